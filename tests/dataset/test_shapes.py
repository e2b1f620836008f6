"""Shapes of instruction data: whatever a row holds, it gives texts or a reason."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ft.conversations.oasst import Message, exchanges_of
from megatron_ft.conversations.shapes import SHAPES, shape_of
from megatron_ft.errors import UserError
from megatron_ft.files.jsonl_row import BadRow
from megatron_ft.prompts import CHAT_FORMATS, Turn

KEYS = (
    "messages conversations turns prompt completion instruction input output instances context system question answer "
    "inputs targets role from content value text message_id parent_id replies rank deleted message_tree_id"
).split()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.sampled_from(["", "a", "user", "assistant", "gpt", "prompter", "\ud800"]),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.sampled_from(KEYS), value, max_size=5),
    max_leaves=12,
)  # fmt: skip
ROWS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6)


@settings(max_examples=400)
@given(row=ROWS)
def test_any_row_gives_exchanges_of_text_or_a_reason(row):
    try:
        shape_of(row, "rows.jsonl")
    except UserError as error:
        assert "unknown shape, the row has " in str(error)
    for shape in SHAPES:
        shape.fits(row)
        try:
            for history, answer in shape.exchanges(row):
                assert all(isinstance(turn, Turn) and turn.text.encode() is not None for turn in history)
                assert isinstance(answer, str)
        except BadRow as reason:
            assert str(reason)


@given(
    texts=st.lists(st.text(max_size=5), min_size=1, max_size=5),
    system=st.text(max_size=5) | st.none(),
    answer=st.text(max_size=5),
)
def test_every_format_keeps_all_texts_in_their_order(texts, system, answer):
    turns = [Turn("assistant" if n % 2 else "user", text) for n, text in enumerate(texts)]
    turns = turns if system is None else [Turn("system", system), *turns]
    for to_texts in CHAT_FORMATS.values():
        inputs, outputs = to_texts(turns, answer)
        position = 0
        for turn in turns:
            position = inputs.index(turn.text, position) + len(turn.text)
        assert answer in outputs


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.none() | st.integers(0, 3)), max_size=10))
def test_each_answer_of_a_tree_follows_the_path_to_it(nodes):
    """Message n replies to an earlier one, so these are trees; ids begin at 1."""
    messages = [
        Message(n + 1, min(parent, n) or None, Turn("assistant" if bot else "user", str(n + 1)), float("inf") if rank is None else rank, False)
        for n, (parent, bot, rank) in enumerate(nodes)
    ]  # fmt: skip
    parents = {message.id: message.parent for message in messages}
    found = list(exchanges_of(messages))
    answers = {message.id for message in messages if message.turn.role == "assistant"}
    assert {int(exchange.answer) for exchange in found} == answers and len(found) == len(answers)
    for history, answer in found:
        path, parent = [], parents[int(answer)]
        while parent is not None:
            path.append(str(parent))
            parent = parents[parent]
        assert [turn.text for turn in history] == path[::-1]
