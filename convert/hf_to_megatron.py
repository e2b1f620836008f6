"""Convert a Hugging Face model (StarCoder, SantaCoder, StarCoder2) to a Megatron checkpoint.

    python convert/hf_to_megatron.py --load starcoderbase-1b --save sc-1b --format torch_dist
    python convert/hf_to_megatron.py --load starcoderbase --save sc-mtf --format legacy \\
        --tensor-parallel 4 --pipeline-parallel 4

torch_dist is Megatron-Core's format. Any layout loads it; --tensor-parallel only sets how the
vocabulary is padded and how the files are cut. legacy is what BigCode's mtf branch loads, at
exactly this layout; the branch has no StarCoder2. Our own trainer also starts from the Hugging Face directory itself.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its files would hide others'


from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.model.activation import ACTIVATIONS
from megatron_ft.model.families import family_of
from megatron_ft.model.gpt_bigcode import GPT_BIGCODE
from megatron_ft.weights.hf_config import read_hf_config
from megatron_ft.weights.locate import HUGGING_FACE, locate
from megatron_ft.weights.output_directory import check_layout, check_output
from megatron_ft.weights.precision import PRECISIONS


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
    args = parser.parse_args()
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

    from megatron_ft.conversion.to_megatron import to_megatron  # imports torch, which takes seconds

    to_megatron(args)


if __name__ == "__main__":
    run_program(main)
