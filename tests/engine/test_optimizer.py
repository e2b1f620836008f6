"""The optimizer that Megatron-Core builds uses torch's fused kernels."""

import torch
from conftest import ROOT
from engine_runs import start
from ranks import run_ranks

from megatron_ft.engine.optimizer import _l2_norm


def kernels():
    from megatron.core.optimizer import clip_grads

    from megatron_ft.checkpoint.optimizer_state import parts
    from megatron_ft.engine.model import build_model, wrap_for_data_parallel
    from megatron_ft.engine.optimizer import build_optimizer

    flags = "--preset tiny --bf16 --seq-length 64 --train-iters 1 --data-prefix unused"
    config = start(flags, ROOT / "README.md")  # any file: it is not read
    optimizer = build_optimizer(config, wrap_for_data_parallel(config, build_model(config, config.shape, 512)))
    fused = {group["fused"] for part in parts(optimizer) for group in part.optimizer.param_groups}
    return fused, clip_grads.l2_norm_impl.__module__


def test_update_and_norm_are_fused():
    (found,) = run_ranks(kernels, 1)
    assert found == ({True}, "megatron_ft.engine.optimizer")


def test_norm_is_that_of_all_tensors_concatenated():
    torch.manual_seed(0)
    tensors = [torch.randn(7), torch.randn(3, 5), torch.zeros(2)]
    norm, _ = _l2_norm(65536, torch.zeros(1), [tensors], False)
    assert norm.shape == (1,)
    torch.testing.assert_close(norm[0], torch.cat([t.flatten() for t in tensors]).norm())
