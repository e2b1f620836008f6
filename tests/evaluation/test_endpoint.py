"""generate.py --engine endpoint, against a server that fails in every way."""

import random
import re
from pathlib import Path

import pytest
from conftest import run_program
from failing_server import FAULTS, INCOMPLETE, KEY, CompletionsServer, serving
from generate_program import GENERATE, load, texts, write_data

from megatron_ft.errors import UserError
from megatron_ft.evaluation.engines import endpoint
from megatron_ft.evaluation.problems import load_problems
from megatron_ft.evaluation.prompts import prompt_of
from megatron_ft.evaluation.records import Generation, generations_file, read_records

SAMPLES = 5


@pytest.fixture
def generate(monkeypatch, tmp_path):
    """Call `main` with a server, an output and more flags."""
    main, data = load(monkeypatch), write_data(tmp_path / "data")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)

    def run(server: CompletionsServer | str, output: Path, *flags: str | int | Path) -> None:
        url = server if isinstance(server, str) else server.url
        common = ["served", "--engine", "endpoint", "--endpoint", url, "--data", data, "--languages", "js"]
        more = ["--tasks", "synthesize", "--style", "octocoder", "--samples", SAMPLES, "--timeout", 2]
        main(*common, *more, "--output", output, *flags)

    return run


@pytest.fixture
def expected(generate, tmp_path):
    """The samples of a server without faults."""
    with serving() as server:
        generate(server, tmp_path / "expected")
    found = texts(tmp_path / "expected")
    assert len(found) == 3 * SAMPLES == len(set(found.values()))
    return found


def test_prompts_are_exact_and_samples_of_a_prompt_are_one_request(generate, tmp_path):
    with serving() as server:
        generate(server, tmp_path / "out", "--max-length", 512)
    wanted = {prompt_of(p, "synthesize", "octocoder") for p in load_problems(tmp_path / "data", "js")}
    assert {body["prompt"] for body in server.bodies} == wanted
    asked = [body for body in server.bodies if "n" in body]
    assert [(body["n"], body["max_tokens"], body["model"]) for body in asked] == [(5, 412, "served")] * 3
    assert not {"messages", "stop"} & {key for body in server.bodies for key in body}
    records = read_records(generations_file(tmp_path / "out", "synthesize", "js"), Generation)
    assert {(record.tokens, record.finish) for record in records} == {(7, "stop")}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_retried_and_leaves_no_gap(fault, generate, expected, tmp_path):
    with serving(["ok", fault, fault]) as server:
        generate(server, tmp_path / "out", "--requests-at-once", 1)
    found = texts(tmp_path / "out")
    assert found.keys() == expected.keys() and INCOMPLETE not in found.values()
    if fault not in ("few", "aborted"):  # of which the missing samples are asked for by another seed
        assert found == expected
    # One request for the length of the prompt, one per problem, and the repeated ones.
    assert not server.faults and len(server.bodies) == (5 if fault == "few" else 6)


def test_many_faults_at_once_leave_no_gap(generate, expected, tmp_path):
    draw = random.Random(7)
    faults = [draw.choice([*FAULTS, "ok", "ok"]) for _ in range(25)]
    quick = [fault for fault in faults if fault not in ("429", "late", "trickle")]
    with serving(quick) as server:
        generate(server, tmp_path / "out", "--batch-size", 2, "--attempts", 40)
    assert texts(tmp_path / "out").keys() == expected.keys()


def test_retry_after_is_waited_for(generate, tmp_path):
    with serving(["429"]) as server:
        generate(server, tmp_path / "out", "--requests-at-once", 1)
    assert server.times[1] - server.times[0] >= 1


@pytest.mark.parametrize("fault", ["500", "html", "none", "closed"])
def test_a_server_that_never_recovers_ends_in_one_line_after_bounded_attempts(fault, generate, tmp_path):
    with serving(forever=fault) as server, pytest.raises(UserError, match="3 attempts failed, the last with: .+again"):
        generate(server, tmp_path / "out", "--attempts", 3, "--requests-at-once", 1)
    assert 3 <= len(server.bodies) <= 4


@pytest.mark.parametrize("fault", ["307", "401", "403", "404", "400"])
def test_what_cannot_pass_is_not_retried(fault, generate, tmp_path, monkeypatch):
    monkeypatch.setenv("SERVED_KEY", KEY)
    with serving(forever=fault) as server, pytest.raises(UserError, match=f"HTTP status {fault}") as error:
        generate(server, tmp_path / "out", "--requests-at-once", 1, "--key-variable", "SERVED_KEY")
    assert len(server.bodies) == 1
    assert server.keys == {f"Bearer {KEY}"} and KEY not in str(error.value)


def test_a_server_without_several_samples_is_asked_for_one_at_a_time(generate, tmp_path):
    with serving(max_n=1) as server:
        generate(server, tmp_path / "out")
    assert len(texts(tmp_path / "out")) == 3 * SAMPLES
    assert len(set(texts(tmp_path / "out").values())) == 3 * SAMPLES
    assert sum(body.get("n") == 1 for body in server.bodies) == 3 * SAMPLES


def test_samples_are_the_same_after_a_truncated_file_and_with_shards(generate, expected, tmp_path):
    with serving() as server:
        for shard in ("2/2", "1/2"):
            generate(server, tmp_path / "out", "--shard", shard)
        path = generations_file(tmp_path / "out", "synthesize", "js", "1-of-2")
        path.write_bytes(path.read_bytes()[:-700])
        assert len(texts(tmp_path / "out")) < len(expected)
        generate(server, tmp_path / "out", "--shard", "1/2")
    assert texts(tmp_path / "out") == expected


def test_the_key_is_in_no_file_and_no_log(generate, tmp_path, monkeypatch):
    data = tmp_path / "data"
    monkeypatch.setenv("SERVED_KEY", KEY)
    with serving(["500", "html"]) as server:
        flags = ("--engine", "endpoint", "--endpoint", server.url, "--data", data, "--languages", "js")
        more = ("--tasks", "synthesize", "--style", "octocoder", "--samples", "2", "--key-variable", "SERVED_KEY")
        done = run_program(GENERATE, "served", *flags, *more, "--output", tmp_path / "out")
    assert server.keys == {f"Bearer {KEY}"}
    written = "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert KEY not in done.stdout + done.stderr + written


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--endpoint", "gpu7:8000"], r"--endpoint gpu7:8000: expected http://HOST:PORT/v1"),
        (["--endpoint", "http://me:pass4@gpu7:x/v1"], "holds a name or password"),
        (["--endpoint", "http://gpu7/v1?key=a"], "without \\? and #"),
        (["--key-variable", "NO_SUCH_KEY"], "NO_SUCH_KEY: not set in the environment"),
        (["--key-variable", "BAD_KEY"], "API key is empty, or holds spaces"),
        (["--engine", "transformers"], "--endpoint needs --engine endpoint"),
        (["--attempts", "0"], "--attempts must be at least 1"),
    ],
)
def test_bad_flags_are_one_line_before_anything_is_asked(flags, message, generate, tmp_path, monkeypatch):
    monkeypatch.setenv("BAD_KEY", "two\nlines")
    with serving() as server, pytest.raises(UserError, match=message) as error:
        generate(server, tmp_path / "out", *flags)
    assert not server.bodies and not (tmp_path / "out").exists()
    assert not re.search("pass4|two", str(error.value))
