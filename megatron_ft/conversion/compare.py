"""Compare two checkpoints tensor by tensor: the work of convert/verify.py."""

import argparse
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ft.errors import UserError
from megatron_ft.files.atomic import replace_file
from megatron_ft.model.hf_names import hf_tensors, label
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.tensor_names import layer_of, name_of_parameter, tensor_shape
from megatron_ft.printable import printable
from megatron_ft.progress import Progress
from megatron_ft.tokenizer.spec import first_line
from megatron_ft.tokenizer.tokenizer import load_tokenizer
from megatron_ft.weights.adapters import MergedSource, open_adapters
from megatron_ft.weights.checkpoint_tokenizer import compare_tokenizers, tokenizer_path
from megatron_ft.weights.open import open_weights
from megatron_ft.weights.source import WeightSource
from megatron_ft.weights.tensor_blocks import dtype_name

DIFFERENT, ONLY_AFTER_ROUNDING = 1, 3  # exit statuses
BLOCK = 32 << 20  # bytes compared at once
MOST_PADDING = 128 * 16  # rows; padding is below 128 x tensor-parallel ranks
LOGITS_TOLERANCE = 1e-4  # fp32, other order of summation
ARCHITECTURE = (
    "num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "ffn_hidden_size", "num_query_groups",
    "layernorm_epsilon", "family", "rotary_base", "window_size", "untie_embeddings_and_output_weights", "exact_gelu",
)  # fmt: skip


@dataclass
class Comparison:
    """Result for the tensors of one kind, over all layers."""

    kind: str
    count: int = 0
    different: int = 0  # tensors of which a bit differs
    worst: float = 0.0  # largest absolute difference; 0 where only signs of zeros or NaNs differ
    where: str = ""  # the tensor that has it

    def is_equal(self, tolerance: float) -> bool:
        """Whether all are equal: exactly, or to a tolerance above 0."""
        return not self.different or 0 < tolerance >= self.worst


def compare(args: argparse.Namespace) -> int:
    """The program after its flags are parsed; `args` are these."""
    if args.report:
        check_report(Path(args.report))
    a, b = open_any(args.a, args.iteration_a, args.base), open_any(args.b, args.iteration_b, args.base)
    if args.base and not any(isinstance(source, MergedSource) for source in (a, b)):
        raise UserError(f"--base {args.base}: neither {args.a} nor {args.b} is a LoRA run; omit the flag")
    for letter, path, source in (("A", args.a, a), ("B", args.b, b)):
        print(f"{letter}  {path}: {source.kind}, {dtype_name(source.dtype)}, {source.shape.vocab_size} embedding rows")
        if source.notice:
            print(f"   {source.notice}")
    report: dict[str, Any] = {"a": str(args.a), "b": str(args.b), "equal": False, "equal_after_rounding": False}
    known = max((source.vocab_size for source in (a, b) if source.vocab_size is not None), default=None)
    differences = architecture_differences(a.shape, b.shape) + vocabulary_differences(a.shape, b.shape, known)
    rounded: dict[str, torch.dtype] = {}
    if differences:
        print("\n".join(differences))
        report["architecture"] = differences
    else:
        rows, rounded = compare_tensors(a, b)
        print_table(rows, args.tolerance)
        print_precisions(a, b, rounded)
        print_extra_rows(a, b, known)
        worst = max(rows, key=lambda row: row.worst)
        same = all(row.is_equal(args.tolerance) for row in rows)
        report |= {"largest_difference": worst.worst, "largest_difference_at": worst.where}
        report |= {"tensors": sum(row.count for row in rows), "tensors_rounded": len(rounded)}
        if args.logits:
            difference = compare_logits(args, a, b, rounded)
            report["largest_logit_difference"] = difference
            same &= difference <= LOGITS_TOLERANCE
        tokenizers, notices = compare_tokenizers(a, b)
        for line in [*(f"warning: {notice}" for notice in notices), *(f"tokenizer: {line}" for line in tokenizers)]:
            print(printable(line))
        if tokenizers:
            report["tokenizers"] = tokenizers
        same &= not tokenizers
        report |= {"equal": same and not rounded, "equal_after_rounding": same}
    if args.report:
        replace_file(Path(args.report).resolve(), (json.dumps(report, indent=2) + "\n").encode())
    if report["equal"]:
        print("equal")
        return 0
    if not report["equal_after_rounding"]:
        print("DIFFERENT")
        return DIFFERENT
    print(f"equal after rounding of {len(rounded)} tensors: one checkpoint has values that the other cannot hold")
    return 0 if args.allow_rounding else ONLY_AFTER_ROUNDING


def print_precisions(a: WeightSource, b: WeightSource, rounded: dict[str, torch.dtype]) -> None:
    """Print in how many tensors the precisions differ, and in how many of them the values do."""
    names = a.names()
    if others := sum(a.dtype_of(name) != b.dtype_of(name) for name in names) - len(rounded):
        print(f"{others} of {len(names)} tensors are in different precisions and have the same values")
    if rounded:
        to = " or ".join(sorted({dtype_name(dtype) for dtype in rounded.values()}))
        print(f"{len(rounded)} of {len(names)} tensors were compared after rounding to {to}")


def print_extra_rows(a: WeightSource, b: WeightSource, known: int | None) -> None:
    """Print how many embedding rows only one side has."""
    extra = abs(a.shape.vocab_size - b.shape.vocab_size)
    if extra and known:
        print(f"{extra} rows of vocabulary padding are on one side only and were left out")
    elif extra:
        print(
            f"{extra} embedding rows are on one side only and were left out; "
            "neither checkpoint records which rows are padding"
        )


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


def compare_tensors(a: WeightSource, b: WeightSource) -> tuple[list[Comparison], dict[str, torch.dtype]]:
    """One Comparison per kind of tensor, in the model's order, and the tensors that were rounded.

    Those are in different dtypes and have different values; the coarser of the dtypes, in which
    both sides were compared, by tensor name.
    """
    found: dict[str, Comparison] = {}
    rounded: dict[str, torch.dtype] = {}
    shape = a.shape.with_vocab(min(a.shape.vocab_size, b.shape.vocab_size))
    sizes = {name: tensor_shape(shape, name) for name in a.names()}
    total = sum(torch.Size(size).numel() * a.dtype.itemsize for size in sizes.values())
    with Progress("comparing", total, "B") as progress:
        for name, size in sizes.items():
            shown = label(shape, name)
            kind = shown if layer_of(name) is None else shown.replace(f".{layer_of(name)}.", ".*.", 1)
            row = found.setdefault(kind, Comparison(kind))
            row.count += 1
            worst, same = 0.0, True
            step = max(1, BLOCK // (torch.Size(size[1:]).numel() * a.dtype.itemsize))
            for first in range(0, size[0], step):
                x, y = (source.read_slice(name, 0, first, min(size[0], first + step)) for source in (a, b))
                progress.update(x.numel() * a.dtype.itemsize)
                if x.dtype != y.dtype:
                    wide = torch.promote_types(x.dtype, y.dtype)
                    if has_same_bits(x.to(wide), y.to(wide)):
                        continue
                    rounded[name] = max(x.dtype, y.dtype, key=lambda dtype: torch.finfo(dtype).eps)
                    x, y = x.to(rounded[name]), y.to(rounded[name])
                if not has_same_bits(x, y):
                    same, worst = False, max(worst, largest_difference(x, y))
            row.different += not same
            if not same and (worst > row.worst or not row.where):
                row.worst, row.where = worst, shown
    return list(found.values()), rounded


def has_same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors of one dtype are equal bit for bit: 0.0 is not -0.0, a NaN is itself."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    return torch.equal(x.contiguous().view(integer), y.contiguous().view(integer))


def largest_difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """Largest absolute difference; infinite where only one side has NaN or Inf."""
    difference = (x.float() - y.float()).abs()
    difference[(x == y) | (x.isnan() & y.isnan())] = 0
    return difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()


def print_table(rows: list[Comparison], tolerance: float) -> None:
    """Print one line per kind of tensor."""
    width = max(len(row.kind) for row in rows)
    for row in rows:
        result = "equal"
        if row.different:
            found = f"{row.worst:.3g}" if row.worst else "signs of zeros, or NaNs,"
            result = f"{found} at {row.where}" + (" (tolerated)" if row.is_equal(tolerance) else "")
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
    rows = min(a.shape.vocab_size, b.shape.vocab_size)
    length = min(128, a.shape.max_position_embeddings)
    ids: list[int] = []
    if path := next(filter(None, (args.tokenizer_file, tokenizer_path(a), tokenizer_path(b))), None):
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
    """Round the fp32 parameters whose names are in `rounded`, in place."""
    for name, parameter in weights:
        if name in rounded:
            parameter.copy_(parameter.to(rounded[name]))


def hugging_face_logits(source: WeightSource, tokens: torch.Tensor, rounded: dict[str, torch.dtype]) -> torch.Tensor:
    """Logits of transformers' model. Raises UserError when the tensors are not exactly its own."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{source.path}: transformers cannot load it ({first_line(error)})") from None
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise UserError(
                f"{source.path}: transformers reports {problem.replace('_', ' ')}: {sorted(info[problem])[:3]}"
            )
    of_hf = {tensor.name: name for name in source.names() for tensor in hf_tensors(source.shape, name)}
    round_weights(((of_hf.get(name), weight) for name, weight in model.named_parameters()), rounded)
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
        tied = not source.shape.untie_embeddings_and_output_weights
        named = ((name_of_parameter(name, tied=tied), weight) for name, weight in model.named_parameters())
        round_weights(named, rounded)
        return model.eval()(tokens, torch.arange(tokens.shape[1])[None], None)
    finally:
        parallel.destroy()
