"""The kinds of tokenizers, behind one interface: `Tokenizer`.

Byte-level BPE like StarCoder's and GPT-2's is encoded by `fast_bpe`, which gives the same ids
faster; if it cannot, `Tokenizer.notices` has one line with the reason.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_ft.errors import UserError
from megatron_ft.tokenizer._bpe import Encoder16, Encoder32
from megatron_ft.tokenizer.fast_bpe import CannotExpress, FastBPE
from megatron_ft.tokenizer.spec import Spec, build, first_line, vocabulary_of, without_dropout

EOD_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "<EOD>")


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 if every id fits, else int32, little-endian: Megatron's `best_fitting_dtype`, with its
    limit of 65500.

    >>> token_dtype(49152), token_dtype(65500)
    (dtype('uint16'), dtype('int32'))
    """
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class Tokenizer(ABC):
    """One tokenizer, whatever its format.

    path: the file with the vocabulary. kind: "tokenizer.json" or "sentencepiece". vocab_size:
    number of ids, which are 0 to vocab_size - 1, without padding. special_ids: special tokens to
    ids. pad: id of the padding token, or None. eos: id of the end-of-sequence token that the
    tokenizer's configuration names, None if it names none. notices: lines for the log.
    """

    kind: str
    vocab_size: int
    special_ids: dict[str, int]

    def __init__(self, path: Path, eod: int | None, eos: int | None, pad: int | None):
        self.path, self._eod, self.eos, self.pad = path, eod, eos, pad
        self.notices: list[str] = []

    @property
    def dtype(self) -> np.dtype:
        """dtype of ids in token files, see `token_dtype`."""
        return token_dtype(self.vocab_size)

    @property
    def eod(self) -> int:
        """Id of `<|endoftext|>`, or of the end-of-sequence token of another model family.

        Raises UserError if there is none."""
        if self._eod is None:
            raise UserError(
                f"{self.path}: no end-of-text token (looked for {', '.join(EOD_TOKENS)}); use a tokenizer that has one"
            )
        return self._eod

    @property
    def stop_ids(self) -> list[int]:
        """Ids at which generation ends: `eod`, which training appends to outputs, and `eos` if that
        is another one. Empty if there is neither."""
        return list(dict.fromkeys(i for i in (self._eod, self.eos) if i is not None))

    @property
    def config_ids(self) -> dict[str, int | None]:
        """Token ids for a model's config.json; StarCoder's first and last token are both
        <|endoftext|>."""
        return {"bos_token_id": self.eod, "eos_token_id": self.eod, "pad_token_id": self.pad}

    @property
    def generation_ids(self) -> dict[str, int | list[int] | None]:
        """Token ids for a model's generation_config.json: `config_ids` with all of `stop_ids`."""
        return self.config_ids | ({"eos_token_id": self.stop_ids} if len(self.stop_ids) > 1 else {})

    @property
    def end_notice(self) -> str | None:
        """A line to print where `eod` is appended, if the tokenizer's own end is another token."""
        if len(self.stop_ids) < 2:
            return None
        ends = [f"{self.token_of(i)} (id {i})" for i in self.stop_ids]
        return (
            f"outputs will end in {ends[0]}; the tokenizer's own end-of-sequence token is {ends[1]}: "
            "a converted model stops at both"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of one text. Special tokens spelled out in it are parsed; none are added."""
        return self.encode_batch([text])[0].tolist()

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts, each [tokens] of `dtype`. Several threads run in parallel.

        Raises UserError if the tokenizer cannot encode a text, for lack of an unknown token."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, with special tokens spelled out."""

    @abstractmethod
    def token_of(self, token_id: int) -> str:
        """The token of one id as the vocabulary has it, "" for an id beyond it."""

    @property
    def fast_encoder(self) -> Encoder16 | Encoder32 | None:
        """What `_bpe.Rows16` or `Rows32` encodes rows with; None if only `encode_batch` can."""
        return None

    def check_sample(self, texts: Sequence[str]) -> None:  # noqa: B027 - only some kinds compare
        """Compare a fast encoder with the reference on real data; stop using it if they differ."""


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, encoded by the `tokenizers` library or, if that is known to be equal, by
    `fast_bpe`."""

    kind = "tokenizer.json"

    def __init__(self, path: Path, spec: Spec, eos: str | None = None, pads: Sequence[str | None] = ()):
        """`spec` is a parsed tokenizer.json (`spec.read_spec`), `eos` the end-of-sequence token
        that a configuration names, `pads` the padding tokens to look for. Raises UserError if ids
        are not 0 to N - 1."""
        self.has_dropout = bool(spec["model"].get("dropout"))
        self.spec = without_dropout(spec) if self.has_dropout else spec
        self._backend = build(path, self.spec)
        vocab = vocabulary_of(path, self.spec, self._backend)
        self.vocab_size = len(vocab)
        self.special_ids = {token["content"]: token["id"] for token in self.spec["added_tokens"] if token["special"]}
        eod = first_known(vocab, [EOD_TOKENS[0], eos, *EOD_TOKENS])
        super().__init__(path, eod, first_known(vocab, [eos]), first_known(vocab, pads))
        if self.has_dropout:
            self.notices.append(
                f"{path}: encoding without the BPE dropout of {spec['model']['dropout']} that it asks for, so that a text has one encoding"
            )

    def with_literals(self, literals: Collection[str]) -> "JsonTokenizer":
        """This tokenizer without the added tokens `literals`; no id changes.

        Raises UserError if that is impossible, or one is not a special token."""
        if unknown := [token for token in literals if token not in self.special_ids]:
            raise UserError(
                f"--literal-special-tokens {unknown[0]}: {self.path} has no such special token; it has {' '.join(self.special_ids)}"
            )
        kept = [token for token in self.spec["added_tokens"] if token["content"] not in literals]
        tokenizer = JsonTokenizer.__new__(JsonTokenizer)
        tokenizer.__dict__.update({key: value for key, value in self.__dict__.items() if key != "_fast"})
        tokenizer.spec = {**self.spec, "added_tokens": kept}
        tokenizer.special_ids = {text: i for text, i in self.special_ids.items() if text not in literals}
        tokenizer.notices = list(self.notices)
        tokenizer._backend = build(self.path, tokenizer.spec)
        if any(tokenizer._backend.token_to_id(token["content"]) != token["id"] for token in kept):
            raise UserError(
                f"--literal-special-tokens: removing one would renumber other special tokens of {self.path}, which follow the vocabulary; leave it out"
            )
        return tokenizer

    @cached_property
    def _fast(self) -> FastBPE | None:
        try:
            return FastBPE.build(self.spec, self._backend, self.dtype)
        except CannotExpress as reason:
            self._use_slow(str(reason))
            return None

    @property
    def fast_encoder(self) -> Encoder16 | Encoder32 | None:
        return self._fast.encoder if self._fast else None

    def _use_slow(self, reason: str) -> None:
        self.notices.append(f"using the slower tokenizers library for {self.path.name}: {reason}")

    def check_sample(self, texts: Sequence[str]) -> None:
        if self._fast and (different := self._fast.differs(list(texts))):
            self._fast = None
            self._use_slow(f"ids differ on {different[0][:60]!r}")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._fast:
            return [self._fast.encode(text) for text in texts]
        try:
            encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise self._cannot_encode(error) from error
        return [np.array(one.ids, self.dtype) for one in encoded]

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of a text, [tokens] of `dtype`, and the characters at which each token starts and
        ends, both int64 [tokens]. Slower than `encode_batch`, and raises UserError like it."""
        try:
            encoded = self._backend.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise self._cannot_encode(error) from error
        offsets = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        return np.array(encoded.ids, self.dtype), offsets[:, 0], offsets[:, 1]

    def _cannot_encode(self, error: Exception) -> UserError:
        return UserError(
            f"{self.path}: cannot encode a text ({first_line(error)}); use a tokenizer that knows every character"
        )

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_of(self, token_id: int) -> str:
        return self._backend.id_to_token(token_id) or ""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file. Like the library it never parses control symbols in text."""

    kind = "sentencepiece"

    def __init__(self, path: Path, eos: str | None = None, pad: str | None = None):
        """`eos` and `pad` are the tokens that a configuration names. Raises UserError."""
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self._model.id_to_piece(list(range(self._model.get_piece_size())))
        except UnicodeDecodeError:  # in a piece, or in the library's message about one
            raise UserError(f"{path}: a piece is not UTF-8; copy the file again") from None
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path}: not a SentencePiece model ({first_line(error)}); give a tokenizer.json or .model file"
            ) from error
        self.vocab_size = self._model.get_piece_size()
        pieces = range(self.vocab_size)
        self.special_ids = {self._model.id_to_piece(i): i for i in pieces if self._model.is_control(i)}
        own = first_known(self.special_ids, EOD_TOKENS[:1])
        end = self._model.eos_id() if self._model.eos_id() >= 0 else None
        padding = self._model.pad_id() if self._model.pad_id() >= 0 else None
        named = [self.id_of(token) if token else None for token in (eos, pad)]
        super().__init__(path, end if own is None else own, named[0], padding if named[1] is None else named[1])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self._model.encode(text), self.dtype) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def id_of(self, token: str) -> int | None:
        """The id of a piece, None if the model does not have it."""
        found = self._model.piece_to_id(token)
        return found if self.token_of(found) == token else None

    def token_of(self, token_id: int) -> str:
        return self._model.id_to_piece(token_id) if 0 <= token_id < self.vocab_size else ""


def first_known(vocab: dict[str, int], names: Sequence[str | None]) -> int | None:
    """The id of the first of `names` that the vocabulary has."""
    return next((vocab[name] for name in names if name is not None and name in vocab), None)
