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

from megatron_ft.conversion.flags import parse_to_hf
from megatron_ft.errors import run_program


def main() -> None:
    """Parse the flags, open the input, write the output."""
    args = parse_to_hf(description=__doc__)

    from megatron_ft.conversion.to_hf import to_hf  # imports torch, which takes seconds

    to_hf(args)


if __name__ == "__main__":
    run_program(main)
