"""The shapes that instruction data come in, recognized by their keys: `shape_of`, `SHAPES`.

A shape turns a row into exchanges: answers, each with the turns before it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_ft.conversations.oasst import are_messages, is_tree, listed_exchanges, nested_exchanges
from megatron_ft.conversations.turns import ROLE_KEYS, TEXT_KEYS, Exchange, answers_in, messages_in, text_in, turn_of
from megatron_ft.errors import UserError
from megatron_ft.files.json_file import kind_of
from megatron_ft.files.jsonl_row import NO_KEY, BadRow, keys_of
from megatron_ft.prompts import SYSTEM, USER, Turn

SYSTEM_KEYS = ("system", "system_prompt")
# Keys of a list of messages. "turns" is also where records.py puts a row that is a list itself.
LISTS = ("messages", "conversations", "conversation", "turns", "dialogue", "dialog")


@dataclass(frozen=True)
class Shape:
    """One shape. `keys` describes it to users. `fits` tells whether a row is of this shape by its
    keys; `exchanges` raises BadRow if one of its values is not as it should be."""

    name: str
    keys: str
    fits: Callable[[dict[str, Any]], bool]
    exchanges: Callable[[dict[str, Any]], Iterable[Exchange]]


def _list_in(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The first of LISTS that a row has, if it holds messages."""
    key = next((key for key in LISTS if key in row), None)
    return None if key is None else messages_in(row[key])


def _conversation(text_key: str) -> Callable[[dict[str, Any]], bool]:
    """Whether a row has a list of messages whose texts have this key."""

    def fits(row: dict[str, Any]) -> bool:
        messages = _list_in(row)
        return messages is not None and text_key in messages[0] and any(key in messages[0] for key in ROLE_KEYS)

    return fits


def _conversation_exchanges(row: dict[str, Any]) -> Iterable[Exchange]:
    key = next((key for key in LISTS if key in row), None)
    if key is None:
        raise BadRow(f"{NO_KEY} {' or '.join(map(repr, LISTS))}; {keys_of(row)}")
    messages = messages_in(row[key])
    if messages is None:
        raise BadRow(f"{key!r} is not a list of messages" if row[key] else f"{key!r} is empty")
    turns = [turn_of(message) for message in messages]
    return answers_in(turns if turns[0].role == SYSTEM else [*_system_of(row), *turns])


def _system_of(row: dict[str, Any]) -> list[Turn]:
    """The system message that a row has under a key of its own, if any."""
    return [Turn(SYSTEM, row[key]) for key in SYSTEM_KEYS if isinstance(row.get(key), str) and row[key]][:1]


def _listed_tree(row: dict[str, Any]) -> bool:
    messages = _list_in(row)
    return messages is not None and are_messages(messages)


def _listed_tree_exchanges(row: dict[str, Any]) -> Iterable[Exchange]:
    messages = _list_in(row)
    if messages is None or not are_messages(messages):
        raise BadRow("not a list of messages with message_id, parent_id and text")
    return listed_exchanges(messages)


def _nested_tree_exchanges(row: dict[str, Any]) -> Iterable[Exchange]:
    if not is_tree(row):
        raise BadRow(f"{NO_KEY} 'prompt' with a message; {keys_of(row)}")
    return nested_exchanges(row)


def _self_instruct(row: dict[str, Any]) -> bool:
    return "instruction" in row and "instances" in row


def _self_instruct_exchanges(row: dict[str, Any]) -> Iterator[Exchange]:
    instances = row.get("instances")
    if not isinstance(instances, list) or not all(isinstance(instance, dict) for instance in instances):
        raise BadRow(f"'instances' is {kind_of(instances)}, not a list of objects")
    for instance in instances:
        yield from PAIR_EXCHANGES["alpaca"]({"instruction": row.get("instruction"), **instance})


# (name, keys of the question, of what it refers to, of the answer): the first key found is used.
PAIRS = (
    ("alpaca", ("instruction",), ("input",), ("output",)),
    ("instruction-response", ("instruction",), ("context", "input"), ("response", "answer", "completion")),
    ("prompt-completion", ("prompt",), (), ("completion", "response", "answer", "output")),
    ("question-answer", ("question", "query", "problem"), ("context",), ("answer", "response", "solution", "output")),
    ("inputs-targets", ("inputs",), (), ("targets", "outputs")),
    ("input-output", ("input",), (), ("output", "target")),
)  # fmt: skip


def _pair(
    questions: tuple[str, ...], contexts: tuple[str, ...], answers: tuple[str, ...]
) -> tuple[Callable[[dict], bool], Callable[[dict], Iterator[Exchange]]]:
    """A question and an answer under these keys. What the question refers to follows it after a
    newline, as in OctoPack's prompts. Either may be a list of messages."""

    def fits(row: dict[str, Any]) -> bool:
        return any(key in row for key in questions) and any(key in row for key in answers)

    def exchanges(row: dict[str, Any]) -> Iterator[Exchange]:
        found = []
        for keys in (questions, answers):
            key = next((key for key in keys if key in row), None)
            if key is None:
                raise BadRow(f"{NO_KEY} {' or '.join(map(repr, keys))}; {keys_of(row)}")
            found.append(key)
        question, answer = found
        history = _system_of(row)
        if (messages := messages_in(row[question])) and _has_a_role(messages):
            history += map(turn_of, messages)
        else:
            texts = [text_in(row, key) for key in (question, *contexts) if key in row]
            history.append(Turn(USER, "\n".join(filter(None, texts))))
        if (messages := messages_in(row[answer])) and _has_a_role(messages):
            answers_from = len(history)
            turns = [*history, *map(turn_of, messages)]
            yield from (one for one in answers_in(turns) if len(one.history) >= answers_from)
        else:
            yield Exchange(tuple(history), text_in(row, answer))

    return fits, exchanges


def _has_a_role(messages: list[dict[str, Any]]) -> bool:
    return any(key in messages[0] for key in ROLE_KEYS) and any(key in messages[0] for key in TEXT_KEYS)


def _shown(questions: tuple[str, ...], contexts: tuple[str, ...], answers: tuple[str, ...]) -> str:
    context = f", [{'|'.join(contexts)}]" if contexts else ""
    return f"{'|'.join(questions)}{context}, {'|'.join(answers)}"


PAIR_SHAPES = [Shape(name, _shown(*keys), *_pair(*keys)) for name, *keys in PAIRS]
PAIR_EXCHANGES = {shape.name: shape.exchanges for shape in PAIR_SHAPES}

# In the order in which they are tried: a row may have the keys of several.
SHAPES: tuple[Shape, ...] = (
    Shape("oasst-tree", "prompt: {text, role, replies: [...]}", is_tree, _nested_tree_exchanges),
    Shape("oasst-list", "[{text, role|from, message_id, parent_id}, ...]", _listed_tree, _listed_tree_exchanges),
    Shape("messages", "messages: [{role, content}, ...]", _conversation("content"), _conversation_exchanges),
    Shape("sharegpt", "conversations: [{from, value}, ...]", _conversation("value"), _conversation_exchanges),
    Shape("turns", "[{from|role, text}, ...]", _conversation("text"), _conversation_exchanges),
    Shape("self-instruct", "instruction, instances: [{input, output}, ...]", _self_instruct, _self_instruct_exchanges),
    *PAIR_SHAPES,
)


def shape_named(name: str) -> Shape:
    """The shape of this name, which is one of SHAPES."""
    return next(shape for shape in SHAPES if shape.name == name)


def shape_of(row: dict[str, Any], where: str) -> Shape:
    """The shape of a row; UserError with the keys found and the shapes known if it has none.

    >>> shape_of({"instruction": "Add 1 and 1", "input": "", "output": "2"}, "rows.jsonl").name
    'alpaca'
    """
    for shape in SHAPES:
        if shape.fits(row):
            return shape
    known = "; ".join(f"{shape.name} ({shape.keys})" for shape in SHAPES)
    raise UserError(f"{where}: unknown shape, {keys_of(row)}; rename its keys, or force a shape with --shape: {known}")
