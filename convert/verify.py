"""Compare two checkpoints tensor by tensor, in any two formats and parallel layouts.

    python convert/verify.py runs/first runs/first-hf --logits

Each may be a torch_dist or legacy Megatron directory or a Hugging Face one. The exit status is

    0  equal: every bit of every tensor, or every value where the precisions differ
    1  different
    2  usage error, or a checkpoint that cannot be read
    3  equal after rounding: one side has values that the other's precision cannot hold, and only
       their rounded values are equal; 0 with --allow-rounding

Rows of vocabulary padding that only one side has are left out and counted; a missing row of a token
makes the two different, and so does a tokenizer of one side that has other ids than the run's or
ids beyond the rows. --logits also runs both in fp32 on the CPU: Megatron formats in the Megatron
model, Hugging Face ones in transformers.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its files would hide others'
# One process on the CPU, whatever GPUs the machine or ranks the environment has, so that fp32
# results are comparable.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)


from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import run_program
from megatron_ft.weights.locate import check_readable


def main() -> int:
    """Parse the flags, compare, print and report; the exit status."""
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("a", metavar="A", help="first checkpoint")
    add("b", metavar="B", help="second checkpoint")
    add("--iteration-a", default="latest", help="iteration of A: a number, 'best', 'release' or 'latest'")
    add("--iteration-b", default="latest", help="iteration of B")
    add("--base", metavar="DIR", help="base weights of a LoRA run (default: where the run loaded them from)")
    add(
        "--tolerance", type=float, default=0.0, help="largest absolute difference of tensors that still counts as equal"
    )
    add("--allow-rounding", action="store_true", help="exit with status 0 also where only the rounded values are equal")
    add("--logits", action="store_true", help="run both models in fp32 and compare their logits")
    add("--prompt", default="def print_hello_world():", help="text they run on, if a tokenizer is found")
    add("--tokenizer-file", metavar="FILE", help="tokenizer of the prompt (default: that of a Hugging Face side)")
    add("--report", metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    check_readable(args.a, args.iteration_a)
    check_readable(args.b, args.iteration_b)

    from megatron_ft.conversion.compare import compare  # imports torch, which takes seconds

    return compare(args)


if __name__ == "__main__":
    run_program(main)
