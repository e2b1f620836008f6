"""LoRA adapters out of a run's checkpoint or a PEFT directory: alone, with the weights they were trained on, or merged into these."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from megatron_ft.errors import UserError
from megatron_ft.model.lora import (
    HF_TARGETS,
    AdapterConfig,
    from_peft,
    is_trainable,
    merged,
    stacked_name,
    to_peft,
)
from megatron_ft.model.tensor_names import hf_shape
from megatron_ft.weights.fingerprint import is_base
from megatron_ft.weights.hf_reader import read_json
from megatron_ft.weights.manifest import NAME, Manifest, damage_as_user_error, read_intact_manifest
from megatron_ft.weights.open import find_iteration, open_weights
from megatron_ft.weights.source import WeightSource
from megatron_ft.weights.torch_dist_files import TorchDistFiles

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass
class AdapterSource:
    """The adapters of one checkpoint: `tensors` by their torch_dist names stacked over layers (small: read whole), `config`, and where
    the base weights were. `iteration` and `manifest` are a run's, None for a PEFT directory."""

    path: Path
    tensors: dict[str, torch.Tensor]
    config: AdapterConfig
    base_path: str
    base_iteration: int | str = "latest"
    iteration: int | str | None = None
    manifest: Manifest | None = None
    notice: str | None = None  # of `find_iteration`

    @property
    def args(self) -> dict:
        """Arguments of the run."""
        return self.manifest.args if self.manifest else {}

    def peft_tensors(self, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        """By PEFT's names, in `dtype` (None: as stored)."""
        return {name: tensor.to(dtype or tensor.dtype) for name, tensor in to_peft(self.tensors).items()}

    def open_base(self, elsewhere: Path | str | None = None) -> WeightSource:
        """The weights they belong to, from where they were or `elsewhere`. Raises UserError when these are not there or are others."""
        try:
            base = open_weights(elsewhere or self.base_path, self.base_iteration)
        except UserError as error:
            raise UserError(f"base weights of the adapters {self.path}: {error}") from None
        for target in self.config.targets:
            outputs, inputs = hf_shape(base.shape, f"transformer.h.0.{HF_TARGETS[target]}.weight")
            layers, rank = base.shape.num_layers, self.config.rank
            for part, shape in (("lora_a", (layers, rank, inputs)), ("lora_b", (layers, outputs, rank))):
                found = tuple(self.tensors[stacked_name(target, part)].shape)
                if found != shape:
                    raise UserError(
                        f"{self.path}: {stacked_name(target, part)} has shape {list(found)}, {base.path} and rank {rank} want {list(shape)}; "
                        "give the base that the adapters were trained on"
                    )
        if self.manifest and not is_base(base, self.manifest.base):
            raise UserError(
                f"{self.path}: the base weights are not those the adapters were trained on: {base.path} holds others; "
                f"put the right ones back at {self.base_path}"
            )
        return base


def open_adapters(path: Path | str, iteration: int | str = "latest") -> AdapterSource | None:
    """The adapters of a LoRA run's checkpoint or a PEFT directory, None for whole weights (whatever their format)."""
    path = Path(path)
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    if (path / PEFT_CONFIG).is_file():
        return _open_peft(path)
    directory, number, notice = find_iteration(path, iteration)
    if not (directory / NAME).is_file() or not read_json(directory / NAME).get("base"):
        return None
    with damage_as_user_error():
        manifest = read_intact_manifest(directory)
        files = TorchDistFiles(directory)
        tensors = {key: files.read(key) for key in files.tensors if is_trainable(key) and "optimizer" not in key}
    if not tensors:
        raise UserError(f"{directory}: a LoRA run's checkpoint without adapters in it; use another iteration")
    return AdapterSource(
        directory,
        tensors,
        AdapterConfig.from_flags(manifest.args),
        manifest.base["path"],
        manifest.base.get("iteration") or "latest",
        number,
        manifest,
        notice,
    )


def _open_peft(path: Path) -> AdapterSource:
    config = read_json(path / PEFT_CONFIG)
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"{path / PEFT_CONFIG}: has no base_model_name_or_path; write the directory of the base model there"
        )
    try:
        tensors = from_peft(load_file(path / PEFT_WEIGHTS), str(path / PEFT_WEIGHTS))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path / PEFT_WEIGHTS}: cannot be read ({error}); copy it again") from None
    return AdapterSource(path, tensors, AdapterConfig.from_peft(config, tensors, str(path / PEFT_CONFIG)), base)


def open_start(path: Path | str, iteration: int | str, flags: Mapping) -> tuple[WeightSource, AdapterSource | None]:
    """What a run starts from: whole weights, and the adapters to train on when `path` holds such and LoRA is on.

    Raises UserError when they are other adapters than the flags ask for.
    """
    adapters = open_adapters(path, iteration) if flags["lora_rank"] else None
    if adapters is None:
        return open_weights(path, iteration), None
    differences = adapters.config.differences(AdapterConfig.from_flags(flags))
    if differences:
        raise UserError(
            f"{adapters.path}: its adapters are others than the flags ask for: {'; '.join(differences)}; give their flags to train them on, "
            "or merge them with convert/megatron_to_hf.py --merge-lora and --load the result"
        )
    return adapters.open_base(), adapters


class MergedSource(WeightSource):
    """Base weights with the adapters added, each tensor merged when it is read."""

    def __init__(self, adapters: AdapterSource, base: Path | str | None = None) -> None:
        try:
            self.base = adapters.open_base(base)
        except UserError as error:
            raise UserError(f"{error} (--base says where they are now)") from None
        self.adapters, self.kind = adapters, f"{self.base.kind} with merged LoRA adapters"
        self.path, self.iteration, self.args = adapters.path, adapters.iteration, adapters.args
        self.manifest = adapters.manifest
        self.shape, self.vocab_size = self.base.shape, self.base.vocab_size
        self.notice = adapters.notice or self.base.notice
        self._last: tuple[str, torch.Tensor] | None = None

    def dtype_of(self, name: str) -> torch.dtype:
        return self.base.dtype_of(name)

    def pieces(self, name: str) -> tuple[int, list[torch.Tensor]]:
        if self._last is None or self._last[0] != name:  # one tensor is kept: callers read it in blocks
            self._last = None
            whole = merged(name, self.base.read(name), self.adapters.tensors, self.adapters.config)
            self._last = (name, whole)
        return 0, [self._last[1]]
