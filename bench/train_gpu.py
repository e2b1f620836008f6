"""Time training on one GPU with packed sequences, and with a dense attention mask instead.

    python bench/train_gpu.py

Needs one GPU and no data; without a GPU it prints one line and exits with status 0. The sequences
have 8192 tokens and documents of about 500. StarCoderBase-1B in bf16 is run with packed attention,
as is and with dropout 0.1, as in the published configurations; with Transformer Engine's layers,
where it is installed; with the [s, s] mask through torch's fused kernel; and with the mtf branch's
method: plain matrix products with mask and softmax stored, recomputed in backward. 3B and 7B run
with packed attention, with full recompute and the optimizer in host memory where they need it. The
table shows MFU, tokens/s and memory. --profile prints where the time of three packed steps of 1B
goes: kernels by kind, and gaps between them.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's tokenize.py would hide Python's

import argparse
import json
import random
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass

import psutil
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ft.config.arguments import parse_args
from megatron_ft.config.config import Config
from megatron_ft.config.parser import Help, Parser
from megatron_ft.data.batch import Batch
from megatron_ft.engine import device
from megatron_ft.errors import UserError, run_program
from megatron_ft.model import cost
from megatron_ft.model.cost import GIB
from megatron_ft.model.families import PRESETS


@dataclass
class Result:
    """One line of the table."""

    model: str
    path: str
    seconds: float  # per step
    tokens: int  # token positions per step
    flops: float  # per step, without recomputation
    bytes: int  # peak allocated
    loss: float  # of the first step


def main() -> int | None:
    """Run all models and paths, then print the table; status 1 if one failed, except for memory."""
    parser = Parser(prog="bench/train_gpu.py", description=__doc__, formatter_class=Help)
    parser.add_argument(
        "--models", nargs="+", default=["1b", "3b", "7b"], choices=["1b", "3b", "7b"], help="models to run"
    )
    parser.add_argument("--paths", nargs="+", choices=list(PATHS), help="how to run them (default: all)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two warm-up steps")
    parser.add_argument("--micro-batches", type=int, default=4, help="sequences per step")
    parser.add_argument("--seq-length", type=int, default=8192, help="tokens per sequence")
    parser.add_argument("--document-tokens", type=int, default=500, help="mean document length in tokens")
    parser.add_argument("--profile", metavar="FILE", help="also profile three steps of 1b, all kernels to FILE (JSON)")
    parser.add_argument(
        "--result", metavar="FILE", help="measure the one model and path in this process and write the result to FILE"
    )
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no GPU found; run `python bench/train_gpu.py` on a machine with one")
        return None
    if flags.result:
        Path(flags.result).write_text(json.dumps(attempt(flags.models[0], flags.paths[0], flags)), encoding="utf-8")
        return None
    gpu = cost.find_gpu(torch.cuda.get_device_name())
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; sequences of {flags.seq_length} tokens, "
        f"documents of about {flags.document_tokens}, {flags.micro_batches} sequences per step",
        flush=True,
    )
    results, notes = [], []
    for model in flags.models:
        for path in paths_of(model):
            if flags.paths and path not in flags.paths:
                continue
            found = attempt_in_a_process(model, path, flags)
            if isinstance(found, Result):
                results.append(found)
                print(line_of(found, gpu), flush=True)
            else:
                notes.append(found)
                print(found, flush=True)
    print()
    print_table(results, notes, gpu)
    if flags.profile:
        print_profile(flags)
    return any("FAILED" in note for note in notes)


# Training flags of each way to run a model.
PATHS = {
    "packed": "",
    "packed, dropout 0.1": "--hidden-dropout 0.1 --attention-dropout 0.1",
    "packed, Transformer Engine": "--transformer-impl transformer_engine",
    "dense mask, fused": "",
    "dense mask, plain": "",
    "packed, full recompute": "--recompute-granularity full",
    "packed, full recompute, optimizer on host": "--recompute-granularity full --optimizer-cpu-offload",
}


def paths_of(model: str) -> list[str]:
    """How `model` is run: 1b to compare the paths, the larger ones to see what fits."""
    names = list(PATHS)
    return names[:6] if model == "1b" else [names[0], *names[5:]]


def attempt_in_a_process(model: str, path: str, flags: argparse.Namespace) -> Result | str:
    """Measure in a separate process: its failure affects no other, and its memory is released."""
    shape, free = PRESETS[f"starcoderbase-{model}"], psutil.virtual_memory().available
    layout = cost.Layout(precision="bf16", optimizer_cpu_offload="--optimizer-cpu-offload" in PATHS[path])
    needed = cost.host_bytes(shape, shape.vocab_size, layout, 0)
    if needed > free:
        return f"{model} {path}: skipped, needs {needed / GIB:.0f} GiB of host memory, {free / GIB:.0f} GiB free"
    with tempfile.TemporaryDirectory() as directory:
        line = Path(directory) / "line.json"
        words = [sys.executable, __file__, "--models", model, "--paths", path, "--result", str(line)]
        for name in ("steps", "micro_batches", "seq_length", "document_tokens"):
            words += [f"--{name.replace('_', '-')}", str(getattr(flags, name))]
        status = subprocess.run(words).returncode
        if not line.exists():
            return f"{model} {path}: FAILED, exit status {status}"
        found = json.loads(line.read_text(encoding="utf-8"))
    return Result(**found) if isinstance(found, dict) else found


def attempt(model: str, path: str, flags: argparse.Namespace) -> dict | str:
    """Measure one path: the fields of a Result, or the reason why there is none."""
    try:
        return asdict(measure(f"starcoderbase-{model}", path, flags))
    except torch.OutOfMemoryError:
        return f"{model} {path}: does not fit"
    except UserError as error:  # Transformer Engine cannot be used
        return f"{model} {path}: skipped, {error}"
    except Exception as error:  # e.g. a missing kernel; the other paths still run
        traceback.print_exc()
        return f"{model} {path}: FAILED, {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def measure(preset: str, path: str, flags: argparse.Namespace) -> Result:
    """Take two warm-up steps and `flags.steps` timed ones."""
    step, config, attended = training_step(preset, path, flags)
    first_loss = step()
    step()
    seconds = timed(step, flags.steps)
    tokens = config.data.seq_length * flags.micro_batches
    flops = tokens * cost.flops_per_token(config.shape, attended)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return Result(preset.removeprefix("starcoderbase-"), path, seconds, tokens, flops, peak, first_loss)


def training_step(preset: str, path: str, flags: argparse.Namespace) -> tuple[Callable[[], float], Config, float]:
    """A function that takes one step of a new model and returns its loss; the flags; the mean
    number of tokens that a token attends to, on average over all."""
    from megatron_ft.engine.model import build_model, wrap_for_data_parallel
    from megatron_ft.engine.optimizer import build_optimizer
    from megatron_ft.engine.parallel import initialize
    from megatron_ft.engine.step import forward_backward
    from megatron_ft.training.batches import micro_batch_from

    with tempfile.NamedTemporaryFile() as unread:
        words = f"--preset {preset} --bf16 --transformer-impl local --seq-length {flags.seq_length} --global-batch-size {flags.micro_batches} {PATHS[path]}"
        words = f"--hidden-dropout 0 --attention-dropout 0 {words} --train-iters 1 --data-prefix none --tokenizer-file {unread.name}"
        config = parse_args(words.split())
    where = device.set_up_device()
    initialize(config)
    vocabulary = config.shape.vocab_size
    chunks = build_model(config, config.shape, vocabulary)
    if path in DENSE:
        for module in chunks[0].modules():
            if hasattr(module, "core_attention"):
                module.core_attention = DENSE[path]()
    model = wrap_for_data_parallel(config, chunks)
    optimizer = build_optimizer(config, model)
    rows = [packed_row(config, flags.document_tokens, seed) for seed in range(flags.micro_batches)]
    micros = [to_device(micro_batch_from(row, row.loss_mask, "token", [i]), where) for i, row in enumerate(rows)]
    weight = sum(micro.weight for micro in micros)

    def step() -> float:
        losses = forward_backward(config, model, optimizer, micros, weight, vocabulary)
        optimizer.step()
        return losses.sum().item()

    tokens = config.data.seq_length * flags.micro_batches
    return step, config, sum(micro.squared_lengths for micro in micros) / tokens


def timed(step: Callable, count: int) -> float:
    """Mean seconds of `count` steps, including the device's work."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(count):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / count


# Kinds of kernels by parts of their names, the first that matches.
KINDS = {
    "attention": ("flash", "fmha"),
    "matrix products": ("gemm", "nvjet", "cutlass", "sm90_xmma", "splitk"),
    "optimizer, clipping": ("multi_tensor", "adam", "foreach"),
    "cross entropy": ("amax", "exp_", "_log_", "arange_eq", "gather"),
    "layer norm": ("layer_norm", "layernorm", "gammabeta"),
    "copies": ("memcpy", "memset", "copy"),
}


def print_profile(flags: argparse.Namespace) -> None:
    """Profile three steps of 1b on the packed path; print the time per step by kind and kernel."""
    from torch.profiler import ProfilerActivity, profile

    step, _, _ = training_step("starcoderbase-1b", "packed", flags)
    step()
    step()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        begun = time.perf_counter()
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - begun
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names: dict[str, list[float]] = {}
    for event in kernels:
        entry = names.setdefault(event.name, [0, 0.0])
        entry[0] += 1 / 3
        entry[1] += event.time_range.elapsed_us() / 3e3
    by_time = sorted(names.items(), key=lambda item: -item[1][1])
    Path(flags.profile).write_text(
        json.dumps([[name, *numbers] for name, numbers in by_time], indent=1), encoding="utf-8"
    )
    kinds: dict[str, float] = {}
    for name, (_, spent) in names.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + spent
    busy = sum(kinds.values())
    print(f"profile of a step: {elapsed / 3 * 1e3:.1f} ms, {busy:.1f} ms of it in kernels")
    for kind, spent in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"{kind:<24}{spent:>9.2f} ms{100 * spent / busy:>7.1f}%")
    for name, (count, spent) in by_time[:25]:
        print(f"{spent:>9.2f} ms {count:>6.0f}x  {name[:110]}")


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "elementwise, other")


def packed_row(config: Config, document_tokens: int, seed: int) -> Batch:
    """One full sequence of documents of about `document_tokens` tokens, with loss everywhere."""
    draw, lengths = random.Random(seed), []
    while (left := config.data.seq_length - sum(lengths)) > 0:
        lengths.append(min(left, max(16, int(draw.gauss(document_tokens, document_tokens / 3)))))
    tokens = torch.randint(
        config.shape.vocab_size, (1, config.data.seq_length + 1), generator=torch.Generator().manual_seed(seed)
    )
    return Batch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        loss_mask=torch.ones(1, config.data.seq_length),
        segment_ids=torch.cat([torch.full((n,), i + 1, dtype=torch.int32) for i, n in enumerate(lengths)])[None],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
    )


def to_device(micro, where: torch.device):
    """Move the micro-batch's tensors to a device."""
    for name in ("tokens", "labels", "position_ids", "loss_mask", "weights", "cu_seqlens"):
        setattr(micro, name, getattr(micro, name).to(where))
    return micro


class DenseMask(torch.nn.Module):
    """Attention with the [t, t] mask that separates documents, through torch's fused kernel."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args, packed_seq_params=None, **kwargs) -> Tensor:
        """query [t, n, d], key and value [t, 1, d]; returns [t, n * d]."""
        mask = document_mask(packed_seq_params.cu_seqlens_q, len(query))
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        return (
            self.attend(query, key.expand_as(query), value.expand_as(query), mask).squeeze(0).transpose(0, 1).flatten(1)
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """All [1, n, t, d]; `mask` bool [t, t], True where a query attends to a key."""
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class DenseMaskPlain(DenseMask):
    """As the mtf branch: plain products and a stored softmax, recomputed in backward."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """As above."""
        return checkpoint(self.products, query, key, value, mask, use_reentrant=False)

    def products(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """softmax(q k^T) v with the scores [1, n, t, t] stored, softmax in fp32."""
        scores = torch.matmul(query, key.transpose(-1, -2)) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype), value)


DENSE = {"dense mask, fused": DenseMask, "dense mask, plain": DenseMaskPlain}


def document_mask(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """bool [tokens, tokens]: True for this and earlier positions of the same document."""
    positions = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.bucketize(positions, cu_seqlens[1:], right=True)
    return (document[:, None] == document[None]) & (positions[:, None] >= positions[None])


def line_of(result: Result, gpu: cost.Gpu | None, packed: Result | None = None) -> str:
    """One line of the table; with `packed`, its speed relative to that result."""
    rate = result.flops / result.seconds
    mfu = f"{100 * rate / gpu.peak_flops('bf16'):.1f}" if gpu else "?"
    ratio = f"{result.seconds / packed.seconds:.2f}x" if packed else ""
    return (
        f"{result.model:<6}{result.path:<43}{result.seconds:>8.3f}{result.tokens / result.seconds:>10,.0f}{rate / 1e12:>9.1f}"
        f"{mfu:>7}{result.bytes / GIB:>7.1f}{result.loss:>9.4f}{ratio:>11}"
    )


def print_table(results: list[Result], notes: list[str], gpu: cost.Gpu | None) -> None:
    """All results, with their ratios to the packed path of the same model, and the notes."""
    print(
        f"{'model':<6}{'path':<43}{'step s':>8}{'tokens/s':>10}{'TFLOP/s':>9}{'MFU %':>7}{'GiB':>7}{'loss':>9}{'packed is':>11}"
    )
    for result in results:
        packed = next((p for p in results if p.model == result.model and p.path == "packed"), None)
        print(line_of(result, gpu, packed))
    for note in notes:
        print(note)


if __name__ == "__main__":
    run_program(main)
