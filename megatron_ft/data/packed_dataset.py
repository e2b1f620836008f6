"""Packed rows as the training program reads them: one or several data sets, blended by weight, each row from memory-mapped files.

Training rows are addressed by consumed sample number: row i is the same in every run with the same data and flags, so a resumed run
goes on by asking for the next number. Nothing here needs a process group; every rank reads its own rows.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_ft.config.config import Config
from megatron_ft.data import _packing
from megatron_ft.data.packing import PackedIndex, Packing, TokenizedDocuments, load_index, load_index_covering
from megatron_ft.data.provenance import tokenizer_warning
from megatron_ft.data.splits import Group, Part, groups_of
from megatron_ft.errors import UserError

PROBED_DOCUMENTS = 256  # of each data set, spread over it, whose token ids are compared with the vocabulary


class PackedSample(NamedTuple):
    """One row of s + 1 tokens: int64 ids; int32 document of each place (from 1, 0 is padding); whether it is an input token."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    is_inputs: np.ndarray


class PackedDocuments:
    """The rows of one data set: its documents and the index that groups them."""

    def __init__(self, documents: TokenizedDocuments, packing: Packing, index: PackedIndex, pad: int):
        self.documents, self.packing, self.index, self.pad = documents, packing, index, pad
        self.capacity = packing.capacity

    def __len__(self) -> int:
        return len(self.index)

    def document_ids(self, row: int) -> np.ndarray:
        """int64, the documents of a row in their order."""
        start, end = self.index.bounds[row]
        return self.index.documents[start:end]

    def __getitem__(self, row: int) -> PackedSample:
        pieces, lengths = [], []
        for document in self.document_ids(row).tolist():
            inputs, targets = self.documents.inputs[document], self.documents.targets[document]
            if (excess := len(inputs) + len(targets) - self.capacity) > 0:  # --overlong truncate
                inputs = inputs[excess:]
            pieces += (inputs, targets)
            lengths += (len(inputs), len(targets))
        padding = self.capacity - sum(lengths)
        pieces.append(np.full(padding, self.pad, np.int64))
        tokens = np.empty(self.capacity, np.int64)
        np.concatenate(pieces, out=tokens, casting="unsafe")
        pairs = len(lengths) // 2
        numbers = np.repeat(np.arange(1, pairs + 1, dtype=np.int32), 2)
        segment_ids = np.repeat(np.append(numbers, np.int32(0)), [*lengths, padding])
        is_inputs = np.repeat(np.append(np.tile([True, False], pairs), False), [*lengths, padding])
        return PackedSample(tokens, segment_ids, is_inputs)


class PackedDataset:
    """The rows of a group: `len(dataset)` of them, taken from its parts by weight. `dataset[i]` is a PackedSample.

    `sequences_per_epoch`: rows that all parts have once. `fill_rate`: share of the places of those rows that hold a token.
    `description`: lines for the log.
    """

    def __init__(self, group: Group, parts: list[PackedDocuments], source: np.ndarray, row: np.ndarray, sequences_per_epoch: int):
        self.name, self.parts, self.sequences_per_epoch = group.name, parts, sequences_per_epoch
        self._source, self._row = source, row
        packed = sum(part.index.facts["packed_tokens"] for part in parts)
        self.fill_rate = packed / max(1, sum(len(part) * part.capacity for part in parts))
        self.description = "\n".join(self._describe(group.parts[i], i) for i in range(len(parts)))

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, i: int) -> PackedSample:
        return self.parts[self._source[i]][int(self._row[i])]

    def provenance(self, i: int) -> dict:
        """Where row i comes from: `prefix`, and `documents`, their numbers in it."""
        part = self.parts[self._source[i]]
        return {"prefix": part.documents.prefix, "documents": part.document_ids(int(self._row[i])).tolist()}

    def _describe(self, part: Part, number: int) -> str:
        rows = self.parts[number]
        facts = rows.index.facts
        return (
            f"{self.name}: {part.prefix} {part.start:g}:{part.end:g}, {facts['documents']:,} documents, {facts['tokens']:,} tokens, "
            f"{rows.index.fill_rate:.2%} of its rows filled, gives {int((self._source == number).sum()):,} rows"
        )

    def overlong(self) -> list[str]:
        """A line for each data set with documents that are longer than a row: how many, and what became of them."""
        lines = []
        for part in self.parts:
            facts, policy = part.index.facts, part.packing.overlong
            left_out, cut = facts["left_out_documents"], facts["overlong_documents"] - facts["left_out_documents"]
            if facts["overlong_documents"]:
                done = f"{left_out:,} left out" + (f", {cut:,} cut" if cut else "")
                lines.append(
                    f"{self.name}: {facts['overlong_documents']:,} of {facts['documents']:,} documents of {part.documents.prefix} are over "
                    f"{part.capacity:,} tokens: {done}, {facts['lost_tokens'] / facts['tokens']:.2%} of the tokens (--overlong {policy})"
                )
        return lines


@dataclass
class Datasets:
    """What a run reads. `notices` are lines for the log that a user should see."""

    train: PackedDataset | None = None
    valid: dict[str, PackedDataset] = field(default_factory=dict)
    test: dict[str, PackedDataset] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def sequences_per_epoch(config: Config, split: str = "train") -> int:
    """Rows that all data sets of `split` have once: for training the length of an epoch, for "valid" and "test" of all groups.

    In greedy order an epoch's unfinished last row belongs to the next epoch. Builds the index where it is not there yet.
    """
    return sum(
        _epoch_rows(load_index(*_documents_and_packing(part, config, split), config.data.cache_path))
        for group in groups_of(config, split)
        for part in group.parts
    )


def training_fill_rate(config: Config) -> float:
    """Share of the training rows' places that hold a token, over the data sets by their weights; a set too small for one row counts as full."""
    parts = [part for group in groups_of(config, "train") for part in group.parts]
    indices = [load_index(*_documents_and_packing(part, config, "train"), config.data.cache_path) for part in parts]
    return float(np.average([index.fill_rate or 1.0 for index in indices], weights=[part.weight for part in parts]))


def build_datasets(
    config: Config, *, train_samples: int | None, pad: int, vocab_size: int | None = None
) -> Datasets:
    """The data sets that the flags ask for, their indices built where they are missing (by one process; the others wait).

    `train_samples` rows of training data, over as many epochs as that needs; None: no training data. Validation and test groups hold the rows of their ranges once,
    blended by weight as far as each part reaches. `pad` fills the ends of rows. With `vocab_size`, token ids of every
    data set are compared with it. Raises UserError.
    """
    datasets = Datasets()
    for group in groups_of(config, "train") if train_samples is not None else []:
        datasets.train = _build(group, config, "train", pad, vocab_size, train_samples)
    for split, built in (("valid", datasets.valid), ("test", datasets.test)):
        for group in groups_of(config, split):
            built[group.name] = _build(group, config, split, pad, vocab_size)
    others = [*datasets.valid.values(), *datasets.test.values()]
    everything = [datasets.train, *others] if datasets.train else others
    prefixes = dict.fromkeys(part.documents.prefix for dataset in everything for part in dataset.parts)
    datasets.notices += filter(None, (tokenizer_warning(prefix, config.data.tokenizer_file) for prefix in prefixes))
    for dataset in everything:
        datasets.notices += dataset.overlong()
    if datasets.train:
        datasets.notices += _overlaps(datasets.train, others)
    return datasets


def _build(
    group: Group, config: Config, split: str, pad: int, vocab_size: int | None, samples: int | None = None
) -> PackedDataset:
    """A group's data set: `samples` rows, or the rows of its range once when None."""
    weights = np.array([part.weight for part in group.parts])
    opened = [_documents_and_packing(part, config, split) for part in group.parts]
    if vocab_size is not None:
        for documents, _ in opened:
            check_vocabulary(documents, vocab_size)
    once = [load_index(documents, packing, config.data.cache_path) for documents, packing in opened]
    if samples is None:
        limits = np.array([len(index) for index in once])
        source, row = _packing.blend(weights, limits, int(limits.sum()))
        indices = once
    else:
        source, row = _packing.blend(weights, np.full(len(weights), -1), samples)
        needed = np.bincount(source, minlength=len(weights))
        indices = [
            load_index_covering(documents, packing, int(rows), config.data.cache_path)
            for (documents, packing), rows in zip(opened, needed, strict=True)
        ]
    parts = [
        PackedDocuments(documents, packing, index, pad) for (documents, packing), index in zip(opened, indices, strict=True)
    ]
    return PackedDataset(group, parts, source, row, sum(_epoch_rows(index) for index in once))


def _epoch_rows(index: PackedIndex) -> int:
    return max(1, len(index))  # a greedy epoch that does not fill one row still counts as one


def _documents_and_packing(part: Part, config: Config, split: str) -> tuple[TokenizedDocuments, Packing]:
    try:
        documents = TokenizedDocuments(part.prefix)
    except UserError as error:
        raise UserError(f"{part.where}: {error}") from error
    start, stop = part.documents(len(documents))
    if start >= stop:
        remedy = "raise --validation-fraction or set it to 0" if config.data.prefix else "widen the range"
        raise UserError(
            f"{part.where}: the {split} range {part.start:g}:{part.end:g} of {part.prefix} ({len(documents)} documents) is empty; {remedy}"
        )
    packing = Packing(
        start,
        stop,
        capacity=config.data.seq_length + 1,
        order=config.data.packing,
        lookahead=config.data.packing_lookahead,
        overlong=config.data.overlong,
        seed=config.training.seed,
        keep_last=split != "train",
    )
    return documents, packing


def check_vocabulary(documents: TokenizedDocuments, vocab_size: int) -> None:
    """UserError where a probed document has a token id of `vocab_size` or above: it was made with another tokenizer."""
    for reader in (documents.inputs, documents.targets):
        for i in range(0, len(reader), max(1, len(reader) // PROBED_DOCUMENTS)):
            sequence = reader[i]
            if len(sequence) and sequence.max() >= vocab_size:
                raise UserError(
                    f"{reader.path}: document {i} has token id {sequence.max()}, the tokenizer has {vocab_size} entries; "
                    "give the --tokenizer-file the data were made with"
                )


def _overlaps(train: PackedDataset, others: list[PackedDataset]) -> list[str]:
    """A line for each data set of a validation or test group whose documents are trained on as well."""
    notices = []
    for dataset in others:
        for part in dataset.parts:
            for trained in train.parts:
                ours, theirs = part.packing, trained.packing
                shared = min(ours.stop, theirs.stop) - max(ours.start, theirs.start)
                if shared > 0 and Path(part.documents.prefix).resolve() == Path(trained.documents.prefix).resolve():
                    notices.append(
                        f"{dataset.name}: {shared:,} documents of {part.documents.prefix} are trained on as well"
                    )
    return notices
