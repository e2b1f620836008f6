"""Tokenizers as used by the rest of the package: `load_tokenizer(path)` reads a tokenizer.json, a
SentencePiece model or a Hugging Face directory.

Nothing is downloaded. Byte-level BPE like StarCoder's and GPT-2's is encoded by `fast_bpe`, which
gives the same ids faster; if it cannot, `Tokenizer.notice` is one line with the reason.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft.errors import UserError
from megatron_ft.tokenizer.fast_bpe import CannotExpress, FastBPE

EOD_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "<EOD>")
PAD_TOKENS = ("<pad>", "<|pad|>", "[PAD]", "<|padding|>")
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 if every id fits, else int32, little-endian: Megatron's `best_fitting_dtype`, with its
    limit of 65500.

    >>> token_dtype(49152), token_dtype(65500)
    (dtype('uint16'), dtype('int32'))
    """
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class Tokenizer(ABC):
    """One tokenizer, whatever its format.

    kind: "tokenizer.json" or "sentencepiece". vocab_size: number of ids, without padding.
    special_ids: special tokens to ids. pad: id of the padding token, or None. notice: one line for
    the log, or None.
    """

    kind: str
    vocab_size: int
    special_ids: dict[str, int]
    pad: int | None
    notice: str | None = None

    def __init__(self, path: Path, eod: int | None):
        self.path, self._eod = path, eod

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
    def config_ids(self) -> dict[str, int | None]:
        """Token ids for a model's config.json; StarCoder's first and last token are both
        <|endoftext|>."""
        return {"bos_token_id": self.eod, "eos_token_id": self.eod, "pad_token_id": self.pad}

    def encode(self, text: str) -> list[int]:
        """Ids of one text. Special tokens spelled out in it are parsed; none are added."""
        return self.encode_batch([text])[0].tolist()

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts, each [tokens] of `dtype`. Several threads run in parallel."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, with special tokens spelled out."""

    def check_sample(self, texts: Sequence[str]) -> None:  # noqa: B027 - only some kinds compare
        """Compare a fast encoder with the reference on real data; stop using it if they differ."""


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, encoded by the `tokenizers` library or, if that is known to be equal, by
    tiktoken's core."""

    kind = "tokenizer.json"

    def __init__(self, path: Path, text: str, config: dict):
        from tokenizers import Tokenizer as Backend

        try:
            self._spec = json.loads(text)
            self._backend = Backend.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{path}: not a tokenizer.json ({_first_line(error)}); give the file that comes with the model"
            ) from error
        self._backend.no_truncation()
        self._backend.no_padding()
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(len(vocab), max(vocab.values(), default=-1) + 1)
        self.special_ids = {token["content"]: token["id"] for token in self._spec["added_tokens"] if token["special"]}
        self.pad = _first_known(vocab, [config.get("pad_token"), *PAD_TOKENS])
        super().__init__(path, _first_known(vocab, [EOD_TOKENS[0], config.get("eos_token"), *EOD_TOKENS]))

    @cached_property
    def _fast(self) -> FastBPE | None:
        try:
            return FastBPE.build(self._spec, self._backend, self.dtype)
        except (CannotExpress, ImportError) as reason:
            self._use_slow(str(reason))
            return None

    def _use_slow(self, reason: str) -> None:
        self.notice = f"using the slower tokenizers library for {self.path.name}: {reason}"

    def check_sample(self, texts: Sequence[str]) -> None:
        if self._fast and (different := self._fast.differs(list(texts))):
            self._fast = None
            self._use_slow(f"ids differ on {different[0][:60]!r}")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._fast:
            return [self._fast.encode(text) for text in texts]
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, self.dtype) for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model` file. Like the library it never parses control symbols in text."""

    kind = "sentencepiece"

    def __init__(self, path: Path):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path}: not a SentencePiece model ({_first_line(error)}); give a tokenizer.json or .model file"
            ) from error
        self.vocab_size = self._model.get_piece_size()
        pieces = range(self.vocab_size)
        self.special_ids = {self._model.id_to_piece(i): i for i in pieces if self._model.is_control(i)}
        self.pad = self._model.pad_id() if self._model.pad_id() >= 0 else None
        named = _first_known(self.special_ids, EOD_TOKENS[:1])
        eos = self._model.eos_id() if self._model.eos_id() >= 0 else None
        super().__init__(path, eos if named is None else named)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self._model.encode(text), self.dtype) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])


def load_tokenizer(path: str | Path, literal_specials: Collection[str] = ()) -> Tokenizer:
    """Load a tokenizer.json, a SentencePiece `.model`, or a Hugging Face directory that contains
    one of them or vocab.json and merges.txt.

    `literal_specials` are special tokens to encode as plain text if they occur in it. Raises
    UserError if the path is missing or unreadable, or a literal token is not a special token of a
    tokenizer.json.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path}: no such tokenizer; give a tokenizer.json, a SentencePiece .model or a Hugging Face directory"
        )
    config: dict[str, str | None] = {}
    if path.is_dir():
        path, config = _inside_directory(path)
    if path.suffix == ".model":
        if literal_specials:
            raise UserError(
                f"{path}: SentencePiece never parses special tokens from text; leave out --literal-special-tokens"
            )
        return SentencePieceTokenizer(path)
    if path.is_dir():
        text = _from_slow_files(path)
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot read this tokenizer ({error}); give a tokenizer.json") from error
    if not literal_specials:
        return JsonTokenizer(path, text, config)
    return _with_literals(path, text, config, literal_specials)


def _with_literals(path: Path, text: str, config: dict, literals: Collection[str]) -> JsonTokenizer:
    """The tokenizer without the added tokens `literals`; no id changes."""
    complete = JsonTokenizer(path, text, config)
    if unknown := [token for token in literals if token not in complete.special_ids]:
        raise UserError(
            f"--literal-special-tokens {unknown[0]}: {path} has no such special token; it has {' '.join(complete.special_ids)}"
        )
    spec = json.loads(text)
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in literals]
    tokenizer = JsonTokenizer(path, json.dumps(spec), config)
    tokenizer._eod, tokenizer.vocab_size, tokenizer.pad = complete._eod, complete.vocab_size, complete.pad
    ids = tokenizer._backend.get_vocab(with_added_tokens=True)
    if any(ids.get(token) != i for token, i in complete.special_ids.items() if token not in literals):
        raise UserError(
            f"--literal-special-tokens: removing one would renumber other special tokens of {path}, which follow the vocabulary; leave it out"
        )
    return tokenizer


def _inside_directory(directory: Path) -> tuple[Path, dict]:
    """The file of a Hugging Face directory to read (or the directory itself), and its configuration
    with special tokens as text."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            try:
                config |= json.loads((directory / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{directory / name}: not JSON ({error}); copy the file again") from error
    names = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()}
    for name in ("tokenizer.json", *SENTENCEPIECE_FILES):
        if (directory / name).is_file():
            return directory / name, names
    return directory, names


def _from_slow_files(directory: Path) -> str:
    """The text of a tokenizer.json, converted by transformers from a slow tokenizer's files."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True).backend_tokenizer.to_str()
    except Exception as error:  # transformers raises many types
        raise UserError(
            f"{directory}: no readable tokenizer ({_first_line(error)}); it needs a tokenizer.json or a tokenizer.model"
        ) from error


def _first_known(vocab: dict[str, int], names: Sequence[str | None]) -> int | None:
    return next((vocab[name] for name in names if name is not None and name in vocab), None)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
