"""Files of data sets, as lists of plain dicts, with what identifies them."""

from collections.abc import Sequence
from pathlib import Path

from base.errors import UserError
from base.files import read_text, sha256
from base.hub import dataset_file
from data.rows import parse_row


def read_dataset(repo: str, filename: str, columns: Sequence[str]) -> tuple[list[dict], dict]:
    """Rows of a JSONL or parquet file of a hub data set, and its name, file, revision and SHA-256.

    A UserError where it is damaged, empty, or lacks one of the `columns` that the caller reads.
    """
    path, revision = dataset_file(repo, filename)
    if path.suffix == ".parquet":
        rows = read_parquet(path)
    else:
        lines = read_text(path).split("\n")
        rows = [parse_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line]
    missing = [name for name in columns if not rows or any(name not in row for row in rows)]
    if missing:
        raise UserError(f"{path} has no rows or lacks the column {missing[0]}; delete it, and it is fetched again")
    return rows, {"name": repo, "file": filename, "revision": revision, "sha256": sha256(path)}


def read_parquet(path: Path) -> list[dict]:
    """Rows of a parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({error})") from error
