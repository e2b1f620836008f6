"""The manifest of a checkpoint: each file's size and checksum, the run's state, and its provenance.

`manifest.json` has a checksum of its own content, so a damaged manifest is detected without reading
anything else.
"""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

import megatron_ft
from megatron_ft.errors import UserError
from megatron_ft.files.atomic import replace_file
from megatron_ft.files.checksum import file_checksum

NAME = "manifest.json"
FORMAT = 1  # raised when an older package could not read what a newer one writes
ALWAYS_CHECKED = 1 << 20  # bytes; checksums of files up to this size are compared on every start


class Damaged(Exception):
    """A checkpoint that is not intact; the message says what is wrong with which file."""


@contextmanager
def damage_as_user_error() -> Iterator[None]:
    """Damage becomes a UserError, for a reader that has no older checkpoint to fall back to."""
    try:
        yield
    except Damaged as error:
        raise UserError(f"{error}; copy the checkpoint again, or use another iteration") from None


@dataclass
class Manifest:
    """Content of manifest.json."""

    iteration: int
    shape: dict  # ModelShape's fields
    args: dict  # flags of the run, by their names with underscores
    state: dict  # TrainState's counters and the optimizer's
    layout: dict  # parallel sizes it was saved from: tensor, pipeline, context, data
    data: dict = field(default_factory=dict)  # what the run reads, and its tokenizer's digest
    base: dict | None = None  # the weights that adapters belong to (fingerprint.py)
    # The tokenizer's `config_ids`, so that a converted model has its end of text without it.
    special_ids: dict[str, int | None] = field(default_factory=dict)
    files: dict[str, dict] = field(default_factory=dict)  # name -> size in bytes, sha256
    versions: dict = field(default_factory=dict)
    git_revision: str | None = None
    saved_at: str = ""
    format: int = FORMAT

    def write(self, directory: Path) -> None:
        """Write it into `directory`, replacing an existing one."""
        content = asdict(self)
        content["checksum"] = _checksum(content)
        replace_file(directory / NAME, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def read_manifest(directory: Path) -> Manifest:
    """Read and check manifest.json. Raises Damaged, or UserError when a newer package wrote it."""
    path = directory / NAME
    try:
        content = json.loads(path.read_bytes())
        claimed = content.pop("checksum")
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):  # not JSON, no object, no checksum
        raise Damaged(f"{path} is truncated or not a manifest") from None
    if claimed != _checksum(content):
        raise Damaged(f"{path} does not match its own checksum")
    if content["format"] > FORMAT:
        raise UserError(
            f"{directory} was written by megatron-ft {content['versions'].get('megatron_ft')} in checkpoint format "
            f"{content['format']}; this is {megatron_ft.__version__}, which reads up to format {FORMAT}: "
            "install the newer package"
        )
    return Manifest(**content)


def check_files(directory: Path, manifest: Manifest, *, checksums: bool, part: int = 0, parts: int = 1) -> list[str]:
    """One line for each file of a manifest that is missing or has another size or checksum.

    Checksums are compared for small files, and with `checksums` for all. Several processes share
    the work: this one checks every `parts`-th file from `part` on.
    """
    wrong = []
    for name in sorted(manifest.files)[part::parts]:
        path, expected = directory / name, manifest.files[name]
        if not path.is_file():
            wrong.append(f"{path} is missing")
        elif path.stat().st_size != expected["size"]:
            wrong.append(f"{path} has {path.stat().st_size} bytes, expected {expected['size']}")
        elif (checksums or expected["size"] <= ALWAYS_CHECKED) and file_checksum(path) != expected["sha256"]:
            wrong.append(f"{path} does not have the checksum it was saved with")
    return wrong


def read_intact_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint, after `check_files` of its files.

    Adapters are small and are read completely, so all of their checksums are compared. Raises
    Damaged for the first file that is wrong, UserError as `read_manifest` does.
    """
    try:
        manifest = read_manifest(directory)
        wrong = check_files(directory, manifest, checksums=bool(manifest.base))
    except TypeError as error:  # valid JSON of another kind
        raise Damaged(f"{directory / NAME}: not a manifest ({error})") from None
    if wrong:
        raise Damaged(wrong[0])
    return manifest


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that determine a run's numbers."""
    return {"megatron_ft": megatron_ft.__version__, **{name: version(name) for name in ("torch", "megatron-core")}}


@cache
def git_revision() -> str | None:
    """Commit of the checkout that this package runs from, None outside one.

    It ends with "-modified" when tracked files differ from the commit.
    """
    root = Path(megatron_ft.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("-modified" if changed.stdout.strip() else "")


def now() -> str:
    """The time in UTC, in ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
