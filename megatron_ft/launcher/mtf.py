"""The second engine: BigCode's Megatron-LM, branch `mtf`, driven through its own `finetune_mtf.py`.

The checkout is at MEGATRON_PATH. The same flags as for Megatron-Core are checked the same way and then written in the branch's spellings; flags that only
the branch knows are passed on as they are. Reset or resume is chosen by looking at the save directory, where its README has people edit flags by hand.
"""

import argparse
import ast
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ft.config.flags import build_parser
from megatron_ft.data.splits import groups_of
from megatron_ft.errors import UserError
from megatron_ft.weights.directory import iteration_directory, read_tracker

STOP_SIGNAL = signal.SIGTERM  # the only one the branch saves at, and it then ends with status 0

# Flags that say the same in both, by their name in the parsed arguments.
SAME_VALUE = (
    "make_vocab_size_divisible_by", "seq_length", "micro_batch_size", "global_batch_size", "rampup_batch_size", "train_iters", "train_samples",
    "optimizer", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "clip_grad", "seed", "lr", "min_lr", "lr_decay_style",
    "lr_decay_iters", "lr_decay_samples", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", "loss_scale", "initial_loss_scale",
    "min_loss_scale", "loss_scale_window", "hysteresis", "tensor_model_parallel_size", "pipeline_model_parallel_size", "recompute_granularity",
    "recompute_method", "recompute_num_layers", "num_workers", "eval_interval", "eval_iters", "save_interval", "log_interval", "tensorboard_dir",
    "exit_interval",
)  # fmt: skip
SAME_SWITCH = (
    "bf16", "fp16", "sequence_parallel", "use_distributed_optimizer", "accumulate_allreduce_grads_in_fp32", "loss_on_targets_only",
    "norm_target_loss", "eod_mask_loss", "reset_position_ids", "reset_attention_mask",
)  # fmt: skip
SHAPE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings", "layernorm_epsilon", "init_method_std",
    "hidden_dropout", "attention_dropout",
)  # fmt: skip
# Written below in another way, saying what the branch does anyway, or about speed alone.
HANDLED = {
    "help", "preset", "attention_head_type", "position_embedding_type", "data_prefix", "validation_share", "tokenizer_file", "packing", "overlong", "loss_average",
    "softmax_over_padding", "train_tokens", "save", "load", "finetune_from", "from_scratch", "finetune", "no_load_optim", "no_load_rng",
    "reset_progress", "train_epochs", "overlap_grad_reduce", "overlap_param_gather", "distributed_timeout_minutes", "exit_duration_in_mins", "recompute_activations", *SHAPE, *SAME_VALUE, *SAME_SWITCH,
    *(f"{split}_weighted_split_paths{end}" for split in ("train", "valid", "test") for end in ("", "_path")),
}  # fmt: skip


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
    ours = {option for action in build_parser()._actions for option in action.option_strings}
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


def mtf_command(args: argparse.Namespace, common: Sequence[str], branch_only: Sequence[str], path: Path) -> list[str]:
    """Command line of one rank. `args` are the checked flags of `common`. Raises UserError for what the branch cannot do."""
    _check(args, common)
    command = [sys.executable, str(path / "finetune_mtf.py"), *mtf_flags(args)]
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


def mtf_flags(args: argparse.Namespace) -> list[str]:
    """The checked flags in the branch's spelling."""
    words: list[str] = []
    for name in SHAPE:
        words += [_flag(name), str(getattr(args.shape, name))]
    words += ["--attention-head-type", "multiquery" if args.shape.multi_query else "multihead"]
    for name in SAME_VALUE:
        value = getattr(args, name)
        if name == "rampup_batch_size" and value:
            words += [_flag(name), *map(str, value)]
        elif value is not None:
            words += [_flag(name), str(value)]
    if args.train_tokens:
        words += ["--train-samples", str(math.ceil(args.train_tokens / args.seq_length))]
    words += [_flag(name) for name in SAME_SWITCH if getattr(args, name)]
    words += ["--distributed-timeout", str(args.distributed_timeout_minutes * 60)]
    if args.exit_duration_in_mins:
        words += ["--exit-duration-in-mins", str(max(1, int(args.exit_duration_in_mins)))]
    tokenizer = Path(args.tokenizer_file)
    words += ["--tokenizer-file", str(tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer)]
    for split in ("train", "valid", "test"):
        groups = [
            f"{group.name}: "
            + ", ".join(f"{part.weight} {part.start}:{part.end} {os.path.abspath(part.prefix)}" for part in group.parts)
            for group in groups_of(args, split)
        ]
        if any(" " in part.prefix for group in groups_of(args, split) for part in group.parts):
            raise UserError(
                f"--engine mtf cannot read data paths with spaces ({groups[0]}); move or link the data to a path without"
            )
        words += [f"--{split}-weighted-split-paths", *groups] if groups else []
    return words + start_flags(args)


def start_flags(args: argparse.Namespace) -> list[str]:
    """Resume from `--save` where it holds a checkpoint, else start from the weights of `--load`, at iteration 0. Raises UserError."""
    if not args.save:
        raise UserError("--engine mtf needs --save DIR")
    save = Path(args.save).resolve()
    words = ["--save", str(save), "--load", str(save), "--exit-signal-handler"]
    if read_tracker(save):
        _check_legacy(save, "--save")
        return words
    if args.load:
        _check_legacy(Path(args.load), "--load")
        return words + [
            "--finetune-from",
            os.path.abspath(args.load),
            "--finetune",
            "--reset-progress",
            "--no-load-optim",
            "--no-load-rng",
        ]
    if not args.from_scratch:
        raise UserError(
            f"--save {args.save} holds no checkpoint and no --load is given; add --load DIR, or --from-scratch for random weights"
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


def _check(args: argparse.Namespace, common: Sequence[str]) -> None:
    """Raise UserError for flags the branch has no counterpart of, and for values it does not take."""
    if args.shape is None:
        raise UserError(
            "--engine mtf needs the model's shape: give --preset, or --num-layers, --hidden-size and --num-attention-heads"
        )
    given = {word.partition("=")[0].replace("_", "-") for word in common}
    for action in build_parser()._actions:
        if action.dest not in HANDLED and given.intersection(action.option_strings):
            raise UserError(
                f"{action.option_strings[0]} has no counterpart in the mtf branch; leave it out, or use --engine megatron-core"
            )
    if args.train_epochs is not None:
        raise UserError(
            "--train-epochs: the mtf branch counts steps or rows; add --train-iters or --train-samples after it"
        )
    if args.eval_iters == "full":
        raise UserError("--eval-iters full: the mtf branch takes a number")
    if args.lr_decay_style not in ("constant", "linear", "cosine"):
        raise UserError(f"--lr-decay-style {args.lr_decay_style}: the mtf branch knows constant, linear and cosine")
    if args.overlong != "drop":
        raise UserError("--overlong truncate: the mtf branch always drops")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
