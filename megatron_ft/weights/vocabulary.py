"""Which rows of a stored embedding are tokens: a tokenizer's size against a checkpoint's rows."""

from megatron_ft.errors import UserError
from megatron_ft.weights.source import WeightSource


def check_vocabulary(source: WeightSource, rows: int, asked_by: str) -> str | None:
    """Check that the first `rows` of the stored embedding rows can be the vocabulary.

    Returns a warning where that is doubtful. Raises UserError, beginning with `asked_by` (the
    tokenizer or flag), when the source has fewer rows, or when rows of tokens would be cut.
    """
    stored, known = source.shape.vocab_size, source.vocab_size
    if rows > stored:
        raise UserError(
            f"{asked_by}: {rows} tokens, but {source.path} has {stored} embedding rows; "
            "give the tokenizer the model was trained with"
        )
    if known is not None and rows < known:
        raise UserError(
            f"{asked_by}: {rows} tokens, but {known} of the {stored} embedding rows of {source.path} are tokens, so "
            f"{known - rows} trained rows would be dropped; give the tokenizer the model was trained with"
        )
    if known is not None and rows > known:
        return (
            f"warning: {asked_by}: {rows} tokens, but {source.path} was trained with {known}; "
            f"{rows - known} rows of untrained padding become tokens"
        )
    args = source.args or {}
    multiple = (args.get("make_vocab_size_divisible_by") or 128) * (args.get("tensor_model_parallel_size") or 1)
    if known is None and stored - rows >= multiple:
        return (
            f"warning: {asked_by}: {rows} tokens, but {source.path} has {stored} embedding rows; "
            f"{stored - rows} are cut off, more than the {multiple - 1} that padding to a multiple of {multiple} can add; "
            "is this the tokenizer the model was trained with?"
        )
    return None
