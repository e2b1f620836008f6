"""A directory's tokenizer has the tokens, ids, end and padding that transformers gives it, or is
refused with both counts."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hf_directories import ADDED, FLAGS, PLAIN, SIZE, SPEC, asked, write_directory  # noqa: F401 - a fixture

from megatron_ft.errors import UserError
from megatron_ft.tokenizer.files import vocabulary_digest
from megatron_ft.tokenizer.kinds import Tokenizer
from megatron_ft.tokenizer.tokenizer import load_tokenizer

GPT2 = {"tokenizer_class": "GPT2TokenizerFast"}
END = "<|endoftext|>"
NAMES = [token["content"] for token in SPEC["added_tokens"]]
NEW = ["<|user|>", "<|end|>", "[PAD]", "<s>", "def", "<|im_end|>"]
EVERY_TOKEN = " x".join([*NAMES, *NEW]) + "".join([*NEW, *NAMES])
NORMALIZED = {"content": "helloworld", **FLAGS, "normalized": True, "special": False}


def decoder(*tokens: dict | str, first: int = SIZE) -> dict:
    """An added_tokens_decoder with tokens after those of tokenizer.json."""
    new = [{"content": token, **FLAGS} if isinstance(token, str) else token for token in tokens]
    return {"added_tokens_decoder": ADDED | {str(first + i): token for i, token in enumerate(new)}}


def with_added(*tokens: str) -> dict:
    new = [{"id": SIZE + i, "content": token, **FLAGS} for i, token in enumerate(tokens)]
    return {**SPEC, "added_tokens": [*SPEC["added_tokens"], *new]}


PADDED = {
    "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 4, "pad_type_id": 0, "pad_token": NAMES[-1],
}  # fmt: skip
CASES: dict[str, dict] = {
    "nothing else": {"tokenizer_config": PLAIN},
    "no configuration": {},
    "StarCoder's model directory": {"tokenizer_config": GPT2 | {"eos_token": END}, "config": {"model_type": "gpt_bigcode"}},
    "tokens of a decoder": {"tokenizer_config": PLAIN | decoder("<|user|>", "<|end|>")},
    "tokens of a decoder, GPT2Tokenizer": {"tokenizer_config": GPT2 | decoder("<|user|>", "<|end|>")},
    "a decoder in another order": {"tokenizer_config": PLAIN | {"added_tokens_decoder": dict(reversed(decoder("<a>", "<b>")["added_tokens_decoder"].items()))}},
    "a decoder of a word that is not special": {"tokenizer_config": PLAIN | decoder(NORMALIZED)},
    "a decoder with other flags": {"tokenizer_config": PLAIN | {"added_tokens_decoder": ADDED | {"0": {**ADDED["0"], "lstrip": True}}}},
    "added_tokens.json": {"tokenizer_config": PLAIN, "added_tokens": {"<|user|>": SIZE, "<|end|>": SIZE + 1}},
    "added_tokens.json next to a decoder": {"tokenizer_config": PLAIN | decoder("<|user|>"), "added_tokens": {"<|other|>": SIZE}},
    "additional_special_tokens": {"tokenizer_config": PLAIN | {"additional_special_tokens": ["<|user|>", {"__type": "AddedToken", "content": "<|end|>", **FLAGS}]}},
    "extra_special_tokens": {"tokenizer_config": PLAIN | {"extra_special_tokens": ["<|user|>"]}},
    "named extra_special_tokens": {"tokenizer_config": PLAIN | {"extra_special_tokens": {"image_token": "<image>"}}},
    "an attribute of its own": {"tokenizer_config": PLAIN | {"image_token": "<image>"}},
    "special_tokens_map.json": {"special_tokens_map": {"additional_special_tokens": ["<|user|>"], "eos_token": {"content": "<|end|>", "lstrip": False}}},
    "a special_tokens_map.json that overrides": {"tokenizer_config": PLAIN | {"eos_token": END, "pad_token": "<p>"}, "special_tokens_map": {"eos_token": NAMES[1], "pad_token": NAMES[2]}},
    "a special_tokens_map.json next to a decoder": {"tokenizer_config": PLAIN | decoder() | {"eos_token": END}, "special_tokens_map": {"eos_token": NAMES[1]}},
    "a new padding token": {"tokenizer_config": GPT2 | {"pad_token": "[PAD]"}},
    "a new end": {"tokenizer_config": GPT2 | {"eos_token": "<|im_end|>"}},
    "a known end and padding": {"tokenizer_config": GPT2 | {"eos_token": NAMES[1], "pad_token": NAMES[2]}},
    "a special token that is in the vocabulary": {"tokenizer_config": PLAIN | {"sep_token": "def"}},
    "an end in the vocabulary that is not an added token": {"spec": {**SPEC, "added_tokens": SPEC["added_tokens"][1:]}, "tokenizer_config": PLAIN | {"eos_token": END}},
    "GPT2Tokenizer's default end": {"spec": {**SPEC, "added_tokens": SPEC["added_tokens"][1:]}, "tokenizer_config": GPT2},
    "padding of tokenizer.json": {"spec": {**SPEC, "padding": PADDED}, "tokenizer_config": PLAIN},
    "padding of tokenizer.json, GPT2Tokenizer": {"spec": {**SPEC, "padding": PADDED}, "tokenizer_config": GPT2},
    "tokens after the vocabulary": {"spec": with_added("<|user|>"), "tokenizer_config": GPT2},
    "padding by default of a class": {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer"}},
    "tokens by default of a class": {"tokenizer_config": {"tokenizer_class": "GPTNeoXTokenizerFast", "pad_token": "<|padding|>"}},
    "an unknown class": {"tokenizer_config": {"tokenizer_class": "NoSuchTokenizer"}},
    "another model's configuration": {"tokenizer_config": PLAIN, "config": {"model_type": "llama"}},
}  # fmt: skip


def of_transformers(directory: Path) -> tuple:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    ids = theirs.encode(EVERY_TOKEN, add_special_tokens=False)
    return len(theirs), max(theirs.get_vocab().values()), theirs.eos_token_id, theirs.pad_token_id, ids


def of(tokenizer: Tokenizer) -> tuple:
    ids = tokenizer.encode(EVERY_TOKEN)
    return tokenizer.vocab_size, tokenizer.vocab_size - 1, tokenizer.eos, tokenizer.pad, ids


@pytest.mark.parametrize("files", CASES.values(), ids=CASES)
def test_tokens_ids_end_and_padding_are_those_of_transformers(tmp_path, asked, files):  # noqa: F811
    directory = write_directory(tmp_path / "hf", **files)
    assert of(load_tokenizer(directory)) == of_transformers(directory)


REFUSED: dict[str, tuple[dict, str]] = {
    "a gap before the new tokens": (
        {"tokenizer_config": PLAIN | decoder("<|user|>", first=SIZE + 5)},
        f"gives '<|user|>' id {SIZE + 5}, but transformers",
    ),
    "a gap in added_tokens.json": (
        {"added_tokens": {"<|user|>": SIZE + 1}},
        f"added_tokens.json gives '<|user|>' id {SIZE + 1}, but transformers",
    ),
    "another id of a known token": (
        {"added_tokens": {END: 7}},
        "added_tokens.json gives '<|endoftext|>' id 7, but transformers",
    ),
    "a token that transformers drops": (
        {"spec": with_added("<|user|>"), "tokenizer_config": GPT2 | decoder()},
        f"{SIZE + 1:,} tokens as Megatron-FT reads it, but {SIZE:,} as transformers",
    ),
    "new tokens that transformers cannot load": (
        {"tokenizer_config": PLAIN | {"eos_token": {"content": "<|end|>"}}},
        "and <|end|> are not in its tokenizer.json",
    ),
}


@pytest.mark.parametrize("files, reason", REFUSED.values(), ids=REFUSED)
def test_tokens_that_transformers_has_otherwise_are_refused(tmp_path, asked, files, reason):  # noqa: F811
    with pytest.raises(UserError) as error:
        load_tokenizer(write_directory(tmp_path / "hf", **files))
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_added_tokens_are_named_with_their_ids(tmp_path):
    tokenizer = load_tokenizer(
        write_directory(tmp_path / "hf", tokenizer_config=PLAIN | decoder("<|user|>", "<|end|>"))
    )
    assert tokenizer.encode("<|user|>hi<|end|>")[::3] == [SIZE, SIZE + 1]
    assert tokenizer.notices == [
        f"{tmp_path / 'hf'}: added as transformers does: <|user|> (id {SIZE}), <|end|> (id {SIZE + 1})"
    ]


def test_transformers_is_not_asked_where_tokenizer_json_has_every_token(tmp_path, asked):  # noqa: F811
    for number, config in enumerate((PLAIN | decoder(), GPT2 | {"eos_token": END, "additional_special_tokens": NAMES})):
        load_tokenizer(write_directory(tmp_path / str(number), tokenizer_config=config))
    assert asked == []


def test_new_tokens_can_be_literal_unless_that_renumbers_others(tmp_path, asked):  # noqa: F811
    directory = write_directory(tmp_path / "hf", tokenizer_config=PLAIN | decoder("<|user|>", "<|end|>"))
    literal = load_tokenizer(directory, ["<|end|>"])
    assert SIZE + 1 not in literal.encode("<|user|><|end|>") and literal.vocab_size == SIZE + 2
    with pytest.raises(UserError, match="would renumber"):
        load_tokenizer(directory, ["<|user|>"])


def test_the_digest_of_a_vocabulary_changes_with_tokens_of_other_files(tmp_path):
    plain = write_directory(tmp_path / "plain", tokenizer_config=PLAIN | decoder() | {"eos_token": END})
    digests = {vocabulary_digest(plain / "tokenizer.json"), vocabulary_digest(plain)}
    assert len(digests) == 1
    for number, files in enumerate(({"added_tokens": {"<a>": SIZE}}, {"added_tokens": {"<b>": SIZE}})):
        digests.add(vocabulary_digest(write_directory(tmp_path / str(number), **files)))
    assert len(digests) == 3


def random_token(rng: random.Random, with_type: bool) -> str | dict:
    text = rng.choice([*NAMES * 8, *NEW])
    if rng.random() < 0.5:
        return text
    flags = {flag: rng.random() < 0.3 for flag in FLAGS if rng.random() < 0.4}
    return {"content": text, **flags, **({"__type": "AddedToken"} if with_type else {})}


def random_files(rng: random.Random) -> dict:
    """The files of a directory as somebody may have edited it; mostly valid."""
    token = lambda: random_token(rng, True)  # noqa: E731
    classes = ("GPT2TokenizerFast", "GPT2Tokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer")
    config: dict = {"tokenizer_class": rng.choice(classes)} if rng.random() < 0.9 else {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "image_token"):
        if rng.random() < 0.35:
            config[name] = token() if rng.random() < 0.9 else None
    if rng.random() < 0.3:
        config[rng.choice(("additional_special_tokens", "extra_special_tokens"))] = [
            token() for _ in range(rng.randint(0, 2))
        ]
    if rng.random() < 0.3:
        config |= decoder(*NEW[: rng.randint(0, 3)], first=SIZE + (rng.random() < 0.1))
        if rng.random() < 0.2:
            del config["added_tokens_decoder"][rng.choice(list(ADDED))]
    files: dict = {"tokenizer_config": config, "spec": SPEC}
    if rng.random() < 0.2:
        files["spec"] = rng.choice(
            [with_added("<|user|>"), {**SPEC, "padding": PADDED}, {**SPEC, "added_tokens": SPEC["added_tokens"][1:]}]
        )
    if rng.random() < 0.25:
        files["special_tokens_map"] = {
            name: random_token(rng, False) for name in ("eos_token", "pad_token") if rng.random() < 0.5
        }
    if rng.random() < 0.2:
        files["added_tokens"] = {
            text: SIZE + i + (rng.random() < 0.1) for i, text in enumerate(NEW[: rng.randint(1, 3)])
        }
    if rng.random() < 0.2:
        files["config"] = {"model_type": rng.choice(["gpt_bigcode", "gpt_bigcode", "llama", "gpt2", "none"])}
    return files


@pytest.mark.slow
def test_random_directories_have_the_tokens_of_transformers_or_are_refused(tmp_path, asked):  # noqa: F811
    rng, outcomes = random.Random(12), Counter()
    for number in range(300):
        files = random_files(rng)
        directory = write_directory(tmp_path / str(number), **files)
        before = len(asked)
        try:
            ours = of(load_tokenizer(directory))
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        plain = len(asked) == before
        # GPT2Tokenizer may no longer parse an added token of the vocabulary; tokenizing warns.
        compared = slice(None) if plain else slice(4)
        assert ours[compared] == of_transformers(directory)[compared], json.dumps(files)
        outcomes["plain" if plain else "asked"] += 1
    assert min(outcomes["plain"], outcomes["asked"], outcomes["refused"]) >= 10, outcomes
