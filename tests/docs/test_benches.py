"""The GPU benchmark: all attention paths compute the same losses; without a GPU it is skipped."""

from argparse import Namespace

import pytest
import torch
from conftest import ROOT, run_program
from ranks import run_ranks


def first_losses():
    import sys

    sys.path.insert(0, str(ROOT))
    sys.path.insert(0, str(ROOT / "bench"))
    from megatron_ft.model.families import PRESETS

    PRESETS["starcoderbase-test"] = PRESETS["tiny"]  # before the flags read the presets
    import train_gpu

    from megatron_ft.engine import parallel

    flags = Namespace(seq_length=128, micro_batches=2, steps=1, document_tokens=40)
    results = []
    for path in ("packed", "dense mask, fused", "dense mask, plain", "packed, full recompute"):
        result = train_gpu.measure("starcoderbase-test", path, flags)
        parallel.destroy()
        results.append(result)
    train_gpu.print_table(results, ["a note"], train_gpu.cost.GPUS["h100-80gb"])
    return [(r.loss, r.tokens, r.flops) for r in results]


def test_dense_mask_paths_match_the_packed_path():
    (results,) = run_ranks(first_losses, 1)
    packed = results[0]
    assert packed[1] == 256 and packed[2] > 256 * 6e6 * 0.8
    for other in results[1:]:
        assert other[0] == pytest.approx(packed[0], abs=2e-3)  # bf16
        assert other[1:] == packed[1:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the benchmark would run")
def test_benchmark_is_skipped_without_a_gpu():
    done = run_program("bench/train_gpu.py")
    assert done.stdout.startswith("skipped: no GPU")
