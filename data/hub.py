"""Files of data sets, as lists of plain dicts, with what identifies them."""

from pathlib import Path

from base.errors import UserError
from base.files import misfit, parse_object, read_text, sha256
from base.hub import dataset_file


def read_dataset(repo: str, filename: str, columns: dict) -> tuple[list[dict], dict]:
    """Rows of a JSONL or parquet file of a hub data set, and its name, file, revision and SHA-256.

    A UserError where it is damaged or empty, or a row lacks one of the `columns` (a shape, base/files.py).
    """
    path, revision = dataset_file(repo, filename)
    if path.suffix == ".parquet":
        rows = read_parquet(path)
    else:
        lines = read_text(path).split("\n")
        rows = [parse_object(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line]
    faults = (f"the column {fault}" for row in rows if (fault := misfit(row, columns)))
    if fault := next(faults, None if rows else "it has no rows"):
        # the path in the cache is a link: while what it leads to is there, nothing is fetched
        raise UserError(f"{path}: {fault}; delete {path.resolve()}, and it is fetched again")
    return rows, {"name": repo, "file": filename, "revision": revision, "sha256": sha256(path)}


def read_parquet(path: Path) -> list[dict]:
    """Rows of a parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({error})") from error
