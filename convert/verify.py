"""Compare two checkpoints tensor by tensor, in any two formats and parallel layouts: status 0 only when they are equal.

    python convert/verify.py runs/first runs/first-hf --logits

Each may be a torch_dist or legacy Megatron directory or a Hugging Face one. Tied heads and vocabulary padding are understood:
rows that only one side has are left out and counted. fp32 against bf16 or fp16 is compared after rounding.
--logits also runs both, Megatron formats by the Megatron model and Hugging Face ones by transformers, in fp32 on the CPU.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its files would hide others'
# One process on the CPU, whatever GPUs the machine or ranks the environment has: fp32 results have to be comparable.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)

import json
import warnings
from dataclasses import dataclass

import torch

from megatron_ft.checkpoint.adapter_weights import MergedSource, open_adapters
from megatron_ft.checkpoint.names import WTE, hf_shape, layer_of, weight_of
from megatron_ft.checkpoint.weights import WeightSource, open_weights
from megatron_ft.errors import UserError, run_program
from megatron_ft.flags import Help, Parser
from megatron_ft.models import ModelShape
from megatron_ft.progress import Progress

DIFFERENT = 1  # exit status
BLOCK = 32 << 20  # bytes compared at once
MOST_PADDING = 128 * 16  # rows; padding is below 128 x tensor-parallel ranks
LOGITS_TOLERANCE = 1e-4  # fp32, other order of summation
ARCHITECTURE = (
    "num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "ffn_hidden_size", "multi_query",
    "layernorm_epsilon",
)  # fmt: skip


@dataclass
class Comparison:
    """What the tensors of one kind (over all layers) showed: `worst` is the largest absolute difference, at tensor `where`."""

    kind: str
    count: int = 0
    different: int = 0
    worst: float = 0.0
    where: str = ""


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("a", metavar="A", help="first checkpoint")
    add("b", metavar="B", help="second checkpoint")
    add("--iteration-a", default="latest", help="iteration of A: a number, 'release' or 'latest'")
    add("--iteration-b", default="latest", help="iteration of B")
    add("--tolerance", type=float, default=0.0, help="largest difference of tensors that still counts as equal")
    add("--logits", action="store_true", help="run both models in fp32 and compare their logits")
    add("--prompt", default="def print_hello_world():", help="text they run on, where a tokenizer is found")
    add("--tokenizer-file", metavar="FILE", help="tokenizer of the prompt; that of a Hugging Face side when not given")
    add("--report", metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()

    a, b = open_any(args.a, args.iteration_a), open_any(args.b, args.iteration_b)
    for letter, path, source in (("A", args.a, a), ("B", args.b, b)):
        print(
            f"{letter}  {path}: {source.kind}, {str(source.dtype).removeprefix('torch.')}, {source.shape.vocab_size} embedding rows"
        )
    report = {"a": str(args.a), "b": str(args.b), "equal": False}
    differences = architecture_differences(a.shape, b.shape)
    if differences:
        print("\n".join(differences))
        report["architecture"] = differences
    else:
        rows = compare_tensors(a, b)
        print_table(rows, args.tolerance)
        extra = abs(a.shape.vocab_size - b.shape.vocab_size)
        if extra:
            print(f"{extra} rows of vocabulary padding are on one side only and were left out")
        worst = max(rows, key=lambda row: row.worst)
        report |= {"equal": all(row.worst <= args.tolerance for row in rows), "largest_difference": worst.worst}
        report |= {"largest_difference_at": worst.where, "tensors": sum(row.count for row in rows)}
        if args.logits:
            difference = compare_logits(args, a, b)
            report["largest_logit_difference"] = difference
            report["equal"] &= difference <= LOGITS_TOLERANCE
    if args.report:
        Path(args.report).write_text(json.dumps(report, indent=2) + "\n")
    print("equal" if report["equal"] else "DIFFERENT")
    return 0 if report["equal"] else DIFFERENT


def open_any(path: str, iteration: str) -> WeightSource:
    """Weights of a checkpoint, a LoRA run's merged with its base."""
    adapters = open_adapters(path, iteration)
    return MergedSource(adapters) if adapters else open_weights(path, iteration)


def architecture_differences(a: ModelShape, b: ModelShape) -> list[str]:
    """A line for each number that makes two models different ones; dropout and initialisation do not."""
    fields = [field for field in ARCHITECTURE if getattr(a, field) != getattr(b, field)]
    if abs(a.vocab_size - b.vocab_size) >= MOST_PADDING:  # two vocabularies, not one and its padding
        fields.append("vocab_size")
    return [f"{field}: {getattr(a, field)} and {getattr(b, field)}" for field in fields]


def compare_tensors(a: WeightSource, b: WeightSource) -> list[Comparison]:
    """One Comparison for each kind of tensor, in the order of the model."""
    found: dict[str, Comparison] = {}
    rounded = a.dtype if b.dtype == torch.float32 else b.dtype
    sizes = {name: hf_shape(a.shape, name) for name in a.names()}
    sizes[WTE] = (min(a.shape.vocab_size, b.shape.vocab_size), a.shape.hidden_size)
    total = sum(torch.Size(size).numel() * a.dtype.itemsize for size in sizes.values())
    with Progress("comparing", total, "B") as progress:
        for name, size in sizes.items():
            kind = name if layer_of(name) is None else f"transformer.h.*.{weight_of(name).hf}"
            row = found.setdefault(kind, Comparison(kind))
            row.count += 1
            worst = 0.0
            step = max(1, BLOCK // (torch.Size(size[1:]).numel() * a.dtype.itemsize))
            for first in range(0, size[0], step):
                x, y = (source.read_slice(name, 0, first, min(size[0], first + step)) for source in (a, b))
                worst = max(worst, largest_difference(x, y, rounded))
                progress.update(x.nbytes)
            row.different += worst > 0
            if worst > row.worst:
                row.worst, row.where = worst, name
    return list(found.values())


def largest_difference(x: torch.Tensor, y: torch.Tensor, rounded: torch.dtype) -> float:
    """Largest absolute difference, infinite where only one side is not a number."""
    if x.dtype != y.dtype:
        x, y = x.to(rounded), y.to(rounded)
    if torch.equal(x, y):
        return 0.0
    difference = (x.float() - y.float()).abs()
    difference[x.isnan() & y.isnan()] = 0
    return difference.nan_to_num(nan=float("inf")).max().item()


def print_table(rows: list[Comparison], tolerance: float) -> None:
    width = max(len(row.kind) for row in rows)
    for row in rows:
        said = (
            "equal"
            if row.worst == 0
            else f"{row.worst:.3g} at {row.where}" + (" (tolerated)" if row.worst <= tolerance else "")
        )
        print(f"  {row.kind:<{width}}  {row.count - row.different:>3} of {row.count:<3} equal   {said}")


def compare_logits(args, a: WeightSource, b: WeightSource) -> float:
    """Largest difference of the two models' logits on the prompt, over the tokens that both have."""
    tokens, said = prompt_tokens(args, a, b)
    logits = [run_model(source, tokens) for source in (a, b)]
    columns = min(one.shape[-1] for one in logits)
    first, second = (one[..., :columns] for one in logits)
    difference = largest_difference(first, second, torch.float32)
    agree = (first.argmax(-1) == second.argmax(-1)).float().mean().item()
    print(
        f"logits on {said} ({tokens.shape[1]} tokens): largest difference {difference:.2e}"
        f" (allowed {LOGITS_TOLERANCE:.0e}), the same next token at {agree:.1%} of positions"
    )
    return difference


def prompt_tokens(args, a: WeightSource, b: WeightSource) -> tuple[torch.Tensor, str]:
    """Token ids [1, s], s at most 128: the prompt where there is a tokenizer, filled up with random ids of the vocabulary."""
    from megatron_ft.tokenizer import load_tokenizer

    rows = min(a.shape.vocab_size, b.shape.vocab_size)
    length = min(128, a.shape.max_position_embeddings)
    places = [args.tokenizer_file, *(source.path for source in (a, b) if (source.path / "tokenizer.json").is_file())]
    tokenizer = next((load_tokenizer(place) for place in places if place), None)
    ids = tokenizer.encode(args.prompt)[:length] if tokenizer else []
    if any(token >= rows for token in ids):
        raise UserError(
            f"{tokenizer.path}: its ids exceed the models' {rows} embedding rows; give the models' own tokenizer"
        )
    filling = torch.randint(rows, (length - len(ids),), generator=torch.Generator().manual_seed(1234))
    said = "the prompt and random tokens" if ids else "random tokens (no tokenizer found)"
    return torch.cat([torch.tensor(ids, dtype=torch.long), filling])[None], said


def run_model(source: WeightSource, tokens: torch.Tensor) -> torch.Tensor:
    """fp32 logits [1, s, rows]: Hugging Face directories by transformers, everything else by Megatron-Core."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return hugging_face_logits(source, tokens) if source.kind == "Hugging Face" else megatron_logits(source, tokens)


def hugging_face_logits(source: WeightSource, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import GPTBigCodeForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model, info = GPTBigCodeForCausalLM.from_pretrained(
        source.path, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise UserError(
                f"{source.path}: transformers reports {problem.replace('_', ' ')}: {sorted(info[problem])[:3]}"
            )
    return model.eval()(tokens).logits


def megatron_logits(source: WeightSource, tokens: torch.Tensor) -> torch.Tensor:
    from megatron_ft.checkpoint.load_weights import load_weights
    from megatron_ft.engine import parallel
    from megatron_ft.engine.device import set_up_device
    from megatron_ft.engine.model import build_model
    from megatron_ft.flags import build_parser

    flags = build_parser().parse_args(["--transformer-impl", "local", "--global-batch-size", "1"])
    flags.world_size = 1
    set_up_device(flags)
    parallel.initialize(flags)
    try:
        [model] = build_model(flags, source.shape, source.shape.vocab_size)
        load_weights(source, [model])
        return model.eval()(tokens, torch.arange(tokens.shape[1])[None], None)
    finally:
        parallel.destroy()


if __name__ == "__main__":
    run_program(main)
