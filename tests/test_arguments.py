"""Flags: Megatron's names, one clear line for a mistake, and what is left out is filled in."""

import pytest

from megatron_ft.arguments import parse_args
from megatron_ft.branch_flags import REFUSED
from megatron_ft.errors import UserError
from megatron_ft.flags import build_parser


@pytest.fixture
def base(tmp_path) -> list[str]:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    return ["--preset", "tiny", "--data-prefix", "data", "--tokenizer-file", str(tokenizer), "--train-iters", "2"]


def test_hyphens_and_underscores_are_the_same(base):
    args = parse_args([*base, "--tensor_model_parallel_size", "2", "--lr_decay_style=linear"], world_size=2)
    assert (args.tensor_model_parallel_size, args.lr_decay_style) == (2, "linear")


def test_preset_fills_in_and_a_flag_goes_over_it(base):
    args = parse_args([*base, "--num-layers", "2", "--attention-head-type", "multihead"])
    assert (args.shape.num_layers, args.shape.hidden_size, args.shape.num_query_groups) == (2, 128, 4)
    assert args.seq_length == args.shape.max_position_embeddings
    assert parse_args([*base, "--hidden-size", "64"]).shape.ffn_hidden_size == 256


def test_batch_sizes_follow_the_layout(base):
    args = parse_args([*base, "--micro-batch-size", "2", "--pipeline-model-parallel-size", "2"], world_size=4)
    assert (args.data_parallel_size, args.global_batch_size) == (2, 4)


@pytest.mark.parametrize(
    "flags, world_size, words",
    [
        (["--tensor-paralel-size", "2"], 1, ["--tensor-paralel-size", "did you mean"]),
        (["--micro-batch-size", "x"], 1, ["--micro-batch-size", "'x'"]),
        (
            ["--tensor-model-parallel-size", "3"],
            3,
            ["--tensor-model-parallel-size 3", "4 attention heads", "[1, 2, 4]"],
        ),
        (["--pipeline-model-parallel-size", "3"], 3, ["--pipeline-model-parallel-size 3", "4 layers"]),
        (["--tensor-model-parallel-size", "2"], 3, ["3 processes", "multiple of 2"]),
        (["--global-batch-size", "3", "--micro-batch-size", "2"], 1, ["--global-batch-size 3", "try 4"]),
        (["--save-epochs", "0"], 1, ["--save-epochs 0", "above 0"]),
        (["--seq-length", "4096"], 1, ["--seq-length 4096", "1024 positions"]),
        (["--validation-share", "1.5"], 1, ["--validation-share 1.5"]),
        (["--eval-iters", "some"], 1, ["--eval-iters some", "'full'"]),
        (["--overlap-param-gather"], 1, ["--overlap-grad-reduce"]),
        (["--train-weighted-split-paths", "train: 1 0:1 x"], 1, ["exclude each other"]),
        (["--micro-batch-size", "0"], 1, ["--micro-batch-size 0"]),
        (["--hidden-size", "130"], 1, ["--hidden-size 130", "--num-attention-heads 4"]),
        (["--deepspeed"], 1, [REFUSED["--deepspeed"]]),
    ],
)
def test_a_mistake_ends_in_one_line_that_names_it(base, flags, world_size, words):
    with pytest.raises(UserError) as error:
        parse_args([*base, *flags], world_size)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_what_is_missing_is_asked_for(base):
    for flag, asked in (
        ("--data-prefix", "--data-prefix PREFIX"),
        ("--tokenizer-file", "--tokenizer-file"),
        ("--train-iters", "--train-epochs"),
    ):
        at = base.index(flag)
        with pytest.raises(UserError, match=asked):
            parse_args(base[:at] + base[at + 2 :])


@pytest.mark.parametrize(
    "flags, settled, notices",
    [
        ("--train-epochs 2", {"train_epochs": 2.0, "train_iters": None}, ["--train-epochs"]),
        ("--train_samples=9 --train-iters 7", {"train_samples": None, "train_iters": 7}, ["--train-samples", "--train-iters"]),
        ("--lr-warmup-fraction 0.1 --lr-warmup-iters 5", {"lr_warmup_fraction": None, "lr_warmup_iters": 5}, ["--lr-warmup-iters"]),
        ("--lr-warmup-iters 5 --lr-warmup-samples 0", {"lr_warmup_iters": 0, "lr_warmup_samples": 0}, ["--lr-warmup-samples"]),
        ("--lr-warmup-iters 0 --lr-warmup-fraction 0.1", {"lr_warmup_iters": 0, "lr_warmup_fraction": 0.1}, []),
        ("--lr-decay-iters 5 --lr-decay-samples 9", {"lr_decay_iters": None, "lr_decay_samples": 9}, ["--lr-decay-samples"]),
        ("--bf16 --fp16", {"bf16": False, "fp16": True}, ["--fp16"]),
        ("--train-iters 3", {"train_iters": 3}, []),
    ],
)  # fmt: skip
def test_of_flags_that_say_the_same_the_last_counts(base, flags, settled, notices):
    args = parse_args([*base, *flags.split()])
    assert {name: getattr(args, name) for name in settled} == settled
    assert [notice.split()[0] for notice in args.notices] == notices, args.notices


def test_the_branchs_flags_without_effect_are_taken_with_a_notice(base):
    args = parse_args([*base, "--data-impl", "mmap", "--DDP-impl", "local", "--finetune", "--no-load-optim"])
    assert [n.split()[0] for n in args.notices] == ["--data-impl", "--DDP-impl"]


def test_help_names_a_group_and_a_meaning_for_every_flag():
    for action in build_parser()._actions:
        assert action.help, action.option_strings
    assert "parallel layout:" in build_parser().format_help()
    assert "(default: 1.0)" in build_parser().format_help()
