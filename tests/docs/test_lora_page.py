"""docs/lora.md's commands: a base model, adapters on it by a parallel run, out to PEFT and merged, both the same."""

import json
import re

import pytest
from conftest import run_program
from doc_commands import run_page

from megatron_ft.errors import EXIT_RESUME


@pytest.mark.slow
def test_the_pages_commands_train_export_and_merge_adapters_and_a_run_in_parts_is_the_run_in_one(tmp_path):
    printed = run_page("lora.md", tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "adapters/metrics.jsonl").open()]
    base = [json.loads(line) for line in (tmp_path / "base/metrics.jsonl").open()]
    assert steps[0]["loss"] < base[0]["loss"] - 0.3, "the base's first rows, seen with what the base has learned since"
    assert re.search(r"LoRA rank 8 trains [\d,]+ \([\d.]+ %\)", printed)
    assert "adapter against merged" in printed
    assert "adapters of rank 8 trained on, with a fresh optimizer" in printed
    second = [json.loads(line) for line in (tmp_path / "adapters-2/metrics.jsonl").open()]
    assert second[0]["loss"] < steps[0]["loss"], "the same rows, seen with what the first adapters have learned"
    config = json.loads((tmp_path / "adapter-peft/adapter_config.json").read_text())
    assert config["target_modules"] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]

    # Stopped on two data-parallel ranks and resumed on two tensor-parallel ones: the run that one rank does without a stop.
    common = """--preset tiny --load base --data-prefix commits --tokenizer-file tokenizer.json --seq-length 256 --global-batch-size 4
        --eval-interval 0 --train-iters 6 --lr 1e-2 --lora-rank 8 --lora-dropout 0""".split()

    def train(save, *flags, status=0):
        done = run_program("launch/finetune.py", *common, "--save", save, *flags, ok=False, cwd=tmp_path)
        assert done.returncode == status, done.stdout + done.stderr
        return [json.loads(line) for line in (tmp_path / save / "metrics.jsonl").open()]

    train("parts", "--num-processes", "2", "--exit-interval", "3", status=EXIT_RESUME)
    parts = train("parts", "--tensor-model-parallel-size", "2")
    straight = train("straight")
    assert [step["part"] for step in parts] == [0, 0, 0, 1, 1, 1]
    assert [step["loss"] for step in parts] == pytest.approx([step["loss"] for step in straight], abs=1e-5)
    sizes = {
        name: sum(file.stat().st_size for file in (tmp_path / name / "iter_0000006").iterdir())
        for name in ("parts", "straight")
    }
    whole = sum(file.stat().st_size for file in (tmp_path / "base/iter_0000004").iterdir())
    assert max(sizes.values()) < whole / 5, "adapters and their optimizer state alone"
