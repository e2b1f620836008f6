"""Packed sequences as training reads them: one or more datasets, blended by weight.

Training sequences are addressed by their sample number: sequence i is the same in every run with
the same data and flags, so a resumed run continues with the next number. Nothing here needs a
process group; every rank reads its own sequences.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_ft.config.config import Config
from megatron_ft.data import _packing
from megatron_ft.data.documents import TokenizedDocuments
from megatron_ft.data.packing import PackedIndex, Packing, damaged, load_index, load_index_covering, loss_remedy, pack
from megatron_ft.data.provenance import tokenizer_warning
from megatron_ft.data.splits import Group, Part, groups_of
from megatron_ft.errors import UserError
from megatron_ft.printable import counted

PROBED_DOCUMENTS = 256  # per dataset, evenly spaced, to compare token ids with the vocabulary


class PackedSample(NamedTuple):
    """One packed sequence of s + 1 tokens.

    tokens: int64 [s + 1].
    segment_ids: int32 [s + 1], the document of each token, from 1; 0 is padding.
    is_inputs: bool [s + 1], whether the token is context: of a document's input, or a target token
      that is not learned, such as a user's second question.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    is_inputs: np.ndarray


class PackedDocuments:
    """One dataset as packed sequences: its documents and their packing index.

    `pad` is the token id at the ends of sequences. With `vocab_size`, a sequence with a token id
    outside the vocabulary raises UserError, as does a damaged index.
    """

    def __init__(
        self,
        documents: TokenizedDocuments,
        packing: Packing,
        index: PackedIndex,
        pad: int,
        vocab_size: int | None = None,
    ) -> None:
        self.documents, self.packing, self.index, self.pad = documents, packing, index, pad
        self.capacity, self.vocab_size = packing.capacity, vocab_size

    def __len__(self) -> int:
        return len(self.index)

    def document_ids(self, i: int) -> np.ndarray:
        """The documents of sequence i in order, int64 [documents]."""
        start, end = self.index.bounds[i].tolist()
        if not 0 <= start < end <= len(self.index.documents):
            raise damaged(self.index.directory, f"sequence {i} has documents {start} to {end}")
        documents = self.index.documents[start:end]
        numbers = documents.tolist()
        if min(numbers) < self.packing.start or max(numbers) >= self.packing.stop:
            raise damaged(self.index.directory, f"sequence {i} has a document outside its range")
        return documents

    def __getitem__(self, i: int) -> PackedSample:
        pieces: list[np.ndarray] = []
        lengths: list[int] = []
        ids = self.document_ids(i).tolist()
        fields = [reader.read_many(ids) for reader in (self.documents.inputs, self.documents.targets)]
        for inputs, targets in zip(*fields, strict=True):
            if (excess := len(inputs) + len(targets) - self.capacity) > 0:  # --overlong truncate
                inputs = inputs[excess:]
            pieces += (inputs, targets)
            lengths += (len(inputs), len(targets))
        padding = self.capacity - sum(lengths)
        if padding < 0:
            raise damaged(self.index.directory, f"sequence {i} has more than {self.capacity} tokens")
        pieces.append(np.full(padding, self.pad, np.int64))
        tokens = np.empty(self.capacity, np.int64)
        np.concatenate(pieces, out=tokens, casting="unsafe")
        if self.vocab_size is not None and _outside(tokens, self.vocab_size):
            for document in self.document_ids(i).tolist():
                check_document(self.documents, document, self.vocab_size)
        pairs = len(lengths) // 2
        numbers = np.repeat(np.arange(1, pairs + 1, dtype=np.int32), 2)
        segment_ids = np.repeat(np.append(numbers, np.int32(0)), [*lengths, padding])
        is_inputs = np.repeat(np.append(np.tile([True, False], pairs), False), [*lengths, padding])
        if self.documents.learned is not None:
            learned = np.concatenate(self.documents.learned.read_many(ids))
            is_inputs[~is_inputs & (segment_ids != 0)] = learned == 0
        return PackedSample(tokens, segment_ids, is_inputs)


class PackedDataset:
    """The packed sequences of a group, taken from its parts by weight; `dataset[i]` is a sample.

    `source`, `sequence`: for each sequence its part, int16 [n], and its number there, int64 [n].
    `sequences_per_epoch`: sequences in one pass over all parts. `fill_rate`: fraction of their
    token positions that hold a token. `description`: lines for the log.
    """

    def __init__(
        self,
        group: Group,
        parts: list[PackedDocuments],
        source: np.ndarray,
        sequence: np.ndarray,
        sequences_per_epoch: int,
    ) -> None:
        self.name, self.parts, self.sequences_per_epoch = group.name, parts, sequences_per_epoch
        self._source, self._sequence = source, sequence
        packed = sum(part.index.facts["packed_tokens"] for part in parts)
        self.fill_rate = packed / max(1, sum(len(part) * part.capacity for part in parts))
        self.description = "\n".join(self._describe(group.parts[i], i) for i in range(len(parts)))

    def __len__(self) -> int:
        return len(self._sequence)

    def __getitem__(self, i: int) -> PackedSample:
        return self.parts[self._source[i]][int(self._sequence[i])]

    def provenance(self, i: int) -> dict:
        """Where sequence i comes from: `prefix` of the dataset, and numbers of the `documents`."""
        part = self.parts[self._source[i]]
        return {"prefix": part.documents.prefix, "documents": part.document_ids(int(self._sequence[i])).tolist()}

    def _describe(self, part: Part, number: int) -> str:
        index = self.parts[number].index
        facts = index.facts
        return (
            f"{self.name}: {part.prefix} {part.start:g}:{part.end:g}, {counted(facts['documents'], 'document')}, {facts['tokens']:,} tokens, "
            f"{index.fill_rate:.2%} filled, {int((self._source == number).sum()):,} sequences used"
        )

    def overlong(self) -> list[str]:
        """One line per dataset with documents longer than a sequence: how many there are, and how
        many were left out or cut; a warning if that loses more than MUCH_LOST of the tokens."""
        lines = []
        for part in self.parts:
            facts, policy = part.index.facts, part.packing.overlong
            left_out, cut = facts["left_out_documents"], facts["overlong_documents"] - facts["left_out_documents"]
            if facts["overlong_documents"]:
                done = f"{left_out:,} left out" + (f", {cut:,} cut" if cut else "")
                much = loss_remedy(facts, policy)
                lines.append(
                    f"{'warning: ' * bool(much)}{self.name}: {facts['overlong_documents']:,} of {facts['documents']:,} documents of {part.documents.prefix} are over "
                    f"{part.capacity:,} tokens: {done}, {facts['lost_tokens'] / facts['tokens']:.2%} of the tokens (--overlong {policy}){much}"
                )
        return lines


@dataclass
class Datasets:
    """The datasets of a run; `notices` are warnings for the log."""

    train: PackedDataset | None = None
    valid: dict[str, PackedDataset] = field(default_factory=dict)
    test: dict[str, PackedDataset] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def sequences_per_epoch(config: Config, split: str = "train") -> int:
    """Packed sequences in one pass over all datasets of `split`, over all its groups.

    In greedy order an epoch's incomplete last sequence belongs to the next epoch. Builds missing
    indices.
    """
    return sum(
        _epoch_length(load_index(*_documents_and_packing(part, config, split), config.data.cache_path))
        for group in groups_of(config, split)
        for part in group.parts
    )


def count_sequences(config: Config) -> int:
    """`sequences_per_epoch` of the training data, computed in memory: nothing is written."""
    return sum(
        _epoch_length(pack(*_documents_and_packing(part, config, "train")))
        for group in groups_of(config, "train")
        for part in group.parts
    )


def training_fill_rate(config: Config) -> float:
    """Fraction of token positions in training sequences that hold a token, averaged over datasets
    by weight; a dataset smaller than one sequence counts as full."""
    parts = [part for group in groups_of(config, "train") for part in group.parts]
    indices = [load_index(*_documents_and_packing(part, config, "train"), config.data.cache_path) for part in parts]
    return float(np.average([index.fill_rate or 1.0 for index in indices], weights=[part.weight for part in parts]))


def build_datasets(config: Config, *, train_samples: int | None, pad: int, vocab_size: int | None = None) -> Datasets:
    """The datasets that flags ask for.

    Missing packing indices are built, by one process while the others wait. Training data has
    `train_samples` sequences, over as many epochs as needed; None: no training data. Validation and
    test groups have the sequences of their ranges once, blended by weight until each part is used
    up. `pad` fills the ends of sequences. With `vocab_size`, token ids of every dataset are
    compared with it. Raises UserError.
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
    """A group's dataset: `samples` sequences, or those of its range once if None."""
    weights = np.array([part.weight for part in group.parts])
    opened = [_documents_and_packing(part, config, split) for part in group.parts]
    if vocab_size is not None:
        for documents, _ in opened:
            check_vocabulary(documents, vocab_size)
    once = [load_index(documents, packing, config.data.cache_path) for documents, packing in opened]
    if samples is None:
        limits = np.array([len(index) for index in once])
        source, sequence = _packing.blend(weights, limits, int(limits.sum()))
        indices = once
    else:
        source, sequence = _packing.blend(weights, np.full(len(weights), -1), samples)
        needed = np.bincount(source, minlength=len(weights))
        indices = [
            load_index_covering(documents, packing, int(count), config.data.cache_path)
            for (documents, packing), count in zip(opened, needed, strict=True)
        ]
    parts = [
        PackedDocuments(documents, packing, index, pad, vocab_size)
        for (documents, packing), index in zip(opened, indices, strict=True)
    ]
    return PackedDataset(group, parts, source, sequence, sum(_epoch_length(index) for index in once))


def _epoch_length(index: PackedIndex) -> int:
    return max(1, len(index))  # an epoch counts as one even if it does not fill a sequence


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
    """Raise UserError if a probed document has a token id outside the vocabulary: the data was made
    with another tokenizer."""
    for document in range(0, len(documents), max(1, len(documents) // PROBED_DOCUMENTS)):
        check_document(documents, document, vocab_size)


def check_document(documents: TokenizedDocuments, document: int, vocab_size: int) -> None:
    """Raise UserError if this document has a token id below 0, or of `vocab_size` or more."""
    for reader in (documents.inputs, documents.targets):
        tokens = reader[document].astype(np.int64)
        if _outside(tokens, vocab_size):
            worst = tokens.min() if tokens.min() < 0 else tokens.max()
            raise UserError(
                f"{reader.path}: document {document} has token id {worst}, the tokenizer has {vocab_size} entries; "
                "give the --tokenizer-file that the data was made with"
            )


def _outside(tokens: np.ndarray, vocab_size: int) -> bool:
    """Whether one of these int64 token ids is negative, or `vocab_size` or more."""
    return len(tokens) > 0 and bool(tokens.view(np.uint64).max() >= vocab_size)


def _overlaps(train: PackedDataset, others: list[PackedDataset]) -> list[str]:
    """One line per dataset of a validation or test group that shares documents with training."""
    notices = []
    for dataset in others:
        for part in dataset.parts:
            for trained in train.parts:
                ours, theirs = part.packing, trained.packing
                shared = min(ours.stop, theirs.stop) - max(ours.start, theirs.start)
                if shared > 0 and Path(part.documents.prefix).resolve() == Path(trained.documents.prefix).resolve():
                    notices.append(
                        f"{dataset.name}: {shared:,} documents of {part.documents.prefix} are in the training data, too"
                    )
    return notices
