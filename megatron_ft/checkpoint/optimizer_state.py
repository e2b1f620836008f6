"""Optimizer state as pieces of tensors that any other layout can read: Megatron-Core's optimizers, plain or distributed.

A rank of the distributed optimizer owns a range [start, end) of each flattened parameter. Megatron-Core would gather all ranges
before a save (`fully_reshardable`) or write its own buckets (`dp_reshardable`, tied to TP and PP). Here each range is cut into boxes of the
parameter's own shape, and every rank writes and reads its boxes alone: nothing is gathered, and any layout reads any other's.

Without Transformer Engine or apex, Megatron-Core 0.16.1 cannot restore a fresh distributed optimizer: its state does not exist yet, the
`step` counters are left out, and one `step` tensor is shared by all parameters, which AdamW then advances once for each of them. So the
state is made here (`initialise`), filled in place, and each parameter gets a `step` of its own (`set_step`).
"""

import gc
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

NOT_STORED = (
    "step",
    "master_param",
)  # a count, kept in the manifest; and the offloaded optimizer's second name for `param`


def parts(optimizer) -> list:
    """The optimizers that Megatron-Core chained into one, without those that hold no parameter of this rank."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if not getattr(part, "is_stub_optimizer", False)]


def owned(part) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, int, int]]:
    """(model parameter, the fp32 tensor that is optimized for it, start, end of the flat range that tensor covers) on this rank."""
    if isinstance(part, DistributedOptimizer):
        for buffer in part.gbuf_ranges:
            for buckets in buffer.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        group, order = part.model_param_group_index_map[parameter]
                        main = part.optimizer.param_groups[group]["params"][order]
                        yield parameter, main, ranges["param"].start, ranges["param"].end
        return
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            for parameter, main in zip(models, mains, strict=True):
                yield parameter, main, 0, parameter.numel()
        groups = part.fp32_from_fp32_groups
    else:
        groups = [group["params"] for group in part.optimizer.param_groups]
    for group in groups:
        for parameter in group:
            yield parameter, parameter, 0, parameter.numel()


def initialise(optimizer) -> None:
    """Give every optimizer the state it otherwise makes at its first step, so that it can be filled or measured.

    No step is taken, so nothing else is allocated and no weight changes. With --optimizer-cpu-offload the state is made where
    it lives, beside the host's copies, and shown to Megatron-Core under the names of the GPU's tensors.
    """
    for part in parts(optimizer):
        inner = part.optimizer
        if isinstance(inner, HybridDeviceOptimizer):
            gc.collect()  # Megatron-Core built one for the whole weights first; its copies of them wait in a cycle of references
            for one in inner.sub_optimizers:
                _make_state(one)
            inner._sync_sub_optimizers_state_to_hdo()
        else:
            _make_state(inner)


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Zeros under the names that torch's, Transformer Engine's and apex's Adam and SGD share; torch's Adam counts steps there too."""
    for group in optimizer.param_groups:
        for main in group["params"]:
            if optimizer.state.get(main):
                continue
            names = ["exp_avg", "exp_avg_sq"] if "betas" in group else ["momentum_buffer"] if group["momentum"] else []
            state = {name: torch.zeros_like(main, memory_format=torch.preserve_format) for name in names}
            if isinstance(optimizer, torch.optim.Adam):  # and AdamW; the fused ones count in their parameter groups
                device = main.device if group["capturable"] or group["fused"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            if state:
                optimizer.state[main] = state


def take_weights(optimizer) -> None:
    """Set the fp32 weights that are optimized from the model's, which were just loaded.

    Megatron-Core's `reload_model_params` would leave those of --optimizer-cpu-offload as they were: the first step would
    put the random weights back.
    """
    for part in parts(optimizer):
        for parameter, main, start, end in owned(part):
            main.data.copy_(parameter.data.view(-1)[start:end].view_as(main))
    refresh_copies(optimizer)


def refresh_copies(optimizer) -> None:
    """With --optimizer-cpu-offload the host optimizes copies of the fp32 weights: set them from those that were just filled."""
    for part in parts(optimizer):
        for main, copy in getattr(part.optimizer, "gpu_params_map_cpu_copy", {}).items():
            copy.data.copy_(main.data)


def sharded_tensors(optimizer, model_tensors: dict[int, ShardedTensor]) -> list[ShardedTensor]:
    """This rank's boxes, under the keys `optimizer.state.<param|exp_avg|exp_avg_sq>.<the parameter's key>`.

    `model_tensors` maps id(parameter) to the model's own ShardedTensor, which knows where the parameter lies in the whole one.
    """
    found = []
    for part in parts(optimizer):
        for parameter, main, start, end in owned(part):
            place = model_tensors[id(parameter)]
            if isinstance(part, DistributedOptimizer):  # data-parallel ranks own different ranges: none is a replica
                place = replace(place, replica_id=(*place.replica_id[:2], 0))
            state = {
                name: value for name, value in part.optimizer.state.get(main, {}).items() if name not in NOT_STORED
            }
            for name, value in {"param": main, **state}.items():
                found += _boxes_of(f"optimizer.state.{name}.{place.key}", value.detach(), place, start, end)
    return found


def get_step(optimizer) -> int | None:
    """Number of steps Adam has taken, None for an optimizer without that count."""
    for part in parts(optimizer):
        for state in part.optimizer.state.values():
            if "step" in state:
                return int(state["step"])
        for group in part.optimizer.param_groups:
            if "step" in group:
                return int(group["step"])
    return None


def set_step(optimizer, step: int | None) -> None:
    """Set that count, for each parameter its own tensor."""
    if step is None:
        return
    for part in parts(optimizer):
        counted = [state for state in part.optimizer.state.values() if "step" in state]
        for state in counted:
            state["step"] = torch.full_like(state["step"], step)
        if not counted:  # fused Adam counts in its parameter groups
            for group in part.optimizer.param_groups:
                group["step"] = step


def get_scaler(optimizer) -> dict | None:
    """fp16 loss scaler's state as plain numbers, None without one."""
    for part in parts(optimizer):
        if getattr(part, "grad_scaler", None) and part.config.fp16:
            return {k: v.item() if torch.is_tensor(v) else v for k, v in part.grad_scaler.state_dict().items()}
    return None


def set_scaler(optimizer, saved: dict | None) -> None:
    """Restore `get_scaler`'s numbers."""
    for part in parts(optimizer):
        scaler = getattr(part, "grad_scaler", None)
        if saved and scaler:
            now = scaler.state_dict()
            scaler.load_state_dict(
                {k: torch.full_like(v, saved[k]) if torch.is_tensor(v) else saved[k] for k, v in now.items()}
            )


def boxes(shape: tuple[int, ...], start: int, end: int) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """The range [start, end) of a row-major flattened tensor as boxes (offsets, sizes, start in the flat tensor).

    >>> boxes((4, 3), 2, 10)
    [((0, 2), (1, 1), 2), ((1, 0), (2, 3), 3), ((3, 0), (1, 1), 9)]
    """
    if start >= end:
        return []
    if len(shape) == 1:
        return [((start,), (end - start,), start)]
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # rows that lie in the range as a whole
    found = []
    if first > last:  # the range lies inside one row
        return _in_row(shape, last, start, end)
    found += _in_row(shape, first - 1, start, first * row)
    if last > first:
        found.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]), first * row))
    return found + _in_row(shape, last, last * row, end)


def _in_row(shape: tuple[int, ...], number: int, start: int, end: int) -> list:
    offset = number * math.prod(shape[1:])
    return [
        ((number, *offsets), (1, *sizes), flat + offset)
        for offsets, sizes, flat in boxes(shape[1:], start - offset, end - offset)
    ]


def _boxes_of(key: str, flat: torch.Tensor, place: ShardedTensor, start: int, end: int) -> list[ShardedTensor]:
    """`flat` holds [start, end) of the local parameter that lies at `place`; the same as boxes of the whole parameter."""
    flat = flat.view(-1)
    prepended = (1,) * place.prepend_axis_num
    found = []
    for offsets, sizes, position in boxes(place.local_shape, start, end):
        data = flat[position - start : position - start + math.prod(sizes)].view(*prepended, *sizes)
        offsets = (*(0 for _ in prepended), *offsets)
        found.append(
            ShardedTensor(
                key,
                data,
                data.dtype,
                tuple(data.shape),
                place.global_shape,
                tuple(a + b for a, b in zip(place.global_offset, offsets, strict=True)),
                axis_fragmentations=None,  # boxes form no grid
                replica_id=place.replica_id,
                allow_shape_mismatch=place.allow_shape_mismatch,
            )
        )
    return found
