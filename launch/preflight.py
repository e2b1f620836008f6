"""Check this node before a run starts on it: data and checkpoints, software, GPUs, free disk space.

    python launch/preflight.py --save runs/first --gpus 8 --need-gb 200 \\
        data/commits_inputs_document.bin data/tokenizer.json

Prints what it found as one line of JSON. `launch/finetune.py` runs it on every node of a job and
compares the nodes (`check_nodes`).
"""

import sys
from pathlib import Path

# Not this folder: its files would hide modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import run_program
from megatron_ft.launcher.node_check import check_this_node


def main() -> None:
    """Check the node and print the line."""
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("--save", type=Path, help="directory that checkpoints will be written to")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that must be usable")
    parser.add_argument("--need-gb", type=float, default=0, help="GB that must be free in --save")
    parser.add_argument("files", type=Path, nargs="*", help="files and directories that must be readable")
    args = parser.parse_args()
    print(check_this_node(args.save, args.files, args.gpus, args.need_gb).to_json(), flush=True)


if __name__ == "__main__":
    run_program(main)
