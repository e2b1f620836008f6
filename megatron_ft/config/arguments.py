"""A command line of the training program to settled arguments, or to the one line that says what is wrong with it.

`parse_args(argv, world_size)` gives a validated Namespace or raises UserError with one line, before any process group exists.
Hyphens and underscores are the same. What the user leaves out comes from the preset, the checkpoint to start from, or the default shown by --help.
"""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron_ft.config.bounds import check_bounds
from megatron_ft.config.flags import LORA_TARGETS, build_parser
from megatron_ft.config.mtf_flags import ACCEPTED, REFUSED, RENAMED
from megatron_ft.errors import UserError
from megatron_ft.model.shape import PRESETS, ModelShape

LENGTHS = ("iters", "samples", "tokens", "epochs")  # units of --train-...


def parse_args(argv: Sequence[str], world_size: int = 1) -> argparse.Namespace:
    """Parse and validate. `args.shape` (ModelShape or None when a checkpoint must tell), `args.data_parallel_size` and
    `args.notices` (lines for the log) are added. Raises UserError."""
    parser = build_parser()
    known = {option for action in parser._actions for option in action.option_strings}
    words, notices = normalise(argv, known)
    args = parser.parse_args(words)
    args.notices += notices
    args.world_size = world_size
    check_bounds(args)
    fill_in(args)
    validate(args)
    return args


def normalise(argv: Sequence[str], known: set[str]) -> tuple[list[str], list[str]]:
    """Underscores to hyphens, accepted flags taken out, refused and unknown ones named."""
    words, notices, skip = [], [], 0
    for word in argv:
        if skip:
            skip -= 1
            continue
        if not word.startswith("--") or word == "--":
            words.append(word)
            continue
        flag, equals, value = word.partition("=")
        if flag not in ACCEPTED:
            flag = flag.replace("_", "-")
        flag = RENAMED.get(flag, flag)
        if flag in known:
            words.append(flag + equals + value)
        elif flag in ACCEPTED:
            skip = 0 if equals else ACCEPTED[flag]
            notices.append(f"{flag} has no effect here and is ignored")
        elif flag in REFUSED:
            raise UserError(f"{flag}: {REFUSED[flag]}")
        else:
            near = difflib.get_close_matches(flag, known, n=1)
            raise UserError(f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    return words, notices


def fill_in(args: argparse.Namespace) -> None:
    """Resolve what flags say of each other: preset to shape, other names to one, batch sizes; what has no effect is put off, with a notice."""
    args.load = args.load or args.finetune_from
    if args.lora_rank and args.transformer_impl == "auto":  # Transformer Engine's layers take no adapters
        args.transformer_impl = "local"
    if args.recompute_activations:
        args.recompute_granularity = args.recompute_granularity or "selective"
    if args.recompute_granularity == "full":
        args.recompute_method = args.recompute_method or "uniform"
        args.recompute_num_layers = args.recompute_num_layers or 1
    if args.skip_train:  # no length, and no schedule over it
        for unit in LENGTHS:
            setattr(args, f"train_{unit}", None)
        args.train_iters, args.lr_decay_style = 1, "constant"
        args.lr_warmup_iters, args.lr_warmup_samples, args.lr_warmup_fraction = 0, 0, None
    args.shape = shape_from_args(args, PRESETS[args.preset]) if args.preset else None
    if args.shape is None and args.num_layers and args.hidden_size and args.num_attention_heads:
        base = ModelShape(
            num_layers=1, hidden_size=1, num_attention_heads=1, max_position_embeddings=args.seq_length or 8192
        )
        args.shape = shape_from_args(args, base)
    if args.shape and args.seq_length is None:
        args.seq_length = args.shape.max_position_embeddings
    if args.data_prefix and not args.skip_train and args.validation_share is None and validation_share(args) == 0:
        args.notices.append(
            "validation groups are given, so training takes all of --data-prefix; --validation-share keeps a part out"
        )
    model_parallel = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    args.data_parallel_size = args.world_size // model_parallel if model_parallel > 0 else 0
    if args.global_batch_size is None:
        args.global_batch_size = args.micro_batch_size * max(1, args.data_parallel_size)
    if args.optimizer == "sgd" and args.use_distributed_optimizer:
        args.use_distributed_optimizer = False
        args.notices.append(
            "--optimizer sgd: only Adam's state is sharded over data-parallel ranks, each keeps its own"
        )
    if args.sequence_parallel and args.tensor_model_parallel_size == 1:
        args.sequence_parallel = False
        args.notices.append("--sequence-parallel needs --tensor-model-parallel-size above 1 and is off")
    if args.reset_attention_mask and not args.reset_position_ids:
        args.notices.append("--no-reset-position-ids: positions run on over the documents of a row")


def shape_from_args(args: argparse.Namespace, base: ModelShape) -> ModelShape:
    """`base` with every architecture flag that was given put over it."""
    given = {f.name: getattr(args, f.name) for f in fields(ModelShape) if getattr(args, f.name, None) is not None}
    if args.attention_head_type:
        given["multi_query"] = args.attention_head_type == "multiquery"
    if "hidden_size" in given and "ffn_hidden_size" not in given:
        given["ffn_hidden_size"] = 0
    return ModelShape(**{**base.as_dict(), **given})


def validate(args: argparse.Namespace) -> None:
    """Raise UserError for the first contradiction, naming the flags and the way out; `args` stay as they are."""
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    if cp > 1:
        raise UserError(
            f"--context-parallel-size {cp}: Megatron-Core cuts packed rows over ranks only inside Transformer Engine's attention, "
            "which this program does not rely on; leave it at 1 and use --sequence-parallel or --recompute-granularity full for long rows"
        )
    if args.world_size % (tp * pp * cp):
        raise UserError(
            f"{args.world_size} processes cannot be split into --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp} x --context-parallel-size {cp}; start a multiple of {tp * pp * cp}"
        )
    step = args.micro_batch_size * args.data_parallel_size
    if args.global_batch_size % step:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of --micro-batch-size {args.micro_batch_size} x "
            f"{args.data_parallel_size} data-parallel ranks; try {max(1, round(args.global_batch_size / step)) * step}"
        )
    if args.optimizer_cpu_offload and not ((args.bf16 or args.fp16) and args.use_distributed_optimizer):
        raise UserError("--optimizer-cpu-offload needs --bf16 or --fp16, and the distributed optimizer; add the first")
    if args.overlap_param_gather and not (args.use_distributed_optimizer and args.overlap_grad_reduce):
        raise UserError(
            "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce; add them, or --no-overlap-param-gather"
        )
    if args.eval_iters != "full" and not (args.eval_iters.isdecimal() and int(args.eval_iters) > 0):
        raise UserError(f"--eval-iters {args.eval_iters}: give a number of batches, at least 1, or 'full'")
    if args.tensorboard_dir and Path(args.tensorboard_dir).exists() and not Path(args.tensorboard_dir).is_dir():
        raise UserError(f"--tensorboard-dir {args.tensorboard_dir}: is a file; give a directory")
    if args.shape:
        args.shape.check_layout(tp, pp)
        if args.seq_length > args.shape.max_position_embeddings:
            raise UserError(
                f"--seq-length {args.seq_length} is over the model's {args.shape.max_position_embeddings} positions; "
                f"use at most that, or raise --max-position-embeddings when training from scratch"
            )
        layers = args.shape.num_layers // pp
        if args.recompute_num_layers and args.recompute_num_layers > layers:
            raise UserError(
                f"--recompute-num-layers {args.recompute_num_layers}: a pipeline stage has {layers} layers; give at most that"
            )
    elif not args.load and not args.save:
        raise UserError("no model: give --preset (one of " + ", ".join(sorted(PRESETS)) + ") or --load DIR")
    _validate_data(args)
    _validate_length(args)


def _validate_data(args: argparse.Namespace) -> None:
    if args.data_prefix and (args.train_weighted_split_paths or args.train_weighted_split_paths_path):
        raise UserError("--data-prefix and --train-weighted-split-paths(-path) exclude each other; keep one")
    for split in ("train", "valid", "test"):
        path = getattr(args, f"{split}_weighted_split_paths_path")
        if path and getattr(args, f"{split}_weighted_split_paths"):
            raise UserError(
                f"--{split}-weighted-split-paths and --{split}-weighted-split-paths-path exclude each other; keep one"
            )
        if path and not Path(path).is_file():
            raise UserError(f"--{split}-weighted-split-paths-path {path}: no such file")
    training_data = args.data_prefix or args.train_weighted_split_paths or args.train_weighted_split_paths_path
    if not training_data and not args.skip_train:
        raise UserError("no training data: give --data-prefix PREFIX or --train-weighted-split-paths-path FILE")
    if not args.tokenizer_file:
        raise UserError("--tokenizer-file is missing: give the tokenizer the data were made with")
    if not Path(args.tokenizer_file).exists():
        raise UserError(f"--tokenizer-file {args.tokenizer_file}: no such file")


def _validate_length(args: argparse.Namespace) -> None:
    if all(getattr(args, f"train_{unit}") is None for unit in LENGTHS):
        raise UserError(
            f"length of training is missing; give one of {', '.join(f'--train-{unit}' for unit in LENGTHS)}"
        )
    _validate_rampup(args)
    for flag in ("min_lr", "lr_warmup_init"):
        if getattr(args, flag) > args.lr:
            raise UserError(
                f"--{flag.replace('_', '-')} {getattr(args, flag):g} is above --lr {args.lr:g}; lower it, or raise --lr"
            )
    if unknown := [name for name in args.lora_targets.split(",") if name not in LORA_TARGETS]:
        raise UserError(f"--lora-targets: {unknown[0]!r} is not one of {', '.join(LORA_TARGETS)}")


def _validate_rampup(args: argparse.Namespace) -> None:
    """Raise UserError when --rampup-batch-size cannot be walked in whole steps."""
    if not args.rampup_batch_size:
        return
    start, increment, samples = args.rampup_batch_size
    unit = args.micro_batch_size * args.data_parallel_size
    for name, value in (("START", start), ("INCREMENT", increment)):
        if value <= 0 or value % unit:
            raise UserError(
                f"--rampup-batch-size {name} {value} is not a positive multiple of --micro-batch-size x data-parallel ranks = {unit}"
            )
    if samples < 0 or start > args.global_batch_size or (args.global_batch_size - start) % increment:
        raise UserError(
            f"--rampup-batch-size {start} {increment} {samples} does not reach --global-batch-size {args.global_batch_size} in whole increments"
        )


def validation_share(args: argparse.Namespace) -> float:
    """Share of `--data-prefix` that is kept out of training: 0.05 when the flag is not given, nothing where other documents validate."""
    if args.validation_share is not None:
        return args.validation_share
    return 0.0 if args.valid_weighted_split_paths or args.valid_weighted_split_paths_path else 0.05
