"""Rewrite a Megatron checkpoint for another tensor x pipeline parallel layout, in its own format.

    python convert/reshard.py --load runs/first --save runs/first-tp2 --tensor-parallel 2

torch_dist: the optimizer state is included, and training resumes from the result (our trainer also
resumes from the original at any layout). legacy (the mtf branch's): only the weights are written,
as `release`, since its optimizer state is tied to its layout.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its files would hide others'


from megatron_ft.config.parser import Help, Parser
from megatron_ft.conversion.flags import add_checkpoint
from megatron_ft.errors import UserError, run_program
from megatron_ft.weights.locate import HUGGING_FACE, check_readable
from megatron_ft.weights.output_directory import check_output


def main() -> None:
    """Parse the flags, open the checkpoint, rewrite it in its format."""
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add_checkpoint(parser)
    add = parser.add_argument
    add("--save", required=True, metavar="OUT", help="new checkpoint directory")
    add("--tensor-parallel", type=int, required=True, metavar="T", help="tensor-parallel ranks")
    add("--pipeline-parallel", type=int, default=1, metavar="P", help="pipeline stages")
    add("--make-vocab-size-divisible-by", type=int, default=128, metavar="N", help="pad to a multiple of this times T")
    add("--vocab-size", type=int, metavar="V", help="rows that are not padding (default: the checkpoint's)")
    add(
        "--data-parallel", type=int, default=0, metavar="D",
        help="legacy: data-parallel ranks of the mtf branch with --use-distributed-optimizer, which needs an empty optim.pt for each",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace --save when it is not empty")
    args = parser.parse_args()
    if check_readable(args.load, args.iteration) == HUGGING_FACE:
        raise UserError(f"{args.load}: a Hugging Face model; use convert/hf_to_megatron.py")
    check_output(Path(args.save), [args.load], overwrite=args.overwrite)

    from megatron_ft.conversion.reshard import reshard  # imports torch, which takes seconds

    reshard(args)


if __name__ == "__main__":
    run_program(main)
