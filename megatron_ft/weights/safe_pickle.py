"""Read untrusted pickles without executing them: only names on a fixed allow-list are resolved.

Legacy Megatron checkpoints and `.bin` weights are pickles with tensors (`load_pt`, torch's own
weights-only loader with the names added that Megatron's need); torch_dist's `.metadata` is a bare
pickle (`load_dcp_metadata`). Errors name what a file references.
"""

import argparse
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from torch.distributed.checkpoint import filesystem, metadata

from megatron_ft.errors import UserError


class InertEnum:
    """Stand-in for one of Megatron's enums in a checkpoint's arguments: its value, no behavior."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"InertEnum({self.value!r})"


_ENUM_MODULES = ("megatron.model.enums", "megatron.core.enums", "megatron.core.transformer.enums")
_ENUM_NAMES = ("ModelType", "LayerType", "AttnType", "AttnMaskType", "AttnBackend", "PositionEmbeddingType")
_DTYPE_CLASSES = [cls for name, cls in vars(np.dtypes).items() if name.endswith("DType")]

# What a legacy `.pt` may reference in addition to torch's own weights-only list. numpy has renamed
# its core module since these files were written.
_PT_ALLOWED = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *_DTYPE_CLASSES,
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
    missing or damaged.
    """
    path = Path(path)
    try:
        with torch.serialization.safe_globals(_PT_ALLOWED):
            # Files from before torch 1.6 are not zip archives and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it") from None
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(path, str(error))) from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        raise UserError(f"{path}: not a readable torch file ({_first_line(error)}); copy it again") from None


class _AllowListUnpickler(pickle.Unpickler):
    """Unpickler that resolves the given names and imports nothing."""

    def __init__(self, file, allowed: dict[str, Any]) -> None:
        super().__init__(file)
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed")
        return self.allowed[f"{module}.{name}"]


class _Discarded:
    """Stand-in for objects in `.metadata` that reading does not use (planners' records)."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


_DCP_ALLOWED: dict[str, Any] = {
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
    "torch.distributed.checkpoint.filesystem._StorageInfo": filesystem._StorageInfo,
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": torch.serialization._get_layout,
    "collections.OrderedDict": OrderedDict,
    "pathlib.PosixPath": str,
    "pathlib._local.PosixPath": str,
    **{
        f"torch.{name}": value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format)
    },
    **{
        f"torch.distributed.checkpoint.planner.{name}": _Discarded
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
    },
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata": metadata.Metadata,
    "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan": _Discarded,
}


def load_dcp_metadata(path: Path | str) -> metadata.Metadata:
    """The content of a torch distributed checkpoint's `.metadata`.

    Raises UserError as `load_pt` does.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            found = _AllowListUnpickler(file, _DCP_ALLOWED).load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the checkpoint is incomplete") from None
    except pickle.UnpicklingError as error:
        raise UserError(_refusal(path, str(error))) from None
    except (EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        raise UserError(f"{path}: not readable ({_first_line(error)}); copy it again") from None
    if not isinstance(found, metadata.Metadata):
        raise UserError(f"{path}: contains a {type(found).__name__}, expected a torch_dist checkpoint's metadata")
    return found


def _refusal(path: Path, message: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)|function (<[^>]+>|\S+)", message)
    if found:
        return (
            f"{path}: refused, the pickle references {found[1] or found[2]}, which is not on the allow-list and which "
            "no checkpoint of weights needs; do not load it elsewhere"
        )
    return f"{path}: refused, not a pickle of plain weights ({_first_line(message)})"


def _first_line(error: Exception | str) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
