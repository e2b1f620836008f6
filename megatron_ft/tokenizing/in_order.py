"""Encoding blocks of rows in several threads, in the order of the input and in bounded memory."""

import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from megatron_ft.files.jsonl import Block
from megatron_ft.printable import printable
from megatron_ft.tokenizer.kinds import Tokenizer
from megatron_ft.tokenizing.row_encoder import Encoded

MEMORY = 512 << 20  # bytes of blocks in flight, as estimated by `memory_of`; one block may exceed it


class BlockEncoder(Protocol):
    """What encodes the rows of one kind; one object serves all threads.

    special_ids: int64 [special tokens]. dtypes: of each field.
    """

    tokenizer: Tokenizer
    special_ids: np.ndarray
    dtypes: list[np.dtype]

    def check_fast_encoder(self, block: Block) -> None:
        """Compare the fast encoder with the reference on the first rows of the data."""

    def encode(self, block: Block) -> Encoded:
        """Encode the good rows of a block."""


def encode_in_order(encoder: BlockEncoder, blocks: Iterator[Block], workers: int) -> Iterator[tuple[Block, Encoded]]:
    """Encode blocks in `workers` threads and yield them in the order of the input.

    Threads suffice because the encoders release the GIL. No more than MEMORY bytes, or a single
    block, are in flight at a time.
    """
    pending: deque[tuple[Block, Future[Encoded]]] = deque()
    in_flight = 0
    pool = ThreadPoolExecutor(workers)
    try:
        for number, block in enumerate(blocks):
            if number == 0:
                encoder.check_fast_encoder(block)
                for notice in encoder.tokenizer.notices:
                    print(printable(notice), file=sys.stderr)
            while pending and (in_flight + memory_of(block) > MEMORY or len(pending) > 4 * workers):
                first, future = pending.popleft()
                in_flight -= memory_of(first)
                yield first, future.result()
            pending.append((block, pool.submit(encoder.encode, block)))
            in_flight += memory_of(block)
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def memory_of(block: Block) -> int:
    """Estimated bytes while a block is encoded: its lines, their tokens, and one parsed row.

    A parsed row counts 8 bytes per byte of its line: Python's str takes up to 4 bytes per
    character, and two copies exist.
    """
    return 2 * block.num_bytes + 8 * max((len(line) for line in block.lines if line), default=0)
