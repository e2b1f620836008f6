"""LoRA adapters of a run's checkpoint or a PEFT directory, and the base weights they belong to."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ft.errors import UserError
from megatron_ft.files.hub_cache import resolve_hub_cache
from megatron_ft.files.json_file import read_json, require
from megatron_ft.model.families import shape_of_manifest
from megatron_ft.model.lora import AdapterConfig, is_trainable, merged, stacked_name
from megatron_ft.model.peft_fields import check_plain
from megatron_ft.model.peft_tensors import from_peft, in_groups, to_peft
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.tensor_names import LORA_TARGETS, tensor_shape
from megatron_ft.printable import printable
from megatron_ft.weights.directory import check_link
from megatron_ft.weights.fingerprint import is_base
from megatron_ft.weights.hf_reader import read_tensors
from megatron_ft.weights.locate import find_iteration
from megatron_ft.weights.manifest import NAME, Manifest, damage_as_user_error, read_intact_manifest, read_manifest
from megatron_ft.weights.open import open_weights
from megatron_ft.weights.source import WeightSource
from megatron_ft.weights.torch_dist_files import TorchDistFiles

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PICKLED = "adapter_model.bin"  # as PEFT saved until 2023; read if there is no safetensors file


@dataclass
class AdapterSource:
    """The adapters of one checkpoint, and where their base weights were.

    `tensors` has their torch_dist names, stacked over layers (model/lora.py). They are small, so
    they are in memory. Those of a PEFT directory are complete once `open_base` was called.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    config: AdapterConfig
    base_path: str
    base_iteration: int | str = "latest"
    iteration: int | str | None = None  # of a run; None: a PEFT directory
    manifest: Manifest | None = None  # of a run; None: a PEFT directory
    notice: str | None = None  # of `find_iteration`
    ungrouped: dict[str, torch.Tensor] | None = None  # of a PEFT directory, as `from_peft` gives them

    @property
    def args(self) -> dict:
        """Arguments of the run."""
        return self.manifest.args if self.manifest else {}

    @property
    def shape(self) -> ModelShape:
        """Shape of the run's model. Raises UserError if the manifest's is malformed."""
        assert self.manifest is not None
        return shape_of_manifest(self.manifest.shape, f"{self.path / NAME}: shape")

    def peft_tensors(self, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        """A run's tensors by PEFT's names, in `dtype` (None: as stored)."""
        return {name: tensor.to(dtype or tensor.dtype) for name, tensor in to_peft(self.tensors, self.shape).items()}

    def open_base(self, elsewhere: Path | str | None = None) -> WeightSource:
        """The base weights, where they were when training started, or `elsewhere`.

        Raises UserError when they do not exist or are not those that the adapters were trained on.
        """
        try:
            base = open_weights(elsewhere or self.base_path, self.base_iteration)
        except UserError as error:
            raise UserError(f"base weights of the adapters {self.path}: {error}") from None
        for target in self.config.targets:
            outputs, inputs = tensor_shape(base.shape, f"decoder.layers.0.{LORA_TARGETS[target]}.weight")
            layers, rank = base.shape.num_layers, self.config.rank
            for part, shape in (("lora_a", (layers, rank, inputs)), ("lora_b", (layers, outputs, rank))):
                if stacked_name(target, part) not in self.tensors:
                    raise UserError(f"{self.path}: has no {stacked_name(target, part)}; use another iteration")
                found = tuple(self.tensors[stacked_name(target, part)].shape)
                if found != shape:
                    raise UserError(
                        f"{self.path}: {stacked_name(target, part)} has shape {list(found)}, "
                        f"expected {list(shape)} for rank {rank} on {base.path}; "
                        "give the base that the adapters were trained on"
                    )
        if self.ungrouped is not None:
            self.tensors = in_groups(self.ungrouped, base.shape)
        if self.manifest and self.manifest.base and not is_base(base, self.manifest.base):
            raise UserError(
                f"{self.path}: the base weights are not those the adapters were trained on: {base.path} has others; "
                f"restore the right ones at {self.base_path}"
            )
        return base


def open_adapters(path: Path | str, iteration: int | str = "latest") -> AdapterSource | None:
    """The adapters of a LoRA run's checkpoint or a PEFT directory; None for a complete model.

    `iteration` selects a run's checkpoint (`find_iteration`). Raises UserError if it is damaged.
    """
    path, _ = resolve_hub_cache(Path(path))
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    if (path / PEFT_CONFIG).is_file():
        return _open_peft(path)
    directory, number, notice = find_iteration(path, iteration)
    if (directory / PEFT_CONFIG).is_file():  # of a run of --engine transformers
        return _open_peft(directory)
    if not (directory / NAME).is_file():
        return None
    with damage_as_user_error():
        base = read_manifest(directory).base
        if not base:
            return None
        manifest = read_intact_manifest(directory)
        files = TorchDistFiles(directory)
        files.check_sizes()
        tensors = {key: files.read(key) for key in files.tensors if is_trainable(key) and "optimizer" not in key}
    if not tensors:
        raise UserError(f"{directory}: a LoRA run's checkpoint without adapters in it; use another iteration")
    config = AdapterConfig.from_manifest(manifest.args, f"{directory / NAME}: args")
    return AdapterSource(
        directory,
        tensors,
        config,
        base["path"],
        base.get("iteration") or "latest",
        number,
        manifest,
        printable(notice or "") or None,
    )


def _open_peft(path: Path) -> AdapterSource:
    where = path / PEFT_CONFIG
    check_link(where, path)
    config = read_json(where)
    check_plain(config, str(where))
    if not config.get("base_model_name_or_path"):
        raise UserError(f"{where}: has no base_model_name_or_path; write the base model's directory into it")
    base = require(config, "base_model_name_or_path", str, str(where), low=1, high=4096)
    file = next((path / name for name in (PEFT_WEIGHTS, PEFT_PICKLED) if (path / name).is_file()), None)
    if file is None:
        raise UserError(f"{path}: {PEFT_CONFIG} but neither {PEFT_WEIGHTS} nor {PEFT_PICKLED}; copy one of them there")
    check_link(file, path)
    tensors = from_peft(read_tensors(file), str(file))
    return AdapterSource(path, tensors, AdapterConfig.from_peft(config, tensors, str(where)), base, ungrouped=tensors)


def open_start(path: Path | str, iteration: int | str, flags: Mapping) -> tuple[WeightSource, AdapterSource | None]:
    """The weights that a run starts from, and the adapters to continue training.

    The adapters are None unless LoRA is on and `path` has adapters. Raises UserError when the
    adapters differ from the flags, and as `open_weights` does.
    """
    adapters = open_adapters(path, iteration) if flags["lora_rank"] else None
    if adapters is None:
        return open_weights(path, iteration), None
    differences = adapters.config.differences(AdapterConfig.from_flags(flags))
    if differences:
        raise UserError(
            f"{adapters.path}: its adapters differ from the flags: {'; '.join(differences)}; "
            "give their flags to continue training them, "
            "or merge them with convert/megatron_to_hf.py --merge-lora and --load the result"
        )
    return adapters.open_base(), adapters


class MergedSource(WeightSource):
    """Base weights with the adapters added, each tensor merged when it is read.

    `base` is the directory of the base weights if they were moved. Raises as `open_base` does.
    """

    def __init__(self, adapters: AdapterSource, base: Path | str | None = None) -> None:
        try:
            self.base = adapters.open_base(base)
        except UserError as error:
            raise UserError(f"{error} (or give --base DIR of where they are now)") from None
        self.adapters, self.kind = adapters, f"{self.base.kind} with merged LoRA adapters"
        self.path, self.iteration, self.args = adapters.path, adapters.iteration, adapters.args
        self.manifest = adapters.manifest
        self.shape, self.vocab_size = self.base.shape, self.base.vocab_size
        self.notice = adapters.notice or self.base.notice
        self._last: tuple[str, torch.Tensor] | None = None

    @property
    def special_ids(self) -> dict[str, int | None]:
        return super().special_ids or self.base.special_ids

    def dtype_of(self, name: str) -> torch.dtype:
        return self.base.dtype_of(name)

    def pieces(self, name: str) -> tuple[int, list[torch.Tensor]]:
        if self._last is None or self._last[0] != name:  # one tensor is kept: callers read it in blocks
            self._last = None
            tensor = merged(name, self.base.read(name), self.adapters.tensors, self.adapters.config)
            self._last = (name, tensor)
        return 0, [self._last[1]]
