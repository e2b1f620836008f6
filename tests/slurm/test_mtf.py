"""--engine mtf: the branch's spellings; reset or resume, depending on the save directory."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import one_error_line, run_program

from megatron_ft.config.command_line import option_strings
from megatron_ft.config.flag import Mtf

RECORDED = [
    line for line in (Path(__file__).with_name("mtf_flags.txt")).read_text().splitlines() if line.startswith("--")
]
# Runs the branch's own parser; of its package, only what arguments.py imports is loaded.
PARSE = """
import importlib.util, sys, types, enum
root = sys.argv.pop(1)
def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec); sys.modules[name] = module; spec.loader.exec_module(module); return module
for name in ("megatron", "megatron.model"):
    sys.modules[name] = types.ModuleType(name); sys.modules[name].__path__ = []
sys.modules["megatron"].model = sys.modules["megatron.model"]
sys.modules["megatron.model"].glu_activations = types.SimpleNamespace(GLU_ACTIVATIONS={})
load("megatron.model.enums", root + "/megatron/model/enums.py")
arguments = load("megatron.arguments", root + "/megatron/arguments.py")
args = arguments.validate_args(arguments.parse_args(), {"tokenizer_type": "GPT2BPETokenizer"} if "--tokenizer-type" not in sys.argv else {})
print("RESULT", args.tensor_model_parallel_size, args.train_iters, args.lr, args.train_weighted_split_names, args.norm_target_loss, args.load == args.save)
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """MEGATRON_PATH if set, else a directory whose parser has the recorded flags."""
    if os.environ.get("MEGATRON_PATH"):
        return Path(os.environ["MEGATRON_PATH"])
    path = tmp_path / "Megatron-LM"
    (path / "megatron").mkdir(parents=True)
    (path / "finetune_mtf.py").write_text("")
    (path / "megatron" / "arguments.py").write_text("".join(f"group.add_argument({flag!r})\n" for flag in RECORDED))
    return path


@pytest.fixture
def flags(tmp_path) -> list[str]:
    (tmp_path / "tokenizer.json").write_text("{}")
    return shlex.split(
        f"--engine mtf --preset starcoderbase --bf16 --tensor_model_parallel_size 2 --train-iters 30 --lr 5e-5 --norm-target-loss "
        f"--data-prefix {tmp_path}/data --tokenizer-file {tmp_path}/tokenizer.json --save {tmp_path}/run --num-processes 2"
    )


def compose(flags, checkout, *more: str, ok: bool = True) -> subprocess.CompletedProcess:
    return run_program(
        "launch/finetune.py", *flags, *more, "--dry-run", ok=ok, env={**os.environ, "MEGATRON_PATH": str(checkout)}
    )


def words(done: subprocess.CompletedProcess) -> list[str]:
    command = shlex.split(done.stdout.splitlines()[-1])
    return command[2:]


def checkpoint(directory: Path) -> Path:
    (directory / "iter_0000007" / "mp_rank_00").mkdir(parents=True)
    (directory / "latest_checkpointed_iteration.txt").write_text("7")
    return directory


def test_every_flag_of_the_command_is_one_of_the_branch(flags, checkout, tmp_path):
    composed = words(
        compose(
            flags,
            checkout,
            "--load",
            str(checkpoint(tmp_path / "base")),
            "--use-flash-attn",
            "--valid-num-workers",
            "3",
        )
    )
    assert {word for word in composed if word.startswith("--")} <= set(RECORDED)
    for given in (
        "--use-flash-attn",
        "--valid-num-workers",
        "--exit-signal-handler",
        "--norm-target-loss",
        "--attention-head-type",
    ):
        assert given in composed
    assert composed[composed.index("--train-weighted-split-paths") + 1] == f"train: 1.0 0:0.95 {tmp_path}/data"
    assert composed[composed.index("--distributed-timeout") + 1] == "600"


def test_flags_that_both_parsers_have_are_not_refused(flags, checkout):
    recorded = {flag.replace("_", "-") for flag in RECORDED}
    shared = {option: entry.flag for option, entry in option_strings().items() if option in recorded}
    assert {"--lr", "--position-embedding-type"} <= set(shared)
    assert [option for option, flag in shared.items() if flag.mtf is Mtf.UNKNOWN] == []
    composed = words(compose(flags, checkout, "--from-scratch", "--position-embedding-type", "absolute"))
    assert "--position-embedding-type" not in composed, "the branch always learns positions"
    assert "--no-bias-gelu-fusion" not in composed, "its fused kernel is the tanh form of GELU"


def test_the_exact_gelu_is_the_branchs_unfused_one(flags, checkout):
    composed = words(compose(flags, checkout, "--from-scratch", "--activation", "gelu"))
    assert "--no-bias-gelu-fusion" in composed and "--activation" not in composed


def test_a_length_in_tokens_is_translated_to_sequences(flags, checkout):
    at = flags.index("--train-iters")
    tokens = flags[:at] + flags[at + 2 :]
    composed = words(compose(tokens, checkout, "--from-scratch", "--train-tokens", str(10 * 8192)))
    assert composed[composed.index("--train-samples") + 1] == "10"
    assert "--train-iters" not in composed


def test_the_first_start_resets_and_a_later_one_resumes(flags, checkout, tmp_path):
    base, save = checkpoint(tmp_path / "base"), tmp_path / "run"
    first = words(compose(flags, checkout, "--load", str(base)))
    assert first[first.index("--finetune-from") + 1] == str(base)
    assert {"--finetune", "--reset-progress", "--no-load-optim", "--no-load-rng"} <= set(first)
    checkpoint(save)
    later = words(compose(flags, checkout, "--load", str(base)))
    assert later[later.index("--load") + 1] == str(save)
    assert not {"--finetune", "--reset-progress", "--no-load-optim", "--no-load-rng", "--finetune-from"} & set(later)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "contains no checkpoint and --load is missing"),
        (["--from-scratch", "--lora-rank", "8"], "--lora-rank has no counterpart in the mtf branch"),
        (["--from-scratch", "--eval-iters", "full"], "--eval-iters full: the mtf branch needs a number"),
        (["--from-scratch", "--lr-decay-style", "WSD"], "the mtf branch has constant, linear and cosine"),
        (["--from-scratch", "--train-epochs", "2"], "the mtf branch counts steps or sequences; add --train-iters"),
        (["--from-scratch", "--no-such-flag"], "unknown flag --no-such-flag"),
    ],
)
def test_flags_that_the_branch_does_not_support_are_refused(flags, checkout, more, message):
    assert message in one_error_line(compose(flags, checkout, *more, ok=False))


def test_another_branch_or_no_checkout_is_reported(flags, tmp_path):
    assert "contains no finetune_mtf.py; check out branch mtf" in one_error_line(
        compose(flags, tmp_path, "--from-scratch", ok=False)
    )
    (tmp_path / "megatron").mkdir()
    (tmp_path / "finetune_mtf.py").write_text("")
    (tmp_path / "megatron" / "arguments.py").write_text("group.add_argument('--num-layers')")
    assert "it is another branch" in one_error_line(compose(flags, tmp_path, "--from-scratch", ok=False))


@pytest.mark.skipif(
    not os.environ.get("MEGATRON_PATH"),
    reason="MEGATRON_PATH is not set; the recorded flags are checked instead",
)
def test_the_parser_of_the_branch_accepts_the_command(flags, checkout, tmp_path):
    for more in (["--load", str(checkpoint(tmp_path / "base"))], ["--load", str(checkpoint(tmp_path / "run"))]):
        composed = words(compose(flags, checkout, *more))
        env = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
        done = subprocess.run(
            [sys.executable, "-c", PARSE, str(checkout), *composed], capture_output=True, text=True, env=env
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "RESULT 2 30 5e-05 ['train'] True True"
