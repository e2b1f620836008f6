"""The second engine: BigCode's Megatron-LM, branch `mtf`, driven through its own `finetune_mtf.py`.

The checkout is at MEGATRON_PATH. The same flags as for Megatron-Core are checked the same way and then written in the branch's spellings; flags that only
the branch knows are passed on as they are. Reset or resume is chosen by looking at the save directory, where its README has people edit flags by hand.
"""

import ast
import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron_ft.config.command_line import option_strings, words_of
from megatron_ft.config.config import ENTRIES, Config
from megatron_ft.config.flag import Mtf
from megatron_ft.data.splits import groups_of
from megatron_ft.errors import UserError
from megatron_ft.weights.directory import iteration_directory, read_tracker

STOP_SIGNAL = signal.SIGTERM  # the only one the branch saves at, and it then ends with status 0


def megatron_path() -> Path:
    """The branch's checkout. Raises UserError when MEGATRON_PATH is not set or holds something else."""
    text = os.environ.get("MEGATRON_PATH")
    if not text:
        raise UserError(
            "--engine mtf needs MEGATRON_PATH, the checkout of bigcode-project/Megatron-LM, branch mtf; export MEGATRON_PATH=DIR"
        )
    path = Path(text)
    for needed in ("finetune_mtf.py", "megatron/arguments.py"):
        if not (path / needed).is_file():
            raise UserError(
                f"MEGATRON_PATH={path}: no {needed} there; check out branch mtf of bigcode-project/Megatron-LM (git checkout mtf)"
            )
    return path


def branch_flags(path: Path) -> set[str]:
    """Option strings of a checkout's parser, read from its source: importing it would need apex and a GPU."""
    tree = ast.parse((path / "megatron" / "arguments.py").read_text())
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
    ]
    return {
        arg.value
        for call in calls
        for arg in call.args
        if isinstance(arg, ast.Constant) and str(arg.value).startswith("--")
    }


def split_branch_only(flags: Sequence[str], branch: set[str]) -> tuple[list[str], list[str]]:
    """Words of flags that both engines know or none does, and words of flags that only the branch knows."""
    ours = option_strings()
    common: list[str] = []
    branch_only: list[str] = []
    target = common
    for word in flags:
        if word.startswith("--"):
            name = word.partition("=")[0]
            known = name.replace("_", "-") in ours
            spelling = next((n for n in (name, name.replace("_", "-")) if n in branch), None)
            target = common if known or spelling is None else branch_only
            word = spelling + word[len(name) :] if target is branch_only else word
        target.append(word)
    return common, branch_only


def mtf_command(config: Config, common: Sequence[str], branch_only: Sequence[str], path: Path) -> list[str]:
    """Command line of one rank. `config` are the checked flags of `common`. Raises UserError for what the branch cannot do."""
    _check(config, common)
    command = [sys.executable, str(path / "finetune_mtf.py"), *mtf_flags(config)]
    given = {word.partition("=")[0] for word in branch_only}
    for flag, value in (("--tokenizer-type", "TokenizerFromFile"), ("--data-impl", "mmap")):
        if flag not in given:
            command += [flag, value]
    command += branch_only
    unknown = sorted({word.partition("=")[0] for word in command if word.startswith("--")} - branch_flags(path))
    if unknown:
        raise UserError(
            f"MEGATRON_PATH={path} does not know {', '.join(unknown)}: it is another branch; check out mtf (git checkout mtf)"
        )
    return command


def mtf_flags(config: Config) -> list[str]:
    """The checked flags in the branch's spelling."""
    assert config.shape is not None
    words: list[str] = []
    for field in fields(config.shape):
        if field.name in ENTRIES:
            words += words_of(ENTRIES[field.name], getattr(config.shape, field.name))
    words += ["--attention-head-type", "multiquery" if config.shape.multi_query else "multihead"]
    for dest, entry in ENTRIES.items():
        spelling, value = entry.flag.mtf, config.value(dest)
        if spelling in (Mtf.UNKNOWN, Mtf.TRANSLATED) or value is None or value is False:
            continue
        name, *values = words_of(entry, value)
        words += [name if spelling is Mtf.SAME else str(spelling), *values]
    if config.training.train_tokens:
        words += ["--train-samples", str(math.ceil(config.training.train_tokens / config.data.seq_length))]
    words += ["--distributed-timeout", str(config.parallel.timeout_minutes * 60)]
    if config.logging.exit_duration_in_mins:
        words += ["--exit-duration-in-mins", str(max(1, int(config.logging.exit_duration_in_mins)))]
    tokenizer = Path(config.data.tokenizer_file)
    words += ["--tokenizer-file", str(tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer)]
    for split in ("train", "valid", "test"):
        groups = [
            f"{group.name}: "
            + ", ".join(f"{part.weight} {part.start}:{part.end} {os.path.abspath(part.prefix)}" for part in group.parts)
            for group in groups_of(config, split)
        ]
        if any(" " in part.prefix for group in groups_of(config, split) for part in group.parts):
            raise UserError(
                f"--engine mtf cannot read data paths with spaces ({groups[0]}); move or link the data to a path without"
            )
        words += [f"--{split}-weighted-split-paths", *groups] if groups else []
    return words + start_flags(config)


def start_flags(config: Config) -> list[str]:
    """Resume from `--save` where it holds a checkpoint, else start from the weights of `--load`, at iteration 0. Raises UserError."""
    if not config.checkpoint.save:
        raise UserError("--engine mtf needs --save DIR")
    save = Path(config.checkpoint.save).resolve()
    words = ["--save", str(save), "--load", str(save), "--exit-signal-handler"]
    if read_tracker(save):
        _check_legacy(save, "--save")
        return words
    if config.checkpoint.load:
        _check_legacy(Path(config.checkpoint.load), "--load")
        return words + [
            "--finetune-from",
            os.path.abspath(config.checkpoint.load),
            "--finetune",
            "--reset-progress",
            "--no-load-optim",
            "--no-load-rng",
        ]
    if not config.checkpoint.from_scratch:
        raise UserError(
            f"--save {config.checkpoint.save} holds no checkpoint and no --load is given; add --load DIR, or --from-scratch for random weights"
        )
    return words


def _check_legacy(directory: Path, flag: str) -> None:
    iteration = read_tracker(directory)
    if not iteration:
        raise UserError(
            f"{flag} {directory}: no latest_checkpointed_iteration.txt; --engine mtf starts from a Megatron checkpoint of the branch"
        )
    folder = iteration_directory(directory, int(iteration)) if iteration.isdigit() else directory / iteration
    if not any(folder.glob("mp_rank_*")):
        raise UserError(
            f"{flag} {directory}: {folder.name} is no checkpoint of the branch (no mp_rank_*); use --engine megatron-core, or another directory"
        )


def _check(config: Config, common: Sequence[str]) -> None:
    """Raise UserError for flags the branch has no counterpart of, and for values it does not take."""
    if config.shape is None:
        raise UserError(
            "--engine mtf needs the model's shape: give --preset, or --num-layers, --hidden-size and --num-attention-heads"
        )
    given = {word.partition("=")[0].replace("_", "-") for word in common}
    for option, entry in option_strings().items():
        if option in given and entry.flag.mtf is Mtf.UNKNOWN:
            raise UserError(
                f"{entry.flag.name} has no counterpart in the mtf branch; leave it out, or use --engine megatron-core"
            )
    if config.training.train_epochs is not None:
        raise UserError(
            "--train-epochs: the mtf branch counts steps or rows; add --train-iters or --train-samples after it"
        )
    if config.validation.iters == "full":
        raise UserError("--eval-iters full: the mtf branch takes a number")
    if config.schedule.decay_style not in ("constant", "linear", "cosine"):
        raise UserError(
            f"--lr-decay-style {config.schedule.decay_style}: the mtf branch knows constant, linear and cosine"
        )
    if config.data.overlong != "drop":
        raise UserError("--overlong truncate: the mtf branch always drops")
