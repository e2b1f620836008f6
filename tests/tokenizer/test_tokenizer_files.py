"""The copy of the tokenizer in a save directory: found by conversion, compared on a resume, whether
file or directory."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoint_runs import FLAGS, train, write_inputs
from conftest import ROOT
from conversions import convert
from ranks import run_ranks

from megatron_ft.errors import UserError
from megatron_ft.tokenizer import files as tokenizer_files


@pytest.fixture
def inputs(tmp_path) -> str:
    (tmp_path / "data").mkdir()
    return write_inputs(tmp_path / "data")


def run(words: str, save: Path, more: str = "") -> tuple[int | str, str]:
    """One run on one rank: its exit status or error line, and the lines it logged at the start."""
    [(ended, reasons)] = run_ranks(train, 1, f"{FLAGS} {words} --train-iters 4 --save {save} {more}".split())
    return ended, "\n".join(reasons)


def as_directory(tokenizer: Path, directory: Path) -> Path:
    """A Hugging Face directory of the same tokenizer, with a chat template and unrelated files."""
    directory.mkdir()
    shutil.copy(tokenizer, directory / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 64}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (directory / "config.json").write_text("{}")
    return directory


def ids_of(directory: Path) -> list:
    """End of text in both of a model's configurations."""
    return [
        json.loads((directory / f"{name}.json").read_text())["eos_token_id"] for name in ("config", "generation_config")
    ]


def test_conversion_finds_the_copy_and_without_it_the_end_of_text(inputs, tmp_path):
    tokenizer, save = tmp_path / "data/tokenizer.json", tmp_path / "save"
    assert run(inputs, save)[0] == 0
    content = tokenizer.read_bytes()
    tokenizer.write_bytes(content.replace(b"Q", b"@", 1))  # changed since the run
    convert("reshard", "--load", save, "--save", tmp_path / "tp1", "--tensor-parallel", "1")
    for name, load in {"run": save, "iteration": save / "iter_0000004", "resharded": tmp_path / "tp1"}.items():
        convert("megatron_to_hf", "--load", load, "--output", tmp_path / name)
        assert (tmp_path / name / "tokenizer.json").read_bytes() == content, name
        assert ids_of(tmp_path / name) == [0, 0]

    (save / "tokenizer.json").unlink()  # and the original is not the run's any more
    printed = convert("megatron_to_hf", "--load", save, "--output", tmp_path / "bare")
    assert f"the checkpoint nor at {tokenizer}" in printed
    assert not (tmp_path / "bare/tokenizer.json").exists()
    assert ids_of(tmp_path / "bare") == [0, 0]


def test_a_directory_is_copied_with_its_chat_template(inputs, tmp_path):
    from transformers import AutoTokenizer

    file, save = tmp_path / "data/tokenizer.json", tmp_path / "save"
    directory = as_directory(file, tmp_path / "starcoder-hf")
    assert run(inputs.replace(str(file), str(directory)), save)[0] == 0
    kept = {path.name for path in (save / "tokenizer").iterdir()}
    assert kept == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    shutil.rmtree(directory)
    convert("megatron_to_hf", "--load", save, "--output", tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert tokenizer.model_max_length == 64 and ids_of(tmp_path / "hf") == [0, 0]


def test_a_resume_refuses_a_directory_with_other_content(inputs, tmp_path):
    file, save = tmp_path / "data/tokenizer.json", tmp_path / "save"
    directory = as_directory(file, tmp_path / "first")
    words = inputs.replace(str(file), str(directory))
    assert run(words, save, "--exit-interval 1")[0] == 75
    moved = tmp_path / "moved"
    shutil.copytree(directory, moved)
    (moved / "README.md").write_text("not a part of the tokenizer")
    assert run(words.replace(str(directory), str(moved)), save, "--exit-interval 2")[0] == 75
    spec = json.loads((moved / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (moved / "tokenizer.json").write_text(json.dumps(spec))
    other = words.replace(str(directory), str(moved))
    refused, _ = run(other, save)
    assert "tokenizer was directory of tokenizer.json, tokenizer_config.json, chat_template.jinja (sha256 " in refused
    assert "--override-checkpoint-args" in refused
    assert run(other, save, "--override-checkpoint-args")[0] == 0
    # the last iteration's tokenizer
    assert tokenizer_files.fingerprint(save / "tokenizer") == tokenizer_files.fingerprint(moved)


def test_a_stale_file_is_removed_from_the_copy(tmp_path):
    first, second, save = (tmp_path / name for name in ("first", "second", "save"))
    for directory, names in ((first, ("vocab.json", "merges.txt")), (second, ("tokenizer.json",)), (save, ())):
        directory.mkdir()
        for name in names:
            (directory / name).write_text(name)
    for directory in (first, second):
        tokenizer_files.keep(directory, save)
        assert tokenizer_files.fingerprint(save / "tokenizer") == tokenizer_files.fingerprint(directory)
    assert tokenizer_files.find(save / "iter_0000001", "nowhere/second", None) == save / "tokenizer"
    tokenizer_files.keep(tmp_path / "gone", save)
    assert tokenizer_files.fingerprint(save / "tokenizer") == tokenizer_files.fingerprint(second)
    assert tokenizer_files.fingerprint(tmp_path / "gone") is None


def templates(directory: Path) -> Path:
    """A directory with a tokenizer, a chat template and an additional one."""
    (directory / "additional_chat_templates").mkdir(parents=True)
    shutil.copy(ROOT / "tests/fixtures/tokenizer.json", directory)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    (directory / "additional_chat_templates/._tool_use.jinja").write_bytes(b"\0\5\x16\7")
    return directory


def test_additional_chat_templates_are_kept_and_recognized(tmp_path):
    directory, save = templates(tmp_path / "hf"), tmp_path / "save"
    save.mkdir()
    tokenizer_files.keep(directory, save)
    kept = {str(path.relative_to(save / "tokenizer")) for path in (save / "tokenizer").rglob("*") if path.is_file()}
    assert kept == {"tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"}
    before = tokenizer_files.fingerprint(directory)
    assert before == tokenizer_files.fingerprint(save / "tokenizer") and "tool_use.jinja" in before
    (directory / "additional_chat_templates/tool_use.jinja").unlink()
    assert tokenizer_files.fingerprint(directory) != before
    tokenizer_files.keep(directory, save)
    assert not (save / "tokenizer/additional_chat_templates/tool_use.jinja").exists()


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer_config.json", "merges.txt"]
)
def test_a_link_to_a_file_elsewhere_is_refused_and_copied_nowhere(tmp_path, name):
    directory, save, secret = templates(tmp_path / "hf"), tmp_path / "save", tmp_path / "secret"
    secret.write_text("a password")
    save.mkdir()
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(secret)
    for use in (tokenizer_files.fingerprint, lambda path: tokenizer_files.keep(path, save)):
        with pytest.raises(UserError, match=f"{name}: a link to {secret}"):
            use(directory)
    assert not [path for path in save.rglob("*") if path.is_file()]


def test_a_tokenizer_in_the_hub_cache_is_kept_with_the_content_of_its_links(tmp_path):
    cache, save = tmp_path / "models--bigcode--starcoder", tmp_path / "save"
    snapshot, plain = cache / "snapshots" / ("a" * 40), templates(tmp_path / "hf")
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save.mkdir()
    for number, name in enumerate(
        ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja")
    ):
        shutil.copy(plain / name, cache / "blobs" / str(number))
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to(cache / "blobs" / str(number))
    tokenizer_files.keep(cache, save)
    assert not [path for path in (save / "tokenizer").rglob("*") if path.is_symlink()]
    fingerprints = {tokenizer_files.fingerprint(path) for path in (cache, snapshot, save / "tokenizer", plain)}
    assert len(fingerprints) == 1
    assert tokenizer_files.vocabulary_digest(cache) == tokenizer_files.vocabulary_digest(plain / "tokenizer.json")


@pytest.mark.parametrize("given", ["a\0b", "x" * 5000, ""], ids=["NUL", "too long", "empty"])
def test_a_path_that_cannot_exist_is_not_found(tmp_path, given):
    assert tokenizer_files.find(tmp_path / "iter_0000001", given, None) is None


def test_a_tokenizer_whose_links_lead_outside_is_refused_not_missed(tmp_path):
    (tmp_path / "secret").write_text("{}")
    save = tmp_path / "save"
    save.mkdir()
    (save / "tokenizer.json").write_bytes((ROOT / "tests/fixtures/tokenizer.json").read_bytes())
    (save / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="outside of the tokenizer's directory"):
        tokenizer_files.find(save, None, None)
