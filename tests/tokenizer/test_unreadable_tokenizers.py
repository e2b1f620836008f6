"""Damaged, foreign and missing tokenizers: one line with the file, the fault and the way out."""

import json
from pathlib import Path

import pytest
from conftest import ROOT

from megatron_ft.errors import UserError
from megatron_ft.tokenizer.tokenizer import load_tokenizer

SPEC = json.loads((ROOT / "tests/fixtures/tokenizer.json").read_text(encoding="utf-8"))
SIZE = len(SPEC["model"]["vocab"])
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
TOKEN = {"id": SIZE, "content": "<new>", **FLAGS}


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def added(*tokens: dict) -> bytes:
    """The tokenizer.json with more added tokens."""
    return json.dumps({**SPEC, "added_tokens": [*SPEC["added_tokens"], *tokens]}).encode()


def vocabulary(**changes: int) -> bytes:
    """The tokenizer.json with a changed vocabulary."""
    model = {**SPEC["model"], "vocab": {**SPEC["model"]["vocab"], **changes}}
    return json.dumps({**SPEC, "model": model}).encode()


def without(key: str) -> dict:
    return {name: value for name, value in TOKEN.items() if name != key}


def model(**changes: object) -> bytes:
    """The tokenizer.json with another model."""
    return json.dumps({**SPEC, "model": {**SPEC["model"], **changes}}).encode()


FILES = {
    "empty": (b"", "empty, expected JSON"),
    "truncated": (json.dumps(SPEC).encode()[:-100], "JSON that ends too early"),
    "a list": (b"[1]", "holds a list, expected a JSON object"),
    "null": (b"null", "holds null, expected a JSON object"),
    "a number": (b"1e999", "holds a number, expected a JSON object"),
    "deep": (b'{"model":' + b"[" * 100_000, "more than 100 levels"),
    "5,000 digits": (b'{"model":' + b"9" * 5000 + b"}", "expected an object"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
    "a page": (b"<!DOCTYPE html><html></html>", "an HTML page"),
    "UTF-16": (b"\xff\xfe{\x00}\x00", "UTF-16, not UTF-8"),
    "not UTF-8": (b'{"\xe9": 1}', "not UTF-8 at byte 2"),
    "no model": (b"{}", 'no "model", expected an object'),
    "model of an unknown type": (b'{"model": {"type": "GPT"}}', "not a tokenizer.json"),
    "added_tokens: null": (b'{"model": {}, "added_tokens": null}', '"added_tokens" is null, expected a list'),
    "added_tokens: texts": (b'{"model": {}, "added_tokens": ["<a>"]}', '"added_tokens" has "<a>" at 0'),
    "an added token without id": (added(without("id")), 'no "id", expected an integer, 0 to 4294967295'),
    "an added token without content": (added(without("content")), 'no "content", expected a string'),
    "an added token without flags": (added(without("special")), 'no "special", expected true or false'),
    "an empty added token": (added({**TOKEN, "content": ""}), '"content" is ""'),
    "an id of 1.5": (added({**TOKEN, "id": 1.5}), '"id" is 1.5, expected an integer'),
    "an id of -1": (added({**TOKEN, "id": -1}), '"id" is -1, expected an integer'),
    "an id of true": (added({**TOKEN, "id": True}), '"id" is true, expected an integer'),
    "an id of 2^40": (added({**TOKEN, "id": 2**40}), '"id" is 1099511627776, expected an integer'),
    "a gap before an added token": (added({**TOKEN, "id": SIZE + 5}), f"'<new>' has id {SIZE + 5}, but the tokenizers library gives it {SIZE}"),
    "the id of another added token": (added({**TOKEN, "id": 0}), f"'<new>' has id 0, but the tokenizers library gives it {SIZE}"),
    "two ids of one added token": (added(TOKEN, {**TOKEN, "id": SIZE + 1}), f"'<new>' has id {SIZE + 1}"),
    "two tokens of one id": (vocabulary(zzzz=SIZE - 1), f"both have id {SIZE - 1}"),
    "a gap in the vocabulary": (vocabulary(zzzz=SIZE + 7), f"{SIZE + 1} tokens, but the largest id is {SIZE + 7} ('zzzz'), and none has id {SIZE}"),
    "an id of 2^31": (vocabulary(zzzz=2**31), "but the largest id is 2,147,483,648"),
    "a normalizer in a list": (json.dumps({**SPEC, "normalizer": [[]]}).encode(), '"normalizer" is a list, expected an object'),
    "a pre-tokenizer in a list": (json.dumps({**SPEC, "pre_tokenizer": [SPEC["pre_tokenizer"]]}).encode(), '"pre_tokenizer" is a list'),
    "a prefix that no token has": (model(continuing_subword_prefix="\x00"), "merge 0 continues with"),
    "a prefix in merges as texts": (model(continuing_subword_prefix="##", merges=["a b"]), "merge 0 continues with 'b', without"),
    "a negative id": (vocabulary(zzzz=-1), "not a tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize("content, reason", FILES.values(), ids=FILES)
def test_a_damaged_tokenizer_json_is_refused_with_its_fault(tmp_path, content, reason):
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert reason in refusal(tmp_path / "tokenizer.json")
    assert reason in refusal(tmp_path)


CONFIGS = {
    "a list": ("tokenizer_config.json", [1], "holds a list, expected a JSON object"),
    "null": ("special_tokens_map.json", None, "holds null, expected a JSON object"),
    "a list of added tokens": ("added_tokens.json", ["<new>"], "holds a list, expected a JSON object"),
    "eos: a number": ("tokenizer_config.json", {"eos_token": 5}, "'eos_token' is an integer, expected a token"),
    "eos: a list": ("special_tokens_map.json", {"eos_token": ["<new>"]}, "'eos_token' is a list, expected a token"),
    "pad: an empty object": ("tokenizer_config.json", {"pad_token": {}}, 'pad_token: no "content"'),
    "pad: a content that is an object": ("tokenizer_config.json", {"pad_token": {"content": {}}}, '"content" is an object'),
    "special tokens: a text": ("tokenizer_config.json", {"additional_special_tokens": "<new>"}, "is not a list of tokens"),
    "special tokens: numbers": ("tokenizer_config.json", {"extra_special_tokens": [5]}, "'extra_special_tokens' is an integer"),
    "class: a list": ("tokenizer_config.json", {"tokenizer_class": ["GPT2Tokenizer"]}, '"tokenizer_class" is a list'),
    "decoder: a list": ("tokenizer_config.json", {"added_tokens_decoder": []}, '"added_tokens_decoder" is a list'),
    "decoder: texts": ("tokenizer_config.json", {"added_tokens_decoder": {"0": "<new>"}}, 'has "<new>" at \'0\''),
    "decoder: no content": ("tokenizer_config.json", {"added_tokens_decoder": {"0": {}}}, 'no "content"'),
    "decoder: an id of -1": ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "<new>"}}}, "not a token id"),
    "decoder: an id of 1.5": ("tokenizer_config.json", {"added_tokens_decoder": {"1.5": {"content": "<new>"}}}, "not a token id"),
    "decoder: 5,000 digits": ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "<new>"}}}, "not a token id"),
    "decoder: a flag that is a text": ("tokenizer_config.json", {"added_tokens_decoder": {"0": {"content": "<n>", "special": "yes"}}}, '"special" is "yes"'),
    "added tokens: an id of 1.5": ("added_tokens.json", {"<new>": 1.5}, "'<new>' has id 1.5"),
    "added tokens: an id of -1": ("added_tokens.json", {"<new>": -1}, "'<new>' has id -1"),
    "added tokens: an id of true": ("added_tokens.json", {"<new>": True}, "'<new>' has id True"),
}  # fmt: skip


@pytest.mark.parametrize("name, content, reason", CONFIGS.values(), ids=CONFIGS)
def test_a_damaged_configuration_of_tokens_is_refused_with_its_fault(tmp_path, name, content, reason):
    (tmp_path / "tokenizer.json").write_text(json.dumps(SPEC))
    (tmp_path / name).write_text(json.dumps(content))
    assert reason in refusal(tmp_path)


def test_a_missing_tokenizer_names_what_to_give(tmp_path):
    assert "no such tokenizer; give a tokenizer.json" in refusal(tmp_path / "missing.json")


def test_a_model_on_the_hub_that_was_not_downloaded_names_the_command():
    reason = refusal(Path("bigcode/starcoder"))
    assert "hf download bigcode/starcoder --local-dir starcoder" in reason


def test_a_directory_without_tokenizer_names_the_files_it_needs(tmp_path):
    assert "it needs a tokenizer.json or a tokenizer.model" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content, reason",
    [(b"nothing", "not a SentencePiece model"), (b"version https://git-lfs.github.com", "git lfs pull")],
)
def test_a_damaged_sentencepiece_model_is_refused_with_its_fault(tmp_path, content, reason):
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert reason in refusal(tmp_path / "tokenizer.model")
    assert reason in refusal(tmp_path)


def test_a_text_that_a_tokenizer_cannot_encode_is_refused(tmp_path):
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "[UNK]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode("a") == [0]
    with pytest.raises(UserError, match="cannot encode a text"):
        tokenizer.encode("c")


def test_a_lone_surrogate_and_an_integer_beyond_64_bits_are_refused(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(vocabulary(**{"\ud800": SIZE}))
    assert "not a tokenizer.json" in refusal(file)
    file.write_bytes(vocabulary(**{"large": 2**70}))
    assert "not a tokenizer.json" in refusal(file)
