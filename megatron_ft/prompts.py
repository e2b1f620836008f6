"""Prompt formats: the exact text a model reads in training (`inputs`) and in evaluation.

A model must be evaluated with the prompts it was trained on, so both sides build them here.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from megatron_ft.commits.line_diff import line_diff, number_lines

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str  # "user", "assistant", "system", or another role that only chat templates know
    text: str


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
    r"""Inputs and outputs of a commit as a question and answer, with a blank line after the
    subject, which neither OctoCoder's training text nor HumanEvalPack's prompts have.

    >>> octocoder_commit("x = 1\n", "y = 1\n", "Rename x")
    ('Question: Rename x\n\nx = 1\n\n\nAnswer:', ' y = 1\n')
    """
    return question_prompt(f"{subject}\n\n{old}"), f" {new}"


def published_octocoder_commit(old: str, new: str, subject: str) -> tuple[str, str]:
    r"""Inputs and outputs of a commit as in OctoCoder's training text; HumanEvalPack's `octocoder`
    prompts separate instruction and code by one newline, too.

    >>> published_octocoder_commit("x = 1\n", "y = 1\n", "Rename x")
    ('Question: Rename x\nx = 1\n\n\nAnswer:', ' y = 1\n')
    """
    return question_prompt(f"{subject}\n{old}"), f" {new}"


def plain_commit(old: str, new: str, subject: str) -> tuple[str, str]:
    r"""StarCoder's commit format with the subject in the outputs: the model learns to write it.

    Source, also of `fenced_commit`: OctoPack's commits_to_jsonl.py.

    >>> plain_commit("x = 1\n", "y = 1\n", "Rename x")
    ('<commit_before>x = 1\n<commit_msg>', 'Rename x<commit_after>y = 1\n')
    """
    return f"<commit_before>{old}<commit_msg>", f"{subject}<commit_after>{new}"


def fenced_commit(old: str, new: str, subject: str) -> tuple[str, str]:
    r"""Both files in Markdown fences, for models without commit tokens; the subject is learned.

    >>> fenced_commit("x = 1", "y = 1", "Rename x")
    ('```\nx = 1\n```\n', 'Rename x\n```\ny = 1\n```')
    """
    return f"```\n{old}\n```\n", f"{subject}\n```\n{new}\n```"


def line_diff_commit(old: str, new: str, subject: str) -> tuple[str, str]:
    r"""SantaCoder's line-diff format; the model continues with what `apply_line_diff` applies.

    Outputs are "" if nothing but surrounding white space changed.

    >>> line_diff_commit("x = 1\n", "y = 1\n", "Rename")
    ('<commit_before>\n  1 x = 1\n<commit_msg>\nRename\n<commit_after>\n', '-  1 x = 1\n+  1 y = 1')
    """
    inputs = f"<commit_before>\n{number_lines(old)}\n<commit_msg>\n{subject.strip()}\n<commit_after>\n"
    return inputs, line_diff(old, new)


# By the names of --format: (old contents, new contents, subject) to (inputs, outputs).
COMMIT_FORMATS: dict[str, Callable[[str, str, str], tuple[str, str]]] = {
    "starcoder": starcoder_commit,
    "octocoder": octocoder_commit,
    "octocoder-published": published_octocoder_commit,
    "plain": plain_commit,
    "fenced": fenced_commit,
    "with-filename": plain_commit,
    "line-diff": line_diff_commit,
}
# What stands before the inputs of rows with a file name: StarCoder's token, and SantaCoder's text.
FILE_NAME_FORMATS = {"with-filename": "<filename>{name}", "line-diff": "<file_name>\n{name}\n"}


def question_chat(history: Sequence[Turn], answer: str) -> tuple[str, str]:
    r"""A conversation as questions and answers; one question is as in OctoCoder's training.

    >>> question_chat([Turn("user", "1 + 1?"), Turn("assistant", "2"), Turn("user", "And 2?")], "4")
    ('Question: 1 + 1?\n\nAnswer: 2\n\nQuestion: And 2?\n\nAnswer:', ' 4')
    """
    labels = {USER: "Question: ", ASSISTANT: "Answer: ", SYSTEM: ""}
    return "\n\n".join([*(labels[role] + text for role, text in history), "Answer:"]), f" {answer}"


def commit_chat(history: Sequence[Turn], answer: str) -> tuple[str, str]:
    """A conversation in StarCoder's commit format: an empty file, and what was asked as message.

    >>> commit_chat([Turn("user", "1 + 1?")], "2")
    ('<commit_before><commit_msg>1 + 1?<commit_after>', '2')
    """
    return commit_prompt("", _joined(history)), answer


def alpaca_chat(history: Sequence[Turn], answer: str) -> tuple[str, str]:
    r"""Alpaca's template without its input section, as WizardCoder uses it. A system message
    replaces the first sentences.

    >>> alpaca_chat([Turn("system", "Be brief."), Turn("user", "1 + 1?")], "2")
    ('Be brief.\n\n### Instruction:\n1 + 1?\n\n### Response:\n', '2')
    """
    labels = {USER: "### Instruction:\n", ASSISTANT: "### Response:\n", SYSTEM: ""}
    preamble = "" if history[0].role == SYSTEM else ALPACA
    return preamble + "".join(f"{labels[role]}{text}\n\n" for role, text in history) + "### Response:\n", answer


def starchat_chat(history: Sequence[Turn], answer: str) -> tuple[str, str]:
    r"""StarChat's dialogue format; it always has a system message, empty if there is none.

    >>> starchat_chat([Turn("user", "1 + 1?")], "2")
    ('<|system|>\n<|end|>\n<|user|>\n1 + 1?<|end|>\n<|assistant|>\n', '2<|end|>')
    """
    system = "" if history[0].role == SYSTEM else "<|system|>\n<|end|>\n"
    return system + "".join(
        f"<|{role}|>\n{text}<|end|>\n" for role, text in history
    ) + "<|assistant|>\n", f"{answer}<|end|>"


def text_chat(history: Sequence[Turn], answer: str) -> tuple[str, str]:
    """The texts as they are, for rows that contain their prompts already.

    >>> text_chat([Turn("user", "Translate to German: dog")], "Hund")
    ('Translate to German: dog', 'Hund')
    """
    return _joined(history), answer


def _joined(history: Iterable[Turn]) -> str:
    return "\n\n".join(turn.text for turn in history)


# By the names of --format: (turns before the answer, answer) to (inputs, outputs). The turns have
# the roles user, assistant and system; there is at least one.
CHAT_FORMATS: dict[str, Callable[[Sequence[Turn], str], tuple[str, str]]] = {
    "question": question_chat,
    "commit": commit_chat,
    "alpaca": alpaca_chat,
    "starchat": starchat_chat,
    "text": text_chat,
}
