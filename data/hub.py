"""Files of data sets, as lists of plain dicts, with what identifies them."""

import json
from pathlib import Path

from base.errors import UserError
from base.files import read_text, sha256
from base.hub import dataset_file


def read_dataset(repo: str, filename: str) -> tuple[list[dict], dict]:
    """Rows of a JSONL or parquet file of a hub data set, and its name, file, revision and SHA-256."""
    path, revision = dataset_file(repo, filename)
    rows = read_parquet(path) if path.suffix == ".parquet" else [
        json.loads(line) for line in read_text(path).split("\n") if line
    ]
    return rows, {"name": repo, "file": filename, "revision": revision, "sha256": sha256(path)}


def read_parquet(path: Path) -> list[dict]:
    """Rows of a parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({error})") from error
