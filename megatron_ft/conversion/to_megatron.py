"""Write a Hugging Face model as a Megatron checkpoint: the work of convert/hf_to_megatron.py."""

import argparse
from pathlib import Path

from megatron_ft.called_as import as_called
from megatron_ft.conversion.converted import Converted
from megatron_ft.model.family import activation_of
from megatron_ft.model.shape import padded_vocab_size
from megatron_ft.printable import printable
from megatron_ft.progress import Progress
from megatron_ft.weights.checkpoint_tokenizer import unfit_tokenizer
from megatron_ft.weights.legacy_writer import legacy_bytes, write_legacy
from megatron_ft.weights.open import open_weights
from megatron_ft.weights.output_directory import new_directory
from megatron_ft.weights.tensor_blocks import dtype_name, dtype_to_write, total_bytes
from megatron_ft.weights.torch_dist_writer import write_torch_dist


def to_megatron(args: argparse.Namespace) -> Converted:
    """The program after its flags are parsed; `args` are these."""
    layout = {"tensor_parallel": args.tensor_parallel, "pipeline_parallel": args.pipeline_parallel}

    source = open_weights(args.load)
    if source.notice:
        print(source.notice)
    if line := source.override_activation(args.activation):
        print(line)
    for warning in unfit_tokenizer(source):
        print(printable(f"warning: {warning}"))
    if source.shape.exact_gelu and args.format == "legacy":
        print(
            f"{args.load}: activation_function is {activation_of(source.shape)!r}; the mtf branch computes the tanh GELU, "
            "with which StarCoder was trained, unless it is started with --no-bias-gelu-fusion "
            "(launch/finetune.py --engine mtf --activation gelu)"
        )
    dtype = dtype_to_write(source, args.dtype)
    rows = padded_vocab_size(source.shape.vocab_size, args.make_vocab_size_divisible_by, args.tensor_parallel)
    if args.format == "torch_dist":
        total = total_bytes(source, dtype, rows)
    else:
        total = legacy_bytes(source, dtype, **layout, padded_vocab=rows)
    with (
        new_directory(Path(args.save), needed=total, sources=[args.load], overwrite=args.overwrite) as directory,
        Progress("converting", total, "B") as progress,
    ):
        if args.format == "torch_dist":
            write_torch_dist(
                source, directory, dtype=dtype, **layout, padded_vocab=rows, vocab_size=source.shape.vocab_size,
                advance=progress.update,
            )  # fmt: skip
        else:
            write_legacy(
                source, directory, dtype=dtype, **layout, padded_vocab=rows,
                divisible_by=args.make_vocab_size_divisible_by, optim_ranks=args.data_parallel, advance=progress.update,
            )  # fmt: skip
    print(
        f"{args.save}: {args.format}, TP{args.tensor_parallel} PP{args.pipeline_parallel}, {total / 1e9:.2f} GB, "
        f"{dtype_name(dtype)}, {source.shape.vocab_size} embedding rows padded to {rows}"
    )
    print(as_called(f"check it: python convert/verify.py {args.load} {args.save}"))
    return Converted(Path(args.save), args.format, len(source.names()), total, dtype_name(dtype), rows)
