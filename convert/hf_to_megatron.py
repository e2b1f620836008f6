"""Convert a Hugging Face GPTBigCode model (any StarCoder, SantaCoder) to a Megatron checkpoint.

    python convert/hf_to_megatron.py --load starcoderbase-1b --save sc-1b --format torch_dist
    python convert/hf_to_megatron.py --load starcoderbase --save sc-mtf --format legacy \\
        --tensor-parallel 4 --pipeline-parallel 4

torch_dist is Megatron-Core's format. Any layout loads it; --tensor-parallel only sets how the
vocabulary is padded and how the files are cut. legacy is what BigCode's mtf branch loads, at
exactly this layout. Our own trainer also starts from the Hugging Face directory itself.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its files would hide others'

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.model.activation import ACTIVATIONS
from megatron_ft.model.families import family_of
from megatron_ft.model.family import activation_of
from megatron_ft.model.gpt_bigcode import GPT_BIGCODE
from megatron_ft.model.shape import padded_vocab_size
from megatron_ft.printable import printable
from megatron_ft.progress import Progress
from megatron_ft.weights.checkpoint_tokenizer import unfit_tokenizer
from megatron_ft.weights.legacy_writer import legacy_bytes, write_legacy
from megatron_ft.weights.open import open_weights
from megatron_ft.weights.output_directory import check_layout, new_directory
from megatron_ft.weights.tensor_blocks import DTYPES, dtype_name, dtype_to_write, total_bytes
from megatron_ft.weights.torch_dist_writer import write_torch_dist


def main() -> None:
    """Parse the flags, open the model, write the checkpoint."""
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--load", required=True, metavar="HF_DIR", help="Hugging Face directory, safetensors or .bin")
    add("--save", required=True, metavar="OUT", help="new checkpoint directory")
    add("--format", required=True, choices=["torch_dist", "legacy"], help="Megatron-Core's, or the mtf branch's")
    add("--tensor-parallel", type=int, default=1, metavar="T", help="tensor-parallel ranks")
    add("--pipeline-parallel", type=int, default=1, metavar="P", help="pipeline stages")
    add("--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="pad to a multiple of this times T")
    add(
        "--dtype",
        choices=["keep", *DTYPES],
        default="keep",
        help="precision to store; keep is the widest of the tensors'",
    )
    add(
        "--data-parallel", type=int, default=0, metavar="D",
        help="legacy: data-parallel ranks of the mtf branch with --use-distributed-optimizer, which needs an empty optim.pt for each",
    )  # fmt: skip
    add("--activation", choices=tuple(ACTIVATIONS), help="form of GELU to record (default: the model's)")
    add("--overwrite", action="store_true", help="replace --save when it is not empty")
    args = parser.parse_args()
    layout = {"tensor_parallel": args.tensor_parallel, "pipeline_parallel": args.pipeline_parallel}

    source = open_weights(args.load)
    if source.kind != "Hugging Face":
        raise UserError(f"{args.load}: a {source.kind} checkpoint; change its layout with convert/reshard.py")
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
    if args.format == "legacy" and source.shape.family != GPT_BIGCODE.model_type:
        raise UserError(
            f"{args.load}: a {family_of(source.shape).title}, which the mtf branch does not have; use --format torch_dist"
        )
    check_layout(source.shape, **layout, divisible_by=args.make_vocab_size_divisible_by)
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
    print(f"check it: python convert/verify.py {args.load} {args.save}")


if __name__ == "__main__":
    run_program(main)
