"""The loss: how tokens, spans, micro-batches and ranks weigh, and that padding takes no part."""

import pytest
import torch
from engine_runs import losses_of_splits, padding_probability
from ranks import run_ranks

from megatron_ft.engine.loss import loss_weights


def test_an_empty_mask_weighs_nothing():
    for average in ("token", "microbatch"):
        weights = loss_weights(torch.zeros(2, 5), average)
        assert weights.eq(0).all()


def test_token_average_is_the_same_however_rows_are_split_and_microbatch_average_is_not(golden):
    """Rows of very different numbers of output tokens, one of them without any."""
    whole = run_ranks(losses_of_splits, 1, golden)[0]
    split = run_ranks(losses_of_splits, 2, golden)[0]
    every = [result for results in (whole, split) for result in results["token"]]
    assert [loss for loss, _ in every] == pytest.approx([every[0][0]] * 4, abs=2e-6)
    assert [norm for _, norm in every] == pytest.approx([every[0][1]] * 4, rel=1e-4)
    assert every[0][0] == pytest.approx(whole["by hand"]["token"], abs=2e-6)
    one_row_each = whole["microbatch"][1]
    assert one_row_each[0] == pytest.approx(whole["by hand"]["microbatch"], abs=2e-6)
    assert split["microbatch"][1] == pytest.approx(one_row_each, rel=1e-4)
    assert abs(one_row_each[0] - every[0][0]) > 1e-3


@pytest.mark.parametrize("ranks", [1, 2])
def test_vocabulary_padding_takes_no_probability_unless_asked(ranks, golden):
    for masked, unmasked, padding_gradient, hits in run_ranks(padding_probability, ranks, golden):
        assert masked == pytest.approx(0.0, abs=1e-6)
        assert unmasked > 0.01
        assert padding_gradient == 0.0
        assert hits == [1.0, 0.0]
