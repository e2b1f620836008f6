"""Tokens that a Hugging Face directory names outside of its tokenizer.json.

    tokenizer_config.json      tokenizer_class; eos_token, pad_token, ...; added_tokens_decoder;
                               extra_special_tokens (before transformers 5:
                               additional_special_tokens)
    special_tokens_map.json    the same named tokens; read if there is no added_tokens_decoder
    added_tokens.json          {text: id}; likewise

transformers adds all of them to the tokenizer. `Declared` finds out cheaply whether there are any
that tokenizer.json lacks: if not, its result is known without loading transformers.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.files.json_file import optional, read_json, require
from megatron_ft.tokenizer.spec import FLAGS, MAX_ID, Spec, content_of

CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("extra_special_tokens", "additional_special_tokens")

# Classes of transformers, without "Fast", that keep the vocabulary of a tokenizer.json and add no
# tokens but the defaults given.
PLAIN_CLASSES: dict[str, dict[str, str]] = {
    "TokenizersBackend": {},
    "PreTrainedTokenizer": {},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}
# By model_type of a config.json: the class that a tokenizer_class of PLAIN_CLASSES becomes.
CLASS_OF_MODEL = {"gpt_bigcode": "TokenizersBackend"}


@dataclass(frozen=True)
class Token:
    """A token, the file and key that name it, and its id and flags where they are given."""

    text: str
    where: str
    id: int | None = None
    flags: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Declared:
    """The tokens named by the files of a directory.

    class_name: tokenizer_class without "Fast". plain_class: the class that transformers uses, one
    of PLAIN_CLASSES; None if it is another one, or not certain. named: texts by attribute, such as
    eos_token. unset: attributes that are null, and so have no default. has_decoder: whether there
    is an added_tokens_decoder.
    """

    class_name: str | None
    plain_class: str | None
    named: dict[str, str]
    unset: frozenset[str]
    has_decoder: bool
    tokens: tuple[Token, ...]

    @classmethod
    def read(cls, directory: Path) -> "Declared":
        """Read the files of a directory. Raises UserError if one is damaged."""
        config = _read(directory / CONFIG)
        attributes, has_decoder = dict(config), "added_tokens_decoder" in config
        tokens: list[Token] = []
        if has_decoder:
            tokens += _decoder(config, str(directory / CONFIG))
        else:
            attributes |= _read(directory / SPECIAL_TOKENS_MAP)
            tokens += _added_tokens(directory / ADDED_TOKENS)
        where = str(directory)
        class_name = optional(config, "tokenizer_class", str, str(directory / CONFIG), None)
        class_name = class_name.removesuffix("Fast") if class_name else None
        plain_class = _plain_class(directory, config, class_name)
        named, unset = {}, set()
        for name in NAMES:
            text = content_of(attributes.get(name), where, name)
            if text is not None:
                named[name] = text
            elif name in attributes:
                unset.add(name)
        tokens += [Token(text, name) for name, text in named.items()]
        tokens += [token for source in (config, attributes) for token in _special_tokens(source, where)]
        if plain_class:
            defaults = {k: v for k, v in PLAIN_CLASSES[plain_class].items() if k not in unset and k not in named}
            named |= defaults
            tokens += [Token(text, f"{plain_class}'s default {name}") for name, text in defaults.items()]
        return cls(class_name, plain_class, named, frozenset(unset), has_decoder, tuple(tokens))

    def beyond(self, spec: Spec) -> list[Token]:
        """The tokens that are not added tokens of a tokenizer.json, or with another id or flag."""
        added = {token["content"]: token for token in spec["added_tokens"]}
        return [
            token
            for token in self.tokens
            if token.text not in added
            or token.id not in (None, added[token.text]["id"])
            or any(added[token.text][flag] != value for flag, value in token.flags.items())
        ]

    def is_plain(self, spec: Spec) -> bool:
        """Whether transformers certainly has the tokens of a tokenizer.json and no others."""
        if self.plain_class is None or self.beyond(spec):
            return False
        # GPT2Tokenizer takes the vocabulary from the file, but the added tokens only from the list.
        listed = {token.text for token in self.tokens if token.id is not None}
        rebuilt = self.plain_class == "GPT2Tokenizer" and self.has_decoder
        return not rebuilt or all(token["content"] in listed for token in spec["added_tokens"])

    def pad_of(self, spec: Spec) -> str | None:
        """The padding token: the one named, or that of tokenizer.json's own padding."""
        if "pad_token" in self.named or "pad_token" in self.unset or self.plain_class == "GPT2Tokenizer":
            return self.named.get("pad_token")
        padding = spec.get("padding")
        return content_of(padding.get("pad_token"), "tokenizer.json", "padding") if isinstance(padding, dict) else None


def identity(tokens: list[Token]) -> str:
    """A text that is equal for equal tokens, whichever file names them."""
    return json.dumps(sorted({(t.text, -1 if t.id is None else t.id, str(sorted(t.flags.items()))) for t in tokens}))


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _decoder(config: dict[str, Any], where: str) -> Iterator[Token]:
    """The tokens of added_tokens_decoder, {"7": {"content": ..., "lstrip": ...}}."""
    for key, value in require(config, "added_tokens_decoder", dict, where, of=dict).items():
        name = f"added_tokens_decoder {key!r}"
        if not (key.isascii() and key.isdigit()) or len(key) > 10 or int(key) > MAX_ID:
            raise UserError(f"{where}: {name}: the key is not a token id, expected an integer from 0 to {MAX_ID}")
        text = require(value, "content", str, f"{where}: {name}", low=1)
        given = {flag: optional(value, flag, bool, f"{where}: {name}", False) for flag in FLAGS}
        if value.get("normalized") is None:
            given["normalized"] = not given["special"]
        yield Token(text, name, int(key), given)


def _added_tokens(path: Path) -> Iterator[Token]:
    for text, i in _read(path).items():
        if type(i) is not int or not 0 <= i <= MAX_ID or not text:
            raise UserError(f"{path}: {text!r} has id {i!r}, expected a text and an integer from 0 to {MAX_ID}")
        yield Token(text, path.name, i)


def _special_tokens(attributes: dict[str, Any], where: str) -> Iterator[Token]:
    """The tokens of the lists of special tokens, and of attributes with names of their own."""
    for name in LISTS:
        value = attributes.get(name)
        if value is not None and not isinstance(value, (list, dict)):
            raise UserError(f"{where}: {name!r} is not a list of tokens")
        for item in value.values() if isinstance(value, dict) else value or ():
            if text := content_of(item, where, name):
                yield Token(text, name)
    for name, value in attributes.items():
        if name.endswith("_token") and name not in NAMES and isinstance(value, (str, dict)):
            if text := content_of(value, where, name):
                yield Token(text, name)


def _plain_class(directory: Path, config: dict[str, Any], class_name: str | None) -> str | None:
    """One of PLAIN_CLASSES if it is certainly the one that transformers uses."""
    if {"auto_map", "fast_tokenizer_files"} & set(config):
        return None
    found = class_name or "TokenizersBackend"
    if found in PLAIN_CLASSES and (directory / "config.json").is_file():
        try:
            model = read_json(directory / "config.json")
        except UserError:
            return None
        return CLASS_OF_MODEL.get(str(model.get("model_type"))) if "tokenizer_class" not in model else None
    return found if found in PLAIN_CLASSES else None
