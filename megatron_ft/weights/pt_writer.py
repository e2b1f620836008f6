"""Write torch's `.pt` files as a stream: the pickle first, then every tensor's bytes block by block, as torch.save lays them out.

torch.save wants all tensors in memory. Here an object holds `LazyTensor`s, whose bytes come when their turn is there; any
torch loads the file, memory-mapped if it likes. One bare tensor written at an offset is what torch_dist files are made of.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch._utils import _rebuild_tensor_v2

from megatron_ft.weights.tensor_blocks import raw

ALIGNMENT = 64  # bytes, torch's own alignment of tensors in a file
_STORAGE = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.int64: torch.LongStorage,
    torch.uint8: torch.ByteStorage,
    torch.float64: torch.DoubleStorage,
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written: `blocks()` gives its bytes as contiguous tensors, in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class _Storage:
    tensor: LazyTensor
    key: str


class _Pickler(pickle.Pickler):
    """Pickles LazyTensors as torch pickles tensors, and keeps them in `tensors`, in the order of their records."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[LazyTensor] = []

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, LazyTensor):
            return NotImplemented
        storage = _Storage(obj, str(len(self.tensors)))
        self.tensors.append(obj)
        strides = tuple(torch.empty(obj.shape, device="meta").stride())
        return _rebuild_tensor_v2, (storage, 0, tuple(obj.shape), strides, False, OrderedDict())

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        dtype, count = obj.tensor.dtype, torch.Size(obj.tensor.shape).numel()
        return ("storage", _STORAGE[dtype], obj.key, "cpu", count)


class _FromHere(io.RawIOBase):
    """A file seen from its present position on, so that an archive in the middle of it counts from 0."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._start = file, file.tell()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data) -> int:
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset + (self._start if whence == io.SEEK_SET else 0), whence) - self._start

    def flush(self) -> None:
        self._file.flush()


def write_pt(file: BinaryIO, obj: Any, advance: Callable[[int], None] = lambda count: None) -> int:
    """Append `obj` to a seekable file opened for writing, as torch.save would write it; `advance` hears of every block's bytes.
    Returns the number of bytes."""
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(obj)
    view = _FromHere(file)
    with zipfile.ZipFile(view, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (("data.pkl", pickled.getvalue()), ("byteorder", b"little")):
            archive.writestr(_record(name), content)
        for number, tensor in enumerate(pickler.tensors):
            record = _record(f"data/{number}")
            record.file_size = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
            zip64 = 20 if record.file_size > zipfile.ZIP64_LIMIT * 0.95 else 0  # Python's own extra field comes first
            header = view.tell() + 30 + len(record.filename) + zip64 + 4
            padding = -header % ALIGNMENT
            record.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            written = 0
            with archive.open(record, "w", force_zip64=bool(zip64)) as out:
                for block in tensor.blocks():
                    out.write(raw(block))
                    written += block.nbytes
                    advance(block.nbytes)
            if written != record.file_size:
                raise AssertionError(f"{written} bytes for a tensor of {record.file_size}")
        archive.writestr(_record("version"), b"3\n")
    return view.tell()


def _record(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))  # the same weights make the same bytes
