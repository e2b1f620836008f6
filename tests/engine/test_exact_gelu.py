"""The exact GELU with its bias in one kernel equals torch's; models with it compute the same."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from token_files import training_flags

from megatron_ft.engine.exact_gelu import BiasGelu


def y_and_bias(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments with every magnitude that the function distinguishes: tails, and around zero."""
    generator = torch.Generator().manual_seed(0)
    y = torch.cat([torch.linspace(-12, 12, 90), torch.tensor([0.0, -0.0, 1e-6, -1e-6, 40, -40])])
    bias = torch.randn(4, generator=generator)
    return y.reshape(3, 8, 4).to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_values_and_gradients_equal_those_of_the_unfused_form(dtype, tolerance):
    found, expected = y_and_bias(dtype), y_and_bias(dtype)
    results = BiasGelu.apply(*found), F.gelu(expected[0] + expected[1])
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    weights = torch.linspace(-1, 1, 96, dtype=dtype).reshape(3, 8, 4)
    for result in results:
        (result * weights).sum().backward()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.grad.shape == theirs.shape and ours.grad.dtype == dtype
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)
    tanh = F.gelu(expected[0] + expected[1], approximate="tanh")
    assert dtype == torch.bfloat16 or (results[0] - tanh).abs().max() > 1e-4  # it is not the other form


def logits_and_gradients() -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Of one model with --activation gelu: as Megatron-Core computes it, and with the kernel."""
    from megatron_ft.engine import device, parallel
    from megatron_ft.engine.exact_gelu import fuse_exact_gelu
    from megatron_ft.engine.lora import add_lora
    from megatron_ft.engine.model import build_model

    config = training_flags("--data-prefix", "unused", "--activation", "gelu", "--lora-rank", "2")
    device.set_up_device(config)
    parallel.initialize(config)
    [model] = build_model(config, config.shape, 128)
    tokens = torch.arange(24).reshape(2, 12)
    positions = torch.arange(12).expand(2, 12)
    results = []
    for change in (lambda: None, lambda: fuse_exact_gelu(model), lambda: add_lora([model], config)):
        change()
        model.zero_grad()
        logits = model(tokens, positions, None)
        logits.square().mean().backward()
        gradients = [p.grad.numpy().copy() for p in model.parameters() if p.grad is not None]
        results.append((logits.detach().numpy(), gradients))
    return results


def test_a_model_with_the_kernel_computes_the_same():
    [(plain, fused, with_adapters)] = run_ranks(logits_and_gradients, 1)
    assert np.abs(fused[0] - plain[0]).max() < 1e-6
    for ours, theirs in zip(fused[1], plain[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-8)
    assert np.abs(with_adapters[0] - plain[0]).max() < 1e-6  # B is zero
    assert 0 < len(with_adapters[1]) < len(plain[1])
