"""A tokenizer written into a Hugging Face directory, so that transformers loads the one that the
model was trained with."""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_ft.files.hub_cache import resolve_hub_cache
from megatron_ft.files.json_file import read_json
from megatron_ft.tokenizer.consumer import compare, difference_to_transformers
from megatron_ft.tokenizer.files import files_of, relative_name
from megatron_ft.tokenizer.kinds import JsonTokenizer, Tokenizer

AS_IT_IS = "PreTrainedTokenizerFast"  # the class with which transformers uses all of tokenizer.json
# Keys of tokenizer_config.json with which it does not.
REBUILDING = ("auto_map", "fast_tokenizer_files", "add_prefix_space", "split_special_tokens")


def write_tokenizer(directory: Path, source: Path, tokenizer: Tokenizer, positions: int) -> list[str]:
    """Write the tokenizer's files, with a tokenizer_config.json so that transformers loads them.

    `source` is a Hugging Face directory, whose own tokenizer_config.json is kept, or a bare
    tokenizer.json or SentencePiece model. Where transformers would encode in another way because of
    its tokenizer_class, that is changed. Without BPE dropout, so that texts have one encoding.

    Returns lines to print: what was changed, and how what transformers loads still differs. Raises
    UserError if it has another number of tokens, or a file is a link to somewhere else.
    """
    source, _ = resolve_hub_cache(source)
    config_path = directory / "tokenizer_config.json"
    if source.is_dir():
        for file in files_of(source):
            copy = directory / relative_name(file, source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    else:
        shutil.copyfile(source, directory / ("tokenizer.model" if source.suffix == ".model" else "tokenizer.json"))
    if not source.is_dir() or not config_path.is_file():
        _write(config_path, _new_config(tokenizer, positions))
    if isinstance(tokenizer, JsonTokenizer) and tokenizer.has_dropout:
        _write(directory / "tokenizer.json", tokenizer.spec, indent=None)
    found = compare(directory, tokenizer, source)
    if not found.difference:
        return []
    if not isinstance(tokenizer, JsonTokenizer):
        return [f"warning: {found.difference}"]
    # Named are special tokens that the replaced class has by default.
    config = {key: value for key, value in read_json(config_path).items() if key not in REBUILDING}
    named = found.view.named if found.view else {}
    _write(config_path, {**named, **config, "tokenizer_class": AS_IT_IS})
    if found.view is None or not (directory / "tokenizer.json").is_file():
        _write(directory / "tokenizer.json", tokenizer.spec, indent=None)
    if rest := difference_to_transformers(directory, tokenizer, source):
        return [f"warning: {rest}"]
    return [f"tokenizer_config.json: tokenizer_class is now {AS_IT_IS}, because {found.difference}"]


def _new_config(tokenizer: Tokenizer, positions: int) -> dict[str, Any]:
    config: dict[str, Any] = {"model_max_length": positions, "clean_up_tokenization_spaces": False}
    if tokenizer.kind == "sentencepiece":
        return {"tokenizer_class": "LlamaTokenizer", **config}
    end = tokenizer.token_of(tokenizer.eod)
    config |= {"tokenizer_class": AS_IT_IS, "bos_token": end, "eos_token": end, "unk_token": end}
    if tokenizer.pad is not None:
        config["pad_token"] = tokenizer.token_of(tokenizer.pad)
    return config


def _write(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    text = json.dumps(content, indent=indent, sort_keys=indent is not None)
    path.write_text(text + "\n", encoding="utf-8")
