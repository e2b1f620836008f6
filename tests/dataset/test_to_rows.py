"""dataset/other/to_rows.py: every shape and file of instruction data becomes the same rows."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run_program

from megatron_ft.prompts import question_prompt

TO_ROWS = "dataset/other/to_rows.py"
TURNS = [("user", "1 + 1?"), ("assistant", "2"), ("user", "And é?"), ("assistant", "No\n")]
ROWS = [
    {"inputs": "Question: 1 + 1?\n\nAnswer:", "outputs": " 2"},
    {"inputs": "Question: 1 + 1?\n\nAnswer: 2\n\nQuestion: And é?\n\nAnswer:", "outputs": " No\n"},
]


def write(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def converted(*command) -> tuple[list[dict], str]:
    """The rows that the program writes for files, given before any flags, and its stderr."""
    done = run_program(TO_ROWS, "--output", "-", "--input", *command)
    return [json.loads(line) for line in done.stdout.split("\n")[:-1]], done.stderr


def messages(role: str, text: str, names: dict[str, str] | None = None) -> list[dict]:
    return [{role: (names or {}).get(name, name), text: value} for name, value in TURNS]


def nested(turns=TURNS) -> dict:
    (role, text), *rest = turns
    role = "prompter" if role == "user" else role
    return {"message_id": f"id of {text}", "role": role, "text": text, "replies": [nested(rest)] if rest else []}


def listed(**more) -> list[dict]:
    """Messages that name their parents, as OASST's rows and OctoPack's lists do."""
    return [
        {"message_id": n + 1, "parent_id": n or None, "text": text, "role": role, **more}
        for n, (role, text) in enumerate(TURNS)
    ]


CONVERSATIONS = {
    "messages": {"messages": messages("role", "content"), "prompt": "ignored"},
    "sharegpt": {"conversations": messages("from", "value", {"user": "human", "assistant": "gpt"})},
    "turns": messages("from", "text"),
    "oasst-list": listed(),
    "oasst-tree": {"message_tree_id": "t", "prompt": nested()},
}
PAIRS = {
    "alpaca": {"instruction": "1 + 1?", "input": "", "output": "2"},
    "instruction-response": {"instruction": "1 + 1?", "response": "2"},
    "prompt-completion": {"prompt": "1 + 1?", "completion": "2"},
    "question-answer": {"question": "1 + 1?", "answer": "2"},
    "inputs-targets": {"inputs": "1 + 1?", "targets": "2"},
    "input-output": {"input": "1 + 1?", "output": "2"},
    "self-instruct": {"instruction": "1 + 1?", "instances": [{"input": "", "output": "2"}]},
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_each_answer_of_a_conversation_is_a_row(tmp_path, name):
    rows, stderr = converted(write(tmp_path / "a.jsonl", CONVERSATIONS[name]))
    assert rows == ROWS and f"a.jsonl: {name} (" in stderr
    rows, _ = converted(tmp_path / "a.jsonl", "--first-turn")
    assert rows == ROWS[:1]


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_a_row_as_octocoder_was_trained_on(tmp_path, name):
    rows, stderr = converted(write(tmp_path / "a.jsonl", PAIRS[name] | {"lang": "Python", "id": 3}))
    assert rows == [ROWS[0] | {"lang": "Python"}] and f"a.jsonl: {name} (" in stderr


def test_context_and_system_message_are_part_of_the_inputs(tmp_path):
    row = {"instruction": "Add", "context": "1, 1", "response": "2", "system_prompt": "Be brief."}
    rows, _ = converted(write(tmp_path / "a.jsonl", row))
    assert rows[0]["inputs"] == "Be brief.\n\nQuestion: Add\n1, 1\n\nAnswer:"
    conversation = {"system": "Be brief.", **CONVERSATIONS["sharegpt"]}
    rows, _ = converted(write(tmp_path / "a.jsonl", conversation), "--format", "starchat")
    assert rows[1]["inputs"].startswith(
        "<|system|>\nBe brief.<|end|>\n<|user|>\n1 + 1?<|end|>\n<|assistant|>\n2<|end|>"
    )


def test_a_prompt_and_a_completion_may_be_messages(tmp_path):
    row = {"prompt": messages("role", "content")[:3], "completion": messages("role", "content")[3:]}
    assert converted(write(tmp_path / "a.jsonl", row))[0] == ROWS[1:]


def test_text_in_parts_is_joined_and_a_message_without_text_is_empty(tmp_path):
    parts = {"role": "user", "content": [{"type": "text", "text": "1 +"}, {"type": "text", "text": " 1?"}]}
    rows, _ = converted(write(tmp_path / "a.jsonl", {"messages": [parts, {"role": "assistant", "content": "2"}]}))
    assert rows == ROWS[:1]


def test_tree_gives_best_ranked_answers_first_and_no_deleted_ones(tmp_path):
    replies = [
        {"role": "assistant", "text": "worse", "rank": 1, "replies": []},
        {"role": "assistant", "text": "unranked", "rank": None, "replies": []},
        {
            "role": "assistant",
            "text": "best",
            "rank": 0,
            "replies": [{"role": "prompter", "text": "Why?", "replies": []}],
        },
        {"role": "assistant", "text": "deleted", "rank": 0, "deleted": True, "replies": [nested()]},
    ]
    path = write(tmp_path / "a.jsonl", {"prompt": {"role": "prompter", "text": "Q", "replies": replies}})
    rows, _ = converted(path)
    assert [row["outputs"] for row in rows] == [" best", " worse", " unranked"]
    assert [row["outputs"] for row in converted(path, "--first-turn")[0]] == [" best"]


def test_messages_that_are_rows_are_joined_by_tree(tmp_path):
    trees = [listed(message_tree_id=name) for name in "ab"]
    path = write(tmp_path / "a.jsonl", *trees[0][::-1], *trees[1])
    rows, stderr = converted(path)
    assert rows == ROWS * 2 and "oasst-list" in stderr
    done = run_program(TO_ROWS, "--input", path, "--output", "-", "--shard", "1/2", ok=False)
    assert "one message per row, of trees that shards would cut; run it without --shard" in one_error_line(done)


FILES = (
    *("lines.jsonl", "lines.jsonl.gz", "array.json", "pretty.json", "array.json.gz"),
    *("table.parquet", "stream.arrow", "file.arrow"),
)


def stored(directory: Path, name: str, rows: list[dict]) -> Path:
    """These rows in a file of the kind that its name tells."""
    path = directory / name
    text = {
        "lines": "".join(json.dumps(row) + "\n" for row in rows),
        "array": json.dumps(rows),
        "pretty": json.dumps(rows, indent=2, ensure_ascii=False),
    }.get(name.partition(".")[0])
    if text is not None:
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        return path
    import pyarrow
    from pyarrow import ipc, parquet

    table = pyarrow.Table.from_pylist(rows)
    if name.endswith("parquet"):
        parquet.write_table(table, path, row_group_size=7)
        return path
    writer = ipc.new_file if name.startswith("file") else ipc.new_stream
    with writer(path, table.schema) as out:
        out.write_table(table, max_chunksize=10)
    return path


@pytest.mark.parametrize("shape", ["sharegpt", "alpaca"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, shape):
    pytest.importorskip("pyarrow")
    row = {**CONVERSATIONS, **PAIRS}[shape]
    paths = [stored(tmp_path, name, [row] * 25) for name in FILES]
    rows, stderr = converted(*paths)
    assert rows == (ROWS if shape == "sharegpt" else ROWS[:1]) * 25 * len(FILES)
    assert [line.split(": ")[0] for line in stderr.splitlines()[:-1]] == list(map(str, paths))


def test_saved_dataset_is_read_from_its_arrow_files(tmp_path):
    pytest.importorskip("pyarrow")
    split = tmp_path / "saved/train"
    split.mkdir(parents=True)
    names = [f"data-{n:05}-of-00002.arrow" for n in range(2)]
    for n, name in enumerate(names):
        stored(split, name, [PAIRS["alpaca"] | {"id": str(n)}] * 3)
    (split / "dataset_info.json").write_text("{}")
    (split / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train"]}')
    rows, _ = converted(tmp_path / "saved")
    assert rows == [ROWS[0] | {"id": str(n)} for n in (0, 0, 0, 1, 1, 1)]
    shards = [converted(split, "--shard", f"{n}/2")[0] for n in (1, 2)]
    assert shards[0] + shards[1] == rows
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    done = run_program(TO_ROWS, "--input", tmp_path / "saved", "--output", "-", ok=False)
    assert "a dataset of the splits train, test; give one of them" in one_error_line(done)


def test_lists_of_structs_stored_as_structs_of_lists_are_read(tmp_path):
    turns = CONVERSATIONS["sharegpt"]["conversations"]
    columns = {key: [turn[key] for turn in turns] for key in turns[0]}
    assert converted(write(tmp_path / "a.jsonl", {"conversations": columns}))[0] == ROWS


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_shards_concatenated_equal_the_single_run_and_their_reports_add_up(tmp_path, suffix):
    rows = [{"instruction": f"Q{n}", "input": "", "output": "" if n % 10 == 0 else f"A{n}"} for n in range(100)]
    path = stored(tmp_path, "lines.jsonl" if suffix == "jsonl" else "table.parquet", rows)
    texts, reports = [], []
    for shard in ("1/1", "1/3", "2/3", "3/3"):
        out = tmp_path / f"{shard[0]}of{shard[2]}.jsonl"
        run_program(TO_ROWS, "--input", path, "--output", out, "--shard", shard)
        texts.append(out.read_bytes())
        reports.append(json.loads(out.with_name(out.stem + "_report.json").read_text()))
    assert texts[0] == b"".join(texts[1:]) and texts[1] and texts[2]
    for key in ("rows_in", "answers", "rows_out"):
        assert reports[0][key] == sum(report[key] for report in reports[1:])
    assert reports[0]["dropped"] == {"empty answer": 10} and reports[0]["rows_out"] == 90


def test_answers_that_teach_nothing_are_skipped_and_counted(tmp_path):
    def conversation(*turns):
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    rows = [
        conversation(("assistant", "Hello!"), *TURNS[:2]),
        conversation(("user", "Q"), ("assistant", None)),
        conversation(("user", "Q"), ("tool", "{}"), ("assistant", "A")),
        conversation(("user", "Q")),
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    run_program(TO_ROWS, "--input", path, "--output", tmp_path / "out.jsonl")
    report = json.loads((tmp_path / "out_report.json").read_text())
    reasons = ("empty answer", "no answer", "no question", "tool in the conversation")
    assert report["dropped"] == dict.fromkeys(reasons, 1)
    assert (report["rows_in"], report["answers"], report["rows_out"]) == (4, 5, 1)


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' and loop.first %}{{ raise_exception('no question') }}{% endif %}"
    "{{ bos_token if loop.first }}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer_directory(tmp_path) -> Path:
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    (directory / "tokenizer.json").write_bytes((ROOT / "tests/fixtures/tokenizer.json").read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def test_chat_template_is_rendered_as_transformers_does(tmp_path, tokenizer_directory):
    rows, _ = converted(
        write(tmp_path / "a.jsonl", CONVERSATIONS["sharegpt"]),
        "--format",
        "chat",
        "--tokenizer-file",
        tokenizer_directory,
    )
    program = (
        "import json, sys; from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(json.dumps([tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)"
        " for messages, ask in json.load(sys.stdin)]))"
    )
    turns = messages("role", "content")
    asked = [(turns[:1], True), (turns[:2], False), (turns[:3], True), (turns, False)]
    command = [sys.executable, "-c", program, str(tokenizer_directory)]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=True)
    inputs1, both1, inputs2, both2 = json.loads(done.stdout)
    assert [row["inputs"] for row in rows] == [inputs1, inputs2]
    assert [row["inputs"] + row["outputs"] for row in rows] == [both1, both2]
    assert rows[0]["outputs"] == "2<|im_end|>\n" and inputs1.startswith("<|endoftext|><|im_start|>user\n1 + 1?")


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must\n alternate') }}", "the chat template refuses the conversation (roles must)"),
        ("{{ messages | length }}", "renders these turns differently with and without the answer"),
        (
            "{% if %}",
            "tokenizer: line 1 of the chat template is not Jinja (Expected an expression, got 'end of statement",
        ),
    ],
)
def test_chat_templates_that_do_not_work_report_one_line_errors(tmp_path, tokenizer_directory, template, message):
    (tokenizer_directory / "chat_template.jinja").unlink()
    if template is not None:
        (tokenizer_directory / "chat_template.jinja").write_text(template)
    path = write(tmp_path / "a.jsonl", CONVERSATIONS["messages"])
    flags = ["--format", "chat", "--tokenizer-file", tokenizer_directory]
    done = run_program(TO_ROWS, "--input", path, "--output", tmp_path / "out", *flags, ok=False)
    assert message in one_error_line(done) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"text": "a", "meta": 1}\n', "a.jsonl: unknown shape, the row has 'text', 'meta'; rename its keys"),
        ('{"prompt": "a", "completion": 3}\n', "line 1: 'completion' is an integer, not a string; fix the row"),
        ('{"messages": [{"role": "dog", "content": "w"}]}\n', "line 1: a message's 'role' is 'dog', not one of user,"),
        ('{"messages": [{"role": "user", "content": "w"}, 3]}\n', "unknown shape, the row has 'messages'"),
        (
            '[{"role": "user", "text": "a"}, {"role": "user"}]\n',
            "line 1: no key 'content' or 'value' or 'text' in a message",
        ),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "line 2: no key 'completion' or 'response'"),
        ('[\n{"prompt": "a", "completion": "b"},\n{"prompt": "a", ', "the JSON array is cut off at element 2"),
        ('[\n{"prompt": "a", "completion": "b"} {}]', "'{' after element 1 of the JSON array"),
        ('[{"prompt": "a", "completion": "b"}] x', "'x' after the end of the JSON array"),
        ('[{"prompt": "a", "completion": "b"}, 3]', "a.jsonl, row 2: an integer, not a JSON object"),
        ("[1", "the JSON array is cut off at element 1"),
        ('{"prompt": "a", "completion": ""}\n', "a.jsonl: no question with an answer in 1 row;"),
        (
            '[{"message_id": 1, "parent_id": 1, "text": "a", "role": "user"}]\n',
            "messages of a tree are replies to each other",
        ),
        ('[{"message_id": [], "parent_id": 1, "text": "a", "role": "user"}]\n', "'message_id' is a list, not a string"),
        ('{"prompt": {"text": "a", "role": "prompter", "replies": [3]}}\n', "a message is an integer, not an object"),
    ],
)
def test_what_is_not_instruction_data_reports_one_line_errors(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    done = run_program(TO_ROWS, "--input", tmp_path / "a.jsonl", "--output", tmp_path / "out.jsonl", ok=False)
    assert message in one_error_line(done)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_forced_shape_is_used_and_bad_rows_are_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "first"}, PAIRS["alpaca"], 3)
    flags = ["--shape", "alpaca", "--skip-bad-rows"]
    run_program(TO_ROWS, "--input", path, "--output", tmp_path / "out.jsonl", *flags)
    report = json.loads((tmp_path / "out_report.json").read_text())
    assert (report["rows_in"], report["rows_out"], sum(report["bad_rows"].values())) == (3, 1, 2)


def test_real_rows_keep_their_texts(tmp_path, shared_data):
    path = shared_data / "oasst-commitpackft.jsonl"
    rows, stderr = converted(path)
    expected = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 1178 and "prompt-completion" in stderr
    for row, pair in zip(rows, expected, strict=True):
        assert row == {"inputs": question_prompt(pair["prompt"]), "outputs": " " + pair["completion"]}


def test_memory_is_bounded_for_an_array_on_one_line(tmp_path):
    with open(tmp_path / "a.json", "w", encoding="utf-8") as file:
        row = json.dumps({"prompt": "p", "completion": "x" * 1000})
        file.write("[" + ", ".join([row] * 100_000) + "]")
    probe = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('PEAK', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    command = [
        sys.executable,
        "-c",
        probe,
        ROOT / TO_ROWS,
        "--input",
        tmp_path / "a.json",
        "--output",
        tmp_path / "o.jsonl",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert int(done.stdout.split("PEAK ")[1]) < 60_000  # KiB, of a file of 100 MB
    assert (tmp_path / "o.jsonl").read_bytes().count(b"\n") == 100_000


@pytest.mark.parametrize("name", ["table.parquet", "stream.arrow"])
def test_missing_pyarrow_is_named_with_the_command_that_installs_it(tmp_path, name):
    pytest.importorskip("pyarrow")
    path = stored(tmp_path, name, [PAIRS["alpaca"]])
    without = "import runpy, sys; sys.modules['pyarrow'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [
        sys.executable,
        "-c",
        without,
        str(ROOT / TO_ROWS),
        "--input",
        str(path),
        "--output",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "pyarrow is not installed; pip install -e '.[dataset]' installs it" in one_error_line(done)
