"""convert/push_to_hub.py against a local server: what is published, one-line errors, continuing."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import yaml
from conftest import ROOT, one_error_line, run_program
from hub_server import TOKEN, start
from safetensors.numpy import save_file

from megatron_ft.config.config_file import KEPT

sys.path.append(str(ROOT / "tests/evaluation"))
from scored_directory import write_data, write_evaluation  # noqa: E402

from megatron_ft.evaluation.scores import load_evaluation, report_of  # noqa: E402

FIXTURES = ROOT / "tests/fixtures"
CARD = "---\nlibrary_name: transformers\ntags:\n- code\n---\n\n# model\n\nA model.\n\n## Arguments of the run\n\nold\n"


@pytest.fixture
def hub():
    hub, server = start()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def model(tmp_path):
    """A converted model with a second file of weights, and files that are not for the public."""
    directory = tmp_path / "model"
    shutil.copytree(FIXTURES / "model", directory)
    shutil.copy(FIXTURES / "tokenizer.json", directory)
    save_file({"more": np.ones(5, np.float32)}, directory / "z.safetensors")
    (directory / "README.md").write_text(CARD)
    (directory / "notes.txt").write_text("private")
    return directory


@pytest.fixture
def run(tmp_path):
    """What a training run on the fixtures' data keeps."""
    directory = tmp_path / "run"
    directory.mkdir()
    flags = {
        "data-prefix": str(FIXTURES / "data"),
        "tokenizer-file": "/home/me/tokenizer.json",
        "lr": 4e-5,
        "save": "x",
    }
    (directory / KEPT).write_text(yaml.safe_dump({**flags, "train-iters": 3, "num-processes": 2}))
    step = {"iteration": 3, "consumed_tokens": 1234, "loss": 1.5}
    (directory / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    (directory / "validation.jsonl").write_text(json.dumps({"iteration": 3, "group": "valid", "loss": 1.25}) + "\n")
    return directory


def push(hub, *words, ok=True, token=TOKEN, **env):
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_TOKEN", None)
    if token:
        environment["HF_TOKEN"] = token
    return run_program("convert/push_to_hub.py", *words, ok=ok, env={**environment, **env})


def test_model_and_card_are_published_in_one_commit(hub, model, run, tmp_path):
    data = write_data(tmp_path / "humanevalpack")
    write_evaluation(tmp_path / "evaluation", data, [["passed"], ["wrong_answer"], ["passed"]])
    report = report_of(load_evaluation(tmp_path / "evaluation", data, "faithful"))
    (tmp_path / "evaluation/report.json").write_text(json.dumps(report))
    done = push(
        hub, model, "me/model", "--private", "--revision", "v1", "--run", run, "--evaluation", tmp_path / "evaluation",
        "--license", "bigcode-openrail-m",
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == f"published: {hub.address}/me/model/commit/1234"
    assert hub.commits == ["v1"] and hub.created[0]["visibility"] == "private"
    assert "POST /api/models/me/model/branch/v1" in hub.requests
    published = {path.name for path in model.iterdir()} - {"notes.txt"}
    assert hub.files.keys() == published
    for name in published - {"README.md"}:
        assert hub.files[name] == (model / name).read_bytes()
    card = hub.files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["license"] == "bigcode-openrail-m" and metadata["tags"] == ["code"]
    [result] = metadata["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "pass@k", "name": "pass@1", "value": 0.6667}]
    assert "| 66.7 (" in card and "| data " in card and "| validation loss, valid " in card and "1.2500" in card
    assert "lr: 4.0e-05" in card and "train-iters: 3" in card
    assert "model first-hf; " in card and "/models" not in card  # as the evaluation has it: /models/first-hf
    assert "old" not in card and "/home/me" not in card and str(tmp_path) not in card


def test_dry_run_sends_nothing(hub, model, run):
    done = push(hub, model, "me/model", "--dry-run", "--run", run)
    assert "## Recipe" in done.stdout and "model.safetensors: " in done.stdout
    assert hub.requests == []


def test_an_interrupted_upload_continues(hub, model):
    hub.most_uploads = 1
    line = one_error_line(push(hub, model, "me/model", ok=False))
    assert "the connection to the Hub failed" in line and "run the same command again" in line
    assert hub.commits == [] and len(hub.objects) == 1
    hub.most_uploads, hub.requests[:] = 1000, []
    push(hub, model, "me/model")
    assert len([request for request in hub.requests if request.startswith("PUT")]) == 1, "a file was sent twice"
    assert hub.commits == ["main"]


REFUSALS = {
    "not logged in": ({}, None, "the Hub answered 401", "hf auth login"),
    "wrong token": ({}, "hf_wrong", "the Hub answered 401", "hf auth login"),
    "gated": (
        {"/preupload/": (403, "You must accept the terms")},
        TOKEN,
        "403 (You must accept",
        "accept the terms of",
    ),
    "conflict": ({"/commit/": (409, "Conflict: main has moved")}, TOKEN, "409 (Conflict: main", "run the same command"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_report_one_line(hub, model, tmp_path, case):
    hub.refused, token, found, remedy = REFUSALS[case]
    done = push(hub, model, "me/model", ok=False, token=token, HF_HOME=str(tmp_path))
    line = one_error_line(done)
    assert done.returncode == 2 and found in line and remedy in line
    assert hub.commits == []
    assert not token or token not in done.stdout + done.stderr


def test_a_directory_that_is_no_model_is_refused(hub, tmp_path):
    line = one_error_line(push(hub, tmp_path, "me/model", ok=False))
    assert "not a Hugging Face model with safetensors" in line and hub.requests == []


@pytest.mark.parametrize("repo", ["me/my model", "a/b/c", ""])
def test_impossible_name_is_refused_in_a_dry_run_too(model, repo):
    done = run_program("convert/push_to_hub.py", model, repo, "--dry-run", ok=False)
    assert one_error_line(done).startswith(f"error: {repo!r}: not a name of a repository (") and not done.stdout
