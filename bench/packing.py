"""Time packing documents and reading packed sequences, and measure the fill rate.

    python bench/packing.py --jsonl rows.jsonl --tokenizer-file tokenizer.json --peer MEGATRON_MTF

An epoch is packed in both orders, and compared with the loop of the mtf branch on the same lengths:
with --peer the function `_build_sample_idx` of that checkout, without it a loop that does the same
work. The fill rate on real rows is measured only with --jsonl. Times are CPU seconds of one thread,
the fastest of several runs; all ratios come from one call of this program.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's tokenize.py would hide Python's

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

from megatron_ft.config.parser import Help, Parser
from megatron_ft.data import _packing
from megatron_ft.data.batch import collate
from megatron_ft.data.indexed import IndexedWriter, commit, field_paths
from megatron_ft.data.packed_dataset import PackedDocuments
from megatron_ft.data.packing import Packing, TokenizedDocuments, load_index, pack
from megatron_ft.errors import UserError, run_program
from megatron_ft.tokenizer.kinds import token_dtype
from megatron_ft.tokenizer.tokenizer import load_tokenizer

ORDERS = ("best-fit", "greedy")


def main() -> None:
    parser = Parser(prog="bench/packing.py", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--documents", type=int, default=10_000_000, help="documents per epoch")
    add("--loop-documents", type=int, default=1_000_000, help="documents to time the Python loop on")
    add("--seq-length", type=int, default=2048, help="tokens per sequence")
    add("--sequences", type=int, default=20_000, help="sequences to read")
    add("--peer", type=Path, metavar="DIR", help="checkout of BigCode's Megatron-LM, branch mtf")
    add("--jsonl", type=Path, metavar="FILE", help="real rows to measure the fill rate on")
    add("--input-key", default="inputs", help="key of the inputs in --jsonl")
    add("--output-key", default="outputs", help="key of the outputs in --jsonl")
    add("--tokenizer-file", metavar="FILE", help="tokenizer for --jsonl")
    args = parser.parse_args()
    capacity = args.seq_length + 1
    print(f"{os.cpu_count()} cores, one process, sequences of {capacity:,} tokens\n")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        time_epoch(synthetic_lengths(args.documents), capacity, folder)
        time_loop(synthetic_lengths(args.loop_documents), capacity, args.peer)
        time_reading(f"{folder}/synthetic", args.sequences, capacity)
        if args.jsonl:
            fill_rates(args, capacity, f"{folder}/real")


class Lengths(TokenizedDocuments):
    """Documents with lengths but no tokens; packing needs no more."""

    def __init__(self, inputs: np.ndarray, targets: np.ndarray):
        self.prefix = "synthetic"
        self.inputs, self.targets = SimpleNamespace(sizes=inputs), SimpleNamespace(sizes=targets)

    def __len__(self) -> int:
        return len(self.inputs.sizes)


def synthetic_lengths(count: int) -> Lengths:
    """Log-normal lengths like those of commits: 320 tokens on average, a few too long to pack."""
    random = np.random.default_rng(0)
    inputs, targets = (np.clip(random.lognormal(mean, 1.1, count), 2, 4000).astype(np.int32) for mean in (4.8, 4.3))
    return Lengths(inputs, targets)


def seconds_of(work: Callable, times: int = 1) -> tuple[float, object]:
    """CPU seconds of the fastest of `times` runs, and its result.

    The timed code runs on one thread, so on an idle machine this is also the wall-clock time.
    """
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
            f"  {order:9} packed in {packed:.2f} s, {len(index):,} sequences, {index.fill_rate:.2%} filled; "
            f"packed, written and synced in {stored - start:.2f} s of wall-clock time; opened again in {(opened - stored) * 1000:.1f} ms"
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
    whose = "the mtf branch's loop" if peer else "a loop like the mtf branch's"
    print(
        f"\n{len(documents):,} documents, only packing: {whose} {theirs:.2f} s; greedy {greedy:.4f} s, {theirs / greedy:.0f}x, the same sequences; "
        f"best-fit with its shuffle {best_fit:.3f} s, {theirs / best_fit:.0f}x"
    )


class FieldSizes:
    """Sizes of one field behind the interface of the mtf branch's MMapIndexedDataset."""

    def __init__(self, sizes: np.ndarray):
        self._index = SimpleNamespace(sizes=sizes)

    def size(self, i: int) -> np.int32:
        return self._index.sizes[i]


class MemberSizes:
    """Sizes behind the interface of the mtf branch's MTFDataset, one document at a time."""

    def __init__(self, documents: Lengths):
        self.inputs, self.targets = FieldSizes(documents.inputs.sizes), FieldSizes(documents.targets.sizes)

    def size(self, i: int) -> dict[str, np.int32]:
        return {"input_tokens": self.inputs.size(i), "target_tokens": self.targets.size(i)}


def branch_loop(checkout: Path) -> Callable:
    """`_build_sample_idx` of the checkout, compiled by itself: its file's imports need a GPU."""
    path = checkout / "megatron/data/decoder_packed_mtf_dataset.py"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--peer: {path}: {error.strerror}; give a checkout of the branch mtf") from error
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_build_sample_idx"]
    names = {"np": np, "logging": logging, "logger": logging.getLogger()}
    exec(compile(ast.Module(functions, []), str(path), "exec"), names)
    logging.disable(logging.WARNING)  # one line per document that is too long would be timed too

    def loop(sizes: MemberSizes, order: np.ndarray, capacity: int) -> list:
        return names["_build_sample_idx"](sizes, order, capacity, row_offset=0, old_sample_start=0, epoch=0)[0]

    return loop


def same_loop(sizes: MemberSizes, order: np.ndarray, capacity: int) -> list:
    """The branch's work in Python: a sequence ends where the next document does not fit."""
    rows, start, filled = [], 0, 0
    for position, document in enumerate(order):
        size = sizes.size(document)
        length = size["input_tokens"] + size["target_tokens"]
        filled = filled + length
        if filled > capacity:
            if position > start:
                rows.append(np.asarray([start, position]))
            start, filled = (position, length) if length <= capacity else (position + 1, 0)
    return rows


def write_documents(prefix: str, pairs: list, dtype: np.dtype) -> TokenizedDocuments:
    names = field_paths(prefix)
    with IndexedWriter(names[0], dtype) as inputs, IndexedWriter(names[1], dtype) as targets:
        for source, target in pairs:
            inputs.add(source)
            targets.add(target)
        commit([inputs, targets])
    return TokenizedDocuments(prefix)


def time_reading(prefix: str, count: int, capacity: int) -> None:
    lengths = synthetic_lengths(60_000)
    random = np.random.default_rng(1)
    pairs = [
        (random.integers(0, 49152, a, np.uint16), random.integers(0, 49152, b, np.uint16))
        for a, b in zip(lengths.inputs.sizes, lengths.targets.sizes, strict=True)
    ]
    documents = write_documents(prefix, pairs, np.dtype(np.uint16))
    packing = Packing(0, len(documents), capacity)
    packed = PackedDocuments(documents, packing, load_index(documents, packing), pad=0)
    wanted = random.integers(0, len(packed), count).tolist()
    read, _ = seconds_of(lambda: [packed[i] and None for i in wanted])
    batched, _ = seconds_of(
        lambda: [collate([packed[i] for i in wanted[j : j + 4]]) and None for j in range(0, count, 4)]
    )
    print(
        f"\nreading {count:,} random sequences of {capacity - 1:,} tokens, {len(documents) / len(packed):.1f} documents each: {count / read:,.0f} sequences/s; "
        f"read and collated to batches of 4: {count / batched:,.0f} sequences/s"
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
        f"\n{args.jsonl.name}: {len(documents):,} documents, {sizes.sum():,} tokens, {(sizes > capacity).sum()} too long and dropped"
    )
    for order in ORDERS:
        index = pack(documents, Packing(0, len(documents), capacity, order, keep_last=True))
        filled = [sizes[index.documents[a:b]].sum() for a, b in index.bounds]
        print(
            f"  {order:9} {len(index)} sequences, {sum(filled[:-1]) / capacity / (len(filled) - 1):.2%} filled without the last one "
            f"({filled[-1] / capacity:.2%}), {sum(filled) / capacity / len(filled):.2%} with it"
        )


if __name__ == "__main__":
    run_program(main)
