"""Blocks of conversations as token ids, with marks of those that are learned."""

import re

import numpy as np

from megatron_ft.conversations.chat_template import ChatTemplate
from megatron_ft.conversations.learned_spans import Conversation, conversation_of, learned_spans
from megatron_ft.files.jsonl import Block
from megatron_ft.files.jsonl_row import BadRow, parse_object
from megatron_ft.tokenizer.kinds import Tokenizer
from megatron_ft.tokenizer.overlap import SpanEncoder
from megatron_ft.tokenizing.row_encoder import Encoded


class ConversationEncoder:
    """Encodes blocks of lines; one object serves all threads.

    A conversation is rendered and encoded once. Its fields: inputs, the tokens before the first
    that is learned; targets, the others; and for each target 1 (learned) or 0, of dtype uint8.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, key: str, train_on: str):
        self.tokenizer, self.template, self.key, self.train_on = tokenizer, template, key, train_on
        self.special_ids = np.array(list(tokenizer.special_ids.values()), np.int64)
        self.dtypes = [tokenizer.dtype, tokenizer.dtype, np.dtype(np.uint8)]
        self._spans = SpanEncoder(tokenizer)
        self._numbers = {token: number for number, token in enumerate(tokenizer.special_ids)}
        longest_first = sorted(self._numbers, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def texts_of(self, line: bytes) -> list[str]:
        """The text of a line's conversation; BadRow with the reason if it is not a good row."""
        conversation = conversation_of(parse_object(line), self.key)
        text = self.template.render(conversation.messages, conversation.tools).text
        _check_utf8(text)
        return [text]

    def encode(self, block: Block) -> Encoded:
        """Encode the good rows of a block."""
        data: list[list[bytes | memoryview]] = [[], [], []]
        sizes: list[list[int]] = [[], []]
        bad: list[tuple[int, str]] = []
        special_counts = np.zeros_like(self.special_ids)
        stops = 0
        for i, line in block.rows():
            try:
                conversation = conversation_of(parse_object(line), self.key)
                ids, learned = self._tokens_of(conversation)
            except BadRow as reason:
                bad.append((i, str(reason)))
                continue
            first = int(learned.argmax())
            stops += bool(np.isin(ids[learned.astype(bool)], self.tokenizer.stop_ids).any())
            for pieces, field in zip(data, (ids[:first], ids[first:], learned[first:]), strict=True):
                pieces.append(field.tobytes())
            for lengths, field in zip(sizes, (ids[:first], ids[first:]), strict=True):
                lengths.append(len(field))
            self._count_specials(conversation, special_counts)
        lengths_of = [np.array(lengths, np.int32) for lengths in (*sizes, sizes[1])]
        return Encoded([b"".join(pieces) for pieces in data], lengths_of, bad, special_counts, ended=0, stops=stops)

    def _tokens_of(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a conversation, and whether each is learned; BadRow if none is."""
        text, spans = learned_spans(self.template, conversation, self.train_on)
        _check_utf8(text)
        ids, learned = self._spans.encode(text, spans)
        if not learned.any():
            raise BadRow("no learned tokens: every turn of the assistant is empty, or the chat template leaves it out")
        return ids, learned

    def _count_specials(self, conversation: Conversation, counts: np.ndarray) -> None:
        """Add how often the messages, not the template, spell each special token out."""
        if self._special is not None:
            for message in conversation.messages:
                for token in self._special.findall(message.get("content", "")):
                    counts[self._numbers[token]] += 1


def _check_utf8(text: str) -> None:
    """BadRow if a text has half of a surrogate pair, which only an escape like \\ud83d gives."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("lone surrogate") from None
