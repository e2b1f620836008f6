"""Write a Megatron checkpoint as a Hugging Face directory or PEFT adapter: the work of
convert/megatron_to_hf.py."""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_ft.called_as import as_called
from megatron_ft.config.config import ENTRIES
from megatron_ft.conversion.converted import Converted
from megatron_ft.errors import UserError
from megatron_ft.model.families import family_of
from megatron_ft.model.peft_tensors import hf_targets
from megatron_ft.printable import counted, printable
from megatron_ft.progress import Progress
from megatron_ft.tokenizer.consumer import check_ids_fit
from megatron_ft.tokenizer.export import write_tokenizer
from megatron_ft.tokenizer.kinds import Tokenizer
from megatron_ft.tokenizer.tokenizer import load_tokenizer
from megatron_ft.weights.adapters import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    AdapterSource,
    MergedSource,
    open_adapters,
)
from megatron_ft.weights.checkpoint_tokenizer import given_path, stored_fingerprint, tokenizer_path
from megatron_ft.weights.hf_files import (
    card_args,
    parse_size,
    write_configs,
    write_model_card,
)
from megatron_ft.weights.hf_writer import write_safetensors, write_tensors
from megatron_ft.weights.open import open_weights
from megatron_ft.weights.output_directory import new_directory
from megatron_ft.weights.source import WeightSource
from megatron_ft.weights.tensor_blocks import DTYPES, dtype_name, dtype_to_write, total_bytes
from megatron_ft.weights.vocabulary import check_vocabulary


def to_hf(args: argparse.Namespace) -> Converted:
    """The program after its flags are parsed; `args` are these."""
    adapters = open_adapters(args.load, args.iteration)
    if adapters and not args.merge_lora:
        return write_adapter(adapters, args)
    if args.merge_lora and not adapters:
        raise UserError(f"--merge-lora: {args.load} is a complete model without adapters; omit the flag")
    source = MergedSource(adapters, args.base) if adapters else open_weights(args.load, args.iteration)
    if source.notice:
        print(source.notice)
    if line := source.override_activation(args.activation):
        print(line)
    found = find_tokenizer(source, args)
    rows = vocabulary_rows(source, found.tokenizer if found else None, args.keep_padding)
    threads = torch.get_num_threads()
    if not adapters:
        torch.set_num_threads(1)  # the work is copying: more threads mostly wait, and slow the writer
    try:
        return write_model(source, found, rows, args)
    finally:
        torch.set_num_threads(threads)


class FoundTokenizer(NamedTuple):
    """A tokenizer and the file or Hugging Face directory that it is from."""

    path: Path
    tokenizer: Tokenizer


def find_tokenizer(source: WeightSource | AdapterSource, args: argparse.Namespace) -> FoundTokenizer | None:
    """The tokenizer given by flags, else the run's own, else None with a message.

    The run's own is the copy next to its checkpoints, or the file it was started with.
    """
    path = args.tokenizer_file or args.tokenizer_from
    if not path:
        given, digest = given_path(source), stored_fingerprint(source)
        path = tokenizer_path(source)
        if given and not path:
            what = f"the run's tokenizer, {digest}," if digest else "the run's tokenizer"
            print(
                printable(
                    f"{what} is neither next to the checkpoint nor at {given}; "
                    "no tokenizer files will be written (--tokenizer-file adds them)"
                )
            )
    return FoundTokenizer(Path(path), load_tokenizer(path)) if path else None


def vocabulary_rows(source: WeightSource, tokenizer: Tokenizer | None, keep_padding: bool) -> int:
    """Embedding rows to write: those of the tokenizer, else of the checkpoint's vocabulary.

    Raises UserError when the tokenizer is not the model's (`check_vocabulary`).
    """
    stored = source.shape.vocab_size
    if tokenizer and not (keep_padding and tokenizer.vocab_size <= stored):
        if warning := check_vocabulary(source, tokenizer.vocab_size, str(tokenizer.path)):
            print(warning)
    if keep_padding:
        return stored
    if tokenizer:
        return tokenizer.vocab_size
    if source.vocab_size is None:
        print(f"without a tokenizer all {stored} embedding rows are kept, padding included (--tokenizer-file cuts it)")
        return stored
    return source.vocab_size


def write_model(source: WeightSource, found: FoundTokenizer | None, rows: int, args: argparse.Namespace) -> Converted:
    """Write the weights, configurations, tokenizer files and model card."""
    dtype = dtype_to_write(source, args.dtype)
    output, nbytes = Path(args.output), total_bytes(source, dtype, rows)
    shape = source.shape.with_vocab(rows)
    facts = {
        "from": source.kind + (f", iteration {source.iteration}" if source.iteration is not None else ""),
        "precision": dtype_name(dtype),
        "embedding rows": f"{rows} of {source.shape.vocab_size}",
    }
    sources = [args.load, found and found.path, source.base.path if isinstance(source, MergedSource) else None]
    with new_directory(output, needed=nbytes, sources=sources, overwrite=args.overwrite) as directory:
        write_configs(
            directory, shape, dtype, found.tokenizer.config_ids if found else source.special_ids,
            found.tokenizer.generation_ids if found else source.special_ids,
        )  # fmt: skip
        if found:
            for line in write_tokenizer(directory, found.path, found.tokenizer, shape.max_position_embeddings):
                print(printable(line))
        with Progress("converting", nbytes, "B") as progress:
            files = write_safetensors(
                source, directory, dtype=dtype, vocab_rows=rows, max_shard_bytes=parse_size(args.max_shard_size), advance=progress.update
            )  # fmt: skip
        shown = {name: entry.default for name, entry in ENTRIES.items() if not entry.flag.local}
        args_of_run = card_args(source.args, shown)
        write_model_card(directory, name=output.name, shape=shape, facts=facts, args=args_of_run)
    print(
        f"{output}: {len(source.names())} tensors, {nbytes / 1e9:.2f} GB in {counted(len(files), 'file')}, "
        f"{facts['precision']}, {facts['embedding rows']} embedding rows"
    )
    print(as_called(f"check it: python convert/verify.py {args.load} {output}"))
    return Converted(output, "huggingface", len(source.names()), nbytes, dtype_name(dtype), rows)


def write_adapter(adapters: AdapterSource, args: argparse.Namespace) -> Converted:
    """Write a LoRA run's PEFT directory: adapter weights and configuration, tokenizer files."""
    if adapters.manifest is None:
        raise UserError(f"{args.load}: a PEFT adapter already; --merge-lora makes a complete model of it")
    if adapters.notice:
        print(adapters.notice)
    base = base_model(adapters, args.base)
    found = find_tokenizer(adapters, args)
    if found:
        check_ids_fit(found.tokenizer, adapters.shape.vocab_size, adapters.path)
    tensors = adapters.peft_tensors(DTYPES.get(args.dtype))
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    sources = [args.load, adapters.base_path]
    with new_directory(Path(args.output), needed=nbytes, sources=sources, overwrite=args.overwrite) as directory:
        described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_tensors(directory / PEFT_WEIGHTS, described, lambda name: iter([tensors[name]]))
        config = adapters.config.to_peft(hf_targets(family_of(adapters.shape)), base)
        (directory / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if found:
            positions = adapters.shape.max_position_embeddings
            for line in write_tokenizer(directory, found.path, found.tokenizer, positions):
                print(printable(line))
    print(f"{args.output}: PEFT adapter of rank {adapters.config.rank}, {len(tensors)} tensors, {nbytes / 1e6:.2f} MB")
    if base:
        print(printable(f"to be loaded on {base}"))
    else:
        base_path = printable(adapters.base_path)
        print(
            f"the base {base_path} is not a Hugging Face model, so {PEFT_CONFIG} names none: convert it "
            f"(--load {base_path} --output BASE_HF), then run this again with --base BASE_HF"
        )
    print("--merge-lora writes a complete model instead")
    precision = dtype_name(next(iter(tensors.values())).dtype)
    return Converted(Path(args.output), "peft", len(tensors), nbytes, precision, adapters.shape.vocab_size)


def base_model(adapters: AdapterSource, given: str | None) -> str | None:
    """The base model that PEFT loads the adapters on.

    It is the run's base if that is a Hugging Face directory, else --base, else None. Raises
    UserError for a directory with other weights or in another format.
    """
    place = Path(given or adapters.base_path)
    if (place / "config.json").is_file():
        adapters.open_base(place)  # raises when it is another model
        return str(place.absolute())
    if given and place.exists():
        raise UserError(
            f"--base {given}: has no config.json, so a PEFT adapter cannot be loaded on it; convert it first: "
            f"python convert/megatron_to_hf.py --load {given} --output BASE_HF, then give --base BASE_HF"
        )
    return given  # a name on the Hub
