"""Encoding blocks of rows in several threads, in the order of the input and in bounded memory."""

import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Protocol

import numpy as np

from megatron_ft.files.jsonl import Block
from megatron_ft.files.jsonl_row import BadRow
from megatron_ft.printable import printable
from megatron_ft.tokenizer.kinds import Tokenizer
from megatron_ft.tokenizing.row_encoder import Encoded

MEMORY = 512 << 20  # bytes of blocks in flight, as estimated by `memory_of`; one block may exceed it
SAMPLE_ROWS = 64  # rows of the data on which the fast encoder is checked against the reference
SAMPLE_BYTES = 1 << 18  # of that sample; the reference takes about a second per megabyte


class BlockEncoder(Protocol):
    """What encodes the rows of one kind; one object serves all threads.

    special_ids: int64 [special tokens]. dtypes: of each field.
    """

    tokenizer: Tokenizer
    special_ids: np.ndarray
    dtypes: list[np.dtype]

    def texts_of(self, line: bytes) -> list[str]:
        """The texts of a line; BadRow with the reason if it is not a good row."""

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
                check_fast_encoder(encoder, block)
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


def check_fast_encoder(encoder: BlockEncoder, block: Block) -> None:
    """Compare the fast encoder with the reference on the first rows of the data, without those that
    are too long.

    If they differ, the reference is used and `encoder.tokenizer.notices` has the reason.
    """
    encoder.tokenizer.encode("")
    texts: list[str] = []
    room = SAMPLE_BYTES
    for _, line in islice(block.rows(), SAMPLE_ROWS):
        if line is not None and len(line) <= room:
            room -= len(line)
            with suppress(BadRow):
                texts += encoder.texts_of(line)
    encoder.tokenizer.check_sample(texts)


def memory_of(block: Block) -> int:
    """Estimated bytes while a block is encoded: its lines, their tokens, and one parsed row.

    A parsed row counts 8 bytes per byte of its line: Python's str takes up to 4 bytes per
    character, and two copies exist.
    """
    return 2 * block.num_bytes + 8 * max((len(line) for line in block.lines if line), default=0)
