"""Fine-tune a StarCoder-family model: one rank of a training run.

    python -m megatron_ft.finetune --preset tiny --from-scratch --data-prefix data/commits --tokenizer-file tokenizer.json \\
        --seq-length 256 --train-iters 100 --global-batch-size 8 --save checkpoints

starts a single rank; launch/finetune.py starts all of a node, or of a SLURM job, with the environment variables of torchrun. The run resumes from
--save when it holds a checkpoint, else it starts from the weights of --load. It ends with status 0 when training is finished, 75 when it was
stopped after saving and the same command goes on, 2 for a user's mistake.
"""

import argparse
import contextlib
import functools
import logging
import os
import sys
import time
import warnings
from pathlib import Path

from megatron_ft.config.arguments import parse_args, shape_from_args, validate
from megatron_ft.engine import signals
from megatron_ft.errors import EXIT_DONE, EXIT_RESUME, EXIT_USER_ERROR, UserError, run_program
from megatron_ft.model.shape import PRESETS, ModelShape, padded_vocab_size


def main(argv: list[str] | None = None) -> int:
    """Run this rank; returns its exit status."""
    started = time.monotonic()
    signals.install()
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse_args(argv, int(os.environ.get("WORLD_SIZE", 1)))
        _silence_warnings()
        import torch

        from megatron_ft.engine import parallel
        from megatron_ft.engine.device import set_up_device
        from megatron_ft.engine.out_of_memory import out_of_memory

        device = set_up_device(args)
        parallel.initialize(args)
        try:
            status = run(args, device, started)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(args, error, "before the first step") from error
        parallel.destroy()  # after a good end alone: see run_rank
        return status
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            raise
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def run_rank() -> None:
    """Run `main` and end this process; after a failure at once, without taking process groups down.

    NCCL's teardown waits for peers, and these may wait in a collective that a failed rank never joins. So the first rank to fail
    is the first to end, and whoever started the ranks ends the others.
    """
    try:
        run_program(main)
    except SystemExit as end:
        if end.code in (None, EXIT_DONE, EXIT_RESUME):
            raise
        status = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # torch's: it names the rank
        status = 1
    with contextlib.suppress(OSError, ValueError):  # a pipe that nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def run(args: argparse.Namespace, device, started: float) -> int:
    """Build data, model, optimizer and checkpoints as `args` say, and train; process groups exist already."""
    import torch
    import torch.distributed as dist

    from megatron_ft.checkpoint.checkpointer import Checkpointer
    from megatron_ft.data.packed_dataset import build_datasets, rows_per_epoch, training_fill_rate
    from megatron_ft.engine import parallel
    from megatron_ft.engine.out_of_memory import out_of_memory
    from megatron_ft.engine.rows import Rows
    from megatron_ft.engine.schedule import Length, many_epochs, plan_length
    from megatron_ft.engine.train import Run, train
    from megatron_ft.metrics.console import RunPlan
    from megatron_ft.metrics.metrics import MetricsLog
    from megatron_ft.tokenizer.tokenizer import load_tokenizer

    if args.optimizer_cpu_offload and device.type == "cpu":
        raise UserError(
            "--optimizer-cpu-offload moves optimizer state from the GPU to the host; there is no GPU here, leave it out"
        )
    tokenizer = load_tokenizer(args.tokenizer_file)
    shape = model_shape(args).with_vocab(tokenizer.vocab_size)
    epoch = 0 if args.skip_train else rows_per_epoch(args)
    checkpointer = Checkpointer(args, shape, tokenizer.config_ids, rows_per_epoch=epoch)
    fill_rate = training_fill_rate(args) if args.train_tokens else 1.0
    plan_from = functools.partial(plan_length, args, epoch, fill_rate=fill_rate)
    done = Length(*checkpointer.progress())
    length = plan_from(done=done)
    if args.train_tokens:
        args.notices.append(
            f"--train-tokens {args.train_tokens:,}: {length.samples:,} rows of {fill_rate * args.seq_length:,.1f} tokens on average"
        )
    pad = tokenizer.eod if tokenizer.pad is None else tokenizer.pad
    datasets = build_datasets(
        args, train_samples=None if args.skip_train else length.samples, pad=pad, vocab_size=tokenizer.vocab_size
    )
    check_groups(args, datasets)

    state = build_state(args, shape, length, done)
    start = checkpointer.start(state)
    if plan_from(done=Length(state.iteration, state.consumed_samples)) != length:
        raise UserError(
            f"--save {args.save}: its newest checkpoint is damaged and put aside, and from the one before the run is not as long with "
            f"--global-batch-size {args.global_batch_size}; start the same command again"
        )

    plan = RunPlan(
        train_iters=length.iterations,
        start_iteration=state.iteration or checkpointer.weights_iteration * args.skip_train,
        train_samples=length.samples,
        rows_per_epoch=epoch,
        device_name=torch.cuda.get_device_name() if device.type == "cuda" else None,
    )
    log = MetricsLog(args, shape, plan, args.save, writes=dist.get_rank() == 0)
    checkpointer.log = log.event
    read = [datasets.train] if datasets.train else [*datasets.valid.values(), *datasets.test.values()]
    log.banner(data="\n".join(dataset.description for dataset in read), start="\n".join(start.reasons))
    notices = [*args.notices, *datasets.notices, *(many_epochs(length, epoch) if epoch else [])]
    for notice in [*notices, *attention_notices(args, shape, device)]:
        log.event(notice)

    def rows(dataset, whole: bool = True) -> Rows:
        return Rows(
            dataset,
            args,
            tokenizer.eod,
            device,
            data_parallel_rank=parallel.data_parallel_rank(),
            data_parallel_size=parallel.data_parallel_size(),
            whole=whole,
        )

    watchdog = signals.Watchdog(
        args.watchdog_mins, dist.get_rank(), Path(args.save) / "watchdog" if args.save else None
    )
    training = Run(
        args=args,
        vocab_size=None if args.softmax_over_padding else shape.vocab_size,
        length=length,
        state=state,
        checkpointer=checkpointer,
        log=log,
        watchdog=watchdog,
        train_rows=rows(datasets.train, whole=False) if datasets.train else None,
        valid_rows={name: rows(dataset) for name, dataset in datasets.valid.items()},
        test_rows={name: rows(dataset) for name, dataset in datasets.test.items()},
        started=started,
    )
    try:
        status = train(training)
        checkpointer.finish()
        for reader in (training.train_rows, *training.valid_rows.values(), *training.test_rows.values()):
            if reader:
                reader.close()
        return status
    except torch.OutOfMemoryError as error:
        raise out_of_memory(args, error, f"after {state.iteration} iterations") from error
    finally:
        watchdog.stop()
        log.close()


def build_state(args: argparse.Namespace, shape: ModelShape, length, done):
    """TrainState of a random start: model, optimizer, scheduler of a run of `length`, of which `done` (both Length) lies in a checkpoint."""
    from megatron_ft.checkpoint.train_state import TrainState
    from megatron_ft.engine.lora import add_lora
    from megatron_ft.engine.model import build_model, wrap_for_data_parallel
    from megatron_ft.engine.optimizer import build_optimizer
    from megatron_ft.engine.schedule import build_scheduler

    padded_vocab = padded_vocab_size(
        shape.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    )
    chunks = build_model(args, shape, padded_vocab)
    if args.lora_rank:
        add_lora(chunks, args)
    model = wrap_for_data_parallel(args, chunks)
    optimizer = build_optimizer(args, model)
    return TrainState(model, optimizer, build_scheduler(args, optimizer, length, done))


def attention_notices(args: argparse.Namespace, shape: ModelShape, device) -> list[str]:
    """A line for the log when this GPU has no fast kernel for the attention that was asked for."""
    from megatron_ft.engine.model import compute_dtype, uses_transformer_engine
    from megatron_ft.engine.packed_attention import slow_with_dropout

    if device.type != "cuda" or uses_transformer_engine(args):
        return []
    notice = slow_with_dropout(shape.attention_dropout, compute_dtype(args), shape.kv_channels, device)
    return [notice] if notice else []


def model_shape(args: argparse.Namespace) -> ModelShape:
    """The model's shape: from flags, or else from the checkpoint to resume or start from. Settles --seq-length. Raises UserError."""
    from megatron_ft.checkpoint.resume import starting_shape

    if args.shape is None:
        found = starting_shape(args)
        if found is None:
            raise UserError(
                f"no model: --save {args.save} holds no checkpoint yet; give --preset (one of {', '.join(sorted(PRESETS))}) or --load DIR"
            )
        args.shape = shape_from_args(args, found)
        args.seq_length = args.seq_length or args.shape.max_position_embeddings
        validate(args)
    return args.shape


def check_groups(args: argparse.Namespace, datasets) -> None:
    """Raise UserError where flags about validation have no group to be about."""
    if args.best_group and args.best_group not in datasets.valid:
        raise UserError(
            f"--best-group {args.best_group} is not a validation group; there are {', '.join(datasets.valid) or 'none'}"
        )
    if args.skip_train and not (datasets.valid or datasets.test):
        raise UserError(
            "--skip-train has nothing to evaluate: give --valid-weighted-split-paths-path FILE, or a --validation-share above 0"
        )
    if args.eval_at_start and not datasets.valid:
        raise UserError(
            "--eval-at-start needs a validation group: give --valid-weighted-split-paths-path FILE, or a --validation-share above 0"
        )
    if args.early_stop_patience and not (datasets.valid and args.eval_interval):
        raise UserError("--early-stop-patience needs a validation group and --eval-interval above 0")


def _silence_warnings() -> None:
    """Megatron-Core warns of each optional package that is missing and torch of the collectives it uses; neither helps a user."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


if __name__ == "__main__":
    run_rank()
