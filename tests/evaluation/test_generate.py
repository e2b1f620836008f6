"""evaluation/run/generate.py on a tiny GPTBigCode: resume, shards, batches, and bad input."""

import json
from pathlib import Path

import pytest
import torch
from conftest import one_error_line, run_program
from generate_program import GENERATE, load, texts, write_data
from tiny_model import write_model

from megatron_ft.errors import UserError
from megatron_ft.evaluation.engines.sampling import SeededSampling
from megatron_ft.evaluation.problems import load_problems
from megatron_ft.evaluation.prompts import prompt_of
from megatron_ft.evaluation.records import Generation, generations_file, read_generations, read_records

SAMPLES = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def generate(monkeypatch, model, data):
    """Call the program's `main` in this process with a model, an output and more flags."""
    main = load(monkeypatch)

    def run(output: Path, *flags: str | int) -> None:
        common = [model, "--data", data, "--languages", "js", "--style", "octocoder", "--max-length", 224]
        main(*common, "--samples", SAMPLES, "--temperature", 1, "--output", output, *flags)

    return run


def test_samples_do_not_depend_on_shards_batches_or_restarts(generate, tmp_path, capsys):
    generate(tmp_path / "one", "--tasks", "synthesize")
    expected = texts(tmp_path / "one")
    assert len(expected) == 3 * SAMPLES and len(set(expected.values())) == 3 * SAMPLES
    for shard in ("2/2", "1/2"):
        generate(tmp_path / "two", "--tasks", "synthesize", "--shard", shard, "--batch-size", 2)
    assert texts(tmp_path / "two") == expected
    path = generations_file(tmp_path / "one", "synthesize", "js")
    path.write_bytes(path.read_bytes()[:-300])
    assert len(texts(tmp_path / "one")) < len(expected)
    generate(tmp_path / "one", "--tasks", "synthesize", "--batch-size", 1)
    assert texts(tmp_path / "one") == expected
    size = path.stat().st_size
    capsys.readouterr()
    generate(tmp_path / "one", "--tasks", "synthesize")
    assert path.stat().st_size == size
    assert capsys.readouterr().out == "synthesize-js: 0 samples generated, 9 kept from before\n"


def test_records_name_their_prompt_and_how_they_ended(generate, data, tmp_path):
    generate(tmp_path, "--tasks", "fixtests", "--max-length", 64)
    records = read_records(generations_file(tmp_path, "fixtests", "js"), Generation)
    assert {record.finish for record in records} <= {"stop", "eos", "length"}
    prompt = prompt_of(load_problems(data, "js")[0], "fixtests", "octocoder")
    assert {record.prompt_cut for record in records} == {len(prompt.encode()) - 32}
    assert all(record.tokens <= 32 for record in records)
    assert len({record.seed for record in records}) == len(records)


def test_explain_answers_each_description_with_one_program(generate, tmp_path):
    with pytest.raises(UserError, match="no description 0 of JavaScript/0; generate explaindescribe first"):
        generate(tmp_path / "half", "--tasks", "explainsynthesize")
    generate(tmp_path / "both", "--tasks", "explain", "--max-length", 400)
    found = read_generations(tmp_path / "both", "explainsynthesize", "js")
    assert len(found) == 3 * SAMPLES
    assert len({record.prompt_sha256 for record in found.values()}) > 3


def test_another_seed_in_the_same_directory_is_refused(generate, tmp_path):
    generate(tmp_path, "--tasks", "fixdocs", "--max-length", 160)
    with pytest.raises(UserError, match="its 'seed' is 0, now 1"):
        generate(tmp_path, "--tasks", "fixdocs", "--max-length", 160, "--seed", 1)
    generate(tmp_path / "other", "--tasks", "fixdocs", "--max-length", 160, "--seed", 1)
    assert texts(tmp_path / "other", "fixdocs") != texts(tmp_path, "fixdocs")


def test_sampling_follows_the_model_s_probabilities_within_the_nucleus():
    logits = torch.tensor([[2.0, 1.0, 0.0, -3.0]]).repeat(4000, 1)
    sampling = SeededSampling(list(range(4000)), 0.5, 0.95, torch.device("cpu"))
    drawn = torch.stack([sampling(logits, logits).argmax(1) for _ in range(3)]).flatten()
    expected = torch.tensor([4.0, 2.0]).softmax(0)  # the others are outside 95%: 0.867 + 0.117 > 0.95
    fractions = torch.bincount(drawn, minlength=4) / len(drawn)
    assert fractions[2:].tolist() == [0, 0]
    assert fractions[:2].tolist() == pytest.approx(expected.tolist(), abs=0.012)


def test_prompts_are_written_without_a_model(data, tmp_path):
    """Also of explain, where they are known before a model describes."""
    flags = ["--data", data, "--languages", "js", "--style", "instruct", "--tasks", "fixtests,explain"]
    done = run_program(GENERATE, *flags, "--write-prompts", tmp_path / "prompts.jsonl")
    assert done.stderr == "no prompts of explainsynthesize: they hold what a model describes\n"
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    problems = load_problems(data, "js")
    asked = [(task, problem) for task in ("fixtests", "explaindescribe") for problem in problems]
    assert [(row["task"], row["problem"]) for row in rows] == [(task, problem.task_id) for task, problem in asked]
    assert [row["prompt"] for row in rows] == [prompt_of(problem, task, "instruct") for task, problem in asked]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--style", "octo"], "style 'octo': unknown"),
        (["--tasks", "fix"], "task 'fix': unknown"),
        (["--languages", "php"], "language 'php': unknown"),
        (["--languages", "go"], "go.jsonl: no such file"),
        (["--style", "starcodercommit"], "its tokenizer has no token <commit_before>, which --style starcodercommit needs"),
        (["--max-length", "4096"], "--max-length 4096: the model has 512 positions"),
        (["--temperature", "0"], "--temperature 0 gives 3 equal samples; use --samples 1"),
        (["--shard", "3/2"], "--shard 3/2: expected I/N"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_is_generated(flags, message, generate, tmp_path):
    with pytest.raises(UserError) as error:
        generate(tmp_path / "out", *flags)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_directory_that_is_not_a_model_is_one_line(data, tmp_path):
    done = run_program(
        *(GENERATE, tmp_path, "--data", data, "--languages", "js", "--style", "octocoder"),
        *("--output", tmp_path / "out"),
        ok=False,
    )
    assert "not a Hugging Face model (no config.json)" in one_error_line(done)
    assert done.returncode == 2
