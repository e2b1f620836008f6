"""Weights of a torch_dist checkpoint (Megatron-Core's format), without a process group."""

from pathlib import Path
from typing import Any

import torch

from megatron_ft.errors import UserError
from megatron_ft.model.families import family_of, shape_of_manifest
from megatron_ft.model.gpt_bigcode import shape_of_megatron_args
from megatron_ft.model.tensor_names import EMBEDDING, POSITIONS, stacked_key, tensor_shape
from megatron_ft.weights.manifest import NAME, damage_as_user_error, read_intact_manifest
from megatron_ft.weights.safe_pickle import load_pt, load_pt_bytes
from megatron_ft.weights.source import WeightSource, arguments_of, check_shape
from megatron_ft.weights.torch_dist_files import TorchDistFiles
from megatron_ft.weights.torch_dist_metadata import StoredChunk

COMMON = "common.pt"
# Where Megatron-Core 0.19 and newer have the content of common.pt: an object in the .distcp files.
COMMON_STATE = "common_state/shard_0_1"


class TorchDistSource(WeightSource):
    """See WeightSource.

    The shape and arguments come from our manifest.json, else from what Megatron-LM saved: common.pt
    or, since Megatron-Core 0.19, the object `COMMON_STATE`. Raises UserError for a checkpoint that
    is damaged, not a GPTBigCode or only the adapters of a LoRA run.
    """

    kind = "torch_dist"

    def __init__(self, directory: Path, iteration: int | str | None) -> None:
        self.path = directory
        self.iteration = iteration
        with damage_as_user_error():
            self.files = TorchDistFiles(directory)
            self.files.check_sizes()
            manifest = self.manifest = read_intact_manifest(directory) if (directory / NAME).is_file() else None
        if manifest and manifest.base:
            raise UserError(
                f"{directory}: the adapters of a LoRA run, not a complete model; merge them first with "
                "convert/megatron_to_hf.py --merge-lora, or continue training them with their --lora-rank"
            )
        if EMBEDDING not in self.files.tensors or not (manifest or POSITIONS in self.files.tensors):
            raise UserError(
                f"{directory}: has no word and learned position embeddings; expected a GPTBigCode (StarCoder)"
            )
        rows = self._rows(EMBEDDING)
        if manifest is not None:
            self.args = manifest.args
            shape = shape_of_manifest(manifest.shape, f"{directory / NAME}: shape")
            self.vocab_size, self.shape = min(shape.vocab_size, rows), shape.with_vocab(rows)
        else:
            self.args = self._args_of_megatron()
            self.shape = shape_of_megatron_args(self.args, rows, directory)
        for name in self.names():
            key, layer = self._key(name)
            found = self.files.shape(key) if layer is None else self.files.shape(key)[1:]
            check_shape(name, found, tensor_shape(self.shape, name), directory)
        self.check_dtypes()

    def _rows(self, key: str) -> int:
        shape = self.files.shape(key)
        if len(shape) != 2 or 0 in shape:
            raise UserError(f"{self.path}: {key} has shape {list(shape)}, expected [rows, hidden size]")
        return shape[0]

    def _args_of_megatron(self) -> dict[str, Any]:
        found, where = None, self.path / COMMON
        if where.is_file():
            found = load_pt(where)
        if COMMON_STATE in self.files.objects and not (isinstance(found, dict) and "args" in found):
            where = self.path / self.files.objects[COMMON_STATE].file
            with damage_as_user_error():
                content = self.files.bytes_of(COMMON_STATE)
            found = load_pt_bytes(content, f"{where}: {COMMON_STATE}")
            if isinstance(found, list) and len(found) == 1:  # how Megatron-Core saves a ShardedObject
                found = found[0]
        if not isinstance(found, dict) or "args" not in found:
            raise UserError(
                f"{self.path}: neither {NAME} nor a run's arguments in {COMMON} or {COMMON_STATE}, "
                "so its architecture is unknown"
            )
        return arguments_of(found["args"], where)

    def _key(self, name: str) -> tuple[str, int | None]:
        """Key, and the layer's row on axis 0 where layers are stacked."""
        stacked, layer = stacked_key(name)
        if stacked in self.files.tensors:
            layers = (*self.files.shape(stacked), 0)[0]
            if layer is not None and layers != self.shape.num_layers:
                raise UserError(
                    f"{self.path}: {layers} layers of {stacked}, expected {self.shape.num_layers} from its configuration"
                )
            return stacked, layer
        if name in self.files.tensors:
            return name, None
        raise UserError(f"{self.path}: has no {stacked}; expected a complete {family_of(self.shape).title} model")

    def dtype_of(self, name: str) -> torch.dtype:
        return self.files.tensors[self._key(name)[0]].properties.dtype

    def pieces(self, name: str) -> tuple[int, list[torch.Tensor]]:
        key, layer = self._key(name)
        chunks = self.files.chunks_of(key)
        if layer is not None:
            chunks = [chunk for chunk in chunks if chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]]
        axis, ordered = _along_one_axis(chunks, self.files.shape(key), 0 if layer is None else 1)
        if not ordered:
            raise UserError(f"{self.path}: {key} is stored only in part; copy the checkpoint again")
        with damage_as_user_error():
            tensors = [self.files.chunk(chunk) for chunk in ordered]
        if layer is None:
            return axis, tensors
        return axis - 1, [tensor[layer - chunk.offsets[0]] for chunk, tensor in zip(ordered, tensors, strict=True)]


def _along_one_axis(
    chunks: list[StoredChunk], shape: tuple[int, ...], first_axis: int
) -> tuple[int, list[StoredChunk]]:
    """The axis (from `first_axis` on) that the chunks cut, and the chunks in order.

    Returns no chunks where they leave a gap or cut two axes, which tensor parallelism never does.
    """
    axis = next((a for a in range(first_axis, len(shape)) if any(c.sizes[a] != shape[a] for c in chunks)), first_axis)
    end, ordered = 0, sorted(chunks, key=lambda chunk: chunk.offsets[axis])
    for chunk in ordered:
        others = [a for a in range(first_axis, len(shape)) if a != axis]
        if chunk.offsets[axis] != end or any(chunk.sizes[a] != shape[a] for a in others):
            return axis, []
        end += chunk.sizes[axis]
    return axis, ordered if end == shape[axis] else []
