"""Prompt formats: the exact text a model reads in training (`inputs`) and in evaluation.

A model must be evaluated with the prompts it was trained on, so both sides build them here.
"""

from collections.abc import Callable


def commit_prompt(before: str, message: str) -> str:
    r"""StarCoder's commit format with its special tokens; the model continues with the new file.

    Source: StarCoder pre-training (arXiv 2305.06161, section 3.3).

    >>> commit_prompt("x = 1\n", "Rename x")
    '<commit_before>x = 1\n<commit_msg>Rename x<commit_after>'
    """
    return f"<commit_before>{before}<commit_msg>{message}<commit_after>"


def question_prompt(question: str) -> str:
    r"""OctoCoder's question format; the model continues with " " or a newline and the answer.

    Source: OctoPack (arXiv 2308.07124).

    >>> question_prompt("Write a haiku.")
    'Question: Write a haiku.\n\nAnswer:'
    """
    return f"Question: {question}\n\nAnswer:"


def starcoder_commit(old: str, new: str, subject: str) -> tuple[str, str]:
    r"""Inputs and outputs of a commit in StarCoder's format.

    >>> starcoder_commit("x = 1\n", "y = 1\n", "Rename x")
    ('<commit_before>x = 1\n<commit_msg>Rename x<commit_after>', 'y = 1\n')
    """
    return commit_prompt(old, subject), new


def octocoder_commit(old: str, new: str, subject: str) -> tuple[str, str]:
    r"""Inputs and outputs of a commit as OctoCoder's question and answer.

    >>> octocoder_commit("x = 1\n", "y = 1\n", "Rename x")
    ('Question: Rename x\n\nx = 1\n\n\nAnswer:', ' y = 1\n')
    """
    return question_prompt(f"{subject}\n\n{old}"), f" {new}"


# By the names of --format: (old contents, new contents, subject) to (inputs, outputs).
COMMIT_FORMATS: dict[str, Callable[[str, str, str], tuple[str, str]]] = {
    "starcoder": starcoder_commit,
    "octocoder": octocoder_commit,
}
