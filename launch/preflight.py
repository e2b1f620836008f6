"""Look at a node before a run starts on it: does it see the data and the checkpoints, the same software, its GPUs, free space?

    python launch/preflight.py --save runs/first --gpus 8 --need-gb 200 data/commits_inputs_document.bin data/tokenizer.json

Prints one JSON line with what it found. `launch/finetune.py` runs it on every node of a job and compares (`check_nodes`).
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its files would hide others' of the same name

from megatron_ft.errors import run_program
from megatron_ft.launcher.node_check import look


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="directory that checkpoints will be written to")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that must be usable")
    parser.add_argument("--need-gb", type=float, default=0, help="gigabytes that must be free below --save")
    parser.add_argument("files", type=Path, nargs="*", help="files and directories that must be readable")
    args = parser.parse_args()
    print(json.dumps(look(args.save, args.files, args.gpus, args.need_gb)), flush=True)


if __name__ == "__main__":
    run_program(main)
