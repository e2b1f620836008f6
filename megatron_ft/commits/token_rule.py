"""The rule that counts tokens, by pieces of the text and no further than needed."""

import re

from megatron_ft.commits.candidate import Candidate
from megatron_ft.commits.rules import Limits
from megatron_ft.tokenizer.kinds import Tokenizer

SEPARATOR = "<|endoftext|>"
PIECE_CHARS = 4096
# Where a text may be cut: after a newline between two characters that are not white space. Such a
# cut changes no token of a pattern like GPT-2's, which joins white space only.
LINE_END = re.compile(r"(?<=\S)\n(?=\S)")


class TokenRule:
    """Drops rows of too few or too many tokens: {old}<|endoftext|>{new}, as CommitPackFT."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, row: Candidate, limits: Limits) -> bool:
        text = f"{row.old}{SEPARATOR}{row.new}"
        return not limits.min_tokens <= self.count(text, limits.max_tokens) <= limits.max_tokens

    def count(self, text: str, most: int) -> int:
        """Number of tokens; once it is above `most`, the text is not read further."""
        count = start = 0
        while start < len(text) and count <= most:
            line_end = LINE_END.search(text, start + PIECE_CHARS)
            stop = line_end.end() if line_end else len(text)
            count += len(self._tokenizer.encode_batch([text[start:stop]])[0])
            start = stop
        return count
