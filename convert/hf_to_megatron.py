"""Convert a Hugging Face model (StarCoder, SantaCoder, StarCoder2) to a Megatron checkpoint.

    python convert/hf_to_megatron.py --load starcoderbase-1b --save sc-1b --format torch_dist
    python convert/hf_to_megatron.py --load starcoderbase --save sc-mtf --format legacy \\
        --tensor-parallel 4 --pipeline-parallel 4

torch_dist is Megatron-Core's format. Any layout loads it; --tensor-parallel only sets how the
vocabulary is padded and how the files are cut. legacy is what BigCode's mtf branch loads, at
exactly this layout; the branch has no StarCoder2. Our own trainer also starts from the Hugging Face
directory itself.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its files would hide others'

from megatron_ft.conversion.flags import parse_to_megatron
from megatron_ft.errors import run_program


def main() -> None:
    """Parse the flags, open the input, write the output."""
    args = parse_to_megatron(description=__doc__)

    from megatron_ft.conversion.to_megatron import to_megatron  # imports torch, which takes seconds

    to_megatron(args)


if __name__ == "__main__":
    run_program(main)
