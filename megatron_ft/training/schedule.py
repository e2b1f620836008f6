"""The length of a run and its learning-rate schedule, both in samples as in Megatron.

A sample is a packed sequence.
"""

import math
from dataclasses import dataclass

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.printable import counted

MANY_EPOCHS = 10
FEW_STEPS = 20


@dataclass(frozen=True)
class Length:
    """The length of a training or a part of it, in optimizer steps and in packed sequences."""

    iterations: int
    samples: int


NOTHING = Length(0, 0)


def global_batch_at(config: Config, consumed_samples: int) -> int:
    """Sequences in the step after `consumed_samples`: --global-batch-size, or fewer during
    --rampup-batch-size."""
    if not config.training.rampup_batch_size:
        return config.training.global_batch_size
    start, increment, samples = config.training.rampup_batch_size
    steps = (config.training.global_batch_size - start) // increment
    if not steps or consumed_samples > samples:
        return config.training.global_batch_size
    return min(start + int(consumed_samples / (samples / steps)) * increment, config.training.global_batch_size)


def plan_length(
    config: Config, sequences_per_epoch: int | None = None, *, fill_rate: float = 1.0, done: Length = NOTHING
) -> Length:
    """Length of the entire run, from --train-iters, -samples, -tokens or -epochs.

    The remaining steps follow what is `done`, so a run that is resumed with another batch size
    trains on the remaining sequences. Sequences are rounded up to complete steps, so that
    `--train-epochs 1` reads all of them. If more is done than requested, the request applies.
    `sequences_per_epoch` is needed only for epochs; `fill_rate`, the fraction of token positions
    that hold documents, only for tokens.
    """
    if config.training.train_iters is not None:
        return Length(config.training.train_iters, samples_of(config, config.training.train_iters, done))
    if config.training.train_samples is not None:
        requested = config.training.train_samples
    elif config.training.train_tokens is not None:
        requested = math.ceil(config.training.train_tokens / (fill_rate * config.data.seq_length))
    else:
        assert config.training.train_epochs is not None and sequences_per_epoch is not None
        requested = math.ceil(config.training.train_epochs * sequences_per_epoch)
    if requested <= done.samples:
        from_start = _extend(config, NOTHING, samples=requested)
        return Length(min(from_start.iterations, done.iterations), min(from_start.samples, done.samples))
    return _extend(config, done, samples=requested)


def samples_of(config: Config, iterations: int, done: Length = NOTHING) -> int:
    """Sequences in the first `iterations` steps; those `done` may have had another batch size."""
    if iterations < done.iterations:
        return min(_extend(config, NOTHING, iterations=iterations).samples, done.samples)
    return _extend(config, done, iterations=iterations).samples


def _extend(config: Config, done: Length, *, iterations: int = 0, samples: int | None = None) -> Length:
    """`done` plus complete steps until `samples` sequences, or if None `iterations` steps, are
    reached."""
    step, consumed = done.iterations, done.samples
    while step < iterations if samples is None else consumed < samples:
        batch, steps = global_batch_at(config, consumed), 1
        if batch == config.training.global_batch_size:  # constant from this step on
            steps = iterations - step if samples is None else -(-(samples - consumed) // batch)
        step, consumed = step + steps, consumed + steps * batch
    return Length(step, consumed)


def many_epochs(length: Length, sequences_per_epoch: int) -> list[str]:
    """A line for the log if there are more epochs than usual in fine-tuning."""
    epochs = length.samples / sequences_per_epoch
    if epochs <= MANY_EPOCHS:
        return []
    return [
        f"{epochs:.1f} epochs of {sequences_per_epoch:,} sequences: more than {MANY_EPOCHS} are unusual in fine-tuning; "
        "use fewer with --train-epochs 2"
    ]


def few_steps(sequences_per_epoch: int, epochs: float, batch: int, unit: int = 1) -> list[str]:
    """A warning if `epochs` of the data make fewer steps of `batch` sequences than a learning-rate
    schedule needs.

    `unit`: what a batch must be a multiple of, micro-batch x data-parallel ranks.
    """
    samples = math.ceil(sequences_per_epoch * epochs)
    steps = math.ceil(samples / batch)
    if steps >= FEW_STEPS:
        return []
    smaller = max(1, samples // FEW_STEPS // unit) * unit
    remedy = (
        f"lower --global-batch-size {batch} to {smaller}" if smaller < batch else "train more epochs, or on more data"
    )
    sequences = counted(samples, "packed sequence")
    return [f"warning: your data make {counted(steps, 'step')} ({sequences}, {batch} per step); {remedy}"]


def build_scheduler(config: Config, optimizer, length: Length, done: Length = NOTHING):
    """Megatron's OptimizerParamScheduler, which counts sequences.

    Flags in steps are converted with the batch sizes that `done` had. A warm-up of less than a step
    is none: it would begin and end at --lr-warmup-init, by default a step at rate 0. Neither has a
    run of one step a warm-up. Raises UserError if the warm-up is longer than the decay, or the WSD
    decay does not fit.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    decay = config.schedule.decay_samples or length.samples
    if config.schedule.decay_iters:
        decay = samples_of(config, config.schedule.decay_iters, done)
    if config.schedule.warmup_fraction:
        warmup = config.schedule.warmup_fraction * decay
    else:
        warmup = config.schedule.warmup_samples or samples_of(config, config.schedule.warmup_iters, done)
    if warmup >= decay:
        raise UserError(
            f"the learning-rate warm-up of {warmup:g} sequences takes all of the schedule's {decay}; "
            "lower --lr-warmup-iters, or lengthen the run or --lr-decay-iters"
        )
    if warmup < global_batch_at(config, 0) or length.iterations == 1:
        warmup = 0
    wsd_decay = config.schedule.wsd_decay_samples or (
        samples_of(config, config.schedule.wsd_decay_iters) if config.schedule.wsd_decay_iters else None
    )
    if config.schedule.decay_style == "WSD" and (wsd_decay is None or wsd_decay > decay - warmup):
        raise UserError(
            "--lr-decay-style WSD needs --lr-wsd-decay-iters (or -samples), no longer than the run without its warm-up"
        )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.schedule.warmup_init,
        max_lr=config.schedule.lr,
        min_lr=config.schedule.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=config.schedule.decay_style,
        start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay,
        wd_incr_steps=length.samples,
        wd_incr_style="constant",
        # A resumed run takes its position from the checkpoint and its schedule from its flags.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=wsd_decay,
        lr_wsd_decay_style=config.schedule.wsd_decay_style,
    )


def learning_rate(optimizer) -> float:
    """The learning rate of the parameter groups that follow the schedule unscaled."""
    return next(group["lr"] for group in optimizer.param_groups if group.get("default_config", True))


def changed_rate(scheduler, batch: int, used: float) -> bool:
    """Whether this schedule differs from the one of the last step, which had `batch` sequences.

    It does if its rate for that step is more than 10% off the rate that was `used`.
    """
    position, scheduler.num_steps = scheduler.num_steps, max(0, scheduler.num_steps - batch)
    rate = scheduler.get_lr(scheduler.optimizer.param_groups[0])
    scheduler.num_steps = position
    return abs(rate - used) > 0.1 * max(rate, used)
