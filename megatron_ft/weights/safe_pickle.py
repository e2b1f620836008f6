"""Read untrusted pickles without executing them: only names on a fixed allow-list are resolved.

Legacy Megatron checkpoints and `.bin` weights are pickles with tensors: `load_pt` is torch's own
weights-only loader with the names added that Megatron's need. For torch_dist's `.metadata`, a bare
pickle, see torch_dist_pickle.py. Errors name what a file references.
"""

import argparse
import io
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy._core import multiarray

from megatron_ft.errors import UserError
from megatron_ft.files.first_bytes import what_it_is
from megatron_ft.files.os_error import remedy
from megatron_ft.weights.manifest import saved_version

# What readers of pickles and archives raise for a damaged or hostile file.
UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    ArithmeticError, MemoryError, StopIteration, ImportError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
_COPY = "if it was copied, copy it again"


class InertEnum:
    """Stand-in for one of Megatron's enums in a checkpoint's arguments, without behavior.

    Its value, or the member's name where Python 3.11.2 and the like pickled it by name.
    """

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"InertEnum({self.value!r})"


def _enum_member(enum: Any, name: Any) -> Any:
    """What `getattr` is in a pickle: Python 3.11.2 and the like pickle an enum's member as
    `getattr(enum, name)`. Gives stand-ins for Megatron's enums, and nothing else."""
    if enum is InertEnum and is_member_name(name):
        return InertEnum(name)
    raise getattr_refused(enum, name)


def is_member_name(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and not name.startswith("__")


def getattr_refused(enum: Any, name: Any) -> pickle.UnpicklingError:
    """The error for a pickle that looks up an attribute of anything but an enum on its list."""
    where = f"{enum.__module__}.{enum.__qualname__}" if isinstance(enum, type) else type(enum).__name__
    return pickle.UnpicklingError(f"GLOBAL getattr({where}, {name!r:.60}) is not allowed")


GETATTR = ("builtins.getattr", "__builtin__.getattr")  # the latter before protocol 3
_ENUM_MODULES = ("megatron.model.enums", "megatron.core.enums", "megatron.core.transformer.enums")
_ENUM_NAMES = ("ModelType", "LayerType", "AttnType", "AttnMaskType", "AttnBackend", "PositionEmbeddingType")
_DTYPE_CLASSES = [cls for name, cls in vars(np.dtypes).items() if name.endswith("DType")]

# What a `.pt` may reference in addition to torch's own weights-only list. numpy has renamed its
# core module since legacy checkpoints were written.
_PT_ALLOWED = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *_DTYPE_CLASSES,
    *((_enum_member, name) for name in GETATTR),
    *((InertEnum, f"{module}.{name}") for module in _ENUM_MODULES for name in _ENUM_NAMES),
    *(
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name, function in (("_reconstruct", multiarray._reconstruct), ("scalar", multiarray.scalar))
    ),
]


def load_pt(path: Path | str) -> Any:
    """The object in a torch `.pt` or `.bin` file, its tensors memory-mapped on the CPU.

    Raises UserError when the file references a name that is not on the allow-list, and when it is
    missing, damaged or of another kind.
    """
    path = Path(path)
    try:
        zipped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not, and cannot be mapped
        if zipped:
            with zipfile.ZipFile(path) as archive:
                check_stored(archive)
        return _load(path, mmap=zipped)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (*UNREADABLE, OSError) as error:
        raise UserError(unreadable(path, error, "a readable torch file")) from None


def load_pt_bytes(content: bytes, where: str) -> Any:
    """The object in the bytes of a torch file; `where` names it in the UserError."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            check_stored(archive)
        return _load(io.BytesIO(content), mmap=False)
    except UNREADABLE as error:
        found = referenced(error)
        reason = f"refused, it references {found}" if found else f"not readable ({why_unreadable(error)})"
        raise UserError(f"{where}: {reason}") from None


def _load(file: Path | BinaryIO, mmap: bool) -> Any:
    with _only_allowed():
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


@contextmanager
def _only_allowed() -> Iterator[None]:
    """Make `_PT_ALLOWED` the process's list: importing Megatron-Core adds its own classes to it."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(_PT_ALLOWED):
            yield
    finally:
        torch.serialization.add_safe_globals(others)


def check_stored(archive: zipfile.ZipFile) -> None:
    """Raise ValueError unless all records of an archive are uncompressed, as torch writes them.

    So they can be mapped, and a small file takes little memory.
    """
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError("compressed records, which torch does not write")


def unreadable(path: Path, error: BaseException, expected: str) -> str:
    """The message for a file that cannot be loaded."""
    if found := referenced(error):
        return refusal(path, f"the pickle references {found}")
    if other := what_it_is(path, expected=("zip", "pickle")):
        return f"{path}: {other}" + ("" if ";" in other else ", expected a file of torch.save")
    if isinstance(error, OSError) and (todo := remedy(error, "")):
        return f"{path}: cannot be read ({error.strerror}); {todo}"
    return f"{path}: not {expected} ({why_unreadable(error)}); {_COPY}"


def refusal(path: Path, what: str) -> str:
    """The message for a file with `what`, a reference that is not on the allow-list.

    It warns of the file unless that is as a run of this package saved it, by its manifest.
    """
    if version := saved_version(path):
        return (
            f"{path}: refused, {what}, which is not on the allow-list; the file is as megatron-ft {version} saved it: "
            "read it with that version, and report this"
        )
    return (
        f"{path}: refused, {what}, which is not on the allow-list and which no checkpoint of weights needs; "
        "do not load it elsewhere"
    )


def referenced(error: BaseException) -> str | None:
    """The name in the refusal of a pickle, None if that is not the reason of an error."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    found = re.search(r"GLOBAL (getattr\(.*\)|\S+)|function (<[^>]+>|\S+)", str(error))
    return found and (found[1] or found[2])


def why_unreadable(error: BaseException) -> str:
    """One line about an error, without torch's advice to load the file unsafely."""
    text = str(error).strip()
    if "TorchScript" in text:
        return "a TorchScript archive, expected a file of torch.save"
    if "legacy .tar" in text:
        return "torch's oldest format, expected a file that torch 0.4 or newer saved"
    text = text.rpartition("WeightsUnpickler error:")[2].strip()
    line = text.splitlines()[0][:200] if text else ""
    return (
        type(error).__name__ if not line or "weights_only" in line.lower() or "weights only" in line.lower() else line
    )
