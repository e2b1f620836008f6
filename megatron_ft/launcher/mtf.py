"""The second engine: BigCode's Megatron-LM, branch `mtf`, run through its own `finetune_mtf.py`.

MEGATRON_PATH is its checkout. Megatron-Core's flags are accepted, checked in the same way, and
translated to the branch's spellings; flags that only the branch knows are passed through. Whether
to reset or resume, for which its README has users edit flags by hand, follows from the contents of
the save directory.
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
from megatron_ft.data.indexed import IndexedReader, field_paths, learned_path
from megatron_ft.data.splits import groups_of
from megatron_ft.errors import UserError
from megatron_ft.model.families import family_of
from megatron_ft.model.gpt_bigcode import GPT_BIGCODE
from megatron_ft.weights.directory import iteration_directory, read_tracker

# The only signal at which the branch saves; it then ends with status 0.
STOP_SIGNAL = signal.SIGTERM


def megatron_path() -> Path:
    """The branch's checkout. Raises UserError if MEGATRON_PATH is not set or is another project."""
    text = os.environ.get("MEGATRON_PATH")
    if not text:
        raise UserError(
            "--engine mtf needs MEGATRON_PATH, a checkout of bigcode-project/Megatron-LM, branch mtf; "
            "export MEGATRON_PATH=DIR"
        )
    path = Path(text)
    for needed in ("finetune_mtf.py", "megatron/arguments.py"):
        if not (path / needed).is_file():
            raise UserError(
                f"MEGATRON_PATH={path} contains no {needed}; "
                "check out branch mtf of bigcode-project/Megatron-LM (git checkout mtf)"
            )
    return path


def branch_flags(path: Path) -> set[str]:
    """Option strings of a checkout's parser.

    Read from its source, since importing it needs apex and a GPU.
    """
    tree = ast.parse((path / "megatron" / "arguments.py").read_text(encoding="utf-8"))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
    ]
    return {
        arg.value
        for call in calls
        for arg in call.args
        if isinstance(arg, ast.Constant) and isinstance(arg.value, str) and arg.value.startswith("--")
    }


def split_branch_only(flags: Sequence[str], branch: set[str]) -> tuple[list[str], list[str]]:
    """A command line's words in two lists, each in order.

    First the flags that both engines know or neither does, then those that only the branch knows,
    in its spelling.
    """
    ours = option_strings()
    common: list[str] = []
    branch_only: list[str] = []
    target = common
    for word in flags:
        if word.startswith("--"):
            name = word.partition("=")[0]
            known = name.replace("_", "-") in ours
            spelling = next((n for n in (name, name.replace("_", "-")) if n in branch), None)
            if known or spelling is None:
                target = common
            else:
                target, word = branch_only, spelling + word[len(name) :]
        target.append(word)
    return common, branch_only


def mtf_command(config: Config, common: Sequence[str], branch_only: Sequence[str], path: Path) -> list[str]:
    """Command line of one rank. `config` is what `common` parses to.

    Raises UserError for flags that the branch does not support.
    """
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
            f"MEGATRON_PATH={path} does not have {', '.join(unknown)}: it is another branch; "
            "check out mtf (git checkout mtf)"
        )
    return command


def mtf_flags(config: Config) -> list[str]:
    """A checked command line in the branch's spelling. Raises UserError."""
    assert config.shape is not None
    words: list[str] = []
    for field in fields(config.shape):
        if field.name in ENTRIES and ENTRIES[field.name].flag.mtf is not Mtf.UNKNOWN:
            words += words_of(ENTRIES[field.name], getattr(config.shape, field.name))
    words += ["--attention-head-type", "multiquery" if config.shape.multi_query else "multihead"]
    words += ["--no-bias-gelu-fusion"] if config.shape.exact_gelu else []  # its fused kernel is the tanh form
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
        for group in groups_of(config, split):
            for part in group.parts:
                _check_rows(part.prefix)
        groups = [
            f"{group.name}: "
            + ", ".join(f"{part.weight} {part.start}:{part.end} {os.path.abspath(part.prefix)}" for part in group.parts)
            for group in groups_of(config, split)
        ]
        if any(" " in part.prefix for group in groups_of(config, split) for part in group.parts):
            raise UserError(
                f"--engine mtf cannot read data paths with spaces ({groups[0]}); "
                "move or link the data to a path without spaces"
            )
        words += [f"--{split}-weighted-split-paths", *groups] if groups else []
    return words + start_flags(config)


def _check_rows(prefix: str) -> None:
    """Raise UserError for a dataset that the branch would misread: its loss covers all targets, and
    its data loader stops at a document without inputs."""
    if Path(learned_path(prefix) + ".idx").exists():
        raise UserError(
            f"{prefix}: conversations, of which the mtf branch would learn every turn; use --engine megatron-core, "
            "or one row per answer, which dataset/other/to_rows.py writes"
        )
    inputs = field_paths(prefix)[0]
    if Path(inputs + ".idx").exists() and not IndexedReader(inputs).sizes.all():
        raise UserError(
            f"{prefix}: documents without inputs, such as plain text, at which the mtf branch stops; "
            "use --engine megatron-core"
        )


def start_flags(config: Config) -> list[str]:
    """Flags that resume from --save if it contains a checkpoint, else start from --load at step 0.

    Raises UserError if neither is possible.
    """
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
            f"--save {config.checkpoint.save} contains no checkpoint and --load is missing; "
            "add --load DIR, or --from-scratch for random weights"
        )
    return words


def _check_legacy(directory: Path, flag: str) -> None:
    """Raise UserError if `directory`, the value of `flag`, is not a checkpoint of the branch."""
    iteration = read_tracker(directory)
    if not iteration:
        raise UserError(
            f"{flag} {directory}: no latest_checkpointed_iteration.txt; "
            "--engine mtf starts from a Megatron checkpoint of the branch"
        )
    folder = iteration_directory(directory, int(iteration)) if iteration.isdigit() else directory / iteration
    if not any(folder.glob("mp_rank_*")):
        raise UserError(
            f"{flag} {directory}: {folder.name} is not a checkpoint of the branch (no mp_rank_*); "
            "use --engine megatron-core, or another directory"
        )


def _check(config: Config, common: Sequence[str]) -> None:
    """Raise UserError for flags and values that the branch does not have."""
    if config.shape is None:
        raise UserError(
            "--engine mtf needs the model's shape: "
            "give --preset, or --num-layers, --hidden-size and --num-attention-heads"
        )
    if config.shape.family != GPT_BIGCODE.model_type:
        raise UserError(
            f"--engine mtf: the branch has GPTBigCode (StarCoder, SantaCoder) and no {family_of(config.shape).title}; "
            "use --engine megatron-core"
        )
    given = {word.partition("=")[0].replace("_", "-") for word in common}
    for option, entry in option_strings().items():
        if option in given and entry.flag.mtf is Mtf.UNKNOWN:
            raise UserError(
                f"{entry.flag.name} has no counterpart in the mtf branch; leave it out, or use --engine megatron-core"
            )
    if config.training.train_epochs is not None:
        raise UserError(
            "--train-epochs: the mtf branch counts steps or sequences; add --train-iters or --train-samples after it"
        )
    if config.validation.iters == "full":
        raise UserError("--eval-iters full: the mtf branch needs a number")
    if config.schedule.decay_style not in ("constant", "linear", "cosine"):
        raise UserError(
            f"--lr-decay-style {config.schedule.decay_style}: the mtf branch has constant, linear and cosine"
        )
    if config.data.overlong != "drop":
        raise UserError("--overlong truncate: the mtf branch always drops")
