"""Small files replaced in one step, directories made durable, and how much fits on a disk."""

import os
import shutil
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a small file: after a crash it holds the old content or the new, never part of either."""
    beside = path.with_name(f".{path.name}.new")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(beside, path)
    sync_directory(path.parent)


def free_bytes(save: Path) -> int:
    """Bytes an unprivileged writer may still put into `save` (it need not exist yet)."""
    while not save.exists():
        save = save.parent
    return shutil.disk_usage(save).free
