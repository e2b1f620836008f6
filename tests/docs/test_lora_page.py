"""The commands of docs/lora.md run as printed; adapters resume exactly in another layout."""

import json
import re
from pathlib import Path

import pytest
from conftest import run_program
from doc_commands import run_page

from megatron_ft.errors import EXIT_RESUME


def steps_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def size_of(checkpoint: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(file.stat().st_size for file in checkpoint.iterdir())


@pytest.mark.slow
def test_commands_train_export_and_merge_adapters(tmp_path):
    printed = run_page("lora.md", tmp_path)
    base, first, second = (steps_of(tmp_path / run) for run in ("base", "adapters", "adapters-2"))
    assert first[0]["loss"] < base[0]["loss"] - 0.3, "the same sequences, after the base was trained"
    assert second[0]["loss"] < first[0]["loss"], "the same sequences, after the first adapters were trained"
    assert re.search(r"LoRA rank 8 trains [\d,]+ \([\d.]+ ?%\)", printed)
    assert "adapter against merged" in printed
    assert re.search(r"adapters of rank 8, .*fresh optimizer", printed)
    config = json.loads((tmp_path / "adapter-peft/adapter_config.json").read_text())
    assert config["target_modules"] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert_resume_in_another_layout_is_exact(tmp_path)


def assert_resume_in_another_layout_is_exact(directory: Path) -> None:
    """Stop on two data-parallel ranks, resume on two tensor-parallel ones; compare to one rank."""
    common = """--preset tiny --load base --data-prefix commits --tokenizer-file tokenizer.json
        --seq-length 256 --global-batch-size 4 --eval-interval 0 --train-iters 6 --lr 1e-2
        --lora-rank 8 --lora-dropout 0""".split()

    def train(save: str, *flags: str, status: int = 0) -> list[dict]:
        done = run_program("launch/finetune.py", *common, "--save", save, *flags, ok=False, cwd=directory)
        assert done.returncode == status, done.stdout + done.stderr
        return steps_of(directory / save)

    train("parts", "--num-processes", "2", "--exit-interval", "3", status=EXIT_RESUME)
    parts = train("parts", "--tensor-model-parallel-size", "2")
    straight = train("straight")
    assert [step["part"] for step in parts] == [0, 0, 0, 1, 1, 1]
    assert [step["loss"] for step in parts] == pytest.approx([step["loss"] for step in straight], abs=1e-5)
    largest = max(size_of(directory / run / "iter_0000006") for run in ("parts", "straight"))
    assert largest < size_of(directory / "base/iter_0000004") / 5, "only adapters and their optimizer state"
