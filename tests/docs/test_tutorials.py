"""The commands of docs/tutorials/ run as printed, on tiny models with the names of real ones."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from doc_commands import run_page
from site_images import CHROMIUM, check_picture, picture

REPLACE_PICTURES = os.environ.get("MEGATRON_FT_PICTURES")
COMMITS = 240 if REPLACE_PICTURES else 60


CONFIG = {
    "model_type": "gpt_bigcode",
    "vocab_size": 512,
    "n_positions": 2048,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def without_weights(directory: Path) -> Path:
    """What a dry run reads of a model in the Hub's format, with the tokenizer of tests/fixtures."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    shutil.copy(ROOT / "tests/fixtures/tokenizer.json", directory)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def tiny_model(directory: Path) -> None:
    """The same with random weights."""
    import torch
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    torch.manual_seed(0)
    config = GPTBigCodeConfig.from_pretrained(without_weights(directory))
    GPTBigCodeForCausalLM(config).save_pretrained(directory)


def small_commits(repository: Path) -> None:
    """A bare repository of COMMITS commits: one adds a file, the others change numbers in it."""
    stream = ""
    for i in range(COMMITS):
        subject = f"Correct the areas of stage {i}"
        functions = [f"def area_{j}(width, height):\n    return width * height + {i * j % 7}\n" for j in range(6)]
        code = "\n\n".join(functions)
        stream += f"commit refs/heads/main\ncommitter A <a@example.org> {1_600_000_000 + i} +0000\n"
        stream += f"data {len(subject)}\n{subject}\nM 100644 inline areas.py\ndata {len(code)}\n{code}\n"
    subprocess.run(["git", "init", "--quiet", "--bare", "-b", "main", str(repository)], check=True)
    command = ["git", "-C", str(repository), "fast-import", "--quiet"]
    subprocess.run(command, input=stream, text=True, check=True)


@pytest.fixture(scope="module")
def repository_tutorial(tmp_path_factory) -> tuple[Path, str]:
    """Directory and output of the commands of repository.md, on a repository of small commits."""
    work = tmp_path_factory.mktemp("tutorial")
    small_commits(work / "project")
    tiny_model(work / "starcoderbase-1b")
    return work, run_page("tutorials/repository.md", work, REPOSITORY=str(work / "project"))


@pytest.mark.slow
def test_repository_tutorial_trains_a_model_on_commits(repository_tutorial):
    work, printed = repository_tutorial
    assert "done: " in printed
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == COMMITS - 1, "the first adds the file"
    assert rows[0]["inputs"].startswith("<commit_before>") and "<commit_msg>Correct the areas" in rows[0]["inputs"]
    losses = [json.loads(line)["loss"] for line in (work / "runs/first/metrics.jsonl").open(encoding="utf-8")]
    assert losses[-1] < losses[0]
    assert (work / "runs/first-hf/config.json").is_file()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("page", "name"), [("runs/first/report.html", "report"), ("sequences.html", "view")])
def test_pictures_of_the_tutorial_can_be_taken(repository_tutorial, tmp_path, page, name):
    """With MEGATRON_FT_PICTURES=1 they replace those in docs/images."""
    taken = picture(repository_tutorial[0] / page, tmp_path / f"{name}.png")
    check_picture(taken)
    if REPLACE_PICTURES:
        shutil.copy(taken, ROOT / "docs/images")


@pytest.mark.parametrize("name", ["report", "view"])
def test_pictures_in_the_documentation_are_small(name):
    path = ROOT / f"docs/images/{name}.png"
    check_picture(path)
    assert path.stat().st_size < 150_000


def test_chat_tutorial_learns_answers_only(tmp_path):
    without_weights(tmp_path / "starcoderbase-1b")
    printed = run_page("tutorials/chat.md", tmp_path)
    learned = "".join(part.partition("»")[0] for part in printed.split("«")[1:])
    assert "items.reverse()" in learned and "An immutable sequence." in learned
    assert "In place?" in printed and "In place?" not in learned and "<|user|>" not in learned
    assert "-m megatron_ft.finetune --load starcoderbase-1b" in printed


def test_lora_tutorial_fits_one_gpu_as_planned(tmp_path):
    without_weights(tmp_path / "starcoderbase")
    printed = run_page("tutorials/lora_one_gpu.md", tmp_path)
    page = (ROOT / "docs/tutorials/lora_one_gpu.md").read_text(encoding="utf-8")
    assert "= 31.2 GiB of 39.4: fits" in printed and "31.2 GiB of 39.4" in page
    assert "weights 29.0 + " in printed and "activations 1.4 " in printed and "35 steps" in printed
    assert "--lora-rank 16" in printed


def test_cluster_tutorial_plans_the_layout_of_the_script(tmp_path):
    without_weights(tmp_path / "checkpoints/starcoderbase")
    printed = run_page("tutorials/cluster.md", tmp_path)
    assert "TP 4, PP 1, DP 16" in printed and "checkpoint 217.2 GB, at most 4 at once" in printed
    script = (ROOT / "slurm/finetune_starcoderbase.sh").read_text(encoding="utf-8")
    flags = "--preset starcoderbase --bf16 --tensor-model-parallel-size 4"
    assert flags in printed and flags in script


@pytest.mark.slow
def test_evaluation_tutorial_compares_two_models(tmp_path):
    for name in ("base-hf", "first-hf"):
        tiny_model(tmp_path / "runs" / name)
    row = {"inputs": "What is a tuple?", "outputs": "A list."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    data = tmp_path / "problems"
    shutil.copytree(ROOT / "examples/humanevalpack", data)
    printed = run_page("tutorials/evaluate.md", tmp_path, HUMANEVALPACK=str(data))
    assert "McNemar" in printed and "# Comparison" in printed
    prompts = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(prompts) == 3
    assert (tmp_path / "evaluations/first/report.html").is_file()
