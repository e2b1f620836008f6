"""The commands of docs/evaluation.md run as printed, on a tiny model and three made problems."""

import json
import shutil

import torch
from conftest import ROOT
from doc_commands import run_page
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM


def test_commands_evaluate_and_compare_models(tmp_path):
    for seed, name in enumerate(("first-hf", "base-hf")):
        torch.manual_seed(seed)
        config = GPTBigCodeConfig(
            n_layer=2, n_head=2, n_embd=32, n_positions=2048, vocab_size=512, bos_token_id=0, eos_token_id=0
        )
        model = GPTBigCodeForCausalLM(config)
        with torch.no_grad():  # answers end after some ten tokens
            model.transformer.wte.weight[0] = torch.eye(32)[0]
            model.transformer.ln_f.bias[:] = 0.8 * torch.eye(32)[0]
        model.save_pretrained(tmp_path / "runs" / name)
        shutil.copy(ROOT / "tests/fixtures/tokenizer.json", tmp_path / "runs" / name)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (tmp_path / "runs" / name / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"inputs": "What is a tuple?", "outputs": "A list."}) + "\n", encoding="utf-8"
    )
    data = tmp_path / "problems"
    shutil.copytree(ROOT / "examples/humanevalpack", data)
    printed = run_page("evaluation.md", tmp_path, HUMANEVALPACK=str(data))
    report = json.loads((tmp_path / "evaluations/first/report.json").read_bytes())
    assert report["scores"][0]["scored"] == 6 and report["scores"][0]["score"]
    assert "# Evaluation: first" in printed and "# Comparison" in printed
    assert json.loads((tmp_path / "comparison.json").read_bytes())["comparisons"][0]["problems"] == 3
    held = json.loads((tmp_path / "held.json").read_bytes())
    assert held["tasks"] == {} and held["scores"][0]["with"] == held["scores"][0]["without"]
