"""A converted model in plain transformers: the work of convert/complete.py."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.files.hub_cache import download_hint, resolve_hub_cache
from megatron_ft.tokenizer.spec import first_line


@dataclass(frozen=True)
class LoadedModel:
    """transformers' PreTrainedModel, in evaluation mode on the CPU, and its tokenizer."""

    model: Any
    tokenizer: Any

    def complete(self, prompt: str, max_new_tokens: int = 64, **generation: Any) -> str:
        """The text that the model writes after `prompt`; greedy unless `generation`, arguments of
        transformers' generate(), sample. Ends at end-of-text. Raises UserError if there is no room
        for that, or no prompt."""
        encoded = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        ids = encoded["input_ids"]
        if ids.shape[1] == 0:
            raise UserError("the prompt is empty; give some text to complete")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens {max_new_tokens}: must be at least 1")
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and ids.shape[1] + max_new_tokens > positions:
            raise UserError(
                f"a prompt of {ids.shape[1]:,} tokens and max_new_tokens {max_new_tokens:,} exceed the model's "
                f"{positions:,} positions; shorten the prompt, or use fewer new tokens"
            )
        end = self.model.config.eos_token_id
        options = {"do_sample": False, "pad_token_id": end, **generation}
        written = self.model.generate(
            ids, attention_mask=encoded["attention_mask"], max_new_tokens=max_new_tokens, **options
        )
        return str(self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def check_directory(directory: Path) -> None:
    """Raise UserError, saying what to do, when transformers could not load the directory."""
    if not directory.is_dir():
        raise UserError(
            f"{directory}: no such directory; give what convert/megatron_to_hf.py wrote{download_hint(directory)}"
        )
    if not any((directory / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(
            f"{directory}: not a Hugging Face model; convert it with convert/megatron_to_hf.py --load {directory} first"
        )
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(
            f"{directory}: has no tokenizer files; convert again with --tokenizer-file, or copy tokenizer.json into it"
        )


def load_transformers(directory: Path) -> LoadedModel:
    """The model and tokenizer in a Hugging Face directory, in the precision of its files.

    Raises UserError.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True).eval()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{directory}: transformers cannot load it ({first_line(error)}); check it with convert/verify.py"
        ) from None
    return LoadedModel(model, tokenizer)


def load_any(checkpoint: Path, iteration: str) -> LoadedModel:
    """The model of a Hugging Face directory, or of a Megatron checkpoint, which is converted to a
    temporary directory first; adapters are added to their base. Raises UserError."""
    directory, _ = resolve_hub_cache(checkpoint)
    if (directory / "config.json").is_file():
        check_directory(directory)
        return load_transformers(directory)

    from megatron_ft.conversion.flags import parse_to_hf
    from megatron_ft.conversion.to_hf import to_hf
    from megatron_ft.weights.adapters import open_adapters

    with tempfile.TemporaryDirectory(prefix="megatron-ft-") as temporary:
        output = Path(temporary) / "model"
        args = parse_to_hf(["--load", str(checkpoint), "--iteration", iteration, "--output", str(output)])
        args.merge_lora = open_adapters(args.load, args.iteration) is not None
        to_hf(args)
        check_directory(output)
        return load_transformers(output)
