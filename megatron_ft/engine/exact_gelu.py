"""Bias and exact GELU in one kernel, for models whose configuration has `gelu`.

Megatron-Core fuses a linear layer's bias only into the tanh approximation of GELU. Without this
file, a model with the exact form, x / 2 (1 + erf(x / sqrt 2)), would add the bias in a pass of its
own over [s, b, ffn_hidden_size / TP], the widest activation of a layer, in both directions.
"""

import math

import torch
from megatron.core import jit
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

SQRT_HALF = math.sqrt(0.5)
DENSITY_AT_0 = 1 / math.sqrt(2 * math.pi)  # of the standard normal distribution


def bias_gelu(bias: Tensor, y: Tensor) -> Tensor:
    """Exact GELU of y + bias: y [..., ffn / TP], bias [ffn / TP]."""
    x = y + bias
    return x * 0.5 * (1.0 + torch.erf(SQRT_HALF * x))


def bias_gelu_gradient(gradient: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """Gradient of `bias_gelu` with respect to y (to bias: its sum over all but the last axis), from
    the gradient of its result."""
    x = y + bias
    cumulative = 0.5 * (1.0 + torch.erf(SQRT_HALF * x))
    return gradient * (cumulative + x * DENSITY_AT_0 * torch.exp(-0.5 * x * x))


# torch.compile, as for Megatron-Core's own kernels; nothing is compiled before the first call.
_fused_bias_gelu = jit.jit_fuser(bias_gelu)
_fused_bias_gelu_gradient = jit.jit_fuser(bias_gelu_gradient)


class BiasGelu(torch.autograd.Function):
    """`bias_gelu` with its gradient; keeps y, as the unfused form keeps y + bias.

    One kernel in each direction on a GPU; on the CPU the same formulas, uncompiled.
    """

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor) -> Tensor:
        """Exact GELU of y + bias."""
        ctx.save_for_backward(y, bias)
        return (_fused_bias_gelu if y.is_cuda else bias_gelu)(bias, y)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients for y and bias; autograd sums the latter to the bias's shape."""
        y, bias = ctx.saved_tensors
        found = (_fused_bias_gelu_gradient if y.is_cuda else bias_gelu_gradient)(gradient, bias, y)
        return found, found


class ExactGeluMLP(MLP):
    """Megatron-Core's feed-forward layer with the fused exact GELU."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """From [s, b, h] to the same, without linear_fc2's bias, which is returned to be added."""
        y, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(BiasGelu.apply(y, bias))


def fuse_exact_gelu(model: nn.Module) -> None:
    """Change the class of all feed-forward layers of `model` to the one with the fused kernel."""
    for module in model.modules():
        if type(module) is MLP:
            module.__class__ = ExactGeluMLP
