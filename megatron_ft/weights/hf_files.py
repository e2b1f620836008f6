"""The small files of a Hugging Face directory: configurations and model card."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ft.errors import UserError
from megatron_ft.model.families import family_of
from megatron_ft.model.family import activation_of
from megatron_ft.model.shape import ModelShape
from megatron_ft.printable import printable

if TYPE_CHECKING:
    import torch


def write_configs(
    directory: Path,
    shape: ModelShape,
    dtype: "torch.dtype",
    special_ids: Mapping[str, int | None],
    generation_ids: Mapping[str, int | list[int] | None],
) -> None:
    """Write config.json and generation_config.json, with bos_token_id, eos_token_id, pad_token_id.

    Those that are None are left out. Generation may end at several tokens.
    """
    config = {**family_of(shape).write_config(shape), **_known(special_ids), "dtype": str(dtype).removeprefix("torch.")}
    _write_json(directory / "config.json", config)
    # transformers may replace ids that are marked as derived from config.json's.
    same = _known(generation_ids) == _known(special_ids)
    derived = {"_from_model_config": True} if same else {}
    _write_json(directory / "generation_config.json", {**derived, **_known(generation_ids)})


def _known(ids: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in ids.items() if value is not None}


def write_model_card(
    directory: Path, *, name: str, shape: ModelShape, facts: Mapping[str, object], args: Mapping[str, object]
) -> None:
    """Write README.md: what the model is, how to use it, and its run's arguments (`card_args`).

    `facts` are the lines of the table about the conversion.
    """
    about = "\n".join(f"| {what} | {value} |" for what, value in facts.items())
    run = "\n".join(f"| `--{key.replace('_', '-')}` | {_cell(value)} |" for key, value in sorted(args.items()))
    family = family_of(shape)
    text = f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- code
- {shape.family}
---

# {name}

A {family.title} model of {shape.num_parameters() / 1e9:.3g} billion parameters: {shape.num_layers} layers of width {shape.hidden_size},
{shape.num_attention_heads} heads with {shape.attention} attention, {shape.max_position_embeddings} positions, {shape.vocab_size} tokens, activation `{activation_of(shape)}`.
Trained with Megatron and converted by Megatron-FT.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("def print_hello_world():", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

| conversion | |
| --- | --- |
{about}
"""
    if run:
        text += f"\n## Arguments of the run\n\n| flag | value |\n| --- | --- |\n{run}\n"
    (directory / "README.md").write_text(text, encoding="utf-8")


def card_args(args: Mapping[str, Any] | None, defaults: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """The arguments of a run that its model card shows: flags that were not left at their defaults.

    `defaults` has the flags to show, by their names with underscores; other arguments are left out.
    Paths are cut to their last part.
    """
    found: dict[str, str | int | float | bool] = {}
    for key, value in (args or {}).items():
        if key not in defaults or value == defaults[key] or value is None:
            continue
        if isinstance(value, list | tuple):
            value = " ".join(map(str, value))
        if isinstance(value, str):
            found[key] = re.sub(r"\S*/", "", value)
        elif isinstance(value, int | float | bool):
            found[key] = value
    return found


def parse_size(text: str) -> int:
    """Bytes in "5GB", "500MB" (powers of ten, as in transformers), "2GiB" or a plain number.

    Raises UserError, naming --max-shard-size.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().rstrip("BKMGibkmgI")
    unit = text.strip()[len(number) :].upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):  # float() reads inf and nan
        raise UserError(f"--max-shard-size {text}: not a size; give one like 5GB or 500MB") from None
    if size < 1:
        raise UserError(f"--max-shard-size {text}: must be positive, like 5GB")
    return size


def _cell(value: object) -> str:
    return printable(str(value).replace("\n", " "), limit=500).replace("|", "\\|")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
