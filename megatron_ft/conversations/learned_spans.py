"""Which characters of a rendered conversation are learned: `learned_spans`.

A template with `{% generation %}` marks what the assistant writes, which is what transformers'
`return_assistant_tokens_mask` reads. Without these marks, an answer is what the conversation with
it has in addition to the generation prompt after the turns before it: the outputs of the row that
dataset/other/to_rows.py makes of this answer.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_ft.conversations.chat_template import ChatTemplate, Message, Span
from megatron_ft.files.json_file import kind_of
from megatron_ft.files.jsonl_row import NO_KEY, BadRow, keys_of
from megatron_ft.prompts import ASSISTANT

ANSWERS, LAST, ALL = "assistant", "last", "all"
TRAIN_ON = {
    ANSWERS: "all turns of the assistant",
    LAST: "the last one only",
    ALL: "every token",
}
# Keys of messages that nothing here reads: of other programs, and of an old form of tools.
NOT_COVERED = {
    "weight": "use --train-on",
    "train": "use --train-on",
    "loss": "use --train-on",
    "function_call": "write calls as 'tool_calls'",
}
REMEDY_FOR_TEMPLATE = (
    "give a template with {% generation %} around answers (--chat-template), or one row per answer, as "
    "dataset/other/to_rows.py --format chat writes"
)


class Conversation(NamedTuple):
    """The messages of a row, as templates take them, and the tools that it declares."""

    messages: list[dict[str, Any]]
    tools: list[dict] | None

    @property
    def answers(self) -> list[int]:
        """The indices of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == ASSISTANT]


def conversation_of(row: Mapping[str, Any], key: str) -> Conversation:
    """The conversation under a key of a row: a list of objects with a `role` and, unless they call
    tools, a `content`, both strings. Other keys are for the template; null is as if absent.

    BadRow if it is anything else.
    """
    if key not in row:
        raise BadRow(f"{NO_KEY} {key!r}; {keys_of(dict(row))}")
    messages, tools = row[key], row.get("tools")
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else f"{kind_of(messages)}, not a list"
        raise BadRow(f"{key!r} is {found}")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow("'tools' is not a list of objects")
    return Conversation([_message(message) for message in messages], tools)


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRow(f"a message is {kind_of(message)}, not an object")
    message = {key: value for key, value in message.items() if value is not None}
    for key in ("role",) if "tool_calls" in message else ("role", "content"):
        if key not in message:
            raise BadRow(f"{NO_KEY} {key!r} in a message; {keys_of(message)}")
    for key in ("role", "content"):
        if not isinstance(message.get(key, ""), str):
            raise BadRow(f"a message's {key!r} is {kind_of(message[key])}, not a string")
    for key, instead in NOT_COVERED.items():
        if key in message:
            raise BadRow(f"a message has {key!r}, which is not supported ({instead})")
    return message


def learned_spans(template: ChatTemplate, conversation: Conversation, train_on: str) -> tuple[str, list[Span]]:
    """The conversation's text and the spans that are learned; `train_on` is one of TRAIN_ON.

    BadRow if the template refuses the conversation, ignores its tools, or does not tell which part
    of the text is an answer.
    """
    _check_tools(template, conversation)
    text, spans = template.render(conversation.messages, conversation.tools)
    if train_on == ALL:
        return text, [(0, len(text))]
    answers = conversation.answers
    if not answers:
        raise BadRow("no turn of the assistant")
    if spans is not None:
        if train_on == LAST and len(spans) != len(answers):
            raise BadRow(f"the chat template marks {len(spans)} spans in {len(answers)} turns of the assistant")
        return text, spans[-1:] if train_on == LAST else spans
    chosen = answers[-1:] if train_on == LAST else answers
    return text, [_span_of(template, conversation, answer, text) for answer in chosen]


def _span_of(template: ChatTemplate, conversation: Conversation, answer: int, whole: str) -> Span:
    """Where message number `answer` is in the text of all messages."""
    messages, tools = conversation
    before = template.render(messages[:answer], tools, add_generation_prompt=True).text
    after = template.render(messages[: answer + 1], tools).text
    if not (whole.startswith(after) and after.startswith(before)):
        raise BadRow(f"the chat template renders turns differently once others follow; {REMEDY_FOR_TEMPLATE}")
    return len(before), len(after)


def _check_tools(template: ChatTemplate, conversation: Conversation) -> None:
    """BadRow if the template would leave out the conversation's tools or calls of tools."""
    source = template.source_for(conversation.tools)
    calls: list[Message] = [message for message in conversation.messages if "tool_calls" in message]
    for name, used in (("tools", conversation.tools), ("tool_calls", calls)):
        if used and name not in source:
            raise BadRow(f"the conversation has {name!r}, which the chat template ignores")
