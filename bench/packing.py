"""Time packing and reading: an epoch in both orders, the mtf branch's loop on the same sizes, the fill rate on real rows, rows read a second.

    python bench/packing.py --jsonl oasst-commitpackft.jsonl --input-key prompt --output-key completion \\
        --tokenizer-file starcoder/tokenizer.json --peer PATH_TO_MEGATRON_MTF

Without --jsonl the real rows are left out. With --peer, the loop timed is the function `_build_sample_idx` of that checkout;
without it, one that does the same work. Seconds are CPU seconds of one thread, the quickest of several runs in a row, for both
sides; all ratios are of one call of this program.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its tokenize.py would hide Python's

import argparse
import ast
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch

from megatron_ft.config.flags import Help, Parser
from megatron_ft.data import _packing
from megatron_ft.data.batch import collate
from megatron_ft.data.indexed import IndexedWriter, commit, field_paths
from megatron_ft.data.packed_dataset import PackedRows
from megatron_ft.data.packing import Packing, TokenizedDocuments, load_index, pack
from megatron_ft.errors import UserError, run_program
from megatron_ft.tokenizer.tokenizer import load_tokenizer, token_dtype

ORDERS = ("best-fit", "greedy")


def main() -> None:
    parser = Parser(prog="bench/packing.py", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--documents", type=int, default=10_000_000, help="documents of an epoch")
    add("--loop-documents", type=int, default=1_000_000, help="documents the Python loop is timed on")
    add("--seq-length", type=int, default=2048, help="tokens of a row")
    add("--rows", type=int, default=20_000, help="rows to read")
    add("--peer", type=Path, metavar="DIR", help="checkout of BigCode's Megatron-LM, branch mtf")
    add("--jsonl", type=Path, metavar="FILE", help="real rows to measure the fill rate on")
    add("--input-key", default="inputs", help="key of the inputs in --jsonl")
    add("--output-key", default="outputs", help="key of the outputs in --jsonl")
    add("--tokenizer-file", metavar="FILE", help="tokenizer for --jsonl")
    args = parser.parse_args()
    capacity = args.seq_length + 1
    print(f"{os.cpu_count()} cores, one process, rows of {capacity:,} tokens\n")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        time_epoch(synthetic_lengths(args.documents), capacity, folder)
        time_loop(synthetic_lengths(args.loop_documents), capacity, args.peer)
        time_reading(f"{folder}/synthetic", args.rows, capacity)
        if args.jsonl:
            fill_rates(args, capacity, f"{folder}/real")


class Lengths(TokenizedDocuments):
    """Documents of which only the lengths exist, which is all that packing looks at."""

    def __init__(self, inputs: np.ndarray, targets: np.ndarray):
        self.prefix = "synthetic"
        self.inputs, self.targets = SimpleNamespace(sizes=inputs), SimpleNamespace(sizes=targets)

    def __len__(self) -> int:
        return len(self.inputs.sizes)


def synthetic_lengths(count: int) -> Lengths:
    """Log-normal lengths as commit data have them: 320 tokens on the average, a few over-long ones."""
    random = np.random.default_rng(0)
    inputs, targets = (np.clip(random.lognormal(mean, 1.1, count), 2, 4000).astype(np.int32) for mean in (4.8, 4.3))
    return Lengths(inputs, targets)


def seconds_of(work: Callable, times: int = 1) -> tuple[float, object]:
    """CPU seconds of the quickest of `times` runs, and what it returned. All that is timed here runs on one thread, so on an idle
    machine this is the wall clock, and on a busy one the other programs' time does not count."""
    runs = []
    for _ in range(times):
        start = time.process_time()
        result = work()
        runs.append(time.process_time() - start)
    return min(runs), result


def time_epoch(documents: Lengths, capacity: int, folder: str) -> None:
    print(f"one epoch of {len(documents):,} documents, shuffle included")
    for order in ORDERS:
        packing = Packing(0, len(documents), capacity, order)
        packed, index = seconds_of(lambda packing=packing: pack(documents, packing), 3)
        start = time.perf_counter()
        load_index(documents, packing, folder)
        stored = time.perf_counter()
        load_index(documents, packing, folder)
        opened = time.perf_counter()
        print(
            f"  {order:9} packed in {packed:.2f} s, {len(index):,} rows, {index.fill_rate:.2%} filled; "
            f"packed, written and synced in {stored - start:.2f} s by the clock; opened again in {(opened - stored) * 1000:.1f} ms"
        )


def time_loop(documents: Lengths, capacity: int, peer: Path | None) -> None:
    order = np.arange(len(documents))
    np.random.RandomState(1234).shuffle(order)
    loop = branch_loop(peer) if peer else same_loop
    theirs, rows = seconds_of(lambda: loop(MemberSizes(documents), order, capacity), 3)
    lengths = np.minimum(documents.inputs.sizes + documents.targets.sizes, capacity + 1)
    greedy, (ours, _) = seconds_of(lambda: _packing.greedy(lengths, order, capacity), 10)
    best_fit, _ = seconds_of(lambda: _packing.best_fit(lengths, capacity, 4096, 1), 10)
    assert np.array_equal(ours, np.stack(rows))
    whose = "the branch's loop" if peer else "a loop like the branch's"
    print(
        f"\n{len(documents):,} documents, packing alone: {whose} {theirs:.2f} s; greedy {greedy:.4f} s, {theirs / greedy:.0f}x, the same rows; "
        f"best-fit with its shuffle {best_fit:.3f} s, {theirs / best_fit:.0f}x"
    )


class FieldSizes:
    """One field's sizes behind the calls that the branch makes for each (its MMapIndexedDataset and that one's index)."""

    def __init__(self, sizes: np.ndarray):
        self._index = SimpleNamespace(sizes=sizes)

    def size(self, i: int) -> np.int32:
        return self._index.sizes[i]


class MemberSizes:
    """Sizes as the branch's loop asks for them, one document at a time (its MTFDataset)."""

    def __init__(self, documents: Lengths):
        self.inputs, self.targets = FieldSizes(documents.inputs.sizes), FieldSizes(documents.targets.sizes)

    def size(self, i: int) -> dict[str, np.int32]:
        return {"input_tokens": self.inputs.size(i), "target_tokens": self.targets.size(i)}


def branch_loop(checkout: Path) -> Callable:
    """`_build_sample_idx` of the checkout, taken out of its file because that imports what needs a GPU."""
    path = checkout / "megatron/data/decoder_packed_mtf_dataset.py"
    try:
        tree = ast.parse(path.read_text())
    except OSError as error:
        raise UserError(f"--peer: {path}: {error.strerror}; give a checkout of the branch mtf") from error
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_build_sample_idx"]
    names = {"np": np, "logging": logging, "logger": logging.getLogger()}
    exec(compile(ast.Module(functions, []), str(path), "exec"), names)
    logging.disable(logging.WARNING)  # a line for each over-long document would be timed too

    def loop(sizes: MemberSizes, order: np.ndarray, capacity: int) -> list:
        return names["_build_sample_idx"](sizes, order, capacity, row_offset=0, old_sample_start=0, epoch=0)[0]

    return loop


def same_loop(sizes: MemberSizes, order: np.ndarray, capacity: int) -> list:
    """The branch's work in Python: a row ends where the next document does not fit."""
    rows, start, filled = [], 0, 0
    for place, document in enumerate(order):
        size = sizes.size(document)
        length = size["input_tokens"] + size["target_tokens"]
        filled = filled + length
        if filled > capacity:
            if place > start:
                rows.append(np.asarray([start, place]))
            start, filled = (place, length) if length <= capacity else (place + 1, 0)
    return rows


def write_documents(prefix: str, pairs: list, dtype: np.dtype) -> TokenizedDocuments:
    names = field_paths(prefix)
    with IndexedWriter(names[0], dtype) as inputs, IndexedWriter(names[1], dtype) as targets:
        for source, target in pairs:
            inputs.add(source)
            targets.add(target)
        commit([inputs, targets])
    return TokenizedDocuments(prefix)


def time_reading(prefix: str, rows: int, capacity: int) -> None:
    lengths = synthetic_lengths(60_000)
    random = np.random.default_rng(1)
    pairs = [
        (random.integers(0, 49152, a, np.uint16), random.integers(0, 49152, b, np.uint16))
        for a, b in zip(lengths.inputs.sizes, lengths.targets.sizes, strict=True)
    ]
    documents = write_documents(prefix, pairs, np.dtype(np.uint16))
    packing = Packing(0, len(documents), capacity)
    packed = PackedRows(documents, packing, load_index(documents, packing), pad=0)
    wanted = random.integers(0, len(packed), rows).tolist()
    read, _ = seconds_of(lambda: [packed[i] and None for i in wanted])
    batched, _ = seconds_of(
        lambda: [collate([packed[i] for i in wanted[j : j + 4]]) and None for j in range(0, rows, 4)]
    )
    print(
        f"\nreading {rows:,} random rows of {capacity - 1:,}, {len(documents) / len(packed):.1f} documents each: {rows / read:,.0f} rows/s; "
        f"read and collated to batches of 4: {rows / batched:,.0f} rows/s"
    )


def fill_rates(args: argparse.Namespace, capacity: int, prefix: str) -> None:
    if not args.tokenizer_file:
        raise UserError("--jsonl needs --tokenizer-file FILE")
    tokenizer = load_tokenizer(args.tokenizer_file)
    with open(args.jsonl, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    pairs = [
        (tokenizer.encode(row[args.input_key]), [*tokenizer.encode(row[args.output_key]), tokenizer.eod])
        for row in rows
    ]
    documents = write_documents(prefix, pairs, token_dtype(tokenizer.vocab_size))
    sizes = documents.inputs.sizes + documents.targets.sizes
    print(
        f"\n{args.jsonl.name}: {len(documents):,} documents, {sizes.sum():,} tokens, {(sizes > capacity).sum()} over-long ones dropped"
    )
    for order in ORDERS:
        index = pack(documents, Packing(0, len(documents), capacity, order, keep_last=True))
        filled = [sizes[index.documents[a:b]].sum() for a, b in index.bounds]
        print(
            f"  {order:9} {len(index)} rows, {sum(filled[:-1]) / capacity / (len(filled) - 1):.2%} filled without the last one "
            f"({filled[-1] / capacity:.2%}), {sum(filled) / capacity / len(filled):.2%} with it"
        )


if __name__ == "__main__":
    run_program(main)
