"""Convert a Megatron checkpoint to a Hugging Face GPTBigCode directory, in the memory of a few rows.

    python convert/megatron_to_hf.py --load runs/first --output runs/first-hf

Reads torch_dist checkpoints and those of Megatron before Core (BigCode's mtf branch, bigcode/starcoderbase-megatron) in
any tensor x pipeline parallel layout, in fp32, bf16 or fp16, with the plain or the distributed optimizer. Runs on a login node: no
GPU, no process groups. Nothing appears under --output until all of it is written; convert/verify.py then proves it right.

The tokenizer is the one that the run kept beside its checkpoints. A LoRA run becomes a PEFT adapter, or with --merge-lora a whole model:

    python convert/megatron_to_hf.py --load runs/lora --output runs/lora-peft --base starcoderbase-1b
    python convert/megatron_to_hf.py --load runs/lora --output runs/lora-hf --merge-lora
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its files would hide others'

import json

import torch

from megatron_ft.config.config import ENTRIES
from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.progress import Progress
from megatron_ft.tokenizer import files as tokenizer_files
from megatron_ft.tokenizer.tokenizer import Tokenizer, load_tokenizer
from megatron_ft.weights.adapters import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    AdapterSource,
    MergedSource,
    open_adapters,
)
from megatron_ft.weights.hf_files import (
    card_args,
    parse_size,
    write_configs,
    write_model_card,
    write_tokenizer,
)
from megatron_ft.weights.hf_writer import write_safetensors, write_tensors
from megatron_ft.weights.open import open_weights
from megatron_ft.weights.output_directory import new_directory
from megatron_ft.weights.source import WeightSource
from megatron_ft.weights.tensor_blocks import DTYPES, dtype_name, dtype_to_write, total_bytes
from megatron_ft.weights.vocabulary import check_vocabulary


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="checkpoint: a run's directory, or one iteration's")
    add(
        "--iteration",
        default="latest",
        help="a number, 'best' (lowest validation loss), 'release', or 'latest' as the tracker file says",
    )
    add("--output", required=True, metavar="DIR", help="new Hugging Face directory")
    add("--tokenizer-file", metavar="FILE", help="tokenizer.json or SentencePiece model; the run's own when not given")
    add("--tokenizer-from", metavar="DIR", help="Hugging Face directory to take the tokenizer files from")
    add("--keep-padding", action="store_true", help="keep the embedding rows that pad the vocabulary")
    add(
        "--dtype",
        choices=["keep", *DTYPES],
        default="keep",
        help="precision to store; keep takes the widest of the tensors'",
    )
    add("--max-shard-size", default="5GB", metavar="SIZE", help="largest file")
    add("--merge-lora", action="store_true", help="add a LoRA run's adapters to its base weights")
    add(
        "--base", metavar="DIR",
        help="base weights of a LoRA run; where the run took them from when not given. A PEFT adapter names them as what to load it on: "
        "a Hugging Face directory, or a model's name on the Hub",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace --output when it is not empty")
    args = parser.parse_args()
    if args.tokenizer_file and args.tokenizer_from:
        raise UserError("--tokenizer-file and --tokenizer-from exclude each other; keep one")

    adapters = open_adapters(args.load, args.iteration)
    if adapters and not args.merge_lora:
        write_adapter(adapters, args)
        return
    if args.merge_lora and not adapters:
        raise UserError(f"--merge-lora: {args.load} holds a whole model, no adapters; leave the flag out")
    source = MergedSource(adapters, args.base) if adapters else open_weights(args.load, args.iteration)
    if source.notice:
        print(source.notice)
    if source.kind == "Hugging Face":
        raise UserError(f"{args.load}: a Hugging Face model already; give a Megatron checkpoint")
    if not adapters:
        torch.set_num_threads(1)  # all is copying: more threads mostly wait, and take the writer's processor
    path, tokenizer = find_tokenizer(source, args)
    rows = vocabulary_rows(source, tokenizer, args.keep_padding)
    write_model(source, path, tokenizer, rows, args)


def find_tokenizer(source: WeightSource | AdapterSource, args) -> tuple[Path | None, Tokenizer | None]:
    """The tokenizer asked for, else the run's own: the copy beside its checkpoints, or the file it was given."""
    path = args.tokenizer_file or args.tokenizer_from
    if not path:
        given = (source.args or {}).get("tokenizer_file")
        digest = source.manifest.data.get("tokenizer") if source.manifest else None
        path = tokenizer_files.find(source.path, given, digest)
        if given and not path:
            what = f"the run's tokenizer, {digest}," if digest else "the run's tokenizer"
            print(
                f"{what} is neither beside the checkpoint nor at {given}; no tokenizer files will be written (--tokenizer-file adds them)"
            )
    return (Path(path), load_tokenizer(path)) if path else (None, None)


def vocabulary_rows(source: WeightSource, tokenizer: Tokenizer | None, keep_padding: bool) -> int:
    """Embedding rows to write. Raises UserError when the tokenizer is not the model's: it has tokens without a row, or rows of tokens
    would be cut."""
    stored = source.shape.vocab_size
    if tokenizer and not (keep_padding and tokenizer.vocab_size <= stored):
        if warning := check_vocabulary(source, tokenizer.vocab_size, str(tokenizer.path)):
            print(warning)
    if keep_padding:
        return stored
    if tokenizer is None and source.vocab_size is None:
        print(
            f"without a tokenizer all {stored} embedding rows are kept, padding included (--tokenizer-file cuts them)"
        )
        return stored
    return tokenizer.vocab_size if tokenizer else source.vocab_size


def write_model(source: WeightSource, tokenizer_path, tokenizer: Tokenizer | None, rows: int, args) -> None:
    dtype = dtype_to_write(source, args.dtype)
    output, nbytes = Path(args.output), total_bytes(source, dtype, rows)
    shape = source.shape.with_vocab(rows)
    facts = {
        "from": source.kind + (f", iteration {source.iteration}" if source.iteration is not None else ""),
        "precision": dtype_name(dtype),
        "embedding rows": f"{rows} of {source.shape.vocab_size}",
    }
    sources = [args.load, tokenizer_path, source.base.path if isinstance(source, MergedSource) else None]
    with new_directory(output, needed=nbytes, sources=sources, overwrite=args.overwrite) as directory:
        with Progress("converting", nbytes, "B") as progress:
            files = write_safetensors(
                source, directory, dtype=dtype, vocab_rows=rows, max_shard_bytes=parse_size(args.max_shard_size), advance=progress.update
            )  # fmt: skip
        kept = source.manifest.special_ids if source.manifest else {}
        write_configs(directory, shape, dtype, tokenizer.config_ids if tokenizer else kept)
        if tokenizer:
            write_tokenizer(directory, tokenizer_path, tokenizer, shape.max_position_embeddings)
        shown = {name: entry.default for name, entry in ENTRIES.items() if not entry.flag.local}
        args_of_run = card_args(source.args, shown)
        write_model_card(directory, name=output.name, shape=shape, facts=facts, args=args_of_run)
    print(
        f"{output}: {len(source.names())} tensors, {nbytes / 1e9:.2f} GB in {len(files)} files, {facts['precision']}, {facts['embedding rows']} embedding rows"
    )
    print(f"check it: python convert/verify.py {args.load} {output}")


def write_adapter(adapters: AdapterSource, args) -> None:
    """PEFT's directory of a LoRA run: adapter_model.safetensors and adapter_config.json."""
    if adapters.manifest is None:
        raise UserError(f"{args.load}: a PEFT adapter already; --merge-lora makes a whole model of it")
    if adapters.notice:
        print(adapters.notice)
    base = base_model(adapters, args.base)
    path, tokenizer = find_tokenizer(adapters, args)
    tensors = adapters.peft_tensors(DTYPES.get(args.dtype))
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    sources = [args.load, adapters.base_path]
    with new_directory(Path(args.output), needed=nbytes, sources=sources, overwrite=args.overwrite) as directory:
        described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_tensors(directory / PEFT_WEIGHTS, described, lambda name: iter([tensors[name]]))
        config = adapters.config.to_peft(base)
        (directory / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if tokenizer:
            write_tokenizer(directory, path, tokenizer, adapters.manifest.shape["max_position_embeddings"])
    print(f"{args.output}: PEFT adapter of rank {adapters.config.rank}, {len(tensors)} tensors, {nbytes / 1e6:.2f} MB")
    if base:
        print(f"to be loaded on {base}")
    else:
        print(
            f"the base {adapters.base_path} is no Hugging Face model, so {PEFT_CONFIG} names none: convert it (--load {adapters.base_path} "
            "--output BASE_HF), then give --base BASE_HF here"
        )
    print("--merge-lora writes a whole model instead")


def base_model(adapters: AdapterSource, given: str | None) -> str | None:
    """What PEFT is to load the adapters on: the run's base where that is a Hugging Face directory, else --base, else None."""
    place = Path(given or adapters.base_path)
    if (place / "config.json").is_file():
        adapters.open_base(place)  # is it that one?
        return str(place.absolute())
    if given and place.exists():
        raise UserError(
            f"--base {given}: no config.json there, so no Hugging Face model to load a PEFT adapter on; convert it first: "
            f"python convert/megatron_to_hf.py --load {given} --output BASE_HF, then give --base BASE_HF"
        )
    return given  # a name on the Hub


if __name__ == "__main__":
    run_program(main)
