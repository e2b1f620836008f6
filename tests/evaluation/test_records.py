"""Records on disk: appended, healed after a crash, written by one process, refused if foreign."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from megatron_ft.errors import UserError
from megatron_ft.evaluation.records import (
    Generation,
    RecordWriter,
    Result,
    check_generations,
    generations_file,
    missing_samples,
    open_manifest,
    read_generations,
    read_lists,
    read_records,
    results_file,
    write_lists,
)

MANIFEST = {"model": "models/tiny", "tasks": ["fixtests"], "temperature": 0.2, "seed": 0}


def generation(problem: str = "Python/0", sample: int = 0, text: str = "\n    return 1\n") -> Generation:
    return Generation("fixtests", "python", problem, sample, 17, "ab" * 32, text, 5, "stop")


RESULT = Result("Python/0", 3, "cd" * 32, "timeout", None, 9, 10.01, 12.5, 1 << 20, "é\n", "bwrap", "python 3.11")


def write(path, records) -> None:
    with RecordWriter(path) as writer:
        writer.append(records)


def test_records_are_read_back_as_written(tmp_path):
    path = generations_file(tmp_path, "fixtests", "python")
    records = [generation(text="\n\u2028é\ud800"), generation(sample=1)]
    write(path, records[:1])
    write(path, records[1:])
    assert read_records(path, Generation) == records
    verdicts = results_file(tmp_path, "fixtests", "python", "clean")
    write(verdicts, [RESULT])
    assert read_records(verdicts, Result) == [RESULT]
    assert read_records(tmp_path / "missing", Result) == []


@pytest.mark.parametrize("lost", [1, 20, 150])
def test_truncated_last_line_is_ignored_and_removed_by_the_next_writer(lost, tmp_path):
    path = generations_file(tmp_path, "fixtests", "python")
    write(path, [generation(), generation(sample=1)])
    path.write_bytes(path.read_bytes()[:-lost])
    assert read_records(path, Generation) == [generation()]
    write(path, [generation(sample=2)])
    assert read_records(path, Generation) == [generation(), generation(sample=2)]


def test_file_of_one_truncated_line_is_emptied(tmp_path):
    path = generations_file(tmp_path, "fixtests", "python")
    write(path, [generation(text="x" * 200_000)])
    path.write_bytes(path.read_bytes()[:-1])
    write(path, [])
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finish": "done"}, "finish is 'done', expected one of stop, eos, length"),
        ({"sample": "0"}, "'sample' is a string, not an integer"),
        ({"text": None}, "'text' is null, not a string"),
        ({"task": ...}, "no key 'task'"),
    ],
)
def test_damaged_record_is_named_by_file_and_line(change, message, tmp_path):
    path = generations_file(tmp_path, "fixtests", "python")
    write(path, [generation()])
    row = json.loads(path.read_text()) | change
    row = {key: value for key, value in row.items() if value is not ...}
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    with pytest.raises(UserError) as error:
        read_records(path, Generation)
    assert str(error.value).startswith(f"{path}:2: {message}; expected a generation")


def test_unknown_status_is_refused():
    with pytest.raises(ValueError, match="status is 'ok', expected one of passed, wrong_answer"):
        Result("Python/0", 0, "", "ok", 0, None, 0, 0, 0, "", "none", "")


SECOND_WRITER = """
import sys
from pathlib import Path
from megatron_ft.errors import UserError
from megatron_ft.evaluation.records import RecordWriter
try:
    RecordWriter(Path(sys.argv[1]))
except UserError as error:
    print(error)
"""


def test_second_process_that_writes_the_same_file_is_refused(tmp_path):
    path = generations_file(tmp_path, "fixtests", "python")
    command = [sys.executable, "-c", SECOND_WRITER, str(path)]
    with RecordWriter(path) as writer:
        writer.append([generation()])
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout.startswith(f"{path}: another process is writing this file; wait for it")
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout == ""
    assert read_records(path, Generation) == [generation()]


def test_samples_of_all_shards_are_found_once(tmp_path):
    write(generations_file(tmp_path, "fixtests", "python", "1-of-2"), [generation(), generation("Python/1")])
    write(generations_file(tmp_path, "fixtests", "python", "2-of-2"), [generation(text="again"), generation(sample=1)])
    write(generations_file(tmp_path, "fixtests", "go"), [])
    found = read_generations(tmp_path, "fixtests", "python")
    assert set(found) == {("Python/0", 0), ("Python/0", 1), ("Python/1", 0)}
    assert found["Python/0", 0] == generation()
    assert missing_samples(found, ["Python/0", "Python/1"], 2) == [("Python/1", 1)]
    assert read_generations(tmp_path, "fixdocs", "python") == {}


def test_generations_of_another_task_are_refused(tmp_path):
    write(generations_file(tmp_path, "synthesize", "python"), [generation()])
    with pytest.raises(UserError, match="holds generations of fixtests-python, expected synthesize-python"):
        read_generations(tmp_path, "synthesize", "python")


def test_generations_of_other_problems_or_prompts_are_refused():
    samples = {("Python/0", 0): generation()}
    check_generations(samples, {"Python/0": "ab" * 32}, "DIR")
    with pytest.raises(UserError, match="DIR: sample 0 of Python/0 answers another prompt"):
        check_generations(samples, {"Python/0": "00" * 32}, "DIR")
    with pytest.raises(UserError, match="problem 'Python/0' is not in the data"):
        check_generations(samples, {}, "DIR")


def test_equal_manifest_is_accepted_and_another_is_refused_by_its_field(tmp_path):
    directory = tmp_path / "evaluations/one"
    open_manifest(directory, MANIFEST)
    open_manifest(directory, MANIFEST)
    assert [path.name for path in directory.iterdir()] == ["manifest.json"]
    with pytest.raises(UserError, match=r"manifest.json: .* its 'temperature' is 0.2, now 0.8"):
        open_manifest(directory, MANIFEST | {"temperature": 0.8})
    with pytest.raises(UserError, match="its 'style' is missing, now \"octocoder\""):
        open_manifest(directory, MANIFEST | {"style": "octocoder"})
    with pytest.raises(UserError, match="its 'seed' is 0, now missing"):
        open_manifest(directory, {key: value for key, value in MANIFEST.items() if key != "seed"})


def test_lists_of_the_reference_are_read_and_written(tmp_path):
    path = tmp_path / "generations.json"
    write_lists(path, [["a", "b"], ["é"]])
    assert read_lists(path) == [["a", "b"], ["é"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[["a"], ', "not JSON; expected a list with one list of texts per problem"),
        ('{"a": 1}', "an object, expected a list"),
        ('[["a"], [1]]', "item 1 is not a list of texts"),
        ("[]", "a list, expected a list"),
    ],
)
def test_other_files_are_not_lists_of_generations(content, message, tmp_path):
    path = tmp_path / "generations.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_lists(path)
    with pytest.raises(UserError, match="no such file"):
        read_lists(tmp_path / "missing.json")


def test_published_generations_load(shared_data):
    lists = read_lists(shared_data / "octocoder-fixtests-python/generations.json")
    assert (len(lists), {len(texts) for texts in lists}) == (164, {20})
    assert len({text for texts in lists for text in texts}) <= 3280
