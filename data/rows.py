"""JSONL rows: read strictly, written as they finish, whole and in order at the end.

Lines are split on "\\n" alone: responses contain U+2028, form feeds and other characters that str.splitlines breaks at.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from base.errors import UserError
from base.files import misfit, parse_object, read_text, write_text

# What is read of rows (shapes, base/files.py): of prompts, of data to train on, of what was sampled, graded, measured
PROMPT = {"prompt": str, "system": (str, None)}
ANSWERED = {**PROMPT, "response": str}
SAMPLED = {"response": str, "finish_reason": str}
RESPONSE = {**ANSWERED, **SAMPLED, "response_tokens": range(1, 2**63), "logprob": float}
RESCORED = {**SAMPLED, "gold": str, "level": (int, str, None), "subject": (str, None), "category": (str, None),
            "unit": (str, None), "tolerance": (str, None)}
COMPARED = {"prompt": str, "gold": str, "correct": bool, "extracted": (str, None), "finish_reason": str}
GRADED = {**RESCORED, **COMPARED, "note": (str, None), "strict": ([bool], None), "loose": ([bool], None)}
MEASURED = {"tokens": range(1, 2**63), "nll": float, "base_nll": (float, None), "kl": (float, None)}


def read_rows(path: Path, needed: dict | None = None, instead: str | None = None) -> list[dict]:
    """The rows of a JSONL file, each an object with an id of its own and the `needed` fields (a shape, base/files.py),
    or with the field `instead`.

    Whatever is wrong is a UserError that names the line. Whole-number ids are taken as text.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, where a JSONL file is needed")
    rows, lines_of = [], {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        row = parse_object(line, f"{path}, line {number}")
        if isinstance(row.get("id"), int) and not isinstance(row["id"], bool):
            row["id"] = str(row["id"])
        shape = {"id": str, **({} if needed is None or row.get(instead) is not None else needed)}
        if fault := misfit(row, shape):
            raise UserError(f"{path}, line {number}: the field {fault}")
        if row["id"] in lines_of:
            raise UserError(f"{path}, line {number}: the id {row['id']!r} is that of line {lines_of[row['id']]} too")
        lines_of[row["id"]] = number
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


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

    def __init__(self, path: Path, shape: dict | None = None, key: str = "id") -> None:
        """`shape` (base/files.py) is what rows have; `key` the field that tells them apart."""
        self.path, self.key, self.shape = path, key, {key: str} | (shape or {})
        self.partial = path.with_name(f"{path.stem}.partial.jsonl")
        self.rows: dict[object, dict] = {}

    def __enter__(self) -> "GrowingRows":
        left = next((path for path in (self.partial, self.path) if path.exists()), None)
        if left:
            whole_lines = left.read_bytes().rpartition(b"\n")[0]
            for number, line in enumerate(filter(None, whole_lines.split(b"\n")), 1):
                where = f"{left} (delete it to start again), line {number}"
                row = parse_object(line.decode(errors="replace"), where, self.shape)
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
