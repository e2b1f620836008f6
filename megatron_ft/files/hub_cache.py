"""Directories from the Hugging Face Hub: its cache on disk, names of models, symbolic links.

models--bigcode--starcoder/   one model in the cache
  refs/main                   the commit that was downloaded last
  snapshots/COMMIT/           its files: links to ../../blobs
  blobs/
"""

import os
import re
from pathlib import Path

from megatron_ft.errors import UserError

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
FILE_NAME = re.compile(r".*\.(?:json|jsonl|model|txt|bin|pt|safetensors|idx|gz|zst)")


def resolve_hub_cache(path: Path) -> tuple[Path, str | None]:
    """The directory with a model's files, and a notice if `path` is its directory in the Hub's
    cache.

    That is the snapshot of `refs/main` or, without one, the newest. Any other path is returned as
    it is. Raises UserError if the cache has no snapshot.
    """
    folder = path if path.name.startswith("models--") else path.absolute()
    if folder.name == "snapshots":
        folder = folder.parent
    if not folder.name.startswith("models--") or not folder.is_dir():
        return path, None
    snapshots = [entry for entry in _entries(folder / "snapshots") if entry.is_dir()]
    if not snapshots:
        if not (folder / "refs").is_dir() and not (folder / "blobs").is_dir():
            return path, None  # only named like one
        name = folder.name.removeprefix("models--").replace("--", "/")
        raise UserError(f"{folder}: a Hub cache without a snapshot; complete it with hf download {name}")
    main = [entry for entry in snapshots if entry.name == _main_commit(folder)]
    snapshot = (main or sorted(snapshots, key=lambda entry: (entry.stat().st_mtime, entry.name)))[-1]
    which = "that of refs/main" if main else "the newest of them" if len(snapshots) > 1 else "the only one"
    return snapshot, f"{folder}: a Hub cache; reading snapshot {snapshot.name[:12]}, {which}"


def download_hint(path: str | Path) -> str:
    """For an error about a path that does not exist: how to download the model that it may name on
    the Hub, or "" if it does not look like a model's name.

    >>> download_hint("bigcode/starcoder").removeprefix("; if that is a model on the Hub, ")
    'hf download bigcode/starcoder --local-dir starcoder downloads it'
    >>> download_hint("/scratch/starcoder")
    ''
    """
    name = str(path)
    if not HUB_NAME.fullmatch(name) or FILE_NAME.fullmatch(name) or os.path.isdir(name.split("/")[0]):
        return ""
    return f"; if that is a model on the Hub, hf download {name} --local-dir {name.split('/')[1]} downloads it"


def leads_outside(file: Path, directory: Path) -> bool:
    """Whether a file of `directory` is a link to somewhere else: neither inside the directory nor
    in the blobs of the Hub cache whose snapshot it is."""
    target, home = file.resolve(), directory.resolve()
    if target.is_relative_to(home):
        return False
    return home.parent.name != "snapshots" or target.parent != home.parent.parent / "blobs"


def _main_commit(folder: Path) -> str | None:
    """The commit in refs/main, None if there is none."""
    try:
        with open(folder / "refs/main", "rb") as file:
            commit = file.read(100).decode("ascii", "replace").strip()
    except OSError:
        return None
    return commit if COMMIT.fullmatch(commit) else None


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []
