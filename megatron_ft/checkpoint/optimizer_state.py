"""The state of Megatron-Core's optimizers, plain or distributed, in a form any layout can read.

A rank of the distributed optimizer owns a range [start, end) of each flattened parameter.
Megatron-Core gathers all ranges before a save (`fully_reshardable`) or writes its own buckets
(`dp_reshardable`, tied to TP and PP). This module cuts each range into boxes of the parameter's
shape, and every rank writes and reads only its own: nothing is gathered, and any layout can read
the state of any other.

Without Transformer Engine or apex, Megatron-Core 0.16.1 cannot restore a fresh distributed
optimizer: its state does not exist yet, the `step` counters are left out, and one `step` tensor is
shared by all parameters, so that AdamW advances it once for each of them. So `initialize` makes the
state, it is filled in place, and `set_step` gives each parameter its own `step`.
"""

import gc
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

# A counter, kept in the manifest; and the offloaded optimizer's second name for `param`.
NOT_STORED = ("step", "master_param")


class Owned(NamedTuple):
    """What this rank optimizes of a parameter: the flat range [start, end) of it.

    `main` holds that range in fp32; it is the parameter itself where that is fp32.
    """

    parameter: torch.nn.Parameter
    main: torch.Tensor
    start: int
    end: int


class FlatBox(NamedTuple):
    """A box of a tensor that is contiguous in the flattened tensor, from `start` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int


def parts(optimizer: Any) -> list[Any]:
    """The optimizers that Megatron-Core chained into one, without those that have no parameters."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if not getattr(part, "is_stub_optimizer", False)]


def owned(part: Any) -> Iterator[Owned]:
    """What this rank optimizes, parameter by parameter; `part` is one of `parts`."""
    if isinstance(part, DistributedOptimizer):
        for buffer in part.gbuf_ranges:
            for buckets in buffer.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        group, order = part.model_param_group_index_map[parameter]
                        main = part.optimizer.param_groups[group]["params"][order]
                        yield Owned(parameter, main, ranges["param"].start, ranges["param"].end)
        return
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            for parameter, main in zip(models, mains, strict=True):
                yield Owned(parameter, main, 0, parameter.numel())
        groups = part.fp32_from_fp32_groups
    else:
        groups = [group["params"] for group in part.optimizer.param_groups]
    for group in groups:
        for parameter in group:
            yield Owned(parameter, parameter, 0, parameter.numel())


def initialize(optimizer: Any) -> None:
    """Make the state that an optimizer otherwise makes at its first step, to be filled or measured.

    No step is taken: nothing else is allocated and no weight changes. With --optimizer-cpu-offload
    the state is made on the host, and mapped to the GPU's tensors for Megatron-Core.
    """
    for part in parts(optimizer):
        inner = part.optimizer
        if isinstance(inner, HybridDeviceOptimizer):
            # Megatron-Core first built one for all weights; its copies are in a reference cycle.
            gc.collect()
            for one in inner.sub_optimizers:
                _make_state(one)
            inner._sync_sub_optimizers_state_to_hdo()
        else:
            _make_state(inner)


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Zeros, under the names that Adam and SGD use in torch, Transformer Engine and apex.

    torch's Adam also counts steps there.
    """
    for group in optimizer.param_groups:
        for main in group["params"]:
            if optimizer.state.get(main):
                continue
            names = ["exp_avg", "exp_avg_sq"] if "betas" in group else ["momentum_buffer"] if group["momentum"] else []
            state = {name: torch.zeros_like(main, memory_format=torch.preserve_format) for name in names}
            if isinstance(optimizer, torch.optim.Adam):  # fused ones count in their parameter groups
                device = main.device if group["capturable"] or group["fused"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            if state:
                optimizer.state[main] = state


def take_weights(optimizer: Any) -> None:
    """Copy the model's weights, which were just loaded, into the fp32 weights that are optimized.

    Megatron-Core's `reload_model_params` does not set those of --optimizer-cpu-offload, so that the
    first step would restore the random weights.
    """
    for part in parts(optimizer):
        for parameter, main, start, end in owned(part):
            main.data.copy_(parameter.data.view(-1)[start:end].view_as(main))
    refresh_copies(optimizer)


def refresh_copies(optimizer: Any) -> None:
    """Copy the fp32 weights, which were just filled, to the host with --optimizer-cpu-offload."""
    for part in parts(optimizer):
        for main, copy in getattr(part.optimizer, "gpu_params_map_cpu_copy", {}).items():
            copy.data.copy_(main.data)


def sharded_tensors(optimizer: Any, model_tensors: dict[int, ShardedTensor]) -> list[ShardedTensor]:
    """This rank's boxes, with keys `optimizer.state.<param|exp_avg|exp_avg_sq>.<parameter's key>`.

    `model_tensors` maps id(parameter) to the model's ShardedTensor, which has the position of the
    local parameter in the full one.
    """
    found = []
    for part in parts(optimizer):
        for parameter, main, start, end in owned(part):
            local = model_tensors[id(parameter)]
            if isinstance(part, DistributedOptimizer):  # ranks own different ranges: none is a replica
                local = replace(local, replica_id=(*local.replica_id[:2], 0))
            state = {
                name: value for name, value in part.optimizer.state.get(main, {}).items() if name not in NOT_STORED
            }
            for name, value in {"param": main, **state}.items():
                found += _boxes_of(f"optimizer.state.{name}.{local.key}", value.detach(), local, start, end)
    return found


def get_step(optimizer: Any) -> int | None:
    """Number of steps that Adam has taken, None for an optimizer that does not count them."""
    for part in parts(optimizer):
        for state in part.optimizer.state.values():
            if "step" in state:
                return int(state["step"])
        for group in part.optimizer.param_groups:
            if "step" in group:
                return int(group["step"])
    return None


def set_step(optimizer: Any, step: int | None) -> None:
    """Set the number of steps, in a separate tensor for each parameter."""
    if step is None:
        return
    for part in parts(optimizer):
        counted = [state for state in part.optimizer.state.values() if "step" in state]
        for state in counted:
            state["step"] = torch.full_like(state["step"], step)
        if not counted:  # fused Adam
            for group in part.optimizer.param_groups:
                group["step"] = step


def get_scaler(optimizer: Any) -> dict[str, Any] | None:
    """State of the fp16 loss scaler as plain numbers, None without one."""
    for part in parts(optimizer):
        if getattr(part, "grad_scaler", None) and part.config.fp16:
            return {k: v.item() if torch.is_tensor(v) else v for k, v in part.grad_scaler.state_dict().items()}
    return None


def set_scaler(optimizer: Any, saved: dict[str, Any] | None) -> None:
    """Restore what `get_scaler` returned."""
    for part in parts(optimizer):
        scaler = getattr(part, "grad_scaler", None)
        if saved and scaler:
            now = scaler.state_dict()
            scaler.load_state_dict(
                {k: torch.full_like(v, saved[k]) if torch.is_tensor(v) else saved[k] for k, v in now.items()}
            )


def boxes(shape: tuple[int, ...], start: int, end: int) -> list[FlatBox]:
    """The range [start, end) of a row-major flattened tensor as boxes.

    >>> [tuple(box) for box in boxes((4, 3), 2, 10)]
    [((0, 2), (1, 1), 2), ((1, 0), (2, 3), 3), ((3, 0), (1, 1), 9)]
    """
    if start >= end:
        return []
    if len(shape) == 1:
        return [FlatBox((start,), (end - start,), start)]
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # rows that are entirely in the range
    if first > last:  # the range is inside one row
        return _in_row(shape, last, start, end)
    found = _in_row(shape, first - 1, start, first * row)
    if last > first:
        found.append(FlatBox((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]), first * row))
    return found + _in_row(shape, last, last * row, end)


def _in_row(shape: tuple[int, ...], number: int, start: int, end: int) -> list[FlatBox]:
    offset = number * math.prod(shape[1:])
    return [
        FlatBox((number, *offsets), (1, *sizes), flat + offset)
        for offsets, sizes, flat in boxes(shape[1:], start - offset, end - offset)
    ]


def _boxes_of(key: str, flat: torch.Tensor, local: ShardedTensor, start: int, end: int) -> list[ShardedTensor]:
    """`flat`, the elements [start, end) of a local parameter, as boxes of the full one."""
    flat = flat.view(-1)
    prepended = (1,) * local.prepend_axis_num
    found = []
    for offsets, sizes, position in boxes(local.local_shape, start, end):
        data = flat[position - start : position - start + math.prod(sizes)].view(*prepended, *sizes)
        offsets = (*(0 for _ in prepended), *offsets)
        found.append(
            ShardedTensor(
                key,
                data,
                data.dtype,
                tuple(data.shape),
                local.global_shape,
                tuple(a + b for a, b in zip(local.global_offset, offsets, strict=True)),
                axis_fragmentations=None,  # boxes do not form a grid
                replica_id=local.replica_id,
                allow_shape_mismatch=local.allow_shape_mismatch,
            )
        )
    return found
