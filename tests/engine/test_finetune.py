"""Complete runs of the training program: how they resume, agree, and end."""

import json
import os
import pty
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from engine_runs import finetune, finetune_error
from ranks import run_ranks
from token_files import write_documents

from megatron_ft.config.arguments import parse_args
from megatron_ft.data.packed_dataset import build_datasets
from megatron_ft.errors import EXIT_DONE, EXIT_RESUME, EXIT_USER_ERROR
from megatron_ft.metrics.metrics import DETERMINISTIC_KEYS

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"


class Runs:
    """Runs of the tiny reference model on real data, each with its own save directory."""

    def __init__(self, golden: Path, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.common = [
            *f"--load {golden}/hf/hf_tiny --tokenizer-file {golden}/data/tokenizer.json --data-prefix {golden}/data/short".split(),
            *f"--data-cache-path {tmp_path}/cache --validation-fraction 0.1 --seq-length 128 --lr 1e-3 --log-interval 100".split(),
        ]

    def __call__(self, name: str, flags: str, ranks: int = 1, during: str = "") -> list[int]:
        """Exit statuses of the ranks."""
        return run_ranks(finetune, ranks, [*self.common, "--save", str(self.tmp_path / name), *flags.split()], during)

    def lines(self, name: str, file: str = "metrics.jsonl") -> list[dict]:
        return [json.loads(line) for line in (self.tmp_path / name / file).read_text().splitlines()]

    def events(self, name: str) -> list[str]:
        return [line["event"] for line in self.lines(name, "events.jsonl")]

    def steps(self, name: str) -> list[dict]:
        return [{key: line[key] for key in DETERMINISTIC_KEYS} for line in self.lines(name)]

    def validations(self, name: str) -> list[dict]:
        lines = self.lines(name, "validation.jsonl")
        return [{key: value for key, value in line.items() if key not in ("time", "group")} for line in lines]


@pytest.fixture
def runs(golden, tmp_path) -> Runs:
    return Runs(golden, tmp_path)


def column(lines: list[dict], key: str) -> list:
    return [line[key] for line in lines]


def test_stopped_run_resumes_bitwise(runs):
    flags = f"{TP2} --train-iters 8 --micro-batch-size 2 --global-batch-size 4 --eval-interval 4 --eval-iters full"
    flags += " --lr-warmup-iters 2 --hidden-dropout 0.1 --attention-dropout 0.1"
    assert runs("uninterrupted", flags, 2) == [EXIT_DONE] * 2
    assert runs("stopped", flags, 2, "SIGTERM-in-step 3") == [EXIT_RESUME] * 2
    assert column(runs.steps("stopped"), "iteration") == [1, 2, 3]
    assert runs("stopped", flags, 2, "SIGUSR2-in-validation 1") == [EXIT_RESUME] * 2
    assert runs.steps("stopped")[-1]["iteration"] == 4
    assert runs("stopped", flags, 2, "SIGUSR1-in-step 2") == [EXIT_RESUME] * 2
    assert runs.steps("stopped")[-1]["iteration"] == 6
    assert runs("stopped", flags, 2) == [EXIT_DONE] * 2
    assert runs.steps("stopped") == runs.steps("uninterrupted")
    assert runs.validations("stopped") == runs.validations("uninterrupted")
    assert column(runs.validations("stopped"), "iteration") == [4, 8]
    assert runs("stopped", flags, 2) == [EXIT_DONE] * 2, "a finished run has nothing to do"
    assert runs.steps("stopped") == runs.steps("uninterrupted")


@pytest.mark.slow
def test_recompute_repeats_the_dropout_of_the_forward_pass(runs):
    flags = (
        f"{TP2} --train-iters 3 --global-batch-size 2 --eval-interval 0 --hidden-dropout 0.2 --attention-dropout 0.2"
    )
    runs("plain", flags, 2)
    for granularity in ("full", "selective"):
        runs(granularity, f"{flags} --recompute-granularity {granularity}", 2)
        assert column(runs.steps(granularity), "loss") == column(runs.steps("plain"), "loss")
        assert column(runs.steps(granularity), "grad_norm") == column(runs.steps("plain"), "grad_norm")


LAYOUTS = {
    "one_rank": (1, "--micro-batch-size 4"),
    "dp2": (2, "--micro-batch-size 1 --overlap-grad-reduce --overlap-param-gather"),
    "tp2": (2, f"--micro-batch-size 2 {TP2} --recompute-granularity full"),
    "pp2": (2, f"--micro-batch-size 1 {PP2}"),
}


def test_runs_agree_in_every_layout(runs):
    flags = "--train-iters 5 --global-batch-size 4 --norm-target-loss --hidden-dropout 0 --attention-dropout 0"
    flags += " --eval-interval 5 --eval-iters full --keep-last 1"
    for name, (ranks, layout) in LAYOUTS.items():
        assert runs(name, f"{flags} {layout}", ranks) == [EXIT_DONE] * ranks
    one, (validated,) = runs.steps("one_rank"), runs.validations("one_rank")
    for name in list(LAYOUTS)[1:]:
        steps, (validation,) = runs.steps(name), runs.validations(name)
        assert column(steps, "loss") == pytest.approx(column(one, "loss"), abs=2e-5), name
        assert column(steps, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=1e-3), name
        assert validation == pytest.approx(validated, abs=2e-4, rel=1e-4), name
        assert validation["tokens"] == validated["tokens"] and validation["rows"] == validated["rows"]


def test_validation_counts_every_sequence_once_with_any_batch_size(runs):
    flags = "--train-iters 1 --eval-interval 1 --eval-iters full --hidden-dropout 0 --attention-dropout 0 --lr 0"
    for batch in (1, 4, 5):
        runs(f"batch_{batch}", f"{flags} --global-batch-size {batch}")
    (first,), *others = (runs.validations(f"batch_{batch}") for batch in (1, 4, 5))
    assert first["rows"] > 1 and first["rows"] % 5 and first["rows"] % 4
    for (other,) in others:
        assert other == pytest.approx(first, rel=1e-6)


def documents_with_hits(model, number: int) -> list[tuple[list[int], list[int]]]:
    """Documents in which two of three tokens are `model`'s first choice; the last 12 are targets.

    Their lengths are even, so that no sequence is full.
    """
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 1000, (number, 1), generator=draw)
    for i in range(1, 36):
        any_token = torch.randint(1, 1000, (number, 1), generator=draw)
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:, :1000].argmax(-1) if i % 3 else any_token], dim=1)
    ends = 2 * torch.randint(8, 19, (number,), generator=draw)
    return [(row[: end - 12], row[end - 12 : end]) for row, end in zip(tokens.tolist(), ends.tolist(), strict=True)]


@torch.no_grad()
def test_validation_equals_a_direct_computation(runs, golden):
    from transformers import GPTBigCodeForCausalLM

    model = GPTBigCodeForCausalLM.from_pretrained(golden / "hf/hf_tiny").eval()
    documents = documents_with_hits(model, 24)
    train, valid = documents[:18], documents[18:]
    losses, hits = [], 0
    for inputs, outputs in valid:
        logits = model(torch.tensor([inputs + outputs])).logits[0, -13:-1, :1000]
        losses += F.cross_entropy(logits, torch.tensor(outputs), reduction="none").tolist()
        hits += (logits.argmax(-1) == torch.tensor(outputs)).sum().item()
    prefix = write_documents(runs.tmp_path / "documents", documents)
    flags = f"--data-prefix {prefix} --validation-fraction 0.25 --hidden-dropout 0 --attention-dropout 0 --global-batch-size 1"
    runs("all", f"{flags} --train-epochs 1 --lr 0 --eval-iters full")
    assert runs.steps("all")[-1]["consumed_tokens"] == sum(len(a) + len(b) for a, b in train)
    (validation,) = runs.validations("all")
    assert validation["tokens"] == 12 * 6 == len(losses) and 0.5 < hits / 72 < 0.8
    assert validation["token_accuracy"] == pytest.approx(hits / 72)
    assert validation["loss"] == pytest.approx(sum(losses) / 72, rel=1e-5)
    assert validation["rows"] > 1
    runs("first batch", f"{flags} --skip-train --eval-iters 1")
    (first,) = runs.validations("first batch")
    assert first["rows"] == 1 and first["tokens"] < validation["tokens"]


def test_skip_train_evaluates_a_checkpoint(runs, tmp_path):
    flags = "--eval-interval 2 --eval-iters full --hidden-dropout 0 --attention-dropout 0"
    runs("trained", f"{flags} --train-iters 2 --global-batch-size 2 --save-interval 1")
    assert runs("evaluated", f"{flags} --skip-train --load {tmp_path / 'trained'}") == [EXIT_DONE]
    (trained,), (evaluated,) = runs.validations("trained"), runs.validations("evaluated")
    assert evaluated == pytest.approx(trained, rel=1e-6), "the same loss, at the weights' iteration"
    assert not list((tmp_path / "evaluated").glob("iter_*"))
    before = {name: runs.lines("trained", name) for name in ("metrics.jsonl", "validation.jsonl")}
    shutil.rmtree(tmp_path / "trained/iter_0000002")  # as after a crash, the checkpoint is older than the log
    at = runs.common.index("--data-prefix")
    prefix = runs.common[at + 1]
    del runs.common[at : at + 2]
    (tmp_path / "valid.txt").write_text(f"valid: 1 0.9:1 {prefix}\nmore: 1 0.8:0.9 {prefix}\n")
    flags += f" --skip-train --global-batch-size 2 --valid-weighted-split-paths-path {tmp_path}/valid.txt"
    for _ in range(2):
        assert runs("trained", flags) == [EXIT_DONE]
    assert runs.lines("trained") == before["metrics.jsonl"]
    found = [(line["iteration"], line["group"]) for line in runs.lines("trained", "validation.jsonl")]
    assert found == [(2, "valid"), (1, "valid"), (1, "more")]
    assert sum(line["event"] == "start" for line in runs.lines("trained", "events.jsonl")) == 1
    runs.common[at:at] = ["--data-prefix", prefix]
    flags = "--eval-iters full"
    assert runs("nothing", f"{flags} --skip-train --validation-fraction 0") == [EXIT_USER_ERROR]


@pytest.mark.parametrize(
    "precision",
    [
        "--bf16 --overlap-grad-reduce --overlap-param-gather",
        "--fp16 --initial-loss-scale 1024",
        "--fp16 --loss-scale 512",
    ],
)
def test_half_precision_is_close_to_fp32(runs, precision):
    flags = "--train-iters 6 --micro-batch-size 2 --global-batch-size 4 --eval-interval 0 --hidden-dropout 0 --attention-dropout 0"
    runs("fp32", flags)
    runs("half", f"{flags} {precision}", 2)
    assert column(runs.steps("half"), "loss") == pytest.approx(column(runs.steps("fp32"), "loss"), abs=0.05)
    scale = 1.0 if "--fp16" not in precision else float(precision.split()[-1])
    assert set(column(runs.steps("half"), "loss_scale")) == {scale}


def test_fp16_overflow_skips_the_step_and_lowers_the_scale(runs):
    flags = "--train-iters 9 --global-batch-size 2 --eval-interval 0 --fp16 --initial-loss-scale 3e7 --hysteresis 1"
    assert runs("fp16", flags) == [EXIT_DONE]
    steps = runs.steps("fp16")
    skipped = column(steps, "skipped_iterations")
    assert skipped[0] == 1 and skipped[-1] < 9
    assert steps[0]["grad_norm"] is None and any(step["grad_norm"] for step in steps)
    assert steps[1]["lr"] == steps[0]["lr"], "a skipped step does not move the schedule"
    assert steps[-1]["loss_scale"] < 3e7


def test_nonfinite_loss_ends_the_run_and_names_its_documents(runs):
    flags = "--train-iters 9 --global-batch-size 2 --lr 1e25 --clip-grad 0 --eval-interval 0 --save-interval 100"
    assert runs("nan", flags, 2) == [EXIT_USER_ERROR] * 2
    (path,) = (runs.tmp_path / "nan").glob("nonfinite_loss_iteration_*.json")
    found = json.loads(path.read_text())
    rows = [row for micro_batch in found["micro_batches"] for row in micro_batch["rows"]]
    assert column(rows, "sample") == [found["consumed_samples"], found["consumed_samples"] + 1]
    assert all(row["prefix"].endswith("data/short") and row["documents"] for row in rows)
    assert not list((runs.tmp_path / "nan").glob("iter_*"))


def test_time_limit_and_exit_interval_save_and_exit_for_resume(runs):
    flags = "--train-iters 4 --global-batch-size 2 --eval-interval 0"
    assert runs("limits", f"{flags} --exit-duration-in-mins 0.0001", 2) == [EXIT_RESUME] * 2
    assert column(runs.steps("limits"), "iteration") == [1]
    assert runs("limits", f"{flags} --exit-interval 3", 2) == [EXIT_RESUME] * 2
    assert column(runs.steps("limits"), "iteration") == [1, 2, 3]
    assert runs("limits", flags, 2) == [EXIT_DONE] * 2
    assert column(runs.steps("limits"), "iteration") == [1, 2, 3, 4]


def test_named_groups_are_validated_and_tested_once(runs, golden):
    short = golden / "data/short"
    splits = f"train: 1.0 0:0.8 {short}", f"one: 1.0 0.8:0.9 {short}", f"two: 1.0 0.9:1.0 {short}"
    for name, split in zip(("train", "valid", "test"), splits, strict=True):
        (runs.tmp_path / f"{name}.txt").write_text(f'"{split}"\n')
    (runs.tmp_path / "valid.txt").write_text(f'"{splits[1]}" "{splits[2]}"\n')
    at = runs.common.index("--data-prefix")
    del runs.common[at : at + 2]
    files = [f"--{name}-weighted-split-paths-path {runs.tmp_path}/{name}.txt" for name in ("train", "valid", "test")]
    flags = f"{' '.join(files)} --train-epochs 0.1 --global-batch-size 2 --eval-interval 2 --save-interval 1 --best-group two"
    assert runs("groups", flags) == [EXIT_DONE]
    assert runs("groups", flags) == [EXIT_DONE]
    lines = runs.lines("groups", "validation.jsonl")
    assert [(line["iteration"], line["group"]) for line in lines] == [
        (2, "one"), (2, "two"), (3, "one"), (3, "two"), (3, "test two"),
    ]  # fmt: skip
    assert lines[-1]["loss"] == lines[-2]["loss"] != lines[-3]["loss"]


def test_eval_at_start_is_a_baseline_and_not_repeated(runs):
    flags = (
        "--eval-at-start --train-iters 4 --global-batch-size 2 --eval-interval 2 --eval-iters 1 --lr 10 --clip-grad 0"
    )
    assert runs("reference", flags, 2) == [EXIT_DONE] * 2
    assert runs("stopped", flags, 2, "SIGTERM-in-validation 1") == [EXIT_RESUME] * 2
    assert not (runs.tmp_path / "stopped/validation.jsonl").exists()
    assert runs("stopped", flags, 2, "SIGTERM-in-step 1") == [EXIT_RESUME] * 2
    assert column(runs.validations("stopped"), "iteration") == [0]
    assert runs("stopped", flags, 2) == [EXIT_DONE] * 2
    assert column(runs.validations("stopped"), "iteration") == [0, 2, 4]
    assert runs.validations("stopped") == runs.validations("reference")
    losses = column(runs.validations("reference"), "loss")
    assert losses[0] < min(losses[1:]), "this learning rate makes the model worse"
    best = (runs.tmp_path / "reference/best_checkpointed_iteration.txt").read_text()
    assert int(best) == (2 if losses[1] <= losses[2] else 4)
    assert f"{losses[0]:.4f} before the first step, last" in (runs.tmp_path / "reference/report.html").read_text()


def test_restarted_run_replaces_the_baseline(runs):
    flags = "--eval-at-start --train-iters 1 --save-interval 0 --eval-interval 0 --eval-iters 1 --lr 1e30 --global-batch-size 2"
    for _ in range(2):  # ends without a checkpoint, like a run killed early
        assert runs("restarted", f"{flags} --clip-grad 0 --train-iters 3") == [EXIT_USER_ERROR]
        assert column(runs.validations("restarted"), "iteration") == [0]


def test_loss_tokens_do_not_depend_on_weights(runs, golden):
    flags = "--train-iters 2 --global-batch-size 4 --eval-interval 0 --validation-fraction 0"
    counts = {}
    for name, more, ranks in (("plain", "", 1), ("normed", "--norm-target-loss --loss-average microbatch", 2)):
        assert runs(name, f"{flags} {more}", ranks) == [EXIT_DONE] * ranks
        counts[name] = column(runs.steps(name), "loss_tokens")
    assert counts["plain"] == counts["normed"]
    config = parse_args([*runs.common, *flags.split(), "--preset", "tiny"])
    samples = build_datasets(config, train_samples=8, pad=0).train
    targets = [int(((~samples[i].is_inputs[1:]) & (samples[i].segment_ids[1:] > 0)).sum()) for i in range(8)]
    assert counts["plain"] == [sum(targets[:4]), sum(targets[4:])]


def test_early_stop_keeps_and_marks_the_best(runs):
    """From step 5 on the learning rate is 0, so the loss is bitwise the same and not better."""
    flags = "--train-iters 20 --global-batch-size 2 --eval-interval 2 --eval-iters full --early-stop-patience 2"
    flags += " --lr-decay-style linear --lr-decay-iters 4 --save-interval 2 --keep-last 1"
    assert runs("early", flags) == [EXIT_DONE]
    first, best, *later = column(runs.validations("early"), "loss")
    assert best < first - 0.01 and later == [best, best]
    save = runs.tmp_path / "early"
    assert (save / "best_checkpointed_iteration.txt").read_text() == "4"
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000004", "iter_0000008"]
    assert runs("early", flags) == [EXIT_DONE]
    assert len(runs.validations("early")) == 4, "a run stopped early stays stopped"
    assert "stopped early at 8; raise --early-stop-patience, or leave it out, to continue" in runs.events("early")
    assert runs("early", flags.replace("patience 2", "patience 3")) == [EXIT_DONE]
    assert len(runs.validations("early")) == 5, "resumes with more patience"


def test_losses_on_other_data_do_not_compete_for_the_best(runs):
    flags = "--train-iters 4 --global-batch-size 2 --eval-interval 2 --early-stop-patience 1 --lr 0.3 --clip-grad 0 --min-lr 0.3"
    runs("other", f"{flags} --eval-iters full --exit-interval 2")
    assert runs("other", f"{flags} --eval-iters 1") == [EXIT_DONE]
    (line,) = [event for event in runs.events("other") if event.startswith("best loss")]
    assert "on group valid (6 sequences" in line and "now uses group valid (2 sequences" in line
    assert column(runs.lines("other", "validation.jsonl"), "rows") == [2, 2], "iteration 2 was validated again"
    assert column(runs.lines("other", "validation.jsonl"), "iteration") == [2, 4]


def test_another_batch_size_trains_on_the_remaining_sequences(runs):
    flags = "--eval-interval 0 --lr-warmup-iters 4 --keep-last 0"
    runs("more", f"{flags} --train-samples 50 --global-batch-size 4 --exit-interval 6")
    shutil.copytree(runs.tmp_path / "more", runs.tmp_path / "fewer")
    more = f"{flags} --train-samples 50 --global-batch-size 8 --override-checkpoint-args"
    assert runs("more", more) == [EXIT_DONE]
    assert column(runs.steps("more"), "consumed_samples") == [4, 8, 12, 16, 20, 24, 32, 40, 48, 56]
    rates = column(runs.steps("more"), "lr")
    assert rates[4] == max(rates) and rates[6:] == sorted(rates[6:], reverse=True) and 0 < rates[-1] < rates[6]
    fewer = f"{flags} --train-iters 12 --global-batch-size 2 --override-checkpoint-args"
    assert runs("fewer", fewer) == [EXIT_DONE]
    assert column(runs.steps("fewer"), "consumed_samples") == [4, 8, 12, 16, 20, 24, 26, 28, 30, 32, 34, 36]


def test_damaged_checkpoint_and_another_batch_size_need_a_second_start(runs):
    flags = "--eval-interval 0 --train-samples 50 --keep-last 0"
    runs("damaged", f"{flags} --global-batch-size 4 --save-interval 5 --exit-interval 6")
    for file in (runs.tmp_path / "damaged/iter_0000006").glob("*.distcp"):
        file.write_bytes(b"")
    more = f"{flags} --global-batch-size 8 --override-checkpoint-args"
    words = [*runs.common, "--save", str(runs.tmp_path / "damaged"), *more.split()]
    (line,) = run_ranks(finetune_error, 1, words)
    assert "newest checkpoint is damaged" in line and "start the same command again" in line
    assert runs("damaged", more) == [EXIT_DONE]
    assert column(runs.steps("damaged"), "consumed_samples") == [4, 8, 12, 16, 20, 28, 36, 44, 52]


def test_finished_run_logs_how_to_continue_and_tolerates_a_truncated_line(runs):
    flags = "--global-batch-size 2 --eval-interval 3 --eval-iters 1"
    assert runs("done", f"{flags} --train-iters 4", 1, "truncate-in-step 2") == [EXIT_DONE]
    assert (runs.tmp_path / "done/iter_0000004").is_dir()
    assert runs("done", f"{flags} --train-iters 2") == [EXIT_DONE]
    assert "nothing to do: 4 of 2 steps are done; raise --train-iters to continue" in runs.events("done")
    assert not any(event.startswith("learning rate continues") for event in runs.events("done"))
    assert runs("done", f"{flags} --train-iters 6 --lr 5e-3") == [EXIT_DONE]
    (line,) = [event for event in runs.events("done") if event.startswith("learning rate continues")]
    last, following = column(runs.steps("done"), "lr")[3:5]
    assert line == f"learning rate continues at {following:.3e} (the last step used {last:.3e})"


def test_log_has_the_notices_of_the_tokenizer(runs, golden):
    spec = json.loads((golden / "data/tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["dropout"] = 0.1
    file = runs.tmp_path / "dropout.json"
    file.write_text(json.dumps(spec), encoding="utf-8")
    assert runs("noted", f"--tokenizer-file {file} --train-iters 1 --global-batch-size 1") == [EXIT_DONE]
    assert [event for event in runs.events("noted") if event.startswith(f"{file}: ") and "dropout of 0.1" in event]


def test_closed_terminal_stops_a_run_like_sigterm(runs):
    save = runs.tmp_path / "closed"
    flags = (
        f"--train-iters 100000 --global-batch-size 2 --eval-interval 0 --save-interval 0 --save {save} --log-interval 1"
    )
    command = [sys.executable, str(ROOT / "launch/finetune.py"), "--num-processes", "2", *runs.common, *flags.split()]
    launcher, terminal = pty.fork()
    if launcher == 0:
        os.execv(sys.executable, command)
    seen = b""
    while b" 3/100,000" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)  # the kernel sends SIGHUP to the launcher; printing fails on all ranks
    assert os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1]) == EXIT_RESUME
    (stopped,) = [event for event in runs.events("closed") if event.startswith("stopped by")]
    assert not any("could not be saved" in event for event in runs.events("closed"))
    iteration = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert f"stopped by SIGHUP at iteration {iteration};" in stopped and iteration >= 3
    assert runs.lines("closed")[-1]["iteration"] == iteration


def test_sgd_trains_and_resumes(runs):
    flags = "--optimizer sgd --lr 0.1 --train-iters 6 --global-batch-size 4 --eval-interval 0"
    assert runs("sgd", f"{flags} --exit-interval 3", 2) == [EXIT_RESUME] * 2
    assert runs("sgd", flags, 2) == [EXIT_DONE] * 2
    losses = column(runs.steps("sgd"), "loss")
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.05


def test_batch_size_ramps_up(runs):
    flags = "--train-samples 20 --global-batch-size 4 --micro-batch-size 1 --rampup-batch-size 2 2 6 --eval-interval 0"
    assert runs("ramp", flags, 2) == [EXIT_DONE] * 2
    steps = runs.steps("ramp")
    assert column(steps, "global_batch_size") == [2, 2, 2, 4, 4, 4, 4]
    assert column(steps, "consumed_samples") == [2, 4, 6, 10, 14, 18, 22]


@pytest.mark.slow
def test_watchdog_ends_a_hanging_rank_with_stack_traces(runs):
    flags = "--train-iters 4 --global-batch-size 2 --eval-interval 0 --watchdog-mins 0.05"
    with pytest.raises(RuntimeError, match="process died"):
        runs("hang", flags, 2, "hang-in-step 3")
    for rank in (0, 1):
        traces = (runs.tmp_path / f"hang/watchdog/rank_{rank:05d}.txt").read_text()
        assert f"rank {rank}: no progress" in traces and "in step" in traces


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--context-parallel-size 2 --train-iters 1", ["--context-parallel-size 2", "Transformer Engine"]),
        ("--optimizer-cpu-offload --train-iters 1", ["--optimizer-cpu-offload", "--bf16"]),
        ("--optimizer-cpu-offload --bf16 --train-iters 1", ["--optimizer-cpu-offload", "no GPU"]),
        ("--lr-warmup-iters 5 --train-iters 5", ["warm-up", "--lr-warmup-iters"]),
        ("--lr-decay-style WSD --train-iters 5", ["--lr-wsd-decay-iters"]),
        (
            "--rampup-batch-size 1 2 6 --global-batch-size 4 --train-iters 5",
            ["--rampup-batch-size", "complete increments"],
        ),
        ("--best-group other --train-iters 5", ["--best-group other", "valid"]),
    ],
)
def test_contradictory_flags_report_one_line_errors(runs, flags, words):
    (line,) = run_ranks(finetune_error, 1, [*runs.common, "--save", str(runs.tmp_path / "wrong"), *flags.split()])
    assert all(word in line for word in words) and "\n" not in line, line
    assert not (runs.tmp_path / "wrong/metrics.jsonl").exists()
