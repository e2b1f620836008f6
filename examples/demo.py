"""The pipeline, end to end, on this machine: commits to a fine-tuned, evaluated checkpoint.

    make demo                 # or: python examples/demo.py --repo PATH --output DIR

Runs the programs that a user runs, one after the other, and prints every command line. Training is
stopped halfway by SIGTERM, as by a scheduler, and the same command line resumes it. The evaluation
shows the steps only: the score of so small a model is meaningless.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from megatron_ft.errors import EXIT_RESUME, UserError, run_program

EXAMPLES = "examples/commits.jsonl"
MIN_ROWS = 100  # with fewer of these commits, the example rows are used instead
MAX_FILE_BYTES = 1500  # larger files would not fit the short sequences of the demo
VOCAB_SIZE = 2000  # padded to 2048 for training; conversion removes the padding


def show(text: str) -> None:
    print(text, flush=True)


def start(program: str, *words: Path, **flags: object) -> subprocess.Popen:
    """Start a program of the checkout, with `flag_name=value` as `--flag-name value`.

    Prints the command line as a user would type it.
    """
    command = [program, *map(str, words)]
    for name, value in flags.items():
        command.append("--" + name.replace("_", "-"))
        if value is not True:
            command.append(str(value))
    show("\n$ python " + shlex.join(command))
    return subprocess.Popen([sys.executable, *command])


def run(program: str, *words: Path, **flags: object) -> None:
    """Run a program to completion. Raises UserError if it fails, which ends the demo."""
    status = start(program, *words, **flags).wait()
    if status:
        raise UserError(f"{program} ended with status {status}; its last lines above give the reason")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train(save: Path, train_iters: int, **flags: object) -> int:
    """Train, stop halfway as a scheduler would, resume with the same command line.

    Returns the iteration it resumed from.
    """
    flags = {"save": save, "train_iters": train_iters, **flags}
    metrics = save / "metrics.jsonl"
    process = start("launch/finetune.py", **flags)
    while process.poll() is None and not (
        metrics.is_file() and len(metrics.read_text(encoding="utf-8").splitlines()) >= train_iters // 2
    ):
        time.sleep(0.1)
    if process.poll() is None:
        show("\n--- SIGTERM, as from a scheduler ---")
        process.send_signal(signal.SIGTERM)
    status = process.wait()
    if status != EXIT_RESUME:
        raise UserError(
            f"launch/finetune.py ended with status {status}, expected {EXIT_RESUME} after SIGTERM; see its output above"
        )
    resumed_at = int((save / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8"))
    run("launch/finetune.py", **flags)
    return resumed_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repo", type=Path, help=f"git repository whose commits to train on (default: the rows of {EXAMPLES})"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "demo", help="output directory, emptied first (default: demo/)"
    )
    parser.add_argument("--iterations", type=int, default=100, help="optimizer steps (default: 100)")
    args = parser.parse_args()
    began = time.monotonic()
    repo, out = args.repo and args.repo.resolve(), args.output.resolve()
    os.chdir(ROOT)
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out  # short paths on screen
    if out.exists():
        if any(out.iterdir()) and not (out / ".demo").exists():
            raise UserError(
                f"--output {out} contains files that are not from an earlier demo; choose an empty directory"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / ".demo").touch()

    names = ("commits.jsonl", "rows.jsonl", "tokenizer.json", "data", "checkpoints", "hf")
    commits, rows, tokenizer, data, save, model = (out / name for name in names)
    source = EXAMPLES
    if repo:
        source = commits
        run(
            "dataset/git_commits.py",
            repo=repo,
            max_file_bytes=MAX_FILE_BYTES,
            min_rows=MIN_ROWS,
            fallback=EXAMPLES,
            output=commits,
        )
    run("dataset/commits_to_jsonl.py", input=source, output=rows)
    run("preprocess/train_tokenizer.py", input=rows, vocab_size=VOCAB_SIZE, output=tokenizer)
    run("preprocess/tokenize.py", input=rows, output_prefix=data, tokenizer_file=tokenizer)
    resumed_at = train(
        save=save,
        preset="tiny",
        from_scratch=True,
        data_prefix=data,
        validation_fraction=0.05,
        tokenizer_file=tokenizer,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        use_distributed_optimizer=True,
        seq_length=1024,
        overlong="truncate",
        micro_batch_size=2,
        global_batch_size=4,
        train_iters=args.iterations,
        lr=2e-3,
        lr_warmup_iters=5,
        eval_interval=args.iterations // 2,
        eval_iters="full",
        log_interval=5,
    )
    run("convert/megatron_to_hf.py", load=save, output=model, tokenizer_file=tokenizer)
    run("convert/verify.py", save, model, logits=True, report=out / "verify.json")
    validation = read_jsonl(rows)[-5:]  # the last rows are held out
    (out / "prompt.txt").write_text(min((row["inputs"] for row in validation), key=len), encoding="utf-8")
    show("\n--- a tiny model, the text is noise ---")
    run("convert/complete.py", model, prompt_file=out / "prompt.txt", max_new_tokens=64)
    score = evaluate(model, out / "evaluation")
    print_summary(out, score, resumed_at, time.monotonic() - began)


def evaluate(model: Path, evaluation: Path) -> str:
    """Generate, score and report answers to three problems; returns the score in words.

    Without a sandbox there is no score, and the demo continues.
    """
    data = "examples/humanevalpack"
    flags = {"tasks": "fixtests", "languages": "python", "style": "starcodercommit", "samples": 2, "max_length": 256}
    run("evaluation/run/generate.py", model, data=data, output=evaluation, **flags)
    if start("evaluation/run/score.py", evaluation, data=data).wait():
        return "no score: nothing here can run programs safely, see above"
    run("evaluation/run/report.py", evaluation, data=data)
    report = json.loads((evaluation / "report.json").read_text(encoding="utf-8"))
    passed = report["scores"][0]["score"]["pass@1"]["estimate"]
    return f"{passed:.1%} pass@1 on three problems, meaningless for a model of this size: {evaluation}/report.html"


def print_summary(out: Path, score: str, resumed_at: int, seconds: float) -> None:
    steps = read_jsonl(out / "checkpoints/metrics.jsonl")
    steps = [s for s in steps if "loss" in s]
    if steps[-1]["loss"] >= steps[0]["loss"]:
        raise UserError(
            f"the loss did not decrease: {steps[0]['loss']:.3f} at the first step, {steps[-1]['loss']:.3f} at the last"
        )
    verified = json.loads((out / "verify.json").read_text(encoding="utf-8"))
    fill = sum(s["fill_rate"] for s in steps) / len(steps)
    table = [
        ("rows", f"{len((out / 'rows.jsonl').read_text(encoding='utf-8').splitlines()):,}"),
        ("tokens trained on", f"{steps[-1]['consumed_tokens']:,}"),
        ("packed fill rate", f"{fill:.1%}"),
        ("steps", f"{steps[-1]['iteration']}"),
        ("loss", f"{steps[0]['loss']:.3f} at the first step, {steps[-1]['loss']:.3f} at the last"),
        ("resumed at step", f"{resumed_at}"),
        (
            "largest logit difference",
            f"{verified['largest_logit_difference']:.1e} (Megatron vs. transformers, fp32)",
        ),
        ("evaluation", score),
        ("checkpoints", f"{out / 'checkpoints'}"),
        ("report", f"{out / 'checkpoints/report.html'}"),
        ("Hugging Face model", f"{out / 'hf'}"),
        ("time", f"{seconds:.0f} s"),
    ]
    width = max(len(name) for name, _ in table)
    show("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in table))


if __name__ == "__main__":
    run_program(main)
