"""The manifest of a checkpoint: each file's size and checksum, the run's state, and its provenance.

`manifest.json` has a checksum of its own content, so a damaged manifest is detected without reading
anything else.
"""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

import megatron_ft
from megatron_ft.errors import UserError
from megatron_ft.files.atomic import replace_file
from megatron_ft.files.checksum import file_checksum
from megatron_ft.files.first_bytes import describe
from megatron_ft.files.json_file import optional, parse_json, read_small_file, require
from megatron_ft.weights.directory import MAX_ITERATION, check_file_name

NAME = "manifest.json"
FORMAT = 1  # raised when an older package could not read what a newer one writes
ALWAYS_CHECKED = 1 << 20  # bytes; checksums of files up to this size are compared on every start


class Damaged(Exception):
    """A checkpoint that is not intact; the message names the file and what is wrong with it."""


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
    if not path.is_file():
        raise Damaged(f"{path} is missing")
    written = read_small_file(path)  # a lack of permission or of descriptors is not damage
    try:
        if other := describe(written):
            raise UserError(f"{path}: {other}")
        content = parse_json(written, str(path))
        claimed = content.pop("checksum", None)
        if claimed is None:
            raise UserError(f"{path}: not a manifest, it has no checksum of its own")
        if claimed != _checksum(content):
            raise UserError(f"{path} does not match its own checksum")
        version = require(content, "format", int, str(path), low=1)
    except UserError as error:
        raise Damaged(str(error)) from None
    if version > FORMAT:
        written_by = content["versions"].get("megatron_ft") if isinstance(content.get("versions"), dict) else None
        raise UserError(
            f"{directory} was written by megatron-ft {written_by} in checkpoint format {version}; "
            f"this is {megatron_ft.__version__}, which reads up to format {FORMAT}: install the newer package"
        )
    content = {name: value for name, value in content.items() if value is not None}  # null: the default
    try:
        _check_schema(content, str(path))
    except UserError as error:
        raise Damaged(str(error)) from None
    return Manifest(**content)


def _check_schema(content: dict, where: str) -> None:
    """Raise UserError unless these are the fields of a Manifest, of their types."""
    known = {f.name for f in fields(Manifest)}
    if unknown := [name for name in content if name not in known]:
        raise UserError(f"{where}: not a manifest, it has a field {unknown[0]!r}")
    require(content, "iteration", int, where, low=0, high=MAX_ITERATION)
    for name in ("shape", "args", "state", "layout"):
        require(content, name, dict, where, of=int if name == "layout" else None)
    for name in ("data", "special_ids", "versions", "base"):
        optional(content, name, dict, where, {})
    for token, number in content.get("special_ids", {}).items():
        if number is not None:
            require(content["special_ids"], token, int, where, low=0)
    if base := content.get("base"):
        require(base, "path", str, where, low=1)
        optional(base, "fingerprint", str, where, None)
        if type(base.get("iteration")) not in (int, str, type(None)):
            require(base, "iteration", int, where)
    optional(content, "git_revision", str, where, None)
    optional(content, "saved_at", str, where, "")
    for name, described in optional(content, "files", dict, where, {}, of=dict).items():
        check_file_name(name, f'{where}: "files"')
        require(described, "size", int, f"{where}: {name}", low=0)
        require(described, "sha256", str, f"{where}: {name}", low=64, high=64)


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
    manifest = read_manifest(directory)
    wrong = check_files(directory, manifest, checksums=bool(manifest.base))
    if wrong:
        raise Damaged(wrong[0])
    return manifest


def saved_version(path: Path) -> str | None:
    """The version of this package that saved a checkpoint's file, if it is still as it was saved.

    None unless an intact manifest next to it has its checksum.
    """
    try:
        manifest = read_manifest(path.parent)
        described = manifest.files[path.name]
        same = described["size"] == path.stat().st_size and described["sha256"] == file_checksum(path)
    except (Damaged, UserError, KeyError, OSError):
        return None
    return str(manifest.versions.get("megatron_ft")) if same else None


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
