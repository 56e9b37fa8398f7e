"""From a name to files on disk: models and data sets, from the Hugging Face hub or from folders."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from base.errors import UserError

# Not *.bin or *.pt: pickles execute code when they are read.
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja"]
OTHER_FORMATS = ["original/*", "consolidated*"]  # the same weights again, in their makers' own layout


@contextmanager
def _plain_errors(kind: str, name: str) -> Iterator[None]:
    """Turn the hub library's many errors into one sentence."""
    from huggingface_hub import constants, errors

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its warnings say in ten lines what we say in one
    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{name!r} is neither a folder nor a {kind}'s hub name (owner/name)") from error
    except errors.GatedRepoError as error:
        raise UserError(f"the {kind} {name} is gated: accept its licence on the hub, then `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(f"there is no {kind} {name} on the hub, nor a folder of that name here") from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub can't be reached"
        raise UserError(f"the {kind} {name} is no folder here and not in the hub cache ({constants.HF_HUB_CACHE}), "
                        f"and {why}") from error
    except (errors.HTTPError, OSError) as error:  # the first is of what fetches, and all of the hub's own come from it
        raise UserError(f"the {kind} {name} could not be fetched from the hub: {error}") from error


@cache
def model_folder(name: str) -> Path:
    """The folder of a model or adapter: `name` itself if it is one, else the hub's snapshot of that name.

    The hub is asked once in a process, so that all stages of an experiment work on the same revision.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name} is a file; a model is a folder in Hugging Face layout or a hub name")
    from huggingface_hub import snapshot_download

    with _plain_errors("model", name):
        return Path(snapshot_download(name, allow_patterns=MODEL_FILES, ignore_patterns=OTHER_FORMATS))


def dataset_file(repo: str, filename: str) -> tuple[Path, str]:
    """A data set's file in the hub cache, fetched if need be, and the data set's revision (a commit hash)."""
    from huggingface_hub import hf_hub_download

    with _plain_errors("data set", repo):
        path = Path(hf_hub_download(repo, filename, repo_type="dataset"))
    return path, revision(path) or "unknown"


def revision(path: Path) -> str | None:
    """The commit hash of a file or folder in the hub cache; None elsewhere."""
    # not resolved: the files of a snapshot are links to blobs
    found = re.search(r"/(?:models|datasets)--[^/]+/snapshots/([0-9a-f]{40})(?:/|$)", path.absolute().as_posix())
    return found[1] if found else None


def fingerprint(folder: Path) -> str:
    """A short name for the contents of a model or adapter folder: its hub commit, else a checksum.

    The checksum covers every file's size, first and last MiB: enough to notice another training run, without reading
    16 GB.
    """
    commit = revision(folder)
    if commit:
        return commit
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.jinja")]):
        if path.name == "training.json" or (path.name == "config.json" and (folder / "adapter_config.json").exists()):
            continue  # the training run's record: it says when and with what, not what came out
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            if size > 1 << 20:
                file.seek(-(1 << 20), os.SEEK_END)
                digest.update(file.read())
    return digest.hexdigest()[:16]
