"""Tokenize JSONL rows of inputs and outputs into Megatron's .bin/.idx files, in one pass.

    python preprocess/tokenize.py rows.jsonl --tokenizer-file MODEL --output-prefix data/rows

writes data/rows_inputs_document.{bin,idx} and data/rows_targets_document.{bin,idx}, every output
followed by an end-of-text token, and data/rows_made_from.json, by which merge.py, view.py and
training recognize a different tokenizer. The bytes do not depend on --workers.

Rows may also be conversations, written as the tokenizer's chat template has them and learned turn
by turn, or plain texts, all of which is learned:

    python preprocess/tokenize.py chats.jsonl --messages-key messages --tokenizer-file DIR ...
    python preprocess/tokenize.py code.jsonl --text-key text --fim-rate 0.5 ...

For a job array, give each task one shard and join the parts with merge.py. The result is byte for
byte that of a single run:

    python preprocess/tokenize.py rows.jsonl --tokenizer-file MODEL \\
        --shard $I/8 --output-prefix data/part-$I
    python preprocess/merge.py data/part-{1..8} --output-prefix data/rows
"""

import sys
from pathlib import Path

# The repository root instead of this directory, whose tokenize.py would shadow Python's own.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import os

from megatron_ft.errors import run_program
from megatron_ft.printable import printable
from megatron_ft.tokenizing.flags import parse_tokenize
from megatron_ft.tokenizing.tokenize_rows import list_missing_shards, tokenize_rows


def main() -> None:
    """Tokenize, or list missing shards."""
    args = parse_tokenize(description=__doc__)
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)  # threads of the tokenizers library
    if args.missing_shards:
        for index, reason in list_missing_shards(args):
            print(f"{index}\t{printable(reason)}")
    else:
        tokenize_rows(args)


if __name__ == "__main__":
    run_program(main)
