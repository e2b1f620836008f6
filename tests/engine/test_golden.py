"""Training on the mtf branch's batches equals the branch in every layout."""

import json

import pytest
from golden_runs import golden_steps, golden_steps_offloaded
from ranks import run_ranks

LAYOUTS = {
    "one rank": (1, "--no-use-distributed-optimizer"),
    "one rank, full recompute": (1, "--recompute-granularity full"),
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "TP2, sequence parallel": (2, "--tensor-model-parallel-size 2 --sequence-parallel --recompute-activations"),
    "PP2": (2, "--pipeline-model-parallel-size 2 --no-use-distributed-optimizer"),
    "DP2, plain optimizer": (2, "--no-use-distributed-optimizer"),
    "DP2, distributed optimizer, overlap": (2, "--overlap-grad-reduce --overlap-param-gather"),
    "PP2 DP2, overlap": (
        4,
        "--pipeline-model-parallel-size 2 --overlap-grad-reduce --overlap-param-gather",
    ),
    "TP2 DP2, sequence parallel, overlap": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --overlap-grad-reduce --overlap-param-gather",
    ),
    "TP2 PP2, sequence parallel": (
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel --recompute-granularity full",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_steps_equal_the_mtf_branch(layout, golden):
    ranks, flags = LAYOUTS[layout]
    for result in run_ranks(golden_steps, ranks, flags, golden):
        check(result, golden)


@pytest.mark.slow
def test_offloaded_optimizer_trains_like_the_one_on_the_gpu(golden):
    here = run_ranks(golden_steps, 2, "--bf16", golden)[0]
    for result in run_ranks(golden_steps_offloaded, 2, "--bf16 --optimizer-cpu-offload", golden):
        assert result["loss"] == pytest.approx(here["loss"], abs=1e-3)
        assert result["tensors on the host"] > 10


def check(result: dict, golden) -> None:
    branch = [json.loads(line) for line in (golden / "train/tp1pp1_steps.jsonl").read_text().splitlines()]
    assert result["loss"] == pytest.approx([step["loss"]["lm loss"] for step in branch], abs=5e-5)
    assert result["grad_norm"] == pytest.approx([step["grad_norm"] for step in branch], rel=1e-3)
    assert result["lr"] == pytest.approx([step["groups"][0]["lr"] for step in branch], abs=1e-12)
    assert result["weights"] < 2e-4
