"""Time converting a checkpoint of real size against `cp -r` of the same bytes, and measure memory.

    python bench/convert.py --preset starcoderbase --directory /scratch/bench
    python bench/convert.py --preset starcoderbase --directory /scratch/bench --scale 0.5

Creates a random bf16 checkpoint (TP4 PP4 by default), copies it with `cp -r`, removes the copy, and
runs convert/megatron_to_hf.py on it. Needs twice the checkpoint's size on the disk, and removes all
of it. Peak memory is sampled from /proc: RssAnon is the process's private memory; VmHWM also counts
mapped file pages, which the kernel reclaims when it needs them.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's tokenize.py would hide Python's

import dataclasses
import json
import resource
import shutil
import subprocess
import time
import zlib

import torch

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.atomic import free_bytes
from megatron_ft.model.families import PRESETS
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.tensor_names import tensor_shape
from megatron_ft.progress import Progress
from megatron_ft.weights.legacy_writer import legacy_bytes, write_legacy
from megatron_ft.weights.source import WeightSource

ROOT = Path(__file__).resolve().parents[1]
DTYPE = torch.bfloat16
NOISE = 1 << 25  # values


class RandomWeights(WeightSource):
    """Random bf16 weights of a shape; each piece is a different slice of one buffer of noise."""

    kind = "random"

    def __init__(self, shape: ModelShape) -> None:
        self.shape, self.dtype = shape, DTYPE
        self._noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(1)).to(DTYPE)

    def pieces(self, name: str) -> tuple[int, list[torch.Tensor]]:
        rows, *rest = tensor_shape(self.shape, name)
        width = torch.Size(rest).numel()
        step = NOISE // 2 // width
        pieces = []
        for row in range(0, rows, step):
            count = min(step, rows - row) * width
            first = zlib.crc32(f"{name} {row}".encode()) % (NOISE - count)
            pieces.append(self._noise[first : first + count].view(-1, *rest))
        return 0, pieces


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="starcoderbase", help="model whose shapes to use")
    add("--directory", required=True, metavar="DIR", help="where to write; a directory is created in it and removed")
    add("--scale", type=float, default=1.0, help="fraction of the layers to keep")
    add("--tensor-parallel", type=int, default=4, metavar="T", help="tensor-parallel ranks of the checkpoint")
    add("--pipeline-parallel", type=int, default=4, metavar="P", help="pipeline stages of the checkpoint")
    add("--report", metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args()
    shape, tp, pp = PRESETS[args.preset], args.tensor_parallel, args.pipeline_parallel
    layers = max(pp, round(shape.num_layers * args.scale / pp) * pp)
    shape = dataclasses.replace(shape, num_layers=layers)
    shape.check_layout(tp, pp)
    source = RandomWeights(shape)
    size = legacy_bytes(source, DTYPE, tensor_parallel=tp, pipeline_parallel=pp, padded_vocab=shape.vocab_size)
    work = Path(args.directory) / "megatron-ft-bench-convert"
    if free_bytes(work) < 2 * size + (1 << 30):
        raise UserError(
            f"{args.directory}: {2 * size / 1e9:.0f} GB needed, {free_bytes(work) / 1e9:.0f} GB free; lower --scale"
        )
    try:
        report = measure(source, work, tp, pp, size)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report = {
        "preset": args.preset,
        "layers": layers,
        "parameters": shape.num_parameters(),
        "tp": tp,
        "pp": pp,
        **report,
    }
    width = max(map(len, report))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in report.items()))
    if args.report:
        Path(args.report).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(source: RandomWeights, work: Path, tp: int, pp: int, size: int) -> dict:
    """Create, copy and convert a checkpoint; figures in seconds, GB and MiB."""
    megatron = work / "megatron"
    megatron.mkdir(parents=True)
    with Progress("creating a random checkpoint", size, "B") as progress:
        write_legacy(
            source, megatron, dtype=DTYPE, tensor_parallel=tp, pipeline_parallel=pp, padded_vocab=source.shape.vocab_size, divisible_by=128,
            advance=progress.update,
        )  # fmt: skip
    subprocess.run(["sync", "-f", str(megatron)], check=True)
    began, used = time.monotonic(), children_seconds()
    subprocess.run(["cp", "-r", str(megatron), str(work / "copy")], check=True)
    copied, copied_cpu = time.monotonic() - began, children_seconds() - used
    subprocess.run(["sync", "-f", str(work)], check=True)
    durable = time.monotonic() - began
    shutil.rmtree(work / "copy")
    command = [sys.executable, str(ROOT / "convert/megatron_to_hf.py"), "--load", megatron, "--output", work / "hf"]
    began, used = time.monotonic(), children_seconds()
    peaks = run_and_sample([str(word) for word in command])
    converted, converted_cpu = time.monotonic() - began, children_seconds() - used
    return {
        "gigabytes": round(size / 1e9, 2),
        "cp -r, seconds": round(copied, 1),
        "cp -r and sync, seconds": round(durable, 1),
        "convert, seconds": round(converted, 1),
        "convert / cp -r": round(converted / copied, 2),
        "convert / cp -r and sync": round(converted / durable, 2),
        "cp -r, CPU seconds": round(copied_cpu, 1),
        "convert, CPU seconds": round(converted_cpu, 1),
        "convert / cp -r, CPU seconds": round(converted_cpu / copied_cpu, 2),
        "peak RssAnon, MiB": peaks["RssAnon"],
        "peak VmHWM, MiB": peaks["VmHWM"],
    }


def children_seconds() -> float:
    """CPU seconds of the programs run so far; on a shared machine steadier than the clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_and_sample(command: list[str], interval: float = 0.02) -> dict[str, int]:
    """Run a program and return its peak memory in MiB.

    RssAnon is private memory, sampled every `interval` seconds; VmHWM is the kernel's peak of all
    resident pages. Raises UserError if the program fails.
    """
    peaks = {"RssAnon": 0, "VmHWM": 0}
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            break
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) // 1024)
        time.sleep(interval)
    if process.wait():
        raise UserError(f"{' '.join(command)} ended with status {process.returncode}")
    return peaks


if __name__ == "__main__":
    run_program(main)
