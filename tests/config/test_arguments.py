"""Flags: Megatron's names, one clear line for a mistake, and what is left out is filled in."""

import pytest

from megatron_ft.config.arguments import parse_args, validate
from megatron_ft.config.command_line import build_parser
from megatron_ft.config.config import ENTRIES
from megatron_ft.config.mtf_flags import REFUSED
from megatron_ft.errors import UserError


@pytest.fixture
def base(tmp_path) -> list[str]:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    return ["--preset", "tiny", "--data-prefix", "data", "--tokenizer-file", str(tokenizer), "--train-iters", "2"]


def test_hyphens_and_underscores_are_the_same(base):
    config = parse_args([*base, "--tensor_model_parallel_size", "2", "--lr_decay_style=linear"], world_size=2)
    assert (config.parallel.tensor, config.schedule.decay_style) == (2, "linear")


def test_preset_fills_in_and_a_flag_goes_over_it(base):
    config = parse_args([*base, "--num-layers", "2", "--attention-head-type", "multihead"])
    assert (config.shape.num_layers, config.shape.hidden_size, config.shape.num_query_groups) == (2, 128, 4)
    assert config.data.seq_length == config.shape.max_position_embeddings
    assert parse_args([*base, "--hidden-size", "64"]).shape.ffn_hidden_size == 256


def test_batch_sizes_follow_the_layout(base):
    config = parse_args([*base, "--micro-batch-size", "2", "--pipeline-model-parallel-size", "2"], world_size=4)
    assert (config.parallel.data, config.training.global_batch_size) == (2, 4)


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
        (["--validation-fraction", "1.5"], 1, ["--validation-fraction 1.5"]),
        (["--eval-iters", "some"], 1, ["--eval-iters some", "'full'"]),
        (["--tensorboard-dir", __file__], 1, ["--tensorboard-dir", "is a file"]),
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


@pytest.mark.parametrize(
    "flags, allowed",
    [
        ("--eval-interval -1", "at least 0 (0 disables)"),
        ("--save-interval -1", "at least 0"),
        ("--exit-interval -1", "at least 0 (0 disables)"),
        ("--early-stop-patience 0", "at least 1"),
        ("--early-stop-patience -1", "at least 1"),
        ("--eval-iters 0", "at least 1, or 'full'"),
        ("--eval-iters -1", "at least 1, or 'full'"),
        ("--lr-warmup-iters -3", "at least 0"),
        ("--lr-warmup-fraction 1", "at least 0 and below 1"),
        ("--clip-grad -1", "at least 0 (0 disables)"),
        ("--lora-alpha 0", "above 0"),
        ("--keep-last -1", "at least 0 (0 keeps all)"),
        ("--min-lr 0.1", "is above --lr 5e-05"),
        ("--lr-warmup-init 0.1", "is above --lr 5e-05"),
        ("--log-interval 0", "at least 1"),
        ("--lr -1", "at least 0"),
        ("--lr nan", "at least 0"),
        ("--hidden-dropout 2", "at least 0 and below 1"),
        ("--adam-beta1 1.5", "at least 0 and below 1"),
        ("--weight-decay -1", "at least 0"),
        ("--num-workers -1", "at least 0"),
        ("--make-vocab-size-divisible-by 0", "at least 1"),
        ("--num-layers 0", "at least 1"),
        ("--recompute-num-layers 9", "has 4 layers"),
        ("--watchdog-mins -1", "at least 0 (0 disables)"),
        ("--train-epochs 0", "above 0"),
        ("--seed 4294967296", "at least 0 and below 4294967296"),
    ],
)
def test_numbers_out_of_bounds_are_refused(base, flags, allowed):
    with pytest.raises(UserError) as error:
        parse_args([*base, *flags.split()])
    assert str(error.value).startswith(flags) and allowed in str(error.value)


def test_bounds_take_their_ends(base):
    flags = "--keep-last 0 --eval-interval 0 --exit-interval 0 --lr 0 --hidden-dropout 0 --watchdog-mins 0 --recompute-num-layers 4"
    config = parse_args([*base, *flags.split(), "--early-stop-patience", "1", "--eval-iters", "1"])
    assert (config.checkpoint.keep_last, config.schedule.lr, config.memory.recompute_num_layers) == (0, 0.0, 4)


def test_every_number_on_the_command_line_has_bounds():
    numbers = {action.dest for action in build_parser().actions.values() if action.type in (int, float)}
    assert numbers - {"rampup_batch_size"} == {dest for dest, entry in ENTRIES.items() if entry.flag.bounds}


def test_validation_of_arguments_changes_none(base):
    words = "--optimizer sgd --sequence-parallel --no-reset-position-ids".split()
    config = parse_args([*base, *words])
    assert len(config.notices) == 3 and not config.parallel.distributed_optimizer and not config.parallel.sequence
    before = str(config)
    validate(config)
    assert str(config) == before


def test_evaluation_asks_for_neither_training_data_nor_length(base):
    at = base.index("--data-prefix")
    config = parse_args([*base[:at], *base[at + 2 : -2], "--skip-train", "--lr-warmup-iters", "100"])
    assert config.validation.skip_train and not config.data.prefix


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
        ("--lora-rank 4 --lora-alpha 8", {"lora_alpha": 8}, []),
        ("--lora-rank 4 --lora-alpha 8 --lora-rank 0", {"lora_rank": 0}, ["--lora-alpha"]),
    ],
)  # fmt: skip
def test_of_flags_that_say_the_same_the_last_counts(base, flags, settled, notices):
    config = parse_args([*base, *flags.split()])
    assert {name: config.value(name) for name in settled} == settled
    assert [notice.split()[0] for notice in config.notices] == notices, config.notices


def test_the_branchs_flags_without_effect_are_taken_with_a_notice(base):
    config = parse_args([*base, "--data-impl", "mmap", "--DDP-impl", "local", "--finetune", "--no-load-optim"])
    assert [n.split()[0] for n in config.notices] == ["--data-impl", "--DDP-impl"]


def test_help_names_a_group_and_a_meaning_for_every_flag():
    for action in build_parser().actions.values():
        assert action.help, action.option_strings
    assert "Parallel layout:" in build_parser().format_help()
    assert "(default: 1.0)" in build_parser().format_help()
