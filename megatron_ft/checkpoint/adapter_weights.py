"""LoRA adapters out of a run's checkpoint, alone or merged into the weights they were trained on."""

from pathlib import Path

import torch

from megatron_ft.adapters import AdapterConfig, is_trainable, merged, to_peft
from megatron_ft.checkpoint.hf import read_json
from megatron_ft.checkpoint.torch_dist_weights import TorchDistFiles
from megatron_ft.checkpoint.weights import WeightSource, find_iteration, open_weights
from megatron_ft.errors import UserError


class AdapterSource:
    """The adapters of one checkpoint: `tensors` by their torch_dist names stacked over layers (small: read whole), `config`,
    `args` of the run, and where the base weights were (`base_path`, `base_iteration`)."""

    def __init__(self, directory: Path, iteration: int | str | None, manifest: dict) -> None:
        self.path, self.iteration = directory, iteration
        files = TorchDistFiles(directory)
        self.tensors = {key: files.read(key) for key in files.tensors if is_trainable(key) and "optimizer" not in key}
        if not self.tensors:
            raise UserError(f"{directory}: a LoRA run's checkpoint without adapters in it; use another iteration")
        self.args: dict = manifest["args"]
        self.config = AdapterConfig.from_args(self.args)
        self.base_path: str = manifest["base"]["path"]
        self.base_iteration = manifest["base"].get("iteration") or "latest"

    def peft_tensors(self, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        """By PEFT's names, in `dtype` (None: as stored)."""
        return {name: tensor.to(dtype or tensor.dtype) for name, tensor in to_peft(self.tensors).items()}


def open_adapters(path: Path | str, iteration: int | str = "latest") -> AdapterSource | None:
    """The adapters of a LoRA run's checkpoint, None for a checkpoint of whole weights (whatever its format)."""
    path = Path(path)
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    directory, number = find_iteration(path, iteration)
    if not (directory / "manifest.json").is_file():
        return None
    manifest = read_json(directory / "manifest.json")
    return AdapterSource(directory, number, manifest) if manifest.get("base") else None


class MergedSource(WeightSource):
    """Base weights with the adapters added, each tensor merged when it is read."""

    kind = "torch_dist with merged LoRA adapters"

    def __init__(self, adapters: AdapterSource, base: Path | str | None = None) -> None:
        try:
            self.base = open_weights(base or adapters.base_path, "latest" if base else adapters.base_iteration)
        except UserError as error:
            raise UserError(f"base weights of the LoRA run: {error} (--base says where they are now)") from None
        self.adapters = adapters
        self.path, self.iteration, self.args = adapters.path, adapters.iteration, adapters.args
        self.shape, self.dtype, self.vocab_size = self.base.shape, self.base.dtype, self.base.vocab_size
        self._last: tuple[str, torch.Tensor] | None = None

    def pieces(self, name: str) -> tuple[int, list[torch.Tensor]]:
        if self._last is None or self._last[0] != name:  # one tensor is kept: callers read it in blocks
            self._last = None
            whole = merged(name, self.base.read(name), self.adapters.tensors, self.adapters.config)
            self._last = (name, whole)
        return 0, [self._last[1]]
