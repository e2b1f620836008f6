"""Packed attention equals attention with a dense [t, t] mask: forward, gradients, entire models."""

from types import SimpleNamespace

import pytest
import torch
from engine_runs import dense_attention, difference_from_dense_model
from golden_runs import golden_logits_error
from ranks import run_ranks

from megatron_ft.engine import packed_attention
from megatron_ft.engine.packed_attention import (
    PackedSequences,
    attend_by_document,
    flash_attention_takes,
    flex_attend,
    slow_with_dropout,
)

DOCUMENTS = {"one document": [300], "hundreds": [1 + n % 3 for n in range(250)], "uneven": [1, 150, 2, 97, 50]}


@pytest.mark.parametrize("groups", [1, 4], ids=["multi-query", "multi-head"])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_equals_the_dense_mask(documents, groups, dtype, tolerance):
    lengths = DOCUMENTS[documents]
    torch.manual_seed(0)
    shapes = [(sum(lengths), 4, 16), (sum(lengths), groups, 16), (sum(lengths), groups, 16)]
    values = [torch.randn(shape).to(dtype) for shape in shapes]
    weight = torch.randn(sum(lengths), 64).to(dtype)
    results = []
    for attention in (attend_by_document, dense_attention):
        inputs = [v.clone().requires_grad_() for v in values]
        out = attention(*inputs, lengths)
        (out * weight).mean().backward()
        results.append([out, *(x.grad for x in inputs)])
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [0, 1, 50, 97, 400])
def test_flex_attention_and_a_window_equal_the_dense_mask(window):
    """Only the forward pass: FlexAttention has no backward pass on the CPU."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(300, heads, 16) for heads in (4, 2, 2))
    packed = PackedSequences.from_cu_seqlens(torch.tensor([0, 1, 151, 153, 250, 300], dtype=torch.int32))
    expected = dense_attention(query, key, value, DOCUMENTS["uneven"], window=window)
    for out in (
        flex_attend(query, key, value, packed, window=window, compiled=False),
        attend_by_document(query, key, value, DOCUMENTS["uneven"], window=window),
    ):
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_a_window_holds_in_unpacked_rows_and_with_dropout():
    torch.manual_seed(0)
    query, key, value = (torch.randn(50, 1, heads, 16) for heads in (4, 2, 2))
    config = SimpleNamespace(attention_dropout=0.0, sequence_parallel=False)
    attention = packed_attention.PackedAttention(config, 1, None, "self", window_size=7)
    packed = dense_attention(query[:, 0], key[:, 0], value[:, 0], [50], window=7)
    torch.testing.assert_close(attention(query, key, value, None)[:, 0], packed, atol=1e-5, rtol=1e-5)
    # What dropout leaves of a row of ones has seen at most 7 tokens: it is a multiple of 2 / 7.
    same = torch.zeros(50, 1, 16)
    dropped = attend_by_document(same, same, torch.ones_like(same), [50], None, 0.5, 7)[6:, 0] * 7 / 2
    torch.testing.assert_close(dropped, dropped.round(), atol=1e-4, rtol=0)
    assert len(dropped.round().unique()) > 3


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("groups", [1, 8], ids=["multi-query", "multi-head"])
def test_flash_attention_is_called_with_valid_arguments(groups, dropout, window):
    """On the meta device, where torch checks shapes and derivatives without running a kernel."""
    bounds = torch.empty(3, device="meta", dtype=torch.int32)
    packed = PackedSequences("thd", bounds, bounds, max_seqlen_q=60, max_seqlen_kv=60, lengths=[40, 60])
    inputs = [torch.empty(100, n, 64, device="meta", dtype=torch.bfloat16) for n in (8, groups, groups)]
    inputs = [x.requires_grad_() for x in inputs]
    out = packed_attention._flash(*inputs, packed, None, dropout, window)
    assert out.shape == (100, 512) and out.dtype == torch.bfloat16
    out.sum().backward()
    assert [x.grad.shape for x in inputs] == [x.shape for x in inputs]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("groups", [1, 4], ids=["multi-query", "multi-head"])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"), [("varlen", torch.bfloat16, 1e-2), ("flex", torch.float32, 1e-5)]
)
@pytest.mark.parametrize("window", [0, 60])
def test_gpu_kernels_equal_the_dense_mask(documents, groups, kernel, dtype, tolerance, window):
    lengths = DOCUMENTS[documents]
    torch.manual_seed(0)
    values = [torch.randn(sum(lengths), heads, 64, device="cuda").to(dtype) for heads in (4, groups, groups)]
    weight = torch.randn(sum(lengths), 256, device="cuda").to(dtype)
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    packed = PackedSequences.from_cu_seqlens(bounds, torch.device("cuda"))
    results = []
    for attention in (kernel, "dense"):
        inputs = [v.clone().requires_grad_() for v in values]
        if attention == "dense":
            out = dense_attention(*inputs, lengths, window=window)
        elif attention == "flex":
            out = flex_attend(*inputs, packed, window=window, compiled=True)
        else:
            out = packed_attention._flash(*inputs, packed, None, dropout=0.0, window=window)
        (out * weight).mean().backward()
        results.append([out, *(x.grad for x in inputs)])
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "--micro-batch-size 1"),
        (1, "--micro-batch-size 3 --recompute-granularity selective"),
        (2, "--micro-batch-size 2 --tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity full"),
    ],
)
def test_model_equals_the_model_with_dense_masks(ranks, flags, golden):
    for errors in run_ranks(difference_from_dense_model, ranks, flags, golden):
        assert errors["fp32"] < 1e-5
        assert errors["bf16"] < 1e-2


@pytest.mark.parametrize(("ranks", "flags"), [(1, ""), (2, "--tensor-model-parallel-size 2 --sequence-parallel")])
def test_logits_of_packed_sequences_equal_the_mtf_branch(ranks, flags, golden):
    for error in run_ranks(golden_logits_error, ranks, flags, golden):
        assert error < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flash_attention_drops_the_same_in_forward_and_backward():
    torch.manual_seed(0)
    packed = PackedSequences.from_cu_seqlens(torch.tensor([0, 100, 1000], dtype=torch.int32), torch.device("cuda"))
    query, key, value = (torch.randn(1000, n, 64, device="cuda", dtype=torch.bfloat16) for n in (8, 1, 1))
    value = torch.ones_like(value).requires_grad_()
    out = packed_attention._flash(query, key, value, packed, None, dropout=0.1, window=0)
    assert out.float().std() > 0.005 and abs(out.float().mean() - 1) < 0.01  # dropped and rescaled
    out.float().sum().backward()  # linear in value: sum of out = sum of gradient x value
    torch.testing.assert_close(value.grad.float().sum(), out.float().sum(), rtol=1e-2, atol=0)


def test_dropout_without_a_fused_kernel_is_logged(monkeypatch):
    gpu = torch.device("cuda", 0)
    flash_attention_takes.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert "--attention-dropout 0.1" in slow_with_dropout(0.1, torch.float16, 128, gpu)  # V100
    flash_attention_takes.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert slow_with_dropout(0.1, torch.float32, 128, gpu)
    assert slow_with_dropout(0.1, torch.bfloat16, 20, gpu)
    assert slow_with_dropout(0.1, torch.bfloat16, 128, gpu) is None
    assert slow_with_dropout(0.0, torch.float32, 128, gpu) is None
    flash_attention_takes.cache_clear()
