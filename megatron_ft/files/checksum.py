"""sha256 of files."""

import hashlib
from pathlib import Path


def file_checksum(path: Path) -> str:
    """sha256 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(path: Path) -> dict:
    """Size in bytes and sha256 of a file, as listed in a manifest."""
    return {"size": path.stat().st_size, "sha256": file_checksum(path)}
