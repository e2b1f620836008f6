"""Checkpoints of real runs: exact resume, any layout to any other, damage, what may change."""

import json
import math
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
from checkpoint_runs import DROPOUT, FLAGS, LAYOUTS, final_state, optimizer_steps, steps, train, write_inputs
from ranks import run_ranks

from megatron_ft.checkpoint.resume import compare, describe_data
from megatron_ft.config.arguments import parse_args
from megatron_ft.config.config import ENTRIES
from megatron_ft.config.flag import Resume
from megatron_ft.data.packed_dataset import sequences_per_epoch
from megatron_ft.weights.manifest import Manifest, read_manifest

NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> str:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def run(layout: str, inputs: str, save: Path, *more: str) -> list:
    """Run the training program in a layout; (status or error line, start's log) of each rank."""
    ranks, flags = LAYOUTS[layout]
    words = f"{FLAGS} {flags} {inputs} --save {save} {' '.join(more)}".split()
    return run_ranks(train, ranks, words)


def statuses(results: list) -> set:
    return {status for status, _ in results}


def start_log(results: list) -> str:
    return "\n".join(results[0][1])


@pytest.fixture(scope="module")
def source(inputs, tmp_path_factory) -> Path:
    """A run of TP2 DP2 that stopped after 3 of 6 steps."""
    save = tmp_path_factory.mktemp("source") / "save"
    assert statuses(run("TP2 DP2", inputs, save, NO_DROPOUT, "--train-iters 6 --exit-interval 3")) == {75}
    return save


@pytest.fixture(scope="module")
def uninterrupted(source, inputs, tmp_path_factory) -> list[float]:
    """Losses of the same run when nothing stops it."""
    save = tmp_path_factory.mktemp("uninterrupted") / "save"
    assert statuses(run("TP2 DP2", inputs, save, NO_DROPOUT, "--train-iters 6")) == {0}
    return [step["loss"] for step in steps(save)]


@pytest.mark.parametrize(
    "layout, more",
    [
        ("1", ""),
        ("PP2", "--no-use-distributed-optimizer"),
        ("DP2", "--overlap-grad-reduce --overlap-param-gather"),
        ("TP2 PP2", ""),
    ],
)
def test_any_layout_resumes_from_any_other(source, uninterrupted, inputs, tmp_path, layout, more):
    save = tmp_path / "save"
    shutil.copytree(source, save)
    results = run(layout, inputs, save, NO_DROPOUT, "--train-iters 6", more)
    assert statuses(results) == {0}
    assert "weights and optimizer are resharded" in start_log(results)
    continued = [step["loss"] for step in steps(save)]
    assert len(continued) == 6
    assert max(abs(a - b) for a, b in zip(continued, uninterrupted, strict=True)) < 1e-5
    assert math.isfinite(continued[-1]) and continued[-1] < continued[0]


def test_an_interrupted_run_ends_with_the_bytes_of_the_uninterrupted_one(inputs, tmp_path):
    flags = [DROPOUT, "--bf16 --train-iters 6 --eval-interval 3 --eval-iters 1 --async-save"]
    assert statuses(run("DP2", inputs, tmp_path / "uninterrupted", *flags)) == {0}
    for stop in ("--exit-interval 1", "--exit-interval 3", ""):
        results = run("DP2", inputs, tmp_path / "interrupted", *flags, stop)
    assert statuses(results) == {0}
    assert final_state(tmp_path / "interrupted") == final_state(tmp_path / "uninterrupted")


ADAMS = [
    ("offloaded", "--bf16 --optimizer-cpu-offload"),
    ("fused", "--bf16"),
    ("fused", "--bf16 --no-use-distributed-optimizer"),
    ("torch", "--optimizer sgd"),
]


@pytest.mark.parametrize("adam, flags", ADAMS)
def test_every_optimizer_resumes_without_an_extra_step(inputs, tmp_path, adam, flags):
    def start(name, until):
        words = f"{FLAGS} {flags} {inputs} --train-iters 6 --save {tmp_path / name}".split()
        return run_ranks(optimizer_steps, 2, words, until, adam)

    uninterrupted, first, second = start("uninterrupted", 6), start("interrupted", 3), start("interrupted", 6)
    for complete, before, after in zip(uninterrupted, first, second, strict=True):
        assert before["kind"] == "scratch" and after["kind"] == "resume"
        assert before["taken"] == [0, 1, 2] and after["taken"] == [3, 4, 5]
        assert complete["count"] == after["count"] and complete["count"] in (6, None)
        assert before["digests"] + after["digests"] == complete["digests"]
        assert len(set(complete["digests"])) == 6


def test_an_offloaded_optimizer_starts_from_the_loaded_weights(source, inputs, tmp_path):
    flags = FLAGS.replace("--from-scratch", f"--load {source}") + " --bf16 --optimizer-cpu-offload --seed 7"
    words = f"{flags} {inputs} --train-iters 6 --save {tmp_path}".split()
    for rank in run_ranks(optimizer_steps, 2, words, 1, "offloaded"):
        assert rank["kind"] == "weights"
        assert rank["moved"] < 0.002  # a step at --lr 1e-3; initial weights differ by a hundred times that


@pytest.fixture(scope="module")
def three(inputs, tmp_path_factory) -> Path:
    """A one-rank run with checkpoints at 2, 4 and 6, the best at 3, of 8 steps."""
    save = tmp_path_factory.mktemp("three") / "save"
    flags = "--keep-last 0 --train-iters 8 --exit-interval 6"
    assert statuses(run("1", inputs, save, NO_DROPOUT, flags)) == {75}
    assert sorted(p.name for p in save.glob("iter_*")) == ["iter_0000002", "iter_0000004", "iter_0000006"]
    return save


def test_damaged_checkpoints_are_reported_skipped_and_renamed(three, inputs, tmp_path):
    save = tmp_path / "save"
    shutil.copytree(three, save)
    shard = save / "iter_0000006/__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    flipped = bytearray((save / "iter_0000004/.metadata").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (save / "iter_0000004/.metadata").write_bytes(flipped)
    results = run("1", inputs, save, NO_DROPOUT, "--train-iters 8 --exit-interval 3")
    assert statuses(results) == {75}
    assert "iter_0000006: " in start_log(results) and "__0_0.distcp has" in start_log(results)
    assert ".metadata does not have the checksum" in start_log(results)
    assert "iter_0000002 (iteration 2" in start_log(results)
    assert (save / "damaged-iter_0000006").is_dir() and (save / "damaged-iter_0000004").is_dir()
    assert [step["iteration"] for step in steps(save)] == [1, 2, 3]


def test_a_run_never_starts_over_damaged_checkpoints(three, inputs, tmp_path):
    save = tmp_path / "save"
    shutil.copytree(three, save)
    (save / "iter_0000006/manifest.json").unlink()
    (save / "iter_0000004/__0_0.distcp").unlink()
    manifest = save / "iter_0000002/manifest.json"
    manifest.write_text(manifest.read_text().replace('"consumed_samples": 8', '"consumed_samples": 9'))
    before = sorted(p.name for p in save.iterdir())
    (status,) = statuses(run("1", inputs, save, NO_DROPOUT, "--train-iters 8"))
    assert "none of its 3 checkpoints is complete" in status
    assert "manifest.json is missing" in status and "__0_0.distcp is missing" in status and "its own checksum" in status
    assert set(before) <= {p.name for p in save.iterdir()}  # nothing was renamed or removed


def test_data_and_seed_may_not_change_on_a_resume_but_the_schedule_may(three, inputs, tmp_path):
    save = tmp_path / "save"
    shutil.copytree(three, save)
    first = inputs.split()[1]
    other = tmp_path / "other.txt"
    other.write_text(Path(first).read_text(encoding="utf-8").replace("0.7", "0.6"))
    refused = run(
        "1", inputs.replace(first, str(other)), save, NO_DROPOUT, "--train-iters 8 --seed 7 --global-batch-size 2"
    )
    (line,) = statuses(refused)
    for expected in (
        "--seed was 1234, is 7",
        "--global-batch-size was 4, is 2",
        "training data was 0.7 0:0.8 first",
        "is 0.6 0:0.8 first",
        "--override-checkpoint-args",
    ):
        assert expected in line
    (line,) = statuses(run("1", inputs, save, NO_DROPOUT, "--train-iters 8 --ffn-hidden-size 64"))
    assert "ffn-hidden-size was 128, is 64" in line
    elsewhere = tmp_path / "elsewhere"  # a copy of the data in another directory is the same data
    shutil.copytree(Path(first).parent, elsewhere)
    moved = elsewhere / "train.txt"
    moved.write_text(Path(first).read_text(encoding="utf-8").replace(str(Path(first).parent), str(elsewhere)))
    allowed = run(
        "1", inputs.replace(first, str(moved)), save, NO_DROPOUT, "--train-iters 9 --lr 2e-3 --exit-interval 7"
    )
    assert statuses(allowed) == {75}
    assert "--lr was 0.001, is 0.002" in start_log(allowed) and "--train-iters was 8, is 9" in start_log(allowed)
    overridden = run("1", inputs, save, NO_DROPOUT, "--train-iters 8 --seed 7 --override-checkpoint-args")
    assert statuses(overridden) == {0}
    assert "--seed was 1234, is 7 (--override-checkpoint-args)" in start_log(overridden)


# Every flag that may not change on a resume, with another value than the first start's.
DIFFERENT_RUN = {
    "seq_length": "--seq-length 16",
    "packing": "--packing greedy",
    "packing_lookahead": "--packing-lookahead 8",
    "overlong": "--overlong truncate",
    "loss_on_targets_only": "--no-loss-on-targets-only",
    "norm_target_loss": "--norm-target-loss",
    "loss_average": "--loss-average microbatch",
    "softmax_over_padding": "--softmax-over-padding",
    "eod_mask_loss": "--eod-mask-loss",
    "reset_position_ids": "--no-reset-position-ids",
    "reset_attention_mask": "--no-reset-attention-mask",
    "global_batch_size": "--global-batch-size 2",
    "rampup_batch_size": "--rampup-batch-size 1 1 3",
    "seed": "--seed 7",
    "optimizer": "--optimizer sgd",
    "bf16": "--bf16",
    "fp16": "--fp16",
    "lora_rank": "--lora-rank 4",
    "lora_alpha": "--lora-alpha 8",
    "lora_targets": "--lora-targets linear_qkv",
}


# Fields of the shape to which 4 cannot be added.
OTHER = {"family": "starcoder2", "num_query_groups": 4}


def test_every_change_that_makes_it_a_different_run_is_noticed(tmp_path):
    words = f"{FLAGS} {write_inputs(tmp_path)} --train-iters 8".split()
    config = parse_args(words)
    Manifest(0, config.shape.as_dict(), config.values(), {}, {}, describe_data(config)).write(tmp_path)
    saved = read_manifest(tmp_path)

    def changed(config, shape=config.shape) -> list[str]:
        return compare(saved, config, shape, describe_data(config)).refused

    assert changed(config) == []
    fixed = {dest for dest, entry in ENTRIES.items() if entry.flag.resume is Resume.FIXED}
    assert set(DIFFERENT_RUN) == fixed - {"lora_dora", "quantize_base"}, "those of --engine transformers only"
    for name, flag in DIFFERENT_RUN.items():
        (line,) = changed(parse_args([*words, *flag.split()]))
        assert line.startswith(f"{flag.split()[0].replace('--no-', '--')} was "), name
    for field in fields(config.shape):
        value = getattr(config.shape, field.name)
        value = not value if isinstance(value, bool) else OTHER.get(field.name) or value + 4
        other = replace(config.shape, **{field.name: value})
        (line,) = changed(config, other)
        name = {"num_query_groups": "multi-query", "exact_gelu": "--activation"}.get(field.name)
        name = name or field.name.replace("_", "-")
        assert line.startswith(f"{name} was "), (field.name, line)
    tokenizer, data = tmp_path / "tokenizer.json", tmp_path / "first_targets_document.bin"
    for file, what in ((tokenizer, "tokenizer"), (data, "training data")):
        whole = file.read_bytes()
        file.write_bytes(whole + b"\n\n")
        (line,) = changed(config)
        assert line.startswith(f"{what} was "), line
        file.write_bytes(whole)
    assert changed(config) == []


def test_the_error_suggests_how_to_get_the_saved_batch_size(inputs, tmp_path):
    save = tmp_path / "save"
    small = FLAGS.replace("--global-batch-size 4", "")

    def start(ranks: int, *more: str) -> str:
        words = f"{small} {inputs} --save {save} --train-iters 2 --micro-batch-size 1".split()
        return str(run_ranks(train, ranks, [*words, *more])[0][0])

    assert start(2) == "0"
    assert "--global-batch-size was 2, is 1; give --global-batch-size 2," in start(1)
    four = start(4)
    assert "--global-batch-size was 2, is 4; start a number of processes that divides 2," in four
    assert "give --global-batch-size" not in four
    more = ("--tensor-model-parallel-size", "2", "--micro-batch-size")
    assert "start 2 x D processes, D such that --micro-batch-size 2 x D divides 2," in start(4, *more, "2")
    assert "give --global-batch-size 2 and a --micro-batch-size that divides it," in start(2, *more, "4")


def test_directories_that_cannot_be_resumed_are_explained(three, inputs, tmp_path):
    def start(save: Path, *more: str) -> tuple[str, str]:
        (found,) = run("1", inputs, save, NO_DROPOUT, "--train-iters 7", *more)
        return str(found[0]), "\n".join(found[1])

    def copy(name: str) -> Path:
        shutil.copytree(three, tmp_path / name)
        return tmp_path / name

    tracker = "latest_checkpointed_iteration.txt"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / tracker).write_text("250")
    assert "names iteration 250, but" in start(empty)[0]
    (empty / tracker).write_text("release")
    assert "contains a converted checkpoint" in start(empty)[0]
    foreign = tmp_path / "foreign"
    (foreign / "iter_0000007/mp_rank_00").mkdir(parents=True)
    assert "contains checkpoints written by another program" in start(foreign)[0]
    newer = copy("newer")
    for path in newer.glob("iter_*/manifest.json"):
        from megatron_ft.weights import manifest as manifests

        content = json.loads(path.read_text()) | {"format": 99}
        content.pop("checksum")
        path.write_text(json.dumps(content | {"checksum": manifests._checksum(content)}))
    assert "install the newer package" in start(newer)[0]
    file = tmp_path / "file"
    file.write_text("")
    assert "File exists" in start(file)[0] or "Not a directory" in start(file)[0]
    (line, _) = start(tmp_path / "none", "--load", str(tmp_path / "nowhere"))
    assert line.startswith("error: ") and "nowhere" in line
    lost = copy("lost")
    (lost / tracker).write_text("8")
    status, reasons = start(lost)
    assert status == "0" and "names iteration 8, which does not exist" in reasons
    untracked = copy("untracked")
    (untracked / tracker).unlink()
    status, reasons = start(untracked)
    assert status == "0" and "is missing; the newest checkpoint is 6" in reasons
    assert (untracked / tracker).read_text() == "7"


def test_half_epoch_checkpoints_are_kept_for_any_batch_size_and_any_number_of_resumes(inputs, tmp_path):
    save = tmp_path / "save"
    flags = "--save-epochs 0.5 --train-epochs 2.5 --save-interval 1 --keep-last 1 --micro-batch-size 1 --rampup-batch-size 2 1 13"
    starts = 1
    while statuses(run("1", inputs, save, NO_DROPOUT, flags, "--exit-interval 9")) == {75}:
        starts += 1
    assert starts > 2
    done = {step["iteration"]: step["consumed_samples"] for step in steps(save)}
    period = 0.5 * sequences_per_epoch(parse_args(f"{FLAGS} {inputs} --train-iters 1".split()))
    expected = {next(i for i, samples in done.items() if samples >= k * period) for k in (1, 2, 3, 4, 5)}
    assert max(expected) == max(done) and len(expected) == 5
    assert {int(path.name.removeprefix("iter_")) for path in save.glob("iter_*")} == expected

    save = tmp_path / "epochs-only"
    assert statuses(run("1", inputs, save, NO_DROPOUT, flags, "--save-interval 0 --keep-last 2")) == {0}
    assert {int(path.name.removeprefix("iter_")) for path in save.glob("iter_*")} == expected


def test_the_last_the_best_and_every_nth_checkpoint_are_kept(inputs, tmp_path):
    save = tmp_path / "save"
    flags = "--train-iters 9 --save-interval 1 --keep-last 2 --keep-every 4 --eval-interval 3 --eval-iters 1 --lr 1e-30 --lr-decay-style constant"
    assert statuses(run("1", inputs, save, NO_DROPOUT, flags)) == {0}
    best = int((save / "best_checkpointed_iteration.txt").read_text())
    assert best in (3, 6, 9)
    kept = {int(path.name.removeprefix("iter_")) for path in save.glob("iter_*")}
    assert kept == {4, 8, 9} | {best}
    assert (save / "tokenizer.json").is_file()
