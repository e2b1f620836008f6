"""Length of training and learning-rate schedules, compared with Megatron and with formulas."""

import math

import pytest
import torch

from megatron_ft.config.arguments import parse_args
from megatron_ft.errors import UserError
from megatron_ft.training.schedule import Length, build_scheduler, global_batch_at, many_epochs, plan_length, samples_of


def flags(tmp_path, text: str, world_size: int = 1):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.touch()
    common = ["--preset", "tiny", "--seq-length", "128", "--data-prefix", "unused", "--tokenizer-file", str(tokenizer)]
    return parse_args([*common, *text.split()], world_size)


@pytest.mark.parametrize(
    ("text", "sequences_per_epoch", "iterations", "samples"),
    [
        ("--train-iters 7 --global-batch-size 4", None, 7, 28),
        ("--train-samples 28 --global-batch-size 4", None, 7, 28),
        ("--train-samples 29 --global-batch-size 4", None, 8, 32),
        ("--train-tokens 3072 --global-batch-size 4", None, 6, 24),
        ("--train-tokens 3073 --global-batch-size 4", None, 7, 28),
        ("--train-epochs 3 --global-batch-size 4", 10, 8, 32),
        ("--train-epochs 0.5 --global-batch-size 4", 10, 2, 8),
        ("--train-iters 5 --global-batch-size 8 --rampup-batch-size 2 2 12", None, 5, 2 + 2 + 4 + 6 + 8),
        ("--train-samples 37 --global-batch-size 8 --rampup-batch-size 2 2 12", None, 7, 38),
    ],
)
def test_length_is_computed_from_any_unit(tmp_path, text, sequences_per_epoch, iterations, samples):
    config = flags(tmp_path, text)
    length = plan_length(config, sequences_per_epoch)
    assert (length.iterations, length.samples) == (iterations, samples)
    assert samples_of(config, iterations) == samples


def test_train_tokens_counts_document_tokens(tmp_path):
    for tokens, iterations in ((1536, 6), (1537, 7)):
        config = flags(tmp_path, f"--train-tokens {tokens} --global-batch-size 4")
        assert plan_length(config, fill_rate=0.5).iterations == iterations, (
            "24 sequences of 64 document tokens, and one token more"
        )


@pytest.mark.parametrize(
    ("text", "done", "iterations", "samples"),
    [
        ("--train-samples 100 --global-batch-size 8", (12, 48), 19, 104),
        ("--train-samples 100 --global-batch-size 4", (12, 48), 25, 100),
        ("--train-iters 20 --global-batch-size 2", (12, 48), 20, 64),
        ("--train-epochs 2 --global-batch-size 8", (12, 48), 21, 120),
        ("--train-iters 8 --global-batch-size 4", (20, 80), 8, 32),
        ("--train-samples 30 --global-batch-size 4", (20, 80), 8, 32),
        ("--train-samples 100 --global-batch-size 2", (13, 104), 13, 100),
        ("--train-iters 9 --global-batch-size 8 --rampup-batch-size 2 2 12", (4, 14), 9, 14 + 5 * 8),
        ("--train-iters 9 --global-batch-size 8 --rampup-batch-size 2 2 12", (3, 8), 9, 8 + 6 + 5 * 8),
    ],
)
def test_remaining_steps_follow_the_finished_ones(tmp_path, text, done, iterations, samples):
    length = plan_length(flags(tmp_path, text), 60, done=Length(*done))
    assert (length.iterations, length.samples) == (iterations, samples)


def test_warm_up_counts_the_batch_sizes_of_finished_steps(tmp_path):
    config = flags(tmp_path, "--train-samples 100 --global-batch-size 8 --lr-warmup-iters 11")
    assert samples_of(config, 11, Length(12, 48)) == 48
    assert samples_of(config, 14, Length(12, 48)) == 64


def test_more_than_ten_epochs_are_logged():
    (line,) = many_epochs(Length(10_000, 1_280_000), 31_000)
    assert line.startswith("41.3 epochs of 31,000 sequences") and "--train-epochs" in line
    assert many_epochs(Length(10, 100), 10) == []


def test_ramp_up_equals_megatron(tmp_path):
    calculators = pytest.importorskip("megatron.core.num_microbatches_calculator")
    if not hasattr(calculators, "RampupBatchsizeNumMicroBatchesCalculator"):
        pytest.skip("Megatron-Core 0.17 and newer have no ramp-up")
    config = flags(tmp_path, "--train-iters 1 --micro-batch-size 2 --global-batch-size 20 --rampup-batch-size 4 4 70")
    megatron = calculators.RampupBatchsizeNumMicroBatchesCalculator(20, 2, 1, False, 1, 4, 4, 70)
    for consumed in range(0, 120):
        megatron.update(consumed, consistency_check=True)
        assert global_batch_at(config, consumed) == megatron.get_current_global_batch_size(), consumed


def rates(config, steps: int) -> list[float]:
    """The learning rate of each step, from a scheduler with a real optimizer."""

    class Optimizer:
        param_groups = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0).param_groups

    scheduler = build_scheduler(config, Optimizer, plan_length(config))
    used = []
    for _ in range(steps):
        used.append(Optimizer.param_groups[0]["lr"])
        scheduler.step(increment=config.training.global_batch_size)
    return used


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--lr-decay-style constant --lr-warmup-iters 2", [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("--lr-decay-style linear --min-lr 0.2 --lr-warmup-samples 8", [0, 0.5, *[0.2 + 0.8 * (10 - i) / 8 for i in range(2, 10)]]),
        ("--lr-decay-style cosine --lr-warmup-fraction 0.2 --lr-warmup-init 0.1", [0.1, 0.55, *[0.5 + 0.5 * math.cos(math.pi * (i - 2) / 8) for i in range(2, 10)]]),
        ("--lr-decay-style inverse-square-root --lr-warmup-iters 1", [0, 1, *[i**-0.5 for i in range(2, 10)]]),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 4", [1] * 7 + [0.75, 0.5, 0.25]),
        ("--lr-decay-style WSD --lr-wsd-decay-samples 16 --lr-wsd-decay-style minus_sqrt", [1] * 7 + [1 - (i / 4) ** 0.5 for i in (1, 2, 3)]),
        ("--lr-decay-style linear --lr-decay-iters 5", [1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0]),
    ],
)  # fmt: skip
def test_learning_rates_follow_the_formula(tmp_path, text, expected):
    config = flags(tmp_path, f"--train-iters 10 --global-batch-size 4 --lr 1 {text}")
    assert rates(config, 10) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--train-iters 1 --lr-warmup-fraction 0.03", [1]),
        ("--train-iters 1 --lr-decay-iters 100 --lr-warmup-iters 10", [1]),
        ("--train-iters 10 --lr-warmup-fraction 0.09", [1, 1]),
        ("--train-iters 10 --lr-warmup-samples 4", [0, 1]),
    ],
)
def test_warm_up_of_less_than_a_step_does_not_waste_it(tmp_path, text, expected):
    config = flags(tmp_path, f"--global-batch-size 4 --lr 1 --lr-decay-style constant {text}")
    assert rates(config, len(expected)) == expected


def test_impossible_schedules_are_refused(tmp_path):
    for text, word in [
        ("--lr-warmup-iters 10", "--lr-warmup-iters"),
        ("--lr-decay-style WSD", "--lr-wsd-decay-iters"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 9 --lr-warmup-iters 2", "--lr-wsd-decay-iters"),
    ]:
        with pytest.raises(UserError, match=word):
            rates(flags(tmp_path, f"--train-iters 10 --global-batch-size 4 --lr 1 {text}"), 1)
