"""The README's commands run as printed, on a tiny model in the Hub's format."""

import json
import shutil

import pytest
from conftest import ROOT, run_program
from doc_commands import run_page


@pytest.mark.slow
def test_commands_go_from_rows_to_a_hugging_face_model(tmp_path):
    from transformers import AutoTokenizer, GPTBigCodeConfig, GPTBigCodeForCausalLM

    rows = ROOT / "examples/commits.jsonl"
    run_program("dataset/commits_to_jsonl.py", "--input", rows, "--output", tmp_path / "rows.jsonl")
    model = tmp_path / "starcoderbase-1b"
    config = GPTBigCodeConfig(vocab_size=600, n_positions=512, n_embd=32, n_layer=2, n_head=4, n_inner=64)
    GPTBigCodeForCausalLM(config).save_pretrained(model)
    words = ["--input", tmp_path / "rows.jsonl", "--vocab-size", "600", "--output", model / "tokenizer.json"]
    run_program("preprocess/train_tokenizer.py", *words)
    printed = run_page("../README.md", tmp_path)
    assert "done: " in printed and "starcoderbase-1b" in printed
    shutil.rmtree(model)  # the output must not depend on it
    trained = GPTBigCodeForCausalLM.from_pretrained(tmp_path / "runs/first-hf")
    assert trained.config.n_layer == 2 and trained.config.vocab_size == 600
    assert len(AutoTokenizer.from_pretrained(tmp_path / "runs/first-hf")) == 600
    losses = [json.loads(line)["loss"] for line in (tmp_path / "runs/first/metrics.jsonl").open()]
    assert losses
