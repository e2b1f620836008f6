"""How long a run is, and its learning-rate schedule: everything in samples (packed rows), as Megatron counts."""

import argparse
import math
from dataclasses import dataclass

from megatron_ft.errors import UserError

MANY_EPOCHS = 10


@dataclass(frozen=True)
class Length:
    """Length of training: optimizer steps, and the packed rows they take."""

    iterations: int
    samples: int


def global_batch_at(args: argparse.Namespace, consumed_samples: int) -> int:
    """Rows of the step that starts after `consumed_samples`: --global-batch-size, or less during --rampup-batch-size."""
    if not args.rampup_batch_size:
        return args.global_batch_size
    start, increment, samples = args.rampup_batch_size
    steps = (args.global_batch_size - start) // increment
    if not steps or consumed_samples > samples:
        return args.global_batch_size
    return min(start + int(consumed_samples / (samples / steps)) * increment, args.global_batch_size)


def check_rampup(args: argparse.Namespace) -> None:
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


def plan_length(args: argparse.Namespace, rows_per_epoch: int | None = None) -> Length:
    """Steps and rows of the whole run from whichever of --train-iters, -samples, -tokens, -epochs was given.

    The last step is whole: rows are rounded up to it, so `--train-epochs 1` reads every row. `rows_per_epoch` is needed for epochs alone.
    """
    if args.train_iters is not None:
        wanted = None
    elif args.train_samples is not None:
        wanted = args.train_samples
    elif args.train_tokens is not None:
        wanted = math.ceil(args.train_tokens / args.seq_length)
    else:
        wanted = math.ceil(args.train_epochs * rows_per_epoch)
    iterations = samples = 0
    while iterations < args.train_iters if wanted is None else samples < wanted:
        batch = global_batch_at(args, samples)
        if batch == args.global_batch_size:  # constant from here on
            rest = args.train_iters - iterations if wanted is None else math.ceil((wanted - samples) / batch)
            return Length(iterations + rest, samples + rest * batch)
        iterations, samples = iterations + 1, samples + batch
    if not iterations:
        raise UserError("the run has no steps: give a length of training above 0")
    return Length(iterations, samples)


def many_epochs(length: Length, rows_per_epoch: int) -> list[str]:
    """A line for the log when the run reads the training data more often than is usual for fine-tuning."""
    epochs = length.samples / rows_per_epoch
    if epochs <= MANY_EPOCHS:
        return []
    return [
        f"{epochs:.1f} epochs of {rows_per_epoch:,} rows: more than {MANY_EPOCHS} are unusual in fine-tuning; --train-epochs 2 says fewer"
    ]


def samples_of(args: argparse.Namespace, iterations: int) -> int:
    """Rows that the first `iterations` steps take."""
    samples = 0
    for done in range(iterations):
        batch = global_batch_at(args, samples)
        if batch == args.global_batch_size:
            return samples + (iterations - done) * batch
        samples += batch
    return samples


def build_scheduler(args: argparse.Namespace, optimizer, length: Length):
    """Megatron's OptimizerParamScheduler, stepped in rows. Raises UserError for a warm-up that outlasts the decay."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    decay = args.lr_decay_samples or (samples_of(args, args.lr_decay_iters) if args.lr_decay_iters else length.samples)
    if args.lr_warmup_fraction:
        warmup = args.lr_warmup_fraction * decay
    else:
        warmup = args.lr_warmup_samples or samples_of(args, args.lr_warmup_iters)
    if warmup >= decay:
        raise UserError(
            f"learning-rate warm-up of {warmup:g} rows leaves nothing of the schedule's {decay}; "
            "lower --lr-warmup-iters, or lengthen the run or --lr-decay-iters"
        )
    wsd_decay = args.lr_wsd_decay_samples or (
        samples_of(args, args.lr_wsd_decay_iters) if args.lr_wsd_decay_iters else None
    )
    if args.lr_decay_style == "WSD" and (wsd_decay is None or wsd_decay > decay - warmup):
        raise UserError(
            "--lr-decay-style WSD needs --lr-wsd-decay-iters (or -samples), no longer than the run without its warm-up"
        )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=length.samples,
        wd_incr_style="constant",
        # A resumed run follows its own flags: the checkpoint says how far it is, the command line what the schedule is.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=wsd_decay,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )
