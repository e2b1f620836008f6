"""Adapters under PEFT's names, and back: `to_peft` and `from_peft`.

Where a family has queries, keys and values as three layers, PEFT adapts each. The fused adapter
W + s B A becomes three with the same A and their rows of B, which is exact. The inverse exists only
for three that have the same A.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_ft.errors import UserError
from megatron_ft.model.families import FAMILIES
from megatron_ft.model.family import Family
from megatron_ft.model.hf_names import hf_tensors
from megatron_ft.model.lora import stacked_name
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.tensor_names import LORA_TARGETS

FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}  # ours and PEFT's names
_NAME = re.compile(r"base_model\.model\.(\w+\.\w+)\.(0|[1-9][0-9]{0,4})\.(.+)\.lora_([AB])\.weight")


def hf_targets(family: Family) -> dict[str, list[str]]:
    """PEFT's names of the modules of each of our targets: attn.c_attn, self_attn.q_proj."""
    return {target: [module.partition("{}.")[2] for module in family.modules[target]] for target in LORA_TARGETS}


def to_peft(tensors: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Adapters of a model by PEFT's names, one contiguous tensor per layer, from stacked ones."""
    named = {}
    for target, module in LORA_TARGETS.items():
        for factor, peft_factor in FACTORS.items():
            for layer, tensor in enumerate(tensors.get(stacked_name(target, factor), ())):
                for part in hf_tensors(shape, f"decoder.layers.{layer}.{module}.weight"):
                    own = tensor
                    if factor == "lora_b":
                        own = torch.cat([tensor[rows.start : rows.stop] for rows in part.rows])
                    name = f"base_model.model.{part.name.removesuffix('.weight')}.{peft_factor}.weight"
                    named[name] = own.contiguous()
    return named


def from_peft(named: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The inverse of `to_peft`: tensors stacked over layers, B's rows not yet `in_groups`.

    Raises UserError, naming `where`, for anything but LoRA of one family's linear layers with one
    rank in all layers, for one of the factors A and B without the other, for NaN or Inf, and for
    queries, keys and values with adapters that are not one.
    """
    family = _family_of(named)
    modules = {module: target for target in LORA_TARGETS for module in family.modules[target]}
    expected = ", ".join(module for found in hf_targets(family).values() for module in found)
    layers: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, tensor in named.items():
        match = _NAME.fullmatch(name)
        if not match or f"{match[1]}.{{}}.{match[3]}" not in modules:
            raise UserError(f"{where}: {name} is not supported, expected only LoRA of {expected}")
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise UserError(f"{where}: {name} has shape {list(tensor.shape)} in {tensor.dtype}, expected a matrix")
        if not tensor.float().isfinite().all():
            raise UserError(
                f"{where}: {name} has values that are NaN or Inf; use a checkpoint from before training diverged"
            )
        layers.setdefault((f"{match[1]}.{{}}.{match[3]}", f"lora_{match[4].lower()}"), {})[int(match[2])] = tensor
    if not layers:
        raise UserError(f"{where}: has no LoRA tensors, expected those of {expected}")
    depth = 1 + max(layer for found in layers.values() for layer in found)
    for module in modules:
        a, b = (layers.get((module, factor), {}) for factor in FACTORS)
        if odd := sorted(a.keys() ^ b.keys()):
            factor = "lora_B" if odd[0] in a else "lora_A"
            raise UserError(f"{where}: layer {odd[0]} has no {_short(module)}.{factor}, only the other factor")
    stacked: dict[tuple[str, str], Tensor] = {}
    for (module, factor), found in layers.items():
        if len(found) < depth or len({tensor.shape for tensor in found.values()}) > 1:
            raise UserError(
                f"{where}: {_short(module)}.{factor} does not have one rank in all {depth} layers, "
                "which is not supported"
            )
        stacked[module, factor] = torch.stack([found[layer] for layer in range(depth)])
    return {
        stacked_name(target, factor): tensor
        for target in LORA_TARGETS
        for factor, tensor in _fused(family.modules[target], stacked, where).items()
    }


def in_groups(tensors: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """What `from_peft` gives, with B's rows of queries, keys and values in the order of the fused
    weight of `shape`."""
    key, parts = (
        stacked_name("linear_qkv", "lora_b"),
        hf_tensors(shape, "decoder.layers.0.self_attention.linear_qkv.weight"),
    )
    if key not in tensors or len(parts) == 1:
        return dict(tensors)
    rows = torch.tensor([row for part in parts for ranges in part.rows for row in ranges])
    ordered = torch.empty_like(tensors[key])
    ordered[:, rows] = tensors[key]
    return {**tensors, key: ordered}


def _family_of(named: Mapping[str, Tensor]) -> Family:
    """The family that names modules as `named` does, the first of all if none does."""
    for family in FAMILIES.values():
        modules = {module for target in LORA_TARGETS for module in family.modules[target]}
        if any((match := _NAME.fullmatch(name)) and f"{match[1]}.{{}}.{match[3]}" in modules for name in named):
            return family
    return next(iter(FAMILIES.values()))


def _fused(modules: tuple[str, ...], stacked: Mapping[tuple[str, str], Tensor], where: str) -> dict[str, Tensor]:
    """The two factors of one target, {} if it has no adapter."""
    found = [module for module in modules if (module, "lora_a") in stacked]
    if not found:
        return {}
    first = stacked[found[0], "lora_a"]
    if found != list(modules) or not all(torch.equal(stacked[module, "lora_a"], first) for module in modules):
        names = ", ".join(map(_short, modules))
        raise UserError(
            f"{where}: its adapters of {names} are not parts of one, with the same lora_A, as Megatron's fused layer "
            "needs; merge them with PEFT: merge_and_unload()"
        )
    return {"lora_a": first, "lora_b": torch.cat([stacked[module, "lora_b"] for module in modules], 1)}


def _short(module: str) -> str:
    return module.partition("{}.")[2]
