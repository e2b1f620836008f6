"""Weights of a torch_dist checkpoint (Megatron-Core's format), read by hand: no process group, no pickle executed, memory-mapped.

`.metadata` says which part of which tensor lies at which offset of which `.distcp` file; there, every part is a small
torch archive of its own, whose one record is mapped. Optimizer state and other keys can be read too (`keys`, `chunks_of`).
"""

import io
import mmap
import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from megatron_ft.errors import UserError
from megatron_ft.model.boxes import Box, overlap, whole
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.tensor_names import WPE, WTE, hf_to_core, hf_to_stacked
from megatron_ft.weights.manifest import NAME, Damaged, Manifest, check_files, read_manifest
from megatron_ft.weights.safe_pickle import load_dcp_metadata, load_pt
from megatron_ft.weights.source import WeightSource, check_shape


class Chunk(NamedTuple):
    """One stored part of a tensor: where it begins in the whole, and where it lies on disk."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int  # bytes
    length: int  # bytes


class TorchDistFiles:
    """The tensors and byte objects of one torch_dist directory, by their keys."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        if not (directory / ".metadata").is_file():
            raise UserError(f"{directory}: no .metadata, so its save did not finish; use another iteration")
        metadata = load_dcp_metadata(directory / ".metadata")
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self.objects: dict[str, Chunk] = {}
        self._chunks: dict[str, list[Chunk]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._opened: dict[Chunk, torch.Tensor] = {}
        sizes = {path.name: path.stat().st_size for path in directory.glob("*.distcp")}
        missing = sorted({info.relative_path for info in metadata.storage_data.values()} - set(sizes))
        if missing:
            raise UserError(f"{directory}: missing {', '.join(missing)}; copy the checkpoint again")
        chunk_sizes = {}
        for key, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                self.tensors[key] = stored
                chunk_sizes[key] = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in stored.chunks}
        for index, info in metadata.storage_data.items():
            file = directory / info.relative_path
            if info.offset + info.length > sizes[info.relative_path]:
                raise UserError(
                    f"{file}: {sizes[info.relative_path]} bytes, but {info.offset + info.length} are needed; "
                    "it is cut short, copy the checkpoint again"
                )
            if getattr(info, "transform_descriptors", None):
                raise UserError(f"{file}: stored compressed ({info.transform_descriptors}), which is not supported")
            if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
                self.objects[index.fqn] = Chunk((), (), file, info.offset, info.length)
            else:
                offsets = tuple(index.offset)
                part = chunk_sizes[index.fqn][offsets]
                self._chunks.setdefault(index.fqn, []).append(Chunk(offsets, part, file, info.offset, info.length))

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self.tensors[key].size)

    def chunks_of(self, key: str) -> list[Chunk]:
        """All stored parts of a tensor, in order of their offsets."""
        return sorted(self._chunks.get(key, []))

    def chunk(self, chunk: Chunk) -> torch.Tensor:
        """One part as a memory-mapped tensor (do not write to it)."""
        if chunk not in self._opened:
            self._opened[chunk] = self._open(chunk)
        return self._opened[chunk]

    def _open(self, chunk: Chunk) -> torch.Tensor:
        view = _Window(self._map(chunk.file), chunk.start, chunk.length)
        try:
            # On the meta device torch reads the small pickle alone: dtype, strides and all.
            described = torch.load(view, map_location="meta", weights_only=True)
            with zipfile.ZipFile(view) as archive:
                record = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
        except (StopIteration, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise UserError(
                f"{chunk.file}: damaged at byte {chunk.start} ({str(error).splitlines()[0] if str(error) else 'no record'}); "
                "copy the checkpoint again, or use another iteration"
            ) from None
        if tuple(described.shape) != chunk.sizes or record.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{chunk.file}: holds {list(described.shape)} where .metadata says {list(chunk.sizes)}")
        data = chunk.start + record.header_offset + _local_header_length(view, record.header_offset)
        flat = torch.frombuffer(
            self._map(chunk.file),
            dtype=described.dtype,
            count=record.file_size // described.element_size(),
            offset=data,
        )
        return flat.as_strided(described.shape, described.stride(), described.storage_offset())

    def read_box(self, key: str, box: Box) -> torch.Tensor:
        """A box of a tensor, put together from the parts that overlap it. Raises UserError when they do not fill it."""
        out = torch.empty(box.sizes, dtype=self.tensors[key].properties.dtype)
        filled = 0
        for chunk in self._chunks.get(key, []):
            common = overlap(box, chunk)
            if common is None:
                continue
            target = out[common.within(box)]
            target.copy_(self.chunk(chunk)[common.within(chunk)])
            filled += target.numel()
        if filled != out.numel():
            raise UserError(f"{self.path}: the stored parts of {key} do not make the whole; copy the checkpoint again")
        return out

    def read(self, key: str) -> torch.Tensor:
        """A whole tensor in memory."""
        return self.read_box(key, whole(self.shape(key)))

    def bytes_of(self, key: str) -> bytes:
        """A byte object's contents (a torch archive); load it with `load_pt` or not at all."""
        chunk = self.objects[key]
        return self._map(chunk.file)[chunk.start : chunk.start + chunk.length]

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as handle:
                # Copy on write: torch wants a writable buffer, and nothing is written.
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]


class _Window(io.RawIOBase):
    """A range of a mapped file as a file of its own."""

    def __init__(self, mapped: mmap.mmap, start: int, length: int) -> None:
        self._mapped, self._start, self._length, self._position = mapped, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self._length if size is None or size < 0 else min(self._length, self._position + size)
        found = self._mapped[self._start + self._position : self._start + stop] if stop > self._position else b""
        self._position += len(found)
        return found

    def readinto(self, buffer) -> int:
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def _local_header_length(view: _Window, header_offset: int) -> int:
    """Length of a zip record's local header: 30 bytes, its name, and padding that torch puts in the extra field."""
    view.seek(header_offset + 26)
    lengths = view.read(4)
    return 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


class TorchDistSource(WeightSource):
    """See WeightSource. The shape and arguments come from our manifest.json, else from Megatron-LM's common.pt."""

    kind = "torch_dist"

    def __init__(self, directory: Path, iteration: int | str | None) -> None:
        self.path = directory
        self.iteration = iteration
        self.files = TorchDistFiles(directory)
        manifest = self.manifest = whole_manifest(directory) if (directory / NAME).is_file() else None
        if manifest and manifest.base:
            raise UserError(
                f"{directory}: the adapters of a LoRA run, not a whole model; "
                "merge them first with convert/megatron_to_hf.py --merge-lora, or train them on with their --lora-rank"
            )
        embedding, _ = hf_to_stacked(WTE)
        if embedding not in self.files.tensors or hf_to_stacked(WPE)[0] not in self.files.tensors:
            raise UserError(
                f"{directory}: has no word and learned position embeddings; expected a GPTBigCode (StarCoder)"
            )
        rows = self.files.shape(embedding)[0]
        if manifest is not None:
            self.args = manifest.args
            try:
                shape = ModelShape(**manifest.shape)
            except TypeError as error:
                raise UserError(f"{directory / NAME}: has no usable shape ({error}); copy it again") from None
            self.vocab_size, self.shape = min(shape.vocab_size, rows), shape.with_vocab(rows)
        else:
            common = load_pt(directory / "common.pt")
            if not isinstance(common, dict) or "args" not in common:
                raise UserError(
                    f"{directory}: neither manifest.json nor arguments in common.pt, so its shape is not known"
                )
            args = common["args"]
            self.args = dict(args) if isinstance(args, dict) else vars(args)
            self.shape = ModelShape.from_megatron_args(self.args, rows, directory)
        for name in self.names():
            key, layer = self._key(name)
            found = self.files.shape(key) if layer is None else self.files.shape(key)[1:]
            check_shape(self.shape, name, found, directory)

    def _key(self, name: str) -> tuple[str, int | None]:
        """Key, and row on axis 0 when layers are stacked there."""
        stacked, layer = hf_to_stacked(name)
        if stacked in self.files.tensors:
            if layer is not None and self.files.shape(stacked)[0] != self.shape.num_layers:
                raise UserError(
                    f"{self.path}: {self.files.shape(stacked)[0]} layers stored, its configuration says {self.shape.num_layers}"
                )
            return stacked, layer
        if hf_to_core(name) in self.files.tensors:
            return hf_to_core(name), None
        raise UserError(f"{self.path}: has no {stacked}; not a whole GPTBigCode model")

    def dtype_of(self, name: str) -> torch.dtype:
        return self.files.tensors[self._key(name)[0]].properties.dtype

    def pieces(self, name: str) -> tuple[int, list[torch.Tensor]]:
        key, layer = self._key(name)
        chunks = self.files.chunks_of(key)
        if layer is not None:
            chunks = [chunk for chunk in chunks if chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]]
        axis, ordered = _along_one_axis(chunks, self.files.shape(key), 0 if layer is None else 1)
        if not ordered:
            raise UserError(f"{self.path}: the stored parts of {key} do not make the whole; copy the checkpoint again")
        tensors = [self.files.chunk(chunk) for chunk in ordered]
        if layer is None:
            return axis, tensors
        return axis - 1, [tensor[layer - chunk.offsets[0]] for chunk, tensor in zip(ordered, tensors, strict=True)]


def whole_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there, of the right sizes, small ones with their checksums, and adapters,
    which are read whole, all with theirs. Raises UserError naming the first that is not."""
    try:
        manifest = read_manifest(directory)
        wrong = check_files(directory, manifest, checksums=bool(manifest.base))
    except TypeError as error:  # valid JSON of another kind
        raise UserError(f"{directory / NAME}: not a manifest ({error}); copy the checkpoint again") from None
    except Damaged as error:
        raise UserError(f"{error}; copy the checkpoint again, or use another iteration") from None
    if wrong:
        raise UserError(f"{wrong[0]}; copy the checkpoint again, or use another iteration")
    return manifest


def _along_one_axis(chunks: list[Chunk], shape: tuple[int, ...], first_axis: int) -> tuple[int, list[Chunk]]:
    """The axis (from `first_axis` on) that the chunks cut, and the chunks in order; none where they leave a gap or cut two axes,
    which tensor parallelism never does."""
    axis = next((a for a in range(first_axis, len(shape)) if any(c.sizes[a] != shape[a] for c in chunks)), first_axis)
    end, ordered = 0, sorted(chunks, key=lambda chunk: chunk.offsets[axis])
    for chunk in ordered:
        others = [a for a in range(first_axis, len(shape)) if a != axis]
        if chunk.offsets[axis] != end or any(chunk.sizes[a] != shape[a] for a in others):
            return axis, []
        end += chunk.sizes[axis]
    return axis, ordered if end == shape[axis] else []
