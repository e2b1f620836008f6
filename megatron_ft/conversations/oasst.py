"""Trees of messages, as OASST publishes them: nested, or as lists that name each message's parent.

Every reply of the assistant answers the path of messages that leads to it. Replies to one message
are in the order of their rank, best first; those without a rank follow, in the order of the file. A
deleted message hides the replies to it.

Source: OpenAssistant Conversations (arXiv 2304.07327).
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ft.conversations.turns import Exchange, turn_of
from megatron_ft.files.json_file import kind_of
from megatron_ft.files.jsonl_row import BadRow
from megatron_ft.prompts import ASSISTANT, Turn

MESSAGE_KEYS = ("message_id", "parent_id", "text")


@dataclass(frozen=True)
class Message:
    """One message of a tree; `parent` is the id of the message it replies to, None at the root."""

    id: Hashable
    parent: Hashable
    turn: Turn
    rank: float
    deleted: bool

    @staticmethod
    def parse(fields: Any, id: Hashable, parent: Hashable) -> "Message":
        """The message of an OASST object; BadRow if it lacks its text or role."""
        turn = turn_of(fields)
        rank = fields.get("rank")
        in_order = isinstance(rank, int | float) and rank == rank
        return Message(id, parent, turn, rank if in_order else float("inf"), fields.get("deleted") is True)


def is_tree(row: dict[str, Any]) -> bool:
    """Whether a row is a nested tree: its `prompt` is a message."""
    prompt = row.get("prompt")
    return isinstance(prompt, dict) and "text" in prompt


def are_messages(values: Sequence[dict[str, Any]]) -> bool:
    """Whether these objects are messages that name their parents."""
    return all(key in message for message in values for key in MESSAGE_KEYS)


def nested_exchanges(row: dict[str, Any]) -> Iterator[Exchange]:
    """The answers of a nested tree."""
    messages: list[Message] = []
    stack: list[tuple[Any, int | None]] = [(row["prompt"], None)]
    while stack:
        fields, parent = stack.pop()
        number = len(messages)
        messages.append(Message.parse(fields, number, parent))
        replies = fields.get("replies") or []
        if not isinstance(replies, list):
            raise BadRow(f"'replies' is {kind_of(replies)}, not a list")
        stack += [(reply, number) for reply in reversed(replies)]
    return exchanges_of(messages)


def listed_exchanges(values: Sequence[dict[str, Any]]) -> Iterator[Exchange]:
    """The answers of a tree that is a list of messages with MESSAGE_KEYS."""
    for fields in values:
        for key in ("message_id", "parent_id"):
            if not isinstance(fields[key], str | int | None):
                raise BadRow(f"{key!r} is {kind_of(fields[key])}, not a string or an integer")
    return exchanges_of([Message.parse(fields, fields["message_id"], fields["parent_id"]) for fields in values])


def exchanges_of(messages: Sequence[Message]) -> Iterator[Exchange]:
    """The answers of a tree, depth first. A message whose parent is not listed begins a tree of its
    own.

    Raises BadRow if an id is not unique, or messages are replies to each other.
    """
    ids = {message.id for message in messages}
    if len(ids) < len(messages):
        raise BadRow("two messages of a tree have the same id")
    replies: dict[Hashable, list[Message]] = {}
    for message in sorted(messages, key=lambda message: message.rank):
        replies.setdefault(message.parent if message.parent in ids else None, []).append(message)
    reached = list(replies.get(None, []))
    for message in reached:  # grows while it is read
        reached += replies.get(message.id, []) if message.id is not None else []
    if len(reached) < len(messages):
        raise BadRow("messages of a tree are replies to each other")
    return _answers(replies)


def _answers(replies: dict[Hashable, list[Message]]) -> Iterator[Exchange]:
    stack: list[tuple[Message, tuple[Turn, ...]]] = [(root, ()) for root in reversed(replies.get(None, []))]
    while stack:
        message, history = stack.pop()
        if message.deleted:
            continue
        if message.turn.role == ASSISTANT:
            yield Exchange(history, message.turn.text)
        path = (*history, message.turn)
        stack += [(reply, path) for reply in reversed(replies.get(message.id, []))]
