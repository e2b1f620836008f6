"""sha256 of files."""

import hashlib
from pathlib import Path


def file_checksum(path: Path) -> str:
    """sha256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(path: Path) -> dict:
    """Size and checksum of a file, as a manifest lists it."""
    return {"size": path.stat().st_size, "sha256": file_checksum(path)}
