"""Where converters write: a new directory that appears complete or not at all.

Checked before anything is written: the layout divides the model, the directory is not in use, the
disk has enough free space.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_ft.errors import UserError
from megatron_ft.files.atomic import free_bytes, rename_directory, sync_path
from megatron_ft.files.exchange import exchange
from megatron_ft.files.os_error import remedy
from megatron_ft.files.output import locked_if_abandoned, scratch_directory
from megatron_ft.model.shape import ModelShape
from megatron_ft.weights.directory import OWNER, TRACKER, iteration_directory, list_iterations
from megatron_ft.weights.manifest import Damaged, read_manifest

SPARE = 64 << 20  # bytes left free for configuration, tokenizer and the file system


@contextmanager
def new_directory(
    path: Path, *, needed: int, sources: Iterable[str | Path | None] = (), overwrite: bool = False
) -> Iterator[Path]:
    """Yield an empty directory next to `path`, which is renamed to `path` when the block succeeds.

    It is removed when the block fails. `needed` is the number of bytes that will be written.
    `sources` are the paths that are read (or None): `path` must not be one of them nor contain one.
    A directory that is not empty is replaced only with `overwrite`, only where a converter wrote
    it, and only once the new one is complete. A link to a directory stays a link.

    Raises UserError when `path` may not be written, and for an OSError in the block.
    """
    named = path
    try:
        path = path.resolve()
        _restore_replaced(path)
        _check_output(named, path, sources, overwrite)
        free = free_bytes(path.parent)
        if free < needed + SPARE:
            raise UserError(
                f"{named}: {needed / 1e9:.2f} GB will be written, but its disk has {free / 1e9:.2f} GB free; "
                "free disk space, or choose another disk"
            )
        with scratch_directory(path.parent, f"{path.name}.writing") as staging:
            yield staging
            _put_in_place(staging, path)
    except OSError as error:
        raise UserError(
            f"{error.filename or named}: {error.strerror or error}; nothing was written to {named}, "
            f"{remedy(error, 'choose another directory or disk')}"
        ) from error


def check_output(path: Path, sources: Iterable[str | Path | None], *, overwrite: bool) -> None:
    """Raise UserError when `new_directory` would refuse `path`, before anything is read."""
    with suppress(OSError):  # which new_directory reports
        _check_output(path, path.resolve(), sources, overwrite)


def _check_output(named: Path, path: Path, sources: Iterable[str | Path | None], overwrite: bool) -> None:
    """Raise UserError when `path`, which the user named `named`, may not be written."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{named}: is a file, expected a directory to write to; choose another")
    for source in sources:
        if source is not None and Path(source).resolve().is_relative_to(path):
            raise UserError(f"{named}: contains the input {source}; choose another directory")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise UserError(f"{named}: is not empty; choose another directory, or add --overwrite to replace it")
        _check_replaceable(named)


def _put_in_place(staging: Path, path: Path) -> None:
    """Rename `staging` to `path`. A directory that it replaces gets the name `staging` in the same
    step, and is removed with it.

    Where names cannot be exchanged, the old directory is set aside first, and kept when that fails.
    """
    if not path.exists():
        rename_directory(staging, path)
        return
    sync_path(staging)
    if exchange(staging, path):
        sync_path(path.parent)
        return
    with scratch_directory(path.parent, f"{path.name}.replaced") as aside:
        old = aside / path.name
        try:
            path.rename(old)
            rename_directory(staging, path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise


def _restore_replaced(path: Path) -> None:
    """Give a directory its name back that a converter, killed while replacing it, had set aside."""
    if path.exists() or not path.parent.is_dir():
        return
    for aside in path.parent.iterdir():
        if aside.name.startswith(f"{path.name}.replaced-") and (aside / path.name).is_dir():
            with locked_if_abandoned(aside) as abandoned:
                if abandoned and not path.exists():
                    (aside / path.name).rename(path)
                    with suppress(OSError):
                        aside.rmdir()


def _check_replaceable(path: Path) -> None:
    """Raise UserError unless a converter wrote the directory `path` and no training run uses it."""
    names = {entry.name for entry in path.iterdir()}
    if OWNER in names:
        raise UserError(
            f"{path}: is a training run's save directory ({OWNER} in it names the process); choose another directory"
        )
    weights = any(name.endswith((".safetensors", ".bin")) for name in names)
    hugging_face = ("config.json" in names and weights) or "adapter_config.json" in names
    expected = {TRACKER, "release"}
    for number in list_iterations(path):
        expected |= {iteration_directory(path, number).name, *_tokenizer_names(iteration_directory(path, number))}
    megatron = TRACKER in names and names <= expected
    if not (hugging_face or megatron):
        other = sorted(names - expected)
        raise UserError(
            f"{path}: contains {other[0] if other else 'no checkpoint'}, so no converter wrote it and --overwrite does not replace it; "
            "choose another directory, or remove it yourself"
        )


def _tokenizer_names(iteration: Path) -> set[str]:
    """Possible names of the tokenizer next to a resharded iteration (see tokenizer/files.py)."""
    try:
        return {"tokenizer", Path(read_manifest(iteration).args["tokenizer_file"]).name}
    except (Damaged, UserError, KeyError, TypeError):
        return set()


def check_layout(shape: ModelShape, tensor_parallel: int, pipeline_parallel: int, divisible_by: int) -> None:
    """Raise UserError, with the converters' flag names, when a layout does not divide the shape.

    `divisible_by` is --make-vocab-size-divisible-by; all three numbers must be at least 1.
    """
    for flag, value in (
        ("--tensor-parallel", tensor_parallel),
        ("--pipeline-parallel", pipeline_parallel),
        ("--make-vocab-size-divisible-by", divisible_by),
    ):
        if value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    shape.check_layout(
        tensor_parallel, pipeline_parallel, tensor_flag="--tensor-parallel", pipeline_flag="--pipeline-parallel"
    )
