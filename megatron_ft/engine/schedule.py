"""How long a run is, and its learning-rate schedule: everything in samples (packed rows), as Megatron counts."""

import math
from dataclasses import dataclass

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError

MANY_EPOCHS = 10


@dataclass(frozen=True)
class Length:
    """Length of training, or of a part of it: optimizer steps, and the packed rows they take."""

    iterations: int
    samples: int


NOTHING = Length(0, 0)


def global_batch_at(config: Config, consumed_samples: int) -> int:
    """Rows of the step that starts after `consumed_samples`: --global-batch-size, or less during --rampup-batch-size."""
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
    """Steps and rows of the whole run from whichever of --train-iters, -samples, -tokens, -epochs was given.

    The steps that are left come after the steps and rows that are `done`: so a run resumed with another batch size trains what it did not
    yet, and no more. The last step is whole: rows are rounded up to it, so `--train-epochs 1` reads every row. `sequences_per_epoch` is needed
    for epochs alone, `fill_rate`, the share of a row that holds documents, for tokens alone. A run with more done than was asked for is as long as was asked for.
    """
    if config.training.train_iters is not None:
        return Length(config.training.train_iters, samples_of(config, config.training.train_iters, done))
    if config.training.train_samples is not None:
        wanted = config.training.train_samples
    elif config.training.train_tokens is not None:
        wanted = math.ceil(config.training.train_tokens / (fill_rate * config.data.seq_length))
    else:
        wanted = math.ceil(config.training.train_epochs * sequences_per_epoch)
    if wanted <= done.samples:
        whole = _extend(config, NOTHING, samples=wanted)
        return Length(min(whole.iterations, done.iterations), min(whole.samples, done.samples))
    return _extend(config, done, samples=wanted)


def samples_of(config: Config, iterations: int, done: Length = NOTHING) -> int:
    """Rows that the first `iterations` steps take, when those that are `done` took what they took."""
    if iterations < done.iterations:
        return min(_extend(config, NOTHING, iterations=iterations).samples, done.samples)
    return _extend(config, done, iterations=iterations).samples


def _extend(config: Config, done: Length, *, iterations: int = 0, samples: int | None = None) -> Length:
    """`done` and as many whole steps more as reach `samples` rows, or where None `iterations` steps."""
    step, row = done.iterations, done.samples
    while step < iterations if samples is None else row < samples:
        batch, steps = global_batch_at(config, row), 1
        if batch == config.training.global_batch_size:  # constant from here on
            steps = iterations - step if samples is None else -(-(samples - row) // batch)
        step, row = step + steps, row + steps * batch
    return Length(step, row)


def many_epochs(length: Length, sequences_per_epoch: int) -> list[str]:
    """A line for the log when the run reads the training data more often than is usual for fine-tuning."""
    epochs = length.samples / sequences_per_epoch
    if epochs <= MANY_EPOCHS:
        return []
    return [
        f"{epochs:.1f} epochs of {sequences_per_epoch:,} rows: more than {MANY_EPOCHS} are unusual in fine-tuning; --train-epochs 2 says fewer"
    ]


def build_scheduler(config: Config, optimizer, length: Length, done: Length = NOTHING):
    """Megatron's OptimizerParamScheduler, stepped in rows; flags in steps count what is `done` as it was. Raises UserError for a
    warm-up that outlasts the decay."""
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
            f"learning-rate warm-up of {warmup:g} rows leaves nothing of the schedule's {decay}; "
            "lower --lr-warmup-iters, or lengthen the run or --lr-decay-iters"
        )
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
        # A resumed run follows its own flags: the checkpoint says how far it is, the command line what the schedule is.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=wsd_decay,
        lr_wsd_decay_style=config.schedule.wsd_decay_style,
    )


def changed_rate(scheduler, batch: int, used: float) -> bool:
    """Whether this schedule's rate for the step before, of `batch` rows, is over 10 % from the one it `used`: then it was another schedule."""
    here, scheduler.num_steps = scheduler.num_steps, max(0, scheduler.num_steps - batch)
    rate = scheduler.get_lr(scheduler.optimizer.param_groups[0])
    scheduler.num_steps = here
    return abs(rate - used) > 0.1 * max(rate, used)
