"""Dropout: random numbers by rank and step, and only in training."""

import numpy as np
import pytest
import torch
from engine_runs import start
from ranks import run_ranks

FLAGS = (
    "--num-layers 1 --hidden-size 32 --num-attention-heads 4 --attention-head-type multihead --max-position-embeddings 64 "
    "--train-iters 1 --data-prefix unused"
)
TP2 = "--tensor-model-parallel-size 2"


def draws(flags: str) -> dict[tuple, list[float]]:
    """Random numbers of this rank after `seed_step`, by (stage, data rank, tensor rank, iteration).

    Each is [from torch's state, from the tensor-parallel state].
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_ft.engine import parallel

    config = start(f"{FLAGS} {flags}", __file__)
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    rank = (parallel.pipeline_parallel_rank(), parallel.data_parallel_rank(), tensor_rank)
    found = {}
    for iteration in (0, 1, 0):
        parallel.seed_step(config.training.seed, iteration)
        drawn = [torch.rand(1, dtype=torch.float64).item()]
        with get_cuda_rng_tracker().fork():
            drawn.append(torch.rand(1, dtype=torch.float64).item())
        assert found.setdefault((*rank, iteration), drawn) == drawn, "a function of rank and iteration"
    return found


@pytest.mark.parametrize("more", [TP2, ""], ids=["tensor and pipeline ranks", "data and pipeline ranks"])
def test_random_numbers_depend_on_rank_and_iteration(more):
    ranks = run_ranks(draws, 4, f"{more} --num-layers 2 --pipeline-model-parallel-size 2")
    found = {key: drawn for rank in ranks for key, drawn in rank.items()}
    assert len(found) == 8
    shared = {(*replica, iteration): drawn for (*replica, _, iteration), (drawn, _) in found.items()}
    assert all(drawn == shared[*replica, i] for (*replica, _, i), (drawn, _) in found.items()), "equal on tensor ranks"
    sharded = {drawn for _, drawn in found.values()}
    assert len({*shared.values()}) == len(shared) and len(sharded) == 8 and not sharded & {*shared.values()}


def forward(flags: str) -> dict[bool, dict[str, np.ndarray]]:
    """Activations in training (True) and in evaluation (False).

    `attention` [t, n / TP * d], with the same queries, keys and values on all tensor ranks, and
    where the embedding and the layer's first residual branch are zero, [s, b, h].
    """
    import torch.distributed as dist

    from megatron_ft.engine import parallel
    from megatron_ft.engine.model import build_model
    from megatron_ft.engine.packed_attention import PackedSequences

    config = start(f"{FLAGS} {flags}", __file__)
    (model,) = build_model(config, config.shape, 128)
    layer = model.decoder.layers[0]
    for parameter in layer.self_attention.linear_qkv.parameters():
        dist.broadcast(parameter.data, 0)
    seen: dict[str, torch.Tensor] = {}
    model.embedding.register_forward_hook(lambda module, inputs, output: seen.update(embedding=output))
    layer.self_attention.core_attention.register_forward_hook(lambda _, inputs, output: seen.update(attention=output))
    layer.pre_mlp_layernorm.register_forward_pre_hook(lambda module, inputs: seen.update(residual=inputs[0]))
    tokens = torch.randint(128, (1, 64), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(24), torch.arange(40)])[None]
    packed = PackedSequences.from_cu_seqlens(torch.tensor([0, 24, 64], dtype=torch.int32))
    found = {}
    for training in (True, False):
        parallel.seed_step(config.training.seed, 0)
        with torch.no_grad():
            model.train(training)(tokens, positions, None, packed_seq_params=packed)
        found[training] = {
            "attention": seen["attention"].numpy(),
            "embedding": (seen["embedding"] == 0).numpy(),
            "branch": (seen["residual"] == seen["embedding"]).numpy(),
        }
    return found


@pytest.mark.parametrize("more", ["", "--sequence-parallel"])
def test_attention_drops_only_in_training_and_differently_per_head(more):
    first, second = run_ranks(forward, 2, f"{TP2} {more} --attention-dropout 0.5 --hidden-dropout 0")
    np.testing.assert_array_equal(first[False]["attention"], second[False]["attention"])
    for rank in (first, second):
        assert np.abs(rank[True]["attention"] - rank[False]["attention"]).mean() > 1e-3
        assert not rank[True]["embedding"].any()
    assert np.abs(first[True]["attention"] - second[True]["attention"]).mean() > 1e-3


@pytest.mark.parametrize("more", ["", "--sequence-parallel"])
def test_hidden_states_drop_only_in_training_and_alike_where_replicated(more):
    first, second = run_ranks(forward, 2, f"{TP2} {more} --attention-dropout 0 --hidden-dropout 0.5")
    for where in ("embedding", "branch"):
        for rank in (first, second):
            assert 0.4 < rank[True][where].mean() < 0.6 and not rank[False][where].any()
        assert np.array_equal(first[True][where], second[True][where]) == (not more)
