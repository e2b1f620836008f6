"""Time saving and loading a checkpoint, and the pause in training, against plain torch.save.

    python bench/checkpoint.py --directory /scratch/me --layers 12 --hidden-size 768

Builds a StarCoder of that shape with Adam's state (random numbers, no training), in bf16 with fp32
master weights, on one process. torch.save writes the same tensors to the same disk. Every write
ends with fsync; files are dropped from the page cache before they are read back. Prints one line
per measurement, the best of --repeat.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's tokenize.py would hide Python's

import argparse
import os
import tempfile
import time
from collections.abc import Callable

import torch

from megatron_ft.config.arguments import parse_args
from megatron_ft.errors import run_program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory",
        default=tempfile.gettempdir(),
        help="where to write; a temporary directory is created in it and removed",
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--repeat", type=int, default=3)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.directory, prefix="checkpoint-bench-") as folder:
        measure(flags, Path(folder))


def measure(flags: argparse.Namespace, folder: Path) -> None:
    """Run all measurements and print one line for each."""
    state, config, shape = build(flags, folder)
    from megatron_ft.checkpoint import sharded_state
    from megatron_ft.checkpoint.checkpointer import Checkpointer

    model, optimizer = sharded_state.tensors_of(state.model, state.optimizer, adapters_only=False)
    tensors = {
        f"{item.key}.{number}": item.data.detach()
        for number, item in enumerate([*sharded_state.without_objects(model), *optimizer])
    }
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    print(
        f"{shape.num_parameters() / 1e6:.1f} M parameters, {size / 1e6:.0f} MB of weights and optimizer in {len(tensors)} tensors"
    )

    def plain_save() -> None:
        with open(folder / "plain.pt", "wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())

    def checkpointer(asynchronous: bool, where: str = "save") -> Checkpointer:
        there = config.with_flags(async_save=asynchronous, save=str(folder / where))
        made = Checkpointer(there, shape, {}, log=lambda line: None)
        made.start(state)
        return made

    def plain_load() -> None:
        drop_from_cache(folder / "plain.pt")
        for name, tensor in torch.load(folder / "plain.pt", map_location="cpu", weights_only=True).items():
            tensors[name].copy_(tensor)

    report("torch.save", size, best(flags.repeat, plain_save))
    sync = checkpointer(False)

    def save() -> None:
        state.iteration += 1
        assert sync.save(state)

    report("save, verified and committed", size, best(flags.repeat, save))
    report("torch.load", size, best(flags.repeat, plain_load))
    sync.finish()
    newest = max((folder / "save").glob("iter_*"))

    def load() -> None:
        for file in newest.iterdir():
            drop_from_cache(file)
        checkpointer(False).finish()

    report("resume", size, best(flags.repeat, load))

    background = checkpointer(True)
    pauses, commits = [], []
    for _ in range(flags.repeat):
        state.iteration += 1
        pauses.append(seconds_of(lambda: background.save(state)))
        while background.writing:
            time.sleep(0.01)
        commits.append(seconds_of(background.wait))
    report("async save: pause to copy the state", size, min(pauses))
    report("async save: pause to commit", size, min(commits))
    background.finish()


def build(flags: argparse.Namespace, folder: Path):
    """Train state, configuration and model shape of a run on one process."""
    from megatron_ft.checkpoint import optimizer_state
    from megatron_ft.checkpoint.train_state import TrainState
    from megatron_ft.engine import parallel
    from megatron_ft.engine.device import set_up_device
    from megatron_ft.engine.model import build_model, wrap_for_data_parallel
    from megatron_ft.engine.optimizer import build_optimizer
    from megatron_ft.training.schedule import build_scheduler, plan_length

    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    config = parse_args(
        f"--num-layers {flags.layers} --hidden-size {flags.hidden_size} --num-attention-heads {flags.hidden_size // 64} "
        f"--max-position-embeddings 2048 --bf16 --from-scratch --data-prefix none --train-iters 1000 --keep-last 1 --save {folder / 'save'} "
        f"--tokenizer-file {folder / 'tokenizer.json'}".split()
    )
    set_up_device(config)
    parallel.initialize(config)
    model = wrap_for_data_parallel(config, build_model(config, config.shape, config.shape.vocab_size))
    optimizer = build_optimizer(config, model)
    optimizer_state.initialize(optimizer)
    return TrainState(model, optimizer, build_scheduler(config, optimizer, plan_length(config))), config, config.shape


def best(repeat: int, work: Callable[[], None]) -> float:
    return min(seconds_of(work) for _ in range(repeat))


def seconds_of(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def drop_from_cache(path: Path) -> None:
    """Drop a file from the page cache, so that the next read comes from the disk."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(what: str, size: int, seconds: float) -> None:
    print(f"{what:40} {seconds:8.3f} s {size / 1e6 / seconds:10.0f} MB/s")


if __name__ == "__main__":
    run_program(main)
