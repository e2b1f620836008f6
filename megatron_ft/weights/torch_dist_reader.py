"""Weights of a torch_dist checkpoint (Megatron-Core's format), without a process group."""

from pathlib import Path

import torch

from megatron_ft.errors import UserError
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.tensor_names import WPE, WTE, hf_to_core, hf_to_stacked
from megatron_ft.weights.manifest import NAME, damage_as_user_error, read_intact_manifest
from megatron_ft.weights.safe_pickle import load_pt
from megatron_ft.weights.source import WeightSource, check_shape
from megatron_ft.weights.torch_dist_files import TorchDistFiles
from megatron_ft.weights.torch_dist_metadata import StoredChunk


class TorchDistSource(WeightSource):
    """See WeightSource.

    The shape and arguments come from our manifest.json, else from Megatron-LM's common.pt. Raises
    UserError for a checkpoint that is damaged, not a GPTBigCode or only the adapters of a LoRA run.
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
            self.args = self._args_of_megatron()
            self.shape = ModelShape.from_megatron_args(self.args, rows, directory)
        for name in self.names():
            key, layer = self._key(name)
            found = self.files.shape(key) if layer is None else self.files.shape(key)[1:]
            check_shape(self.shape, name, found, directory)

    def _args_of_megatron(self) -> dict:
        common = load_pt(self.path / "common.pt")
        if not isinstance(common, dict) or "args" not in common:
            raise UserError(
                f"{self.path}: neither manifest.json nor arguments in common.pt, so its architecture is unknown"
            )
        return dict(common["args"] if isinstance(common["args"], dict) else vars(common["args"]))

    def _key(self, name: str) -> tuple[str, int | None]:
        """Key, and the layer's row on axis 0 where layers are stacked."""
        stacked, layer = hf_to_stacked(name)
        if stacked in self.files.tensors:
            layers = self.files.shape(stacked)[0]
            if layer is not None and layers != self.shape.num_layers:
                raise UserError(
                    f"{self.path}: {layers} layers stored, expected {self.shape.num_layers} from its configuration; "
                    "copy the checkpoint again"
                )
            return stacked, layer
        if hf_to_core(name) in self.files.tensors:
            return hf_to_core(name), None
        raise UserError(f"{self.path}: has no {stacked}; expected a complete GPTBigCode model")

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
