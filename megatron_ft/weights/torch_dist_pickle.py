"""The bare pickle of a torch_dist checkpoint's `.metadata`, read without executing it."""

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from megatron_ft.errors import UserError
from megatron_ft.weights.safe_pickle import GETATTR, UNREADABLE, getattr_refused, is_member_name, unreadable


class _Discarded:
    """Stand-in for objects in `.metadata` that reading does not use (planners' records)."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _DiscardedEnum(_Discarded):
    """Stand-in for an enum among them."""


def _enum_member(enum: Any, name: Any) -> Any:
    """What `getattr` is in a pickle, as in safe_pickle.py: members of the two enums that a
    `.metadata` holds, and nothing else."""
    if is_member_name(name):
        if enum is metadata._MEM_FORMAT_ENCODING and name in metadata._MEM_FORMAT_ENCODING.__members__:
            return metadata._MEM_FORMAT_ENCODING[name]
        if enum is _DiscardedEnum:
            return enum(name)
    raise getattr_refused(enum, name)


def _joined_path(*parts: str) -> str:
    """Stand-in for the path that a checkpoint was saved under, pickled by its parts."""
    return "/".join(map(str, parts))


_ALLOWED: dict[str, Any] = {
    **{
        f"torch.distributed.checkpoint.metadata.{cls.__name__}": cls
        for cls in (
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.TensorStorageMetadata,
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.TensorProperties,
            metadata.StorageMeta,
            metadata._MEM_FORMAT_ENCODING,
        )
    },
    **dict.fromkeys(GETATTR, _enum_member),
    "torch.distributed.checkpoint.filesystem._StorageInfo": filesystem._StorageInfo,
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": torch.serialization._get_layout,
    "collections.OrderedDict": OrderedDict,
    "pathlib.PosixPath": _joined_path,
    "pathlib._local.PosixPath": _joined_path,
    **{
        f"torch.{name}": value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format)
    },
    **{
        f"torch.distributed.checkpoint.planner.{name}": _Discarded
        for name in ("SavePlan", "WriteItem", "TensorWriteData")
    },
    "torch.distributed.checkpoint.planner.WriteItemType": _DiscardedEnum,
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata": metadata.Metadata,
    "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan": _Discarded,
}


class _AllowListUnpickler(pickle._Unpickler):
    """Unpickler that resolves the names of `_ALLOWED` and imports nothing.

    Python's own implementation: the one in C allocates as much memory as a file asks for.
    """

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed")
        return _ALLOWED[f"{module}.{name}"]

    def load_build(self) -> None:
        """Set the state of an object; never attributes of the classes and functions allowed."""
        if callable(self.stack[-2]):
            raise pickle.UnpicklingError("the state of a class or function")
        super().load_build()  # type: ignore[misc]  # not in typeshed

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}  # type: ignore[dict-item]  # of this class


def load_dcp_metadata(path: Path | str) -> metadata.Metadata:
    """The content of a torch distributed checkpoint's `.metadata`.

    Raises UserError as `load_pt` does. Types of the object's fields are not checked.
    """
    path = Path(path)
    try:
        found = _AllowListUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the checkpoint is incomplete") from None
    except (*UNREADABLE, OSError) as error:
        raise UserError(unreadable(path, error, "readable")) from None
    if not isinstance(found, metadata.Metadata):
        raise UserError(f"{path}: contains a {type(found).__name__}, expected a torch_dist checkpoint's metadata")
    return found
