"""The loss: weights of tokens, micro-batches and ranks; vocabulary padding."""

import pytest
import torch
from engine_runs import losses_of_splits, padding_probability
from ranks import run_ranks

from megatron_ft.training.batches import loss_weights


def test_empty_loss_mask_has_weight_zero():
    for average in ("token", "microbatch"):
        weights = loss_weights(torch.zeros(2, 5), average)
        assert weights.eq(0).all()


def test_only_the_token_average_is_independent_of_the_micro_batches(golden):
    """On sequences with very different numbers of target tokens, one of them without any."""
    joint = run_ranks(losses_of_splits, 1, golden)[0]
    split = run_ranks(losses_of_splits, 2, golden)[0]
    every = [result for results in (joint, split) for result in results["token"]]
    assert [loss for loss, _ in every] == pytest.approx([every[0][0]] * 4, abs=2e-6)
    assert [norm for _, norm in every] == pytest.approx([every[0][1]] * 4, rel=1e-4)
    assert every[0][0] == pytest.approx(joint["direct"]["token"], abs=2e-6)
    one_sequence_each = joint["microbatch"][1]
    assert one_sequence_each[0] == pytest.approx(joint["direct"]["microbatch"], abs=2e-6)
    assert split["microbatch"][1] == pytest.approx(one_sequence_each, rel=1e-4)
    assert abs(one_sequence_each[0] - every[0][0]) > 1e-3


@pytest.mark.parametrize("ranks", [1, 2])
def test_vocabulary_padding_has_no_probability_unless_requested(ranks, golden):
    for masked, unmasked, padding_gradient, hits in run_ranks(padding_probability, ranks, golden):
        assert masked == pytest.approx(0.0, abs=1e-6)
        assert unmasked > 0.01
        assert padding_gradient == 0.0
        assert hits == [1.0, 0.0]
