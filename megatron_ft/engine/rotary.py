"""Rotary positions: queries and keys are rotated by their token's position.

Su et al., "RoFormer" (2021, https://arxiv.org/abs/2104.09864), with the two halves of a head's
channels as pairs, as in transformers and in Megatron-Core without `rotary_interleaved`.

Megatron-Core's own form for packed rows slices by document and reads the device four times per
layer. Here the angles of a micro-batch are computed once, from its position ids, for all layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines of the angles of t tokens, each [t, 1, d] in the dtype of the model."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, base: float, channels: int, dtype: torch.dtype) -> Rotation:
    """The rotation of tokens at `positions` [t], for heads of `channels` channels; fp32 inside."""
    pairs = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None] * (1.0 / base ** (pairs / channels))
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """`x` [t, n, d] rotated."""
    first, second = x.chunk(2, dim=-1)
    return x * by.cos + torch.cat([-second, first], dim=-1) * by.sin
