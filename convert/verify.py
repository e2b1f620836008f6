"""Compare two checkpoints tensor by tensor, in any two formats and parallel layouts.

    python convert/verify.py runs/first runs/first-hf --logits

Exits with status 0 only when they are equal. Each may be a torch_dist or legacy Megatron directory
or a Hugging Face one. Rows of vocabulary padding that only one side has are left out and counted; a
missing row of a token makes the two different. Tensors in different precisions are compared after
rounding to the narrower one, and counted. --logits also runs both in fp32 on the CPU: Megatron
formats in the Megatron model, Hugging Face ones in transformers.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its files would hide others'
# One process on the CPU, whatever GPUs the machine or ranks the environment has, so that fp32
# results are comparable.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)

import argparse
import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.atomic import replace_file
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.tensor_names import WTE, core_to_hf, hf_shape, layer_of, weight_of
from megatron_ft.progress import Progress
from megatron_ft.weights.adapters import MergedSource, open_adapters
from megatron_ft.weights.open import open_weights
from megatron_ft.weights.source import WeightSource
from megatron_ft.weights.tensor_blocks import dtype_name

DIFFERENT = 1  # exit status
BLOCK = 32 << 20  # bytes compared at once
MOST_PADDING = 128 * 16  # rows; padding is below 128 x tensor-parallel ranks
LOGITS_TOLERANCE = 1e-4  # fp32, other order of summation
ARCHITECTURE = (
    "num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "ffn_hidden_size", "multi_query",
    "layernorm_epsilon", "exact_gelu",
)  # fmt: skip


@dataclass
class Comparison:
    """Result for the tensors of one kind, over all layers."""

    kind: str
    count: int = 0
    different: int = 0
    worst: float = 0.0  # largest absolute difference
    where: str = ""  # the tensor that has it


def main() -> int:
    """Parse the flags, compare, print and report; the exit status."""
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("a", metavar="A", help="first checkpoint")
    add("b", metavar="B", help="second checkpoint")
    add("--iteration-a", default="latest", help="iteration of A: a number, 'best', 'release' or 'latest'")
    add("--iteration-b", default="latest", help="iteration of B")
    add("--base", metavar="DIR", help="base weights of a LoRA run (default: where the run loaded them from)")
    add(
        "--tolerance", type=float, default=0.0, help="largest absolute difference of tensors that still counts as equal"
    )
    add("--logits", action="store_true", help="run both models in fp32 and compare their logits")
    add("--prompt", default="def print_hello_world():", help="text they run on, if a tokenizer is found")
    add("--tokenizer-file", metavar="FILE", help="tokenizer of the prompt (default: that of a Hugging Face side)")
    add("--report", metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()

    if args.report:
        check_report(Path(args.report))
    a, b = open_any(args.a, args.iteration_a, args.base), open_any(args.b, args.iteration_b, args.base)
    if args.base and not any(isinstance(source, MergedSource) for source in (a, b)):
        raise UserError(f"--base {args.base}: neither {args.a} nor {args.b} is a LoRA run; omit the flag")
    for letter, path, source in (("A", args.a, a), ("B", args.b, b)):
        print(f"{letter}  {path}: {source.kind}, {dtype_name(source.dtype)}, {source.shape.vocab_size} embedding rows")
        if source.notice:
            print(f"   {source.notice}")
    report: dict[str, Any] = {"a": str(args.a), "b": str(args.b), "equal": False}
    known = max((source.vocab_size for source in (a, b) if source.vocab_size is not None), default=None)
    differences = architecture_differences(a.shape, b.shape) + vocabulary_differences(a.shape, b.shape, known)
    if differences:
        print("\n".join(differences))
        report["architecture"] = differences
    else:
        rounded = rounded_dtypes(a, b)
        rows = compare_tensors(a, b, rounded)
        print_table(rows, args.tolerance)
        if rounded:
            to = " or ".join(sorted({dtype_name(dtype) for dtype in rounded.values()}))
            print(f"{len(rounded)} of {len(a.names())} tensors were compared after rounding to {to}")
        extra = abs(a.shape.vocab_size - b.shape.vocab_size)
        if extra and known:
            print(f"{extra} rows of vocabulary padding are on one side only and were left out")
        elif extra:
            print(
                f"{extra} embedding rows are on one side only and were left out; "
                "neither checkpoint records which rows are padding"
            )
        worst = max(rows, key=lambda row: row.worst)
        report |= {"equal": all(row.worst <= args.tolerance for row in rows), "largest_difference": worst.worst}
        report |= {"largest_difference_at": worst.where, "tensors": sum(row.count for row in rows)}
        report["tensors_rounded"] = len(rounded)
        if args.logits:
            difference = compare_logits(args, a, b, rounded)
            report["largest_logit_difference"] = difference
            report["equal"] &= difference <= LOGITS_TOLERANCE
    if args.report:
        replace_file(Path(args.report).resolve(), (json.dumps(report, indent=2) + "\n").encode())
    print("equal" if report["equal"] else "DIFFERENT")
    return 0 if report["equal"] else DIFFERENT


def check_report(path: Path) -> None:
    """Raise UserError when the report could not be written, before hours of comparing."""
    usable = path.is_file() or not path.exists()  # not a directory, not a device
    if not usable or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(
            f"--report {path}: cannot be written; give a file in an existing directory with write permission"
        )


def open_any(path: str, iteration: str, base: str | None) -> WeightSource:
    """Weights of a checkpoint; those of a LoRA run are merged with its base."""
    adapters = open_adapters(path, iteration)
    return MergedSource(adapters, base) if adapters else open_weights(path, iteration)


def architecture_differences(a: ModelShape, b: ModelShape) -> list[str]:
    """One line per number that makes two models different; dropout and initialization do not."""
    fields = [field for field in ARCHITECTURE if getattr(a, field) != getattr(b, field)]
    return [f"{field}: {getattr(a, field)} and {getattr(b, field)}" for field in fields]


def vocabulary_differences(a: ModelShape, b: ModelShape, known: int | None) -> list[str]:
    """One line per side that lacks rows for some of the `known` tokens.

    `known` is None when neither checkpoint records how many rows are padding.
    """
    if known is None:  # two vocabularies, or one and its padding
        more = abs(a.vocab_size - b.vocab_size) >= MOST_PADDING
        return [f"vocab_size: {a.vocab_size} and {b.vocab_size}"] if more else []
    return [
        f"vocab_size: {letter} has {shape.vocab_size} embedding rows for {known} tokens, {known - shape.vocab_size} are missing"
        for letter, shape in (("A", a), ("B", b))
        if shape.vocab_size < known
    ]


def rounded_dtypes(a: WeightSource, b: WeightSource) -> dict[str, torch.dtype]:
    """For tensors in different dtypes on the two sides, the coarser one, by tensor name."""
    pairs = {name: (a.dtype_of(name), b.dtype_of(name)) for name in a.names()}
    return {
        name: max(pair, key=lambda dtype: torch.finfo(dtype).eps) for name, pair in pairs.items() if len(set(pair)) > 1
    }


def compare_tensors(a: WeightSource, b: WeightSource, rounded: dict[str, torch.dtype]) -> list[Comparison]:
    """One Comparison per kind of tensor, in the model's order; those in `rounded` in that dtype."""
    found: dict[str, Comparison] = {}
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
                progress.update(x.numel() * a.dtype.itemsize)
                if name in rounded:
                    x, y = x.to(rounded[name]), y.to(rounded[name])
                worst = max(worst, largest_difference(x, y))
            row.different += worst > 0
            if worst > row.worst:
                row.worst, row.where = worst, name
    return list(found.values())


def largest_difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """Largest absolute difference; infinite where only one side has NaN or Inf."""
    if torch.equal(x, y):
        return 0.0
    difference = (x.float() - y.float()).abs()
    difference[(x == y) | (x.isnan() & y.isnan())] = 0
    return difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()


def print_table(rows: list[Comparison], tolerance: float) -> None:
    """Print one line per kind of tensor."""
    width = max(len(row.kind) for row in rows)
    for row in rows:
        result = "equal"
        if row.worst > 0:
            result = f"{row.worst:.3g} at {row.where}" + (" (tolerated)" if row.worst <= tolerance else "")
        print(f"  {row.kind:<{width}}  {row.count - row.different:>3} of {row.count:<3} equal   {result}")


def compare_logits(
    args: argparse.Namespace, a: WeightSource, b: WeightSource, rounded: dict[str, torch.dtype]
) -> float:
    """Largest difference of the two models' logits on the prompt, over the tokens that both have.

    Tensors in `rounded` are rounded to that dtype on both sides, so that the models are compared
    and not their precisions.
    """
    tokens, text = prompt_tokens(args, a, b)
    logits = [run_model(source, tokens, rounded) for source in (a, b)]
    columns = min(one.shape[-1] for one in logits)
    first, second = (one[..., :columns] for one in logits)
    difference = largest_difference(first, second)
    agree = (first.argmax(-1) == second.argmax(-1)).float().mean().item()
    print(
        f"logits on {text} ({tokens.shape[1]} tokens){', both with the rounded weights' if rounded else ''}: "
        f"largest difference {difference:.2e} (allowed {LOGITS_TOLERANCE:.0e}), "
        f"same next token at {agree:.1%} of positions"
    )
    return difference


def prompt_tokens(args: argparse.Namespace, a: WeightSource, b: WeightSource) -> tuple[torch.Tensor, str]:
    """Token ids [1, s] (s at most 128) and what they are.

    They are the prompt if there is a tokenizer, padded with random ids of the vocabulary. Raises
    UserError when the tokenizer has ids beyond the vocabulary.
    """
    from megatron_ft.tokenizer.tokenizer import load_tokenizer

    rows = min(a.shape.vocab_size, b.shape.vocab_size)
    length = min(128, a.shape.max_position_embeddings)
    places = [args.tokenizer_file, *(source.path for source in (a, b) if (source.path / "tokenizer.json").is_file())]
    ids: list[int] = []
    if path := next(filter(None, places), None):
        tokenizer = load_tokenizer(path)
        ids = tokenizer.encode(args.prompt)[:length]
        if any(token >= rows for token in ids):
            raise UserError(
                f"{tokenizer.path}: its ids exceed the models' {rows} embedding rows; give the models' own tokenizer"
            )
    filling = torch.randint(rows, (length - len(ids),), generator=torch.Generator().manual_seed(1234))
    text = "the prompt and random tokens" if ids else "random tokens (no tokenizer found)"
    return torch.cat([torch.tensor(ids, dtype=torch.long), filling])[None], text


def run_model(source: WeightSource, tokens: torch.Tensor, rounded: dict[str, torch.dtype]) -> torch.Tensor:
    """fp32 logits [1, s, vocabulary], of transformers for a Hugging Face directory, else ours."""
    run = hugging_face_logits if source.kind == "Hugging Face" else megatron_logits
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return run(source, tokens, rounded)


def round_weights(weights: Iterable[tuple[str | None, torch.nn.Parameter]], rounded: dict[str, torch.dtype]) -> None:
    """Round the fp32 parameters whose HF names are in `rounded`, in place."""
    for name, parameter in weights:
        if name in rounded:
            parameter.copy_(parameter.to(rounded[name]))


def hugging_face_logits(source: WeightSource, tokens: torch.Tensor, rounded: dict[str, torch.dtype]) -> torch.Tensor:
    """Logits of transformers' model. Raises UserError when the tensors are not exactly its own."""
    from transformers import GPTBigCodeForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    loaded: Any = GPTBigCodeForCausalLM.from_pretrained(
        source.path, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise UserError(
                f"{source.path}: transformers reports {problem.replace('_', ' ')}: {sorted(info[problem])[:3]}"
            )
    round_weights(model.named_parameters(), rounded)
    return model.eval()(tokens).logits


def megatron_logits(source: WeightSource, tokens: torch.Tensor, rounded: dict[str, torch.dtype]) -> torch.Tensor:
    """Logits of Megatron-Core's model in this one process."""
    from megatron_ft.checkpoint.load_weights import load_weights
    from megatron_ft.config.config import Config
    from megatron_ft.engine import parallel
    from megatron_ft.engine.device import set_up_device
    from megatron_ft.engine.model import build_model

    config = Config().with_flags(transformer_impl="local", global_batch_size=1)
    set_up_device(config)
    parallel.initialize(config)
    try:
        [model] = build_model(config, source.shape, source.shape.vocab_size)
        load_weights(source, [model])
        round_weights(((core_to_hf(name), weight) for name, weight in model.named_parameters()), rounded)
        return model.eval()(tokens, torch.arange(tokens.shape[1])[None], None)
    finally:
        parallel.destroy()


if __name__ == "__main__":
    run_program(main)
