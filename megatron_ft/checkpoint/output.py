"""What converters may write and where: a layout that divides the model, a directory that is not in use, on a disk with room,
and there whole or not at all."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ft.checkpoint.directory import free_bytes, sync_directory
from megatron_ft.errors import UserError
from megatron_ft.models import ModelShape

SPARE = 64 << 20  # bytes left free for configuration, tokenizer and the file system's own


@contextmanager
def new_directory(path: Path, *, needed: int, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `path` that becomes `path` when the block ends well, and is removed when it does not.

    `needed` is the number of bytes that will be written; too small a disk is a UserError before the first of them. A
    directory that is not empty is refused unless `overwrite`, and then replaced only once the new one is whole.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, expected a directory to write to; choose another")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"{path}: is not empty; choose another directory, or add --overwrite to replace it")
    free = free_bytes(path.parent)
    if free < needed + SPARE:
        raise UserError(
            f"{path}: {needed / 1e9:.2f} GB will be written, but its disk has {free / 1e9:.2f} GB free; "
            "make room, or choose another disk"
        )
    path = path.absolute()
    staging = path.with_name(f"{path.name}.writing-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another directory") from None
    try:
        with _terminated_like_interrupted():
            yield staging
            sync_directory(staging)
            replaced = None
            if path.exists():
                replaced = path.with_name(f"{path.name}.replaced-{os.getpid()}")
                path.rename(replaced)
            staging.rename(path)
            sync_directory(path.parent)
        if replaced:
            shutil.rmtree(replaced)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}; nothing was left at {path}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """A scheduler's SIGTERM ends the block as Ctrl-C does, so that what is half written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_layout(shape: ModelShape, tensor_parallel: int, pipeline_parallel: int, divisible_by: int) -> None:
    """Raise UserError, with the converters' flag names, when a layout does not divide the shape."""
    for flag, value in (
        ("--tensor-parallel", tensor_parallel),
        ("--pipeline-parallel", pipeline_parallel),
        ("--make-vocab-size-divisible-by", divisible_by),
    ):
        if value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    try:
        shape.check_layout(tensor_parallel, pipeline_parallel)
    except UserError as error:
        raise UserError(str(error).replace("-model-parallel-size", "-parallel")) from None
