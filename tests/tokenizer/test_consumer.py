"""What transformers loads is compared with what a model is trained with, and written alike."""

import json
from pathlib import Path

import pytest
from hf_directories import FLAGS, PLAIN, SIZE, SPEC, asked, write_directory  # noqa: F401 - a fixture

from megatron_ft.errors import UserError
from megatron_ft.tokenizer.consumer import TEXTS, check_ids_fit, difference_to_transformers
from megatron_ft.tokenizer.export import write_tokenizer
from megatron_ft.tokenizer.tokenizer import load_tokenizer

GPT2 = {"tokenizer_class": "GPT2TokenizerFast", "eos_token": "<|endoftext|>"}
DROPOUT = {**SPEC, "model": {**SPEC["model"], "dropout": 0.5}}


def assert_transformers_encodes_alike(directory: Path, tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    assert len(theirs) == tokenizer.vocab_size
    for text in (*TEXTS, "a  1", "".join(tokenizer.special_ids)):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text), text


def test_a_directory_that_loads_as_it_is_has_no_difference(tmp_path):
    directory = write_directory(tmp_path / "hf", tokenizer_config=PLAIN | {"eos_token": "<|endoftext|>"})
    assert difference_to_transformers(directory) is None


def test_a_class_that_rebuilds_the_pre_tokenizer_is_named_with_a_text_and_both_ids(tmp_path, asked):  # noqa: F811
    directory = write_directory(tmp_path / "hf", tokenizer_config=GPT2)
    difference = difference_to_transformers(directory)
    expected = load_tokenizer(directory).encode("a  1")
    assert f"loads {directory} as GPT2Tokenizer, which gives 'a  1' the ids" in difference
    assert difference.endswith(f"expected {expected}") and "\n" not in difference


@pytest.mark.parametrize(
    "config, difference",
    [
        ({"add_prefix_space": True}, "which gives"),
        ({"split_special_tokens": True}, "which gives"),
        ({"eos_token": "<fim_pad>"}, "with end-of-sequence and padding ids 4 and none, expected 0 and none"),
        ({"pad_token": "<fim_pad>"}, "with end-of-sequence and padding ids 0 and 4, expected 0 and none"),
        ({"eos_token": {"content": "<|endoftext|>"}}, "transformers cannot load this tokenizer"),
    ],
)
def test_every_other_difference_is_named(tmp_path, asked, config, difference):  # noqa: F811
    trained_with = load_tokenizer(
        write_directory(tmp_path / "hf", tokenizer_config=PLAIN | {"eos_token": "<|endoftext|>"})
    )
    other = write_directory(tmp_path / "other", tokenizer_config={**GPT2, "tokenizer_class": "GPT2Tokenizer", **config})
    assert difference in difference_to_transformers(other, trained_with)


def test_another_number_of_tokens_is_refused_with_both(tmp_path, asked):  # noqa: F811
    trained_with = load_tokenizer(write_directory(tmp_path / "hf"))
    other = write_directory(tmp_path / "other", tokenizer_config=PLAIN | {"pad_token": "[PAD]"})
    with pytest.raises(
        UserError, match=f"other: {SIZE} tokens as Megatron-FT reads it, but {SIZE + 1} as transformers 5"
    ):
        difference_to_transformers(other, trained_with)


def test_code_of_a_directory_does_not_run(tmp_path, monkeypatch):
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    directory = write_directory(tmp_path / "hf", tokenizer_config=config)
    (directory / "own.py").write_text("open('ran', 'w')\n")
    monkeypatch.chdir(tmp_path)
    assert "transformers cannot load this tokenizer" in difference_to_transformers(directory)
    [notice] = load_tokenizer(directory).notices
    assert notice.endswith("; using its tokenizer.json") and not (tmp_path / "ran").exists()


def test_ids_beyond_the_embedding_rows_are_refused(tmp_path):
    tokenizer = load_tokenizer(write_directory(tmp_path / "hf"))
    check_ids_fit(tokenizer, SIZE, "model")
    with pytest.raises(
        UserError, match=rf"the largest id is {SIZE - 1} \(.+\), but model has {SIZE - 1} embedding rows"
    ):
        check_ids_fit(tokenizer, SIZE - 1, "model")


SOURCES = {
    "a file": {},
    "a directory": {"tokenizer_config": PLAIN},
    "GPT2Tokenizer": {"tokenizer_config": GPT2 | {"model_max_length": 77}},
    "a prefix of a space": {"tokenizer_config": GPT2 | {"add_prefix_space": True}},
    "new tokens": {"tokenizer_config": GPT2 | {"pad_token": "[PAD]", "additional_special_tokens": ["<|user|>"]}},
    "dropout": {"spec": DROPOUT, "tokenizer_config": PLAIN},
    "no list of added tokens": {
        "spec": {key: SPEC[key] for key in ("model", "pre_tokenizer", "decoder")},
        "tokenizer_config": PLAIN,
    },
    "code of its own": {
        "tokenizer_config": {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    },
}


@pytest.mark.parametrize("files", SOURCES.values(), ids=SOURCES)
def test_transformers_loads_a_written_tokenizer_as_it_was_trained_with(tmp_path, asked, files):  # noqa: F811
    source, out = write_directory(tmp_path / "source", **files), tmp_path / "out"
    source = source if "tokenizer_config" in files else source / "tokenizer.json"
    out.mkdir()
    tokenizer = load_tokenizer(source)
    lines = write_tokenizer(out, source, tokenizer, 128)
    assert all(
        line.startswith("tokenizer_config.json: tokenizer_class is now PreTrainedTokenizerFast") for line in lines
    )
    assert_transformers_encodes_alike(out, tokenizer)
    assert difference_to_transformers(out) is None
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config.get("model_max_length") in (None, 77, 128)


def test_the_class_is_kept_where_it_makes_no_difference(tmp_path, asked):  # noqa: F811
    source, out = write_directory(tmp_path / "source", tokenizer_config=GPT2), tmp_path / "out"
    write_directory(out, config={"model_type": "gpt_bigcode"})
    assert write_tokenizer(out, source, load_tokenizer(source), 128) == []
    assert json.loads((out / "tokenizer_config.json").read_text()) == GPT2
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_dropout_is_left_out_with_a_notice(tmp_path):
    for directory in (write_directory(tmp_path / "hf", spec=DROPOUT), write_directory(tmp_path / "plain")):
        tokenizer = load_tokenizer(directory / "tokenizer.json")
        ids = {tuple(tokenizer.encode("def print_hello_world(): return None")) for _ in range(20)}
        assert len(ids) == 1
        assert [("dropout of 0.5" in notice) for notice in tokenizer.notices] == [True] * (directory.name == "hf")


def test_a_second_end_is_named_and_stops_generation(tmp_path, asked):  # noqa: F811
    tokenizer = load_tokenizer(write_directory(tmp_path / "two", tokenizer_config=PLAIN | {"eos_token": "<|im_end|>"}))
    assert tokenizer.end_notice.startswith(
        f"outputs will end in <|endoftext|> (id 0); the tokenizer's own end-of-sequence token is <|im_end|> (id {SIZE})"
    )
    assert (tokenizer.stop_ids, tokenizer.config_ids["eos_token_id"]) == ([0, SIZE], 0)
    assert tokenizer.generation_ids == {"bos_token_id": 0, "eos_token_id": [0, SIZE], "pad_token_id": None}
    for number, config in enumerate(({}, {"eos_token": "<|endoftext|>"})):
        one = load_tokenizer(write_directory(tmp_path / str(number), tokenizer_config=PLAIN | config))
        assert (one.end_notice, one.stop_ids, one.generation_ids) == (None, [0], one.config_ids)
