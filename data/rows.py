"""JSONL rows: read strictly, written as they finish, whole and in order at the end.

Lines are split on "\\n" alone: responses contain U+2028, form feeds and other characters that str.splitlines breaks at.
"""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from base.errors import UserError
from base.files import read_text, write_text


def read_rows(path: Path, needed: Sequence[str] = (), instead: str | None = None) -> list[dict]:
    """The rows of a JSONL file, each an object with an id of its own and the `needed` fields as text, or with the
    field `instead`.

    Whatever is wrong is a UserError that names the line. Whole-number ids are taken as text.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, where a JSONL file is needed")
    rows, lines_of = [], {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        row = parse_row(line, f"{path}, line {number}")
        if isinstance(row.get("id"), int) and not isinstance(row["id"], bool):
            row["id"] = str(row["id"])
        for field in ("id", *(() if row.get(instead) is not None else needed)):
            if not isinstance(row.get(field), str):
                fault = "not text" if field in row else "missing"
                raise UserError(f"{path}, line {number}: the field {field} is {fault}")
        if row["id"] in lines_of:
            raise UserError(f"{path}, line {number}: the id {row['id']!r} is that of line {lines_of[row['id']]} too")
        lines_of[row["id"]] = number
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def parse_row(line: str, where: str) -> dict:
    """One line's object; `where` names it in the UserError if it is not one."""
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # "\ud800" is valid JSON and no character
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON: {error.msg} at column {error.colno}") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has a lone surrogate (\\ud800 to \\udfff), which is no character") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where} can't be read as JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is a JSON {type(row).__name__}, where an object is needed")
    return row


def format_row(row: dict) -> str:
    """One line, without its "\\n"."""
    return json.dumps(row, ensure_ascii=False)


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Write a JSONL file, whole or not at all."""
    write_text(path, "".join(format_row(row) + "\n" for row in rows))


class GrowingRows:
    """Rows that are saved one by one beside `path` and get its name when all are there.

    What an interrupted run left is taken up again, but for a last line that a kill cut short.
    """

    def __init__(self, path: Path, key: str = "id") -> None:
        """`key` is the field that tells rows apart."""
        self.path, self.key = path, key
        self.partial = path.with_name(f"{path.stem}.partial.jsonl")
        self.rows: dict[object, dict] = {}

    def __enter__(self) -> "GrowingRows":
        left = next((path for path in (self.partial, self.path) if path.exists()), None)
        if left:
            whole_lines = left.read_bytes().rpartition(b"\n")[0]
            for number, line in enumerate(filter(None, whole_lines.split(b"\n")), 1):
                where = f"{left}, line {number}"
                row = parse_row(line.decode(errors="replace"), where)
                if self.key not in row:
                    raise UserError(f"{where} lacks the field {self.key}; delete the file to start again")
                self.rows[row[self.key]] = row
            write_rows(self.partial, self.rows.values())
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.partial.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise UserError(f"{self.partial} can't be written: {error.strerror}") from error
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):  # of a disk that is full, which `append` has said
            self.file.close()

    def append(self, row: dict) -> None:
        """Save one row."""
        self.rows[row[self.key]] = row
        try:
            self.file.write(format_row(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"{self.partial} can't be written: {error.strerror}") from error

    def finish(self, rows: Iterable[dict]) -> None:
        """Write `rows` under the final name, in the partial file's place."""
        write_rows(self.partial, rows)
        self.partial.replace(self.path)
