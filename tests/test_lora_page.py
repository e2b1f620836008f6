"""docs/lora.md's commands: a base model, adapters on it by a parallel run, out to PEFT and merged, both the same."""

import json
import re

import pytest
from doc_commands import run_page


@pytest.mark.slow
def test_the_pages_commands_train_export_and_merge_adapters(tmp_path):
    printed = run_page("lora.md", tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "adapters/metrics.jsonl").open()]
    base = [json.loads(line) for line in (tmp_path / "base/metrics.jsonl").open()]
    assert steps[0]["loss"] < base[0]["loss"] - 0.3, "the base's first rows, seen with what the base has learned since"
    assert re.search(r"LoRA rank 8 trains [\d,]+ \([\d.]+ %\)", printed)
    assert "adapter against merged" in printed
    config = json.loads((tmp_path / "adapter-peft/adapter_config.json").read_text())
    assert config["target_modules"] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
