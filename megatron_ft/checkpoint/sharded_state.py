"""The pieces of model and optimizer that this rank has, as Megatron-Core's sharded tensors."""

from collections.abc import Sequence
from dataclasses import replace

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from torch import nn

from megatron_ft.checkpoint import optimizer_state
from megatron_ft.checkpoint.load_weights import unwrap


def layout() -> dict[str, int]:
    """Parallel sizes of this run; the keys are those of a manifest."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def layout_name(sizes: dict[str, int]) -> str:
    """`TP2 PP1 DP2`, for the log."""
    return f"TP{sizes['tensor']} PP{sizes['pipeline']} DP{sizes['data']}" + (
        f" CP{sizes['context']}" if sizes["context"] > 1 else ""
    )


def tensors_of(
    chunks: list[nn.Module], optimizer, *, adapters_only: bool
) -> tuple[list[ShardedTensor | ShardedObject], list[ShardedTensor]]:
    """(the model's pieces, the optimizer's pieces) on this rank, without copies.

    With `adapters_only`, frozen weights are left out.
    """
    model: list[ShardedTensor | ShardedObject] = []
    for chunk in chunks:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        metadata = {"singleton_local_shards": False, "dp_cp_group": group}
        model += nested_values(unwrap(chunk).sharded_state_dict(metadata=metadata))
    if adapters_only:
        model = [item for item in model if isinstance(item, ShardedTensor) and item.data.requires_grad]
    model = _spread_writing(model)
    return model, optimizer_state.sharded_tensors(optimizer, {id(item.data): item for item in without_objects(model)})


def without_objects(items: Sequence[ShardedTensor | ShardedObject]) -> list[ShardedTensor]:
    """Only the tensors.

    Objects (the empty extra state of layers) are written because Megatron-Core expects them, but
    never read: they are pickles.
    """
    return [item for item in items if isinstance(item, ShardedTensor)]


def _spread_writing(items: list[ShardedTensor | ShardedObject]) -> list[ShardedTensor | ShardedObject]:
    """Spread the writing of replicated weights across data-parallel ranks, largest first.

    Megatron-Core leaves it to the first of them.
    """
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    load = [0] * ranks
    spread = []
    for item in sorted(items, key=lambda i: (-_bytes(i), getattr(i, "unique_key", i.key))):
        writer = load.index(min(load))
        load[writer] += _bytes(item)
        if isinstance(item.replica_id, tuple):
            item = replace(item, replica_id=(*item.replica_id[:-1], (item.replica_id[-1] - writer) % ranks))
        spread.append(item)
    return spread


def bytes_to_save(chunks: list[nn.Module], optimizer, adapters_only: bool) -> int:
    """Bytes that this rank writes into a checkpoint, except a few thousand of metadata."""
    model, state = tensors_of(chunks, optimizer, adapters_only=adapters_only)
    return sum(_bytes(item) for item in [*model, *state] if is_main_replica(item.replica_id))


def _bytes(item: ShardedTensor | ShardedObject) -> int:
    return item.data.numel() * item.data.element_size() if isinstance(item, ShardedTensor) else 0
