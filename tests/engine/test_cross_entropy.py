"""Cross entropy in the memory of the logits: Megatron-Core's values and gradients at every TP."""

import pytest
import torch
from ranks import run_ranks


def compared_with_megatron(dtype: torch.dtype) -> dict[str, float]:
    """Largest differences of losses and gradients between ours and Megatron-Core's."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_ft.engine.cross_entropy import cross_entropy
    from megatron_ft.engine.device import set_up_device

    set_up_device()
    ranks = torch.distributed.init_process_group("gloo") or torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    generator = torch.Generator().manual_seed(1)
    logits = 9 * torch.randn(2, 150, 32 * ranks, generator=generator)
    labels = torch.randint(32 * ranks, (2, 150), generator=generator)
    weights = torch.rand(2, 150, generator=generator)
    logits[..., -3:] = float("-inf")  # vocabulary padding
    labels.clamp_(max=32 * ranks - 4)
    ours = logits.to(dtype).chunk(ranks, -1)[torch.distributed.get_rank()]
    results = []
    for function in (cross_entropy, vocab_parallel_cross_entropy):
        leaf = ours.clone().requires_grad_()
        losses = function(leaf * 1, labels)
        (losses * weights).sum().backward()
        results.append((losses.detach(), leaf.grad))
    full = torch.nn.functional.cross_entropy(logits.to(dtype).float().flatten(0, 1), labels.flatten(), reduction="none")
    (losses, gradient), (their_losses, their_gradient) = results
    torch.distributed.destroy_process_group()
    return {
        "losses": float((losses - their_losses).abs().max()),
        "gradients": float((gradient - their_gradient).abs().max()),
        "torch": float((losses.flatten() - full).abs().max()),
        "dtype": gradient.dtype == dtype and losses.dtype == torch.float32,
    }


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=["fp32", "bf16"])
def test_equals_megatrons(ranks, dtype, tolerance):
    """bf16: Megatron-Core rounds the same gradient at another place, one unit in the last place."""
    for found in run_ranks(compared_with_megatron, ranks, dtype):
        assert found["losses"] <= 1e-6 and found["torch"] < 1e-5
        assert found["gradients"] <= tolerance and found["dtype"]


def kept_bytes() -> tuple[int, int]:
    """Bytes that the backward pass keeps, and those of the logits."""
    from megatron.core import parallel_state

    from megatron_ft.engine.cross_entropy import cross_entropy
    from megatron_ft.engine.device import set_up_device

    set_up_device()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    logits = torch.randn(1, 512, 4096, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cross_entropy(logits, torch.zeros(1, 512, dtype=torch.int64))
    torch.distributed.destroy_process_group()
    return sum(kept.values()), logits.nbytes


def test_keeps_the_logits_and_nothing_of_their_size():
    ((kept, logits),) = run_ranks(kept_bytes, 1)
    assert logits <= kept < 1.02 * logits
