"""What a first run is warned of: few steps, lost tokens, slow arithmetic, a slow first step."""

import threading
from types import SimpleNamespace

import pytest
import torch
from token_files import numbered_documents, training_flags, write_documents

from megatron_ft.data.packed_dataset import build_datasets
from megatron_ft.training import step as steps
from megatron_ft.training.device import slow_bf16
from megatron_ft.training.schedule import few_steps

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("sequences", "epochs", "batch", "unit", "warning"),
    [
        (100, 1, 5, 1, None),
        (
            12,
            2,
            128,
            8,
            "your data make 1 step (24 packed sequences, 128 per step); lower --global-batch-size 128 to 8",
        ),
        (1, 1, 1, 1, "your data make 1 step (1 packed sequence, 1 per step); train more epochs, or on more data"),
        (100, 1, 32, 1, "make 4 steps (100 packed sequences, 32 per step); lower --global-batch-size 32 to 5"),
        (100, 0.5, 8, 8, "make 7 steps (50 packed sequences, 8 per step); train more epochs, or on more data"),
    ],
)
def test_fewer_than_twenty_steps_name_a_batch_that_makes_more(sequences, epochs, batch, unit, warning):
    lines = few_steps(sequences, epochs, batch, unit)
    assert len(lines) == (warning is not None)
    assert not lines or lines[0].startswith("warning: your data make ") and lines[0].endswith(warning)


@pytest.mark.parametrize(
    ("cpuinfo", "slow"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", False),
        ("flags\t\t: fpu amx_bf16\n", False),
        ("Features\t: fp asimd bf16\n", False),
        ("flags\t\t: fpu avx512f sse\n", True),
        ("Features\t: fp asimd\n", True),
        ("cpu\t: POWER9\n", False),
    ],
)
def test_bf16_on_a_cpu_without_it_is_a_warning(tmp_path, cpuinfo, slow):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    flags = ("--preset", "tiny", "--data-prefix", "unused")
    config = training_flags(*flags, "--bf16", seq_length=64)
    lines = slow_bf16(config, CPU, tmp_path / "cpuinfo")
    assert len(lines) == slow and all(line.endswith("add --no-bf16") for line in lines)
    off = training_flags(*flags, "--bf16", "--no-bf16", seq_length=64)
    assert not off.precision.bf16 and slow_bf16(off, CPU, tmp_path / "cpuinfo") == []
    assert slow_bf16(config, torch.device("cuda"), tmp_path / "cpuinfo") == []


def test_no_bf16_turns_off_only_bf16():
    flags = ("--preset", "tiny", "--data-prefix", "unused")
    for words, name in (
        (("--bf16", "--no-bf16"), "fp32"),
        (("--bf16", "--fp16", "--no-bf16"), "fp16"),
        (("--no-bf16", "--bf16"), "bf16"),
        (("--fp16", "--bf16"), "bf16"),
    ):
        assert training_flags(*flags, *words, seq_length=64).precision.name == name


@pytest.mark.parametrize(
    ("flags", "length", "remedy"),
    [
        ((), 83, ""),
        ((), 110, "; raise --seq-length, or cut them with --overlong truncate"),
        (("--overlong", "truncate"), 190, "; raise --seq-length"),
    ],
)
def test_lost_tokens_above_five_percent_are_a_warning(tmp_path, flags, length, remedy):
    documents = numbered_documents([[20, 20]] * 40 + [[length - 20, 20]])
    prefix = write_documents(tmp_path / "set", documents)
    words = ("--data-prefix", prefix, "--validation-fraction", "0", *flags)
    config = training_flags(*words, "--data-cache-path", tmp_path, seq_length=80)
    (line,) = build_datasets(config, train_samples=2, pad=1).train.overlong()
    assert line.startswith("warning: train: 1 of 41") == bool(remedy)
    assert line.endswith(f"(--overlong {config.data.overlong}){remedy}")


def test_a_slow_first_step_is_announced_and_a_fast_one_is_not(monkeypatch):
    monkeypatch.setattr(steps, "SLOW_SECONDS", 0.05)
    config = training_flags("--preset", "tiny", "--data-prefix", "unused", "--global-batch-size", "6", seq_length=64)
    lines, logged = [], threading.Event()
    log = SimpleNamespace(event=lambda line: (lines.append(line), logged.set()))
    steps.announce_slow_first_step(SimpleNamespace(config=config, log=log)).cancel()
    assert not logged.wait(0.2)
    steps.announce_slow_first_step(SimpleNamespace(config=config, log=log))
    assert logged.wait(10) and lines[0].startswith("the first step takes over 0.05 s: ")
