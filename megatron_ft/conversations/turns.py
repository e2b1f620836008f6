"""Messages as turns: the names that roles and texts have in different datasets become one."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megatron_ft.files.json_file import kind_of
from megatron_ft.files.jsonl_row import NO_KEY, BadRow, keys_of
from megatron_ft.prompts import ASSISTANT, SYSTEM, USER, Turn

ROLE_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value", "text")
ROLES = {
    USER: (USER, "human", "prompter", "instruction"),
    ASSISTANT: (ASSISTANT, "gpt", "chatgpt", "bot", "bard", "bing", "model", "output"),
    SYSTEM: (SYSTEM, "developer"),
    "tool": ("tool", "function", "ipython", "observation", "function_call", "tool_call", "tool_response"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}


class Exchange(NamedTuple):
    """An answer and the turns before it, oldest first."""

    history: tuple[Turn, ...]
    answer: str


def turn_of(message: Any) -> Turn:
    """The turn of a message: an object with one of ROLE_KEYS and of TEXT_KEYS.

    BadRow if it is anything else. A text that is null, as of a message that only calls a tool, is
    empty; one in parts is joined.

    >>> turn_of({"from": "human", "value": "1 + 1?"})
    Turn(role='user', text='1 + 1?')
    """
    if not isinstance(message, dict):
        raise BadRow(f"a message is {kind_of(message)}, not an object")
    role_key = next((key for key in ROLE_KEYS if key in message), None)
    text_key = next((key for key in TEXT_KEYS if key in message), None)
    if role_key is None or text_key is None:
        names = ROLE_KEYS if role_key is None else TEXT_KEYS
        raise BadRow(f"{NO_KEY} {' or '.join(map(repr, names))} in a message; {keys_of(message)}")
    name = message[role_key]
    role = ROLE_OF.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        shown = repr(name[:40]) if isinstance(name, str) else kind_of(name)
        raise BadRow(f"a message's {role_key!r} is {shown}, not one of {', '.join(ROLE_OF)}")
    return Turn(role, text_in(message, text_key))


def text_in(row: dict[str, Any], key: str) -> str:
    """The text of a key: a string, null, or a list of parts of which all are text; BadRow for
    anything else."""
    value = row[key]
    if isinstance(value, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
            raise BadRow(f"{key!r} has parts that are not text")
        value = "".join(part["text"] for part in value)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{key!r} is {kind_of(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("lone surrogate") from None
    return value


def messages_in(value: Any) -> list[dict[str, Any]] | None:
    """A list of messages, also in the form that `datasets` stores it: an object of equally long
    lists. None if it is anything else."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            return None
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return value
    return None


def answers_in(turns: Sequence[Turn]) -> Iterator[Exchange]:
    """The answers of a conversation: its turns of the assistant, each with all turns before."""
    for i, turn in enumerate(turns):
        if turn.role == ASSISTANT:
            yield Exchange(tuple(turns[:i]), turn.text)
