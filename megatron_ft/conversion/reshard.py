"""Rewrite a Megatron checkpoint for another layout: the work of convert/reshard.py."""

import argparse
import shutil
from pathlib import Path

from megatron_ft.called_as import as_called
from megatron_ft.errors import UserError
from megatron_ft.files.checksum import describe_file
from megatron_ft.model.shape import padded_vocab_size
from megatron_ft.progress import Progress
from megatron_ft.tokenizer import files as tokenizer_files
from megatron_ft.weights.checkpoint_tokenizer import tokenizer_path
from megatron_ft.weights.directory import TRACKER, iteration_directory
from megatron_ft.weights.legacy_writer import legacy_bytes, write_legacy
from megatron_ft.weights.manifest import NAME, read_manifest
from megatron_ft.weights.open import open_weights
from megatron_ft.weights.output_directory import check_layout, new_directory
from megatron_ft.weights.source import WeightSource
from megatron_ft.weights.tensor_blocks import dtype_to_write
from megatron_ft.weights.torch_dist_reader import COMMON, TorchDistSource
from megatron_ft.weights.torch_dist_reshard import resharded_bytes, write_resharded
from megatron_ft.weights.vocabulary import check_vocabulary


def reshard(args: argparse.Namespace) -> None:
    """The program after its flags are parsed; `args` are these."""
    source = open_weights(args.load, args.iteration)
    if source.notice:
        print(source.notice)
    check_layout(source.shape, args.tensor_parallel, args.pipeline_parallel, args.make_vocab_size_divisible_by)
    rows = vocabulary_rows(source, args)
    if isinstance(source, TorchDistSource):
        total = reshard_torch_dist(source, rows, args)
    else:
        total = reshard_legacy(source, rows, args)
    print(
        f"{args.save}: {source.kind}, TP{args.tensor_parallel} PP{args.pipeline_parallel}, "
        f"{total / 1e9:.2f} GB, {rows} embedding rows"
    )
    print(as_called(f"check it: python convert/verify.py {args.load} {args.save}"))


def vocabulary_rows(source: WeightSource, args: argparse.Namespace) -> int:
    """Embedding rows in the new layout: the vocabulary where known, else all rows, padded again."""
    vocab = source.vocab_size or source.shape.vocab_size
    if args.vocab_size is not None:
        vocab = args.vocab_size
        if vocab < 1:
            raise UserError(f"--vocab-size {vocab}: must be at least 1; omit it to keep the checkpoint's")
        if warning := check_vocabulary(source, vocab, f"--vocab-size {vocab}"):
            print(warning)
    return padded_vocab_size(vocab, args.make_vocab_size_divisible_by, args.tensor_parallel)


def reshard_torch_dist(source: TorchDistSource, rows: int, args: argparse.Namespace) -> int:
    """Write weights, optimizer state and manifest under the same iteration; bytes of tensors."""
    tensor_parallel, pipeline_parallel = args.tensor_parallel, args.pipeline_parallel
    total = resharded_bytes(source.files, rows)
    with (
        new_directory(Path(args.save), needed=total, sources=[args.load], overwrite=args.overwrite) as directory,
        Progress("resharding", total, "B") as progress,
    ):
        place, tracked = directory / "release", "release"
        if isinstance(source.iteration, int):
            place, tracked = iteration_directory(directory, source.iteration), str(source.iteration)
        place.mkdir()
        write_resharded(
            source.files, place, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel,
            padded_vocab=rows, advance=progress.update,
        )  # fmt: skip
        if (source.path / NAME).is_file():
            manifest = read_manifest(source.path)
            manifest.layout = {"tensor": tensor_parallel, "pipeline": pipeline_parallel, "context": 1, "data": 1}
            manifest.files = {path.name: describe_file(path) for path in sorted(place.iterdir())}
            manifest.write(place)
            if kept := tokenizer_path(source):
                tokenizer_files.keep(kept, directory)
        elif (source.path / COMMON).is_file():  # since Megatron-Core 0.19 an object of the .distcp files instead
            shutil.copyfile(source.path / COMMON, place / COMMON)
        (directory / TRACKER).write_text(tracked, encoding="utf-8")
    return total


def reshard_legacy(source: WeightSource, rows: int, args: argparse.Namespace) -> int:
    """Write only the weights, as `release`; their bytes."""
    dtype = dtype_to_write(source, "keep")
    layout = {"tensor_parallel": args.tensor_parallel, "pipeline_parallel": args.pipeline_parallel}
    total = legacy_bytes(source, dtype, padded_vocab=rows, **layout)
    with (
        new_directory(Path(args.save), needed=total, sources=[args.load], overwrite=args.overwrite) as directory,
        Progress("resharding", total, "B") as progress,
    ):
        write_legacy(
            source, directory, dtype=dtype, padded_vocab=rows, divisible_by=args.make_vocab_size_divisible_by,
            optim_ranks=args.data_parallel, advance=progress.update, **layout,
        )  # fmt: skip
    return total
