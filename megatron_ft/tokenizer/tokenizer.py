"""`load_tokenizer(path)` reads a tokenizer.json, a SentencePiece model or a Hugging Face directory.

Nothing is downloaded. The tokens of a directory are those that transformers' AutoTokenizer gives
it: added tokens, end of sequence and padding that only tokenizer_config.json or another file next
to tokenizer.json names are part of the tokenizer, or it is refused. Text is split by tokenizer.json
itself, although transformers 5 replaces that part in some classes: a model was trained with the
file. `consumer.difference_to_transformers` finds out whether that makes a difference.
"""

import os
from collections.abc import Collection
from pathlib import Path

from megatron_ft.errors import UserError
from megatron_ft.files.first_bytes import what_it_is
from megatron_ft.files.hub_cache import download_hint, resolve_hub_cache
from megatron_ft.tokenizer.declared import Declared, Token
from megatron_ft.tokenizer.kinds import JsonTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_ft.tokenizer.spec import Spec, read_spec
from megatron_ft.tokenizer.transformers_view import CannotLoad, TransformersView, check_count, transformers_view

PAD_TOKENS = ("<pad>", "<|pad|>", "[PAD]", "<|padding|>")
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
SAVE_AS_JSON = (
    "python -c 'import sys, transformers; "
    "transformers.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])'"
)


def load_tokenizer(path: str | Path, literal_specials: Collection[str] = ()) -> Tokenizer:
    """Load a tokenizer.json, a SentencePiece `.model`, or a Hugging Face directory that contains
    one of them or vocab.json and merges.txt; also a model's directory in the Hub's cache.

    `literal_specials` are special tokens to encode as plain text if they occur in it. Raises
    UserError if the path is missing or unreadable, its tokens are not those that transformers
    loads, or a literal token is not a special token of a tokenizer.json.
    """
    path, notice = resolve_hub_cache(Path(path))
    if not os.path.exists(path):
        raise UserError(
            f"{path}: no such tokenizer; give a tokenizer.json, a SentencePiece .model or a Hugging Face directory"
            + download_hint(path)
        )
    tokenizer = _from_directory(path) if path.is_dir() else _from_file(path)
    if notice:
        tokenizer.notices.insert(0, notice)
    if not literal_specials:
        return tokenizer
    if not isinstance(tokenizer, JsonTokenizer):
        raise UserError(
            f"{path}: SentencePiece never parses special tokens from text; leave out --literal-special-tokens"
        )
    return tokenizer.with_literals(literal_specials)


def vocabulary_file(directory: Path) -> Path | None:
    """The one file of a directory that maps text to ids; None if there is none, or it takes two."""
    files = (directory / name for name in ("tokenizer.json", *SENTENCEPIECE_FILES))
    return next((file for file in files if file.is_file()), None)


def _from_file(path: Path) -> Tokenizer:
    if path.suffix == ".model":
        _check_model(path)
        return SentencePieceTokenizer(path)
    return JsonTokenizer(path, read_spec(path), pads=PAD_TOKENS)


def _from_directory(directory: Path) -> Tokenizer:
    file = vocabulary_file(directory)
    if file is None:
        return _from_slow_files(directory)
    declared = Declared.read(directory)
    if file.suffix == ".model":
        return _from_model(directory, file, declared)
    spec = read_spec(file)
    eos, pad = declared.named.get("eos_token"), declared.pad_of(spec)
    if declared.is_plain(spec) and (pad is None or any(token["content"] == pad for token in spec["added_tokens"])):
        return JsonTokenizer(file, spec, eos, [pad])
    beyond = declared.beyond(spec)
    try:
        view = transformers_view(directory)
    except CannotLoad as reason:
        if beyond:
            raise UserError(f"{reason}, and {_list(beyond)} are not in its tokenizer.json") from reason
        tokenizer = JsonTokenizer(file, spec, eos, [pad])
        tokenizer.notices.append(f"{reason}; using its tokenizer.json")
        return tokenizer
    return _merged(directory, file, spec, beyond, view)


def _merged(directory: Path, file: Path, spec: Spec, beyond: list[Token], view: TransformersView) -> JsonTokenizer:
    """The tokenizer.json with the added tokens that transformers has in addition."""
    for token in beyond:
        given = next((added["id"] for added in view.added_tokens if added["content"] == token.text), None)
        if token.id not in (None, given):
            raise UserError(
                f"{directory}: {token.where} gives {token.text!r} id {token.id}, but transformers {view.version} gives it {given}: "
                "ids of added tokens must follow the vocabulary without gaps or duplicates"
            )
    known = {token["content"] for token in spec["added_tokens"]}
    tokens = {token["content"]: token for token in (*spec["added_tokens"], *view.added_tokens)}
    merged = {**spec, "added_tokens": sorted(tokens.values(), key=lambda token: token["id"])}
    tokenizer = JsonTokenizer(file, merged, view.named.get("eos_token"), [view.named.get("pad_token")])
    check_count(directory, tokenizer.vocab_size, view)
    if new := [
        Token(token["content"], "", token["id"]) for token in view.added_tokens if token["content"] not in known
    ]:
        tokenizer.notices.append(f"{directory}: added as transformers does: {_list(new)}")
    return tokenizer


def _from_model(directory: Path, file: Path, declared: Declared) -> SentencePieceTokenizer:
    """The SentencePiece model of a directory; UserError if transformers adds tokens to it."""
    _check_model(file)
    tokenizer = SentencePieceTokenizer(file, declared.named.get("eos_token"), declared.named.get("pad_token"))
    pieces = [(token, tokenizer.id_of(token.text)) for token in declared.tokens]
    new = [token for token, i in pieces if i is None or token.id not in (None, i)]
    if not new and (declared.plain_class or declared.class_name == "LlamaTokenizer"):
        return tokenizer
    try:
        view = transformers_view(directory)
    except CannotLoad as reason:
        if new:
            raise UserError(f"{reason}, and {_list(new)} are not in its {file.name}") from reason
        tokenizer.notices.append(f"{reason}; using its {file.name}")
        return tokenizer
    check_count(directory, tokenizer.vocab_size, view, f"save it as a tokenizer.json: {SAVE_AS_JSON} {directory} NEW")
    return tokenizer


def _from_slow_files(directory: Path) -> JsonTokenizer:
    """The tokenizer that transformers makes of vocab.json, merges.txt and the like."""
    try:
        view = transformers_view(directory, with_spec=True)
    except CannotLoad as error:
        raise UserError(f"{error}; it needs a tokenizer.json or a tokenizer.model") from error
    assert view.spec is not None
    return JsonTokenizer(directory, view.spec, view.named.get("eos_token"), [view.named.get("pad_token")])


def _check_model(path: Path) -> None:
    if found := what_it_is(path):
        raise UserError(f"{path}: {found}")


def _list(tokens: list[Token]) -> str:
    shown = [token.text if token.id is None else f"{token.text} (id {token.id})" for token in tokens[:3]]
    return ", ".join(shown) + (f" and {len(tokens) - 3} more" if len(tokens) > 3 else "")
