"""Causal attention within the documents of packed sequences, without an [s, s] mask.

`PackedAttention` is the core-attention module of the layer specification. It takes the documents'
bounds from `PackedSequences`, rotates queries and keys where the model has rotary positions, and
chooses a kernel. On a GPU: torch's variable-length flash attention (half precision, Ampere or
newer), else FlexAttention with a block mask (no dropout). Otherwise one call of
scaled_dot_product_attention per document, which supports everything.

With a window of W tokens, token q sees token k of its document if q - W < k <= q.
"""

import contextlib
import functools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megatron_ft.engine.rotary import Rotation, rotate, rotation


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of concatenated sequences [1, t], with lengths on the host as well.

    `lengths`: tokens of each document, for which no kernel has to wait. `position_ids` [1, t]: for
    rotary positions. `rotation` and `block_mask` (FlexAttention's) are created by the first layer
    that needs them.
    """

    lengths: list[int] = field(default_factory=list)
    position_ids: Tensor | None = None
    rotation: Rotation | None = None
    block_mask: BlockMask | None = None

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, device: torch.device | None = None) -> "PackedSequences":
        """From the documents' bounds on the CPU, int32 [documents + 1]: 0, ..., t."""
        return cls.of(cu_seqlens.to(device or cu_seqlens.device, non_blocking=True), cu_seqlens.diff().tolist())

    @classmethod
    def of(cls, bounds: Tensor, lengths: list[int], position_ids: Tensor | None = None) -> "PackedSequences":
        """From the documents' bounds on the device and their lengths."""
        longest = max(lengths)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=lengths,
            position_ids=position_ids,
        )


class PackedAttention(nn.Module):
    """Core attention of Megatron-Core's SelfAttention: packed sequences (THD) or a batch (SBHD).

    `rotary_base` and `window_size` as in ModelShape.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
        rotary_base: float = 0.0,
        window_size: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.rotary_base, self.window = rotary_base, window_size
        self.scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Packed: query [t, n, d], key and value [t, g, d] with g dividing n; returns [t, n * d].

        Otherwise: [s, b, n, d] and [s, b, g, d]; returns [s, b, n * d], causal in each sequence.
        """
        if packed_seq_params is None:
            return self._attend_unpacked(query, key, value)
        dropout, window = self.dropout if self.training else 0.0, self.window
        if self.rotary_base:
            assert isinstance(packed_seq_params, PackedSequences) and packed_seq_params.position_ids is not None
            if packed_seq_params.rotation is None:
                packed_seq_params.rotation = self._rotation(query, packed_seq_params.position_ids[0])
            query, key, value = _rotated(query, key, value, packed_seq_params.rotation)
        if query.is_cuda and flash_attention_takes(query.dtype, query.shape[-1], query.device):
            with self._random_state():
                return _flash(query, key, value, packed_seq_params, self.scale, dropout, window)
        if query.is_cuda and not dropout and isinstance(packed_seq_params, PackedSequences):
            return flex_attend(query, key, value, packed_seq_params, self.scale, window=window, compiled=True)
        lengths = getattr(packed_seq_params, "lengths", None) or packed_seq_params.cu_seqlens_q.diff().tolist()
        with self._random_state():
            return attend_by_document(query, key, value, lengths, self.scale, dropout, window)

    def _rotation(self, query: Tensor, positions: Tensor) -> Rotation:
        return rotation(positions, self.rotary_base, query.shape[-1], query.dtype)

    def _attend_unpacked(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        s, b, _, _ = query.shape
        dropout = self.dropout if self.training else 0.0
        if self.rotary_base:
            by = self._rotation(query, torch.arange(s, device=query.device))
            query, key, value = _rotated(query, key, value, Rotation(by.cos[:, None], by.sin[:, None]))
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        with self._random_state():
            out = _sdpa(query, key, value, self.scale, dropout, self.window)
        return out.permute(2, 0, 1, 3).reshape(s, b, -1)

    def _random_state(self) -> contextlib.AbstractContextManager[None]:
        """The tensor-parallel random state for dropout, since heads are sharded; under sequence
        parallelism the layer has forked it already."""
        if not self.training or not self.dropout or self.config.sequence_parallel:
            return contextlib.nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()


def _rotated(query: Tensor, key: Tensor, value: Tensor, by: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys rotated; values are copied, so that they do not keep what all three are
    slices of in memory until the backward pass."""
    return rotate(query, by), rotate(key, by), value.contiguous()


@functools.cache
def flash_attention_takes(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether torch's flash attention works on this GPU with heads of `head_dim` in `dtype`."""
    if dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def slow_with_dropout(dropout: float, dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """A line for the log if this GPU has no fused attention kernel with `dropout`, else None."""
    if not dropout or flash_attention_takes(dtype, head_dim, device):
        return None
    return (
        f"--attention-dropout {dropout:g} without flash attention (it takes --bf16 or --fp16 and an A100 or newer): "
        "attention goes document by document, which is slow; set --attention-dropout 0"
    )


def attend_by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    scale: float | None = None,
    dropout: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Causal attention within each document; `lengths` sum to t.

    Takes query [t, n, d], key and value [t, g, d]; returns [t, n * d].
    """
    pieces = []
    # Unlike slices, each with a backward over all t tokens, `split` concatenates gradients once.
    for piece in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in piece)
        pieces.append(_sdpa(q, k, v, scale, dropout, window).squeeze(0).transpose(0, 1))
    return torch.cat(pieces).flatten(1)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float, window: int) -> Tensor:
    """Causal attention of query [b, n, s, d] and key, value [b, g, s, d]."""
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:  # multi-query: an expanded view, without copying the one key head
        key, value = (
            x.unsqueeze(2).expand(-1, -1, repeat, -1, -1).reshape(x.shape[0], -1, *x.shape[2:]) for x in (key, value)
        )
    mask, tokens = None, query.shape[2]
    if 0 < window < tokens:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=mask is None, scale=scale)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams, scale: float | None, dropout: float, window: int
) -> Tensor:
    """Variable-length flash attention; shapes as `attend_by_document`."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    bounds = packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.max_seqlen_q, packed.max_seqlen_kv
    # Of a window the kernel counts the tokens before a token, without itself.
    seen = {"window_size_left": window - 1, "window_size_right": 0} if window else {}
    # The operator below varlen_attn, which has no dropout and whose arguments change with each
    # version of torch; nested tensors use it as well.
    out, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *bounds, dropout, is_causal=True, return_debug_mask=False, scale=scale, **seen
    )
    return out.flatten(1)


def flex_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedSequences,
    scale: float | None = None,
    *,
    window: int = 0,
    compiled: bool,
) -> Tensor:
    """FlexAttention, which skips blocks between documents; shapes as `attend_by_document`.

    Only `compiled` has a backward pass.
    """
    if packed.block_mask is None:
        packed.block_mask = _block_mask(packed, window, query.device, compiled)
    attend = _compiled_flex_attention() if compiled else flex_attention
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = attend(query, key, value, block_mask=packed.block_mask, scale=scale, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1).flatten(1)


def _block_mask(packed: PackedSequences, window: int, device: torch.device, compiled: bool) -> BlockMask:
    tokens = sum(packed.lengths)
    lengths = torch.tensor(packed.lengths, device=device)
    document = torch.repeat_interleave(torch.arange(len(packed.lengths), device=device), lengths, output_size=tokens)

    def attends(batch, head, q, k):
        causal = (q >= k) & (document[q] == document[k])
        return causal & (q - k < window) if window else causal

    return create_block_mask(attends, None, None, tokens, tokens, device=device, _compile=compiled)


@functools.cache
def _compiled_flex_attention():
    return torch.compile(flex_attention)
