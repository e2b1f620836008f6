"""Rows of conversations: tokens, and which are learned, as in transformers and in rows per answer.

torch is imported first, because a chat template hides it from transformers where it is not.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, one_error_line, run_program
from engine_runs import finetune
from fixtures.make import HERE, TRAINING_FLAGS
from ranks import run_ranks
from token_files import training_flags, write_documents
from tokenize_runs import TOKENIZE

from megatron_ft.conversations.chat_template import ChatTemplate
from megatron_ft.conversations.learned_spans import conversation_of, learned_spans
from megatron_ft.data.documents import TokenizedDocuments
from megatron_ft.data.fingerprint import sampled_digest, token_files
from megatron_ft.data.indexed import IndexedReader, IndexedWriter, commit, field_paths, learned_path
from megatron_ft.data.packed_dataset import build_datasets
from megatron_ft.data.provenance import Provenance
from megatron_ft.errors import UserError
from megatron_ft.files.jsonl_row import BadRow
from megatron_ft.launcher.mtf import mtf_flags
from megatron_ft.prompts import Turn
from megatron_ft.tokenizer.overlap import SpanEncoder
from megatron_ft.tokenizer.tokenizer import load_tokenizer

WORDS = [
    "def",
    "return",
    "x ",
    " 12",
    "λ",
    "我想",
    "\n    ",
    "🙂",
    "it's",
    "==",
    "<|endoftext|>",
    "👩‍👩‍👧",
    "e\u0301",
    " ",
]
BODY = "{{ m['content'] }}<|endoftext|>\n"
ASK = "{% if add_generation_prompt %}assistant:\n{% endif %}"
PLAIN = "{% for m in messages %}{{ m['role'] }}:\n" + BODY + "{% endfor %}" + ASK
MARKED = PLAIN.replace(
    BODY,
    "{% if m['role'] == 'assistant' %}{% generation %}" + BODY + "{% endgeneration %}{% else %}" + BODY + "{% endif %}",
)
# Spans begin and end inside of tokens, and may be empty.
GLUED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def conversations(count: int) -> list[list[dict]]:
    rng = random.Random(5)
    made = []
    for _ in range(count):
        turns = [{"role": "system", "content": "short"}] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, 4)):
            for role in ("user", "assistant"):
                turns.append({"role": role, "content": "".join(rng.choices(WORDS, k=rng.randint(0, 12)))})
        made.append(turns + [{"role": "user", "content": "bye"}] * (rng.random() < 0.3))
    return made


CHATS = conversations(120)


def tokenizer_directory(directory: Path, template: str, **changes: object) -> Path:
    """The shipped tokenizer with a chat template; `changes` are of its tokenizer.json."""
    directory.mkdir()
    spec = json.loads((HERE / "tokenizer.json").read_text(encoding="utf-8"))
    (directory / "tokenizer.json").write_text(json.dumps({**spec, **changes}), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


class Site:
    """A directory with conversations, a tokenizer that marks answers, and their token files."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.tokenizer = tokenizer_directory(directory / "tokenizer", MARKED)
        self.rows = directory / "chats.jsonl"
        lines = (json.dumps({"id": 1, "messages": turns}, ensure_ascii=False) + "\n" for turns in CHATS)
        self.rows.write_text("".join(lines), encoding="utf-8")
        (directory / "plain.jinja").write_text(PLAIN, encoding="utf-8")
        self.single = directory / "single"
        where = ("--tokenizer-file", self.tokenizer, "--output-prefix", self.single)
        run_program(TOKENIZE, self.rows, *where, "--messages-key", "messages")

    def tokenize(self, name: str, *flags: str, template: str = "tokenizer/chat_template.jinja") -> Path:
        """Tokenize with a tokenizer.json and a template, which takes less time than a directory."""
        where = ("--tokenizer-file", self.tokenizer / "tokenizer.json", "--output-prefix", self.directory / name)
        kind = ("--messages-key", "messages", "--chat-template", self.directory / template)
        run_program(TOKENIZE, self.rows, *where, *kind, *flags)
        return self.directory / name


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    return Site(tmp_path_factory.mktemp("conversations"))


def documents_of(prefix: Path) -> list[tuple[list[int], list[int]]]:
    """Token ids of each document, and for each token 1 if it is learned."""
    documents = TokenizedDocuments(str(prefix))
    assert documents.learned is not None
    found = []
    for i in range(len(documents)):
        inputs, targets, learned = documents.inputs[i], documents.targets[i], documents.learned[i]
        found.append(([*inputs.tolist(), *targets.tolist()], [0] * len(inputs) + learned.tolist()))
        assert learned[0] == 1, "targets begin with the first learned token"
    return found


def all_bytes(prefix: Path) -> list[bytes]:
    return [path.read_bytes() for path in token_files(str(prefix))]


def transformers_gives(directory: Path, template: str, chats: list[list[dict]]) -> list[tuple[list[int], list[int]]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    flags = {"chat_template": template, "return_dict": True, "return_assistant_tokens_mask": True}
    found = (tokenizer.apply_chat_template(turns, **flags) for turns in chats)
    return [(one["input_ids"], one["assistant_masks"]) for one in found]


def test_tokens_and_learned_tokens_are_those_of_transformers(site):
    assert documents_of(site.single) == transformers_gives(site.tokenizer, MARKED, CHATS)


@pytest.mark.parametrize("changes", [{}, {"normalizer": {"type": "NFC"}}, {"post_processor": BYTE_LEVEL}], ids=str)
def test_tokens_across_the_border_of_a_span_are_learned_as_in_transformers(tmp_path, changes):
    directory = tokenizer_directory(tmp_path / "tokenizer", GLUED, **changes)
    encoder, template = SpanEncoder(load_tokenizer(directory)), ChatTemplate(directory)
    found = []
    for turns in CHATS:
        text, spans = learned_spans(template, conversation_of({"m": turns}, "m"), "assistant")
        ids, learned = encoder.encode(text, spans)
        found.append((ids.tolist(), learned.astype(int).tolist()))
    assert found == transformers_gives(directory, GLUED, CHATS)


def rows_per_answer(template: ChatTemplate, turns: list[dict]) -> list[tuple[str, str]]:
    """Inputs and outputs of each answer, as dataset/other/to_rows.py --format chat writes them."""
    history = [Turn(turn["role"], turn["content"]) for turn in turns]
    return [template.texts(history[:i], turn.text) for i, turn in enumerate(history) if turn.role == "assistant"]


def test_a_template_without_marks_learns_what_rows_per_answer_do(site):
    prefix = site.tokenize("plain", "--workers", "2", template="plain.jinja")
    assert all_bytes(prefix) == all_bytes(site.single)
    flags, others = (Provenance.read(made).flags for made in (prefix, site.single))
    assert flags["--train-on"] == others["--train-on"] and flags["--chat-template"] != others["--chat-template"]
    template, tokenizer = ChatTemplate(site.tokenizer, site.directory / "plain.jinja"), load_tokenizer(site.tokenizer)
    for turns, (tokens, learned) in zip(CHATS, documents_of(prefix), strict=True):
        expected = np.zeros(len(tokens), int)
        for inputs, outputs in map(lambda row: list(map(tokenizer.encode, row)), rows_per_answer(template, turns)):
            assert tokens[: len(inputs) + len(outputs)] == inputs + outputs
            expected[len(inputs) : len(inputs) + len(outputs)] = 1
        assert learned == expected.tolist()


def test_the_last_answer_or_everything_can_be_learned(site):
    every = documents_of(site.single)
    last = documents_of(site.tokenize("last", "--train-on", "last"))
    assert last == documents_of(site.tokenize("plain-last", "--train-on", "last", template="plain.jinja"))
    assert [tokens for tokens, _ in last] == [tokens for tokens, _ in every]
    for (_, marks), (_, marks_of_all) in zip(last, every, strict=True):
        end = len(marks_of_all) - marks_of_all[::-1].index(1)
        start = end - [*marks_of_all[:end][::-1], 0].index(0)
        assert marks == [int(start <= i < end) for i in range(len(marks))]
    whole = documents_of(site.tokenize("all", "--train-on", "all"))
    assert whole == [(tokens, [1] * len(tokens)) for tokens, _ in every]


def test_merged_shards_are_byte_for_byte_a_single_run(site):
    parts = [site.tokenize(f"part-{i}", "--shard", f"{i}/3") for i in (1, 2, 3)]
    run_program("preprocess/merge.py", *parts, "--output-prefix", site.directory / "merged")
    assert all_bytes(site.directory / "merged") == all_bytes(site.single) and len(all_bytes(site.single)) == 6
    shipped = [path.name for path in site.directory.glob("single_*")]
    assert sorted(shipped) == sorted(path.name.replace("merged", "single") for path in site.directory.glob("merged_*"))


def test_parts_that_were_made_otherwise_are_not_merged(site, tmp_path):
    first, last = (
        site.tokenize(f"half-{i}", "--shard", f"{i}/2", "--train-on", on) for i, on in ((1, "all"), (2, "last"))
    )
    merge = ("preprocess/merge.py", "--output-prefix", tmp_path / "out")
    assert "were made with different --train-on" in one_error_line(run_program(*merge, first, last, ok=False))
    ordinary = write_documents(tmp_path / "ordinary", [([1], [2])])
    line = one_error_line(run_program(*merge, site.single, ordinary, ok=False))
    assert f"{site.single} has conversations, with marks of the learned tokens, but {ordinary} has other rows" in line
    assert not list(tmp_path.glob("out*"))


def copy(site: Site, directory: Path, *without: str) -> Path:
    for path in site.directory.glob("single_*"):
        if path.name not in without:
            (directory / path.name).write_bytes(path.read_bytes())
    return directory / "single"


def test_other_rows_under_the_same_name_leave_no_marks(site, tmp_path):
    prefix = copy(site, tmp_path)
    rows = site.directory / "pairs.jsonl"
    rows.write_text('{"inputs": "a", "outputs": "b"}\n', encoding="utf-8")
    run_program(TOKENIZE, rows, "--tokenizer-file", HERE / "tokenizer.json", "--output-prefix", prefix)
    assert TokenizedDocuments(str(prefix)).learned is None and not list(tmp_path.glob("single_learned*"))


@pytest.mark.parametrize(
    "damage, message",
    [
        ({"without": ("single_learned_document.bin", "single_learned_document.idx")}, "of which it marks the learned"),
        ({"without": ("single_learned_document.idx",)}, "single_learned_document.idx: No such file or directory; make"),
        ({"other": "u1"}, "marks the tokens of other documents than those in"),
        ({"other": "u2"}, "uint16 values (dtype code 8), expected marks of type uint8"),
    ],
    ids=str,
)
def test_datasets_whose_marks_do_not_fit_are_refused(site, tmp_path, damage, message):
    prefix = copy(site, tmp_path, *damage.get("without", ()))
    if "other" in damage:
        with IndexedWriter(learned_path(prefix), np.dtype(damage["other"])) as marks:
            for size in IndexedReader(field_paths(prefix)[1]).sizes[::-1]:
                marks.add(np.ones(size, int))
            commit([marks])
    with pytest.raises(UserError) as caught:
        TokenizedDocuments(str(prefix))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_marks_are_part_of_what_a_run_was_trained_on(site, tmp_path):
    prefix = copy(site, tmp_path)
    before = sampled_digest(token_files(str(prefix)))
    marks = Path(f"{prefix}_learned_document.bin")
    marks.write_bytes(bytes(1) + marks.read_bytes()[1:])
    assert sampled_digest(token_files(str(prefix))) != before


def test_packed_sequences_have_the_learned_tokens_of_their_documents(site, tmp_path):
    flags = ("--data-prefix", site.single, "--validation-fraction", "0.25", "--data-cache-path", tmp_path)
    datasets = build_datasets(training_flags(*flags, seq_length=256), train_samples=4, pad=0)
    expected, seen = documents_of(site.single), set()
    assert datasets.train is not None
    for dataset, count in ((datasets.train, 4), (datasets.valid["valid"], len(datasets.valid["valid"]))):
        for i in range(count):
            sample, numbers = dataset[i], dataset.provenance(i)["documents"]
            for segment, number in enumerate(numbers, 1):
                document = sample.segment_ids == segment
                learned = (~sample.is_inputs[document]).astype(int).tolist()
                assert (sample.tokens[document].tolist(), learned) == expected[number]
            assert not sample.is_inputs[sample.segment_ids == 0].any()
            seen |= {(dataset is datasets.train, number) for number in numbers}
    held_out = {number for number in range(90, 120) if len(expected[number][0]) <= 257}
    assert {number for trained, number in seen if not trained} == held_out and len(held_out) > 20


def test_view_shows_and_counts_the_learned_tokens(site):
    flags = ("--tokenizer-file", site.tokenizer, "--seq-length", "256", "--stats", "--sequences", "0:3")
    printed = run_program("preprocess/view.py", site.single, *flags).stdout
    learned = sum(sum(marks) for _, marks in documents_of(site.single))
    assert f"in outputs, {learned:,} of these learned)" in printed
    shown = printed.split("┌ document 1 (number ")[1].split("┌ document")[0]
    turns = CHATS[int(shown.split(" ")[0])]
    answers = [turn["content"] + "<|endoftext|>\n" for turn in turns if turn["role"] == "assistant"]
    assert [piece.split("»")[0] for piece in shown.split("«")[1:]] == answers


def test_a_training_step_learns_what_rows_per_answer_do(tmp_path):
    """One step on all conversations has the mean loss of the outputs of all rows, one by one."""
    from transformers import GPTBigCodeForCausalLM

    chats = sorted((turns for turns in CHATS if len(turns) > 3), key=lambda turns: len(str(turns)))[:3]
    (tmp_path / "plain.jinja").write_text(PLAIN, encoding="utf-8")
    rows = tmp_path / "chats.jsonl"
    rows.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chats), encoding="utf-8")
    source = (HERE / "tokenizer.json", tmp_path / "plain.jinja")
    where = ("--tokenizer-file", source[0], "--chat-template", source[1], "--output-prefix", tmp_path / "data")
    run_program(TOKENIZE, rows, *where, "--messages-key", "messages")

    template, encode = ChatTemplate(*source), load_tokenizer(source[0]).encode
    model = GPTBigCodeForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32).eval()
    losses = []
    for inputs, outputs in (map(encode, row) for turns in chats for row in rows_per_answer(template, turns)):
        logits = model(torch.tensor([inputs + outputs])).logits[0, len(inputs) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(outputs), reduction="none"))

    flags = TRAINING_FLAGS.replace(str(HERE / "data"), str(tmp_path / "data")).split()
    flags += f"--train-iters 1 --lr-warmup-iters 0 --global-batch-size 1 --validation-fraction 0 --save {tmp_path}/run".split()
    assert run_ranks(finetune, 1, flags) == [0]
    (step, *_) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines())
    assert step["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=5e-5)


def test_the_mtf_engine_refuses_conversations(site, tmp_path):
    for prefix, message in (
        (site.single, "conversations, of which the mtf branch would learn every turn; use --engine megatron-core"),
        (Path(write_documents(tmp_path / "text", [([], [1, 2])])), "documents without inputs, such as plain text"),
    ):
        config = training_flags("--data-prefix", prefix, "--save", tmp_path / "run", "--from-scratch")
        with pytest.raises(UserError, match=message):
            mtf_flags(config)


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "row, template, message",
    [
        ({"inputs": "a"}, PLAIN, "no key 'messages'; the row has 'inputs'"),
        ({"messages": []}, PLAIN, "'messages' is an empty list"),
        ({"messages": "a"}, PLAIN, "'messages' is a string, not a list"),
        ({"messages": [USER, "b"]}, PLAIN, "a message is a string, not an object"),
        ({"messages": [{"from": "human", "value": "a"}]}, PLAIN, "no key 'role' in a message; the row has 'from', 'value'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, PLAIN, "no key 'content' in a message"),
        ({"messages": [{**USER, "content": [{"text": "a"}]}]}, PLAIN, "a message's 'content' is a list, not a string"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, PLAIN, "a message has 'weight', which is not supported"),
        ({"messages": [USER, {**ANSWER, "function_call": {}}]}, PLAIN, "write calls as 'tool_calls'"),
        ({"messages": [USER, ANSWER], "tools": "[]"}, PLAIN, "'tools' is not a list of objects"),
        ({"messages": [USER, ANSWER], "tools": [{}]}, PLAIN, "has 'tools', which the chat template ignores"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, MARKED, "has 'tool_calls', which the chat template ignores"),
        ({"messages": [USER]}, PLAIN, "no turn of the assistant"),
        ({"messages": [USER, ANSWER]}, "{{ raise_exception('no') }}", "the chat template refuses the conversation (no)"),
        (
            {"messages": [USER, ANSWER, USER, ANSWER]},
            PLAIN.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '' }}"),
            "renders turns differently once others follow; give a template with {% generation %} around answers",
        ),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_learned_from_have_a_reason(tmp_path, row, template, message):
    (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(BadRow) as caught:
        learned_spans(
            ChatTemplate(HERE / "tokenizer.json", tmp_path / "t.jinja"), conversation_of(row, "messages"), "assistant"
        )
    assert message in str(caught.value)


def test_a_template_that_declares_tools_gets_them(tmp_path):
    source = "{% for tool in tools %}{{ tool['name'] }};{% endfor %}" + PLAIN
    source = source.replace("{{ m['content'] }}", "{{ m['content'] }}{{ (m['tool_calls'] or '') | length }}")
    (tmp_path / "t.jinja").write_text(source, encoding="utf-8")
    row = {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
        "tools": [{"name": "f"}],
    }
    template = ChatTemplate(HERE / "tokenizer.json", tmp_path / "t.jinja")
    text, ((start, end),) = learned_spans(template, conversation_of(row, "messages"), "assistant")
    assert text.startswith("f;user:\na0<|endoftext|>\n") and text[start:end] == "1<|endoftext|>\n"


def test_a_tokenizer_may_have_a_template_of_its_own_for_tools(tmp_path):
    directory = tokenizer_directory(tmp_path / "tokenizer", PLAIN)
    before = ChatTemplate(directory)
    (directory / "additional_chat_templates").mkdir()
    source = "{{ strftime_now('%Y') }} {% for tool in tools %}{{ tool['name'] }};{% endfor %}" + PLAIN
    (directory / "additional_chat_templates/tool_use.jinja").write_text(source, encoding="utf-8")
    template = ChatTemplate(directory)
    with_tools = template.render([USER], [{"name": "f"}]).text
    assert with_tools.partition(" ")[2] == "f;" + template.render([USER]).text == "f;user:\na<|endoftext|>\n"
    assert template.digest != before.digest and (before.dated, template.dated) == (False, True)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--chat-template", "absent.jinja"], "--chat-template absent.jinja: No such file or directory"),
        (["--chat-template", "EOS"], "it uses eos_token, which TOKENIZER does not name; give --tokenizer-file a Hugging"),
        ([], "--tokenizer-file TOKENIZER: not a directory; a chat template needs a Hugging Face directory"),
        (["--chat-template", "BROKEN"], "--chat-template BROKEN: line 2 of the chat template is not Jinja (unexpected '}')"),
        (["--chat-template", "PLAIN", "--append-eod"], "--append-eod: the chat template ends a conversation"),
        (["--chat-template", "PLAIN", "--text-key", "text"], "rows are either conversations or plain texts"),
        (["--chat-template", "PLAIN", "--literal-special-tokens", "<|endoftext|>"], "the chat template writes this token"),
        (["--chat-template", "PLAIN"], "line 2: no turn of the assistant; fix the row"),
    ],
)  # fmt: skip
def test_usage_errors_report_one_line(tmp_path, flags, message):
    (tmp_path / "PLAIN").write_text(PLAIN, encoding="utf-8")
    (tmp_path / "BROKEN").write_text("{% for m in messages %}\n{{ m.content }", encoding="utf-8")
    (tmp_path / "EOS").write_text(PLAIN.replace("<|endoftext|>", "{{ eos_token }}"), encoding="utf-8")
    (tmp_path / "TOKENIZER").write_bytes((HERE / "tokenizer.json").read_bytes())
    lines = (json.dumps({"messages": turns}) + "\n" for turns in ([USER, ANSWER], [USER]))
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    where = ("--tokenizer-file", "TOKENIZER", "--output-prefix", "out", "--messages-key", "messages")
    done = run_program(ROOT / TOKENIZE, "rows.jsonl", *where, *flags, ok=False, cwd=tmp_path)
    assert message in one_error_line(done) and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("answer, warns", [("yes", True), ("yes<|endoftext|>", False)])
def test_answers_that_never_end_trigger_a_warning(tmp_path, answer, warns):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "utf-8")
    rows = [[USER, {"role": "assistant", "content": answer}], [USER, {"role": "assistant", "content": "no"}]]
    lines = (json.dumps({"messages": turns}) + "\n" for turns in rows)
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    where = ("--tokenizer-file", HERE / "tokenizer.json", "--output-prefix", tmp_path / "out")
    kind = ("--messages-key", "messages", "--chat-template", tmp_path / "t.jinja")
    done = run_program(TOKENIZE, tmp_path / "rows.jsonl", *where, *kind)
    assert ("no learned token is <|endoftext|>, so models would not learn to stop" in done.stderr) is warns
