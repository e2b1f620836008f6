"""Convert a Megatron checkpoint to a Hugging Face directory, a few rows in memory.

    python convert/megatron_to_hf.py --load runs/first --output runs/first-hf

Reads torch_dist checkpoints and those of Megatron before Core (BigCode's mtf branch,
bigcode/starcoderbase-megatron) in any tensor x pipeline parallel layout, in fp32, bf16 or fp16,
with the plain or the distributed optimizer. Runs on a login node: no GPU, no process groups.
--output appears only when it is complete; convert/verify.py then compares it with the original.

The tokenizer is the copy that the run keeps next to its checkpoints. A LoRA run becomes a PEFT
adapter, or with --merge-lora a complete model:

    python convert/megatron_to_hf.py --load runs/lora --output lora-peft --base starcoderbase-1b
    python convert/megatron_to_hf.py --load runs/lora --output lora-hf --merge-lora
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its files would hide others'


from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.model.activation import ACTIVATIONS
from megatron_ft.weights.locate import HUGGING_FACE, check_readable
from megatron_ft.weights.output_directory import check_output
from megatron_ft.weights.precision import PRECISIONS


def main() -> None:
    """Parse the flags, open the checkpoint, write the model or the adapter."""
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="checkpoint: a run's directory, or one iteration's")
    add(
        "--iteration",
        default="latest",
        help="a number, 'best' (lowest validation loss), 'release', or 'latest' (the tracker file's)",
    )
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
    args = parser.parse_args()
    if args.tokenizer_file and args.tokenizer_from:
        raise UserError("--tokenizer-file and --tokenizer-from exclude each other; keep one")
    if check_readable(args.load, args.iteration) == HUGGING_FACE:
        raise UserError(f"{args.load}: a Hugging Face model already; give a Megatron checkpoint")
    check_output(Path(args.output), [args.load], overwrite=args.overwrite)

    from megatron_ft.conversion.to_hf import to_hf  # imports torch, which takes seconds

    to_hf(args)


if __name__ == "__main__":
    run_program(main)
