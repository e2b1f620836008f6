"""Which shape the rows of each file have: by its first row, so that every shard decides alike."""

import sys

from megatron_ft.conversations.records import first_row, is_message
from megatron_ft.conversations.shapes import Shape, shape_named, shape_of
from megatron_ft.errors import UserError
from megatron_ft.files.jsonl import Block, Source
from megatron_ft.files.tables import Row
from megatron_ft.printable import printable


class ShapeFinder:
    """Finds the shape of each file when its first row arrives, and prints it on stderr.

    `forced` is the name of the shape that all files have, None to recognize it. Raises UserError if
    a file has no known shape, or would be cut between the messages of a tree by shard (I, N).
    """

    def __init__(self, forced: str | None, shard: tuple[int, int]):
        self._forced, self._shard = forced, shard
        self._shapes: dict[Source, Shape] = {}

    def shape_of(self, row: Row) -> Shape:
        """The shape of a row of `join_trees`, which is that of its file."""
        origin, _ = row.where
        source = origin.source if isinstance(origin, Block) else origin
        if source not in self._shapes:
            self._shapes[source] = self._recognize(source, row)
        return self._shapes[source]

    def _recognize(self, source: Source, row: Row) -> Shape:
        first = first_row(source)
        if first is not None and is_message(first.fields):
            if self._shard[1] > 1:
                raise UserError(
                    f"{source.name}: one message per row, of trees that shards would cut; run it without --shard"
                )
            first = row  # its complete tree
        shape = shape_named(self._forced) if self._forced else shape_of((first or row).fields, source.name)
        print(printable(f"{source.name}: {shape.name} ({shape.keys})"), file=sys.stderr)
        return shape
