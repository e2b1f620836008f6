"""The tokenizer of a checkpoint: where it is, and whether it fits the weights and its users."""

from pathlib import Path

from megatron_ft.errors import UserError
from megatron_ft.tokenizer import files as tokenizer_files
from megatron_ft.tokenizer.consumer import check_ids_fit, difference_to_transformers
from megatron_ft.tokenizer.tokenizer import load_tokenizer
from megatron_ft.weights.adapters import AdapterSource
from megatron_ft.weights.source import WeightSource


def tokenizer_path(source: WeightSource | AdapterSource) -> Path | None:
    """The files of a Hugging Face directory, or those of a run; None if there are none.

    A run's are the copy next to its checkpoints, or the file it was started with (`given_path`).
    Raises UserError if one is a link to somewhere else.
    """
    if isinstance(source, WeightSource) and source.kind == "Hugging Face":
        return source.path if tokenizer_files.files_of(source.path) else None
    return tokenizer_files.find(source.path, given_path(source), stored_fingerprint(source))


def given_path(source: WeightSource | AdapterSource) -> str | None:
    """The --tokenizer-file of a run, None if its arguments do not have it."""
    given = (source.args or {}).get("tokenizer_file")
    return given if isinstance(given, str) else None


def stored_fingerprint(source: WeightSource | AdapterSource) -> str | None:
    """The fingerprint of a run's tokenizer in its manifest."""
    digest = source.manifest.data.get("tokenizer") if source.manifest else None
    return digest if isinstance(digest, str) else None


def unfit_tokenizer(source: WeightSource) -> list[str]:
    """What is wrong with the tokenizer next to a Hugging Face model's weights, if there is one."""
    try:
        if not (path := tokenizer_path(source)):
            return []
        tokenizer = load_tokenizer(path)
        check_ids_fit(tokenizer, source.shape.vocab_size, source.path)
        difference = difference_to_transformers(path, tokenizer)
    except UserError as error:
        return [str(error)]
    return [difference] if difference else []


def compare_tokenizers(a: WeightSource, b: WeightSource) -> tuple[list[str], list[str]]:
    """What makes the tokenizers of two checkpoints different, and warnings.

    Different are ids beyond the rows of a Hugging Face model, and a run's tokenizer from the one
    that transformers loads from that model. A warning is that transformers loads a tokenizer
    otherwise than its own files say, or that it cannot be read.
    """
    differences: list[str] = []
    warnings: list[str] = []
    for source, other in ((a, b), (b, a)):
        if source.kind != "Hugging Face":
            continue
        try:
            if not (path := tokenizer_path(source)):
                continue
            own = load_tokenizer(path)
            trained = tokenizer_path(other) if other.kind != "Hugging Face" else None
            tokenizer = load_tokenizer(trained) if trained else own
        except UserError as error:
            warnings.append(str(error))
            continue
        try:
            check_ids_fit(own, source.shape.vocab_size, source.path)
            difference = difference_to_transformers(path, tokenizer)
        except UserError as error:
            differences.append(str(error))
            continue
        if difference and trained:
            differences.append(f"{difference} by the run's tokenizer {trained}")
        elif difference:
            warnings.append(difference)
    return list(dict.fromkeys(differences)), list(dict.fromkeys(warnings))
