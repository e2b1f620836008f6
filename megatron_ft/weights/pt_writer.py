"""Write torch's `.pt` files as a stream, in the layout of torch.save: the pickle, then the tensors.

torch.save needs all tensors in memory. This writer takes objects that contain `LazyTensor`s, whose
bytes are computed block by block while they are written. Any torch loads the file, also
memory-mapped. torch_dist files are such archives of one bare tensor each, one after the other.
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
    """A tensor to write: `blocks()` yields it as contiguous tensors of `dtype`, in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class _Storage:
    tensor: LazyTensor
    key: str


class _Pickler(pickle.Pickler):
    """Pickles LazyTensors as torch pickles tensors; `tensors` are those it met, in order."""

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


class _FromPosition(io.RawIOBase):
    """A file from its current position on, so that offsets of an archive inside it begin at 0."""

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
        if not self._file.closed:  # as when this object is collected after a failed write
            self._file.flush()


def write_pt(file: BinaryIO, obj: Any, advance: Callable[[int], None] = lambda count: None) -> int:
    """Append `obj` to a seekable file opened for writing, as torch.save would write it.

    Returns the number of bytes written. `advance(n)` is called after each block of n bytes is
    written.
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(obj)
    view = _FromPosition(file)
    with zipfile.ZipFile(view, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (("data.pkl", pickled.getvalue()), ("byteorder", b"little")):
            archive.writestr(_record(name), content)
        for number, tensor in enumerate(pickler.tensors):
            record = _record(f"data/{number}")
            record.file_size = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
            # From this size on zipfile writes its own extra field before ours.
            zip64 = 20 if record.file_size > zipfile.ZIP64_LIMIT * 0.95 else 0
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
                raise AssertionError(f"wrote {written} bytes of a tensor of {record.file_size}")
        archive.writestr(_record("version"), b"3\n")
    return view.tell()


def _record(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))  # no time: same weights, same bytes
