"""The flags of the two converters, and what can be checked before torch is imported."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError
from megatron_ft.model.activation import ACTIVATIONS
from megatron_ft.model.families import family_of
from megatron_ft.model.gpt_bigcode import GPT_BIGCODE
from megatron_ft.weights.hf_config import read_hf_config
from megatron_ft.weights.locate import HUGGING_FACE, check_readable, locate
from megatron_ft.weights.output_directory import check_layout, check_output
from megatron_ft.weights.precision import PRECISIONS


def add_checkpoint(parser: Parser) -> None:
    """Add --load and --iteration, which checkpoint of a run to read."""
    parser.add_argument(
        "--load", required=True, metavar="DIR", help="checkpoint: a run's directory, or one iteration's"
    )
    parser.add_argument(
        "--iteration",
        default="latest",
        help="a number, 'best' (lowest validation loss), 'release', or 'latest' (the tracker file's)",
    )


def to_hf_parser(description: str | None = None) -> Parser:
    """The parser of convert/megatron_to_hf.py, which `description` describes."""
    parser = Parser(description=description, formatter_class=Help, allow_abbrev=False)
    add_checkpoint(parser)
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="new Hugging Face directory")
    add("--tokenizer-file", metavar="FILE", help="tokenizer.json or SentencePiece model (default: the run's own)")
    add("--tokenizer-from", metavar="DIR", help="Hugging Face directory to copy the tokenizer files from")
    add("--keep-padding", action="store_true", help="keep the embedding rows that pad the vocabulary")
    add(
        "--dtype",
        choices=["keep", *PRECISIONS],
        default="keep",
        help="precision to store; keep is the widest of the tensors'",
    )
    add("--max-shard-size", default="5GB", metavar="SIZE", help="largest file")
    add("--activation", choices=tuple(ACTIVATIONS), help="form of GELU to write (default: the checkpoint's)")
    add("--merge-lora", action="store_true", help="add a LoRA run's adapters to its base weights")
    add(
        "--base", metavar="DIR",
        help="base weights of a LoRA run (default: where the run loaded them from). A PEFT adapter records them as its base model: "
        "a Hugging Face directory, or a model's name on the Hub",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace --output when it is not empty")
    return parser


def parse_to_hf(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Parse a command line, sys.argv's by default, and check both directories. Raises UserError."""
    args = to_hf_parser(description).parse_args(argv)
    if args.tokenizer_file and args.tokenizer_from:
        raise UserError("--tokenizer-file and --tokenizer-from exclude each other; keep one")
    if check_readable(args.load, args.iteration) == HUGGING_FACE:
        raise UserError(f"{args.load}: a Hugging Face model already; give a Megatron checkpoint")
    check_output(Path(args.output), [args.load], overwrite=args.overwrite)
    return args


def to_megatron_parser(description: str | None = None) -> Parser:
    """The parser of convert/hf_to_megatron.py, which `description` describes."""
    parser = Parser(description=description, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--load", required=True, metavar="HF_DIR", help="Hugging Face directory, safetensors or .bin")
    add("--save", required=True, metavar="OUT", help="new checkpoint directory")
    add("--format", required=True, choices=["torch_dist", "legacy"], help="Megatron-Core's, or the mtf branch's")
    add("--tensor-parallel", type=int, default=1, metavar="T", help="tensor-parallel ranks")
    add("--pipeline-parallel", type=int, default=1, metavar="P", help="pipeline stages")
    add("--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="pad to a multiple of this times T")
    add(
        "--dtype",
        choices=["keep", *PRECISIONS],
        default="keep",
        help="precision to store; keep is the widest of the tensors'",
    )
    add(
        "--data-parallel", type=int, default=0, metavar="D",
        help="legacy: data-parallel ranks of the mtf branch with --use-distributed-optimizer, which needs an empty optim.pt for each",
    )  # fmt: skip
    add("--activation", choices=tuple(ACTIVATIONS), help="form of GELU to record (default: the model's)")
    add("--overwrite", action="store_true", help="replace --save when it is not empty")
    return parser


def parse_to_megatron(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Parse a command line, sys.argv's by default, and check both directories. Raises UserError."""
    args = to_megatron_parser(description).parse_args(argv)
    found = locate(args.load)
    if found.kind != HUGGING_FACE:
        raise UserError(f"{args.load}: a {found.kind} checkpoint; change its layout with convert/reshard.py")
    shape = read_hf_config(found.directory).shape
    if args.format == "legacy" and shape.family != GPT_BIGCODE.model_type:
        raise UserError(
            f"{args.load}: a {family_of(shape).title}, which the mtf branch does not have; use --format torch_dist"
        )
    check_layout(shape, args.tensor_parallel, args.pipeline_parallel, args.make_vocab_size_divisible_by)
    check_output(Path(args.save), [args.load], overwrite=args.overwrite)
    return args
