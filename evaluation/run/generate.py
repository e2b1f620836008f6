"""Generate a model's answers to HumanEvalPack; run again to continue where it stopped.

    export HUMANEVALPACK=/data/humanevalpack
    python evaluation/run/generate.py runs/first-hf --style octocoder --output evaluations/first
    python evaluation/run/generate.py starcoder --engine endpoint --endpoint http://gpu7:8000/v1 \\
        --style octocoder --output evaluations/served
    python evaluation/run/generate.py generations.json --engine replay --tasks fixtests \\
        --languages python --style octocoder --output evaluations/replayed
    python evaluation/run/generate.py --style octocoder --write-prompts p.jsonl --tasks fixtests

MODEL is what the engine reads:

    transformers   a Hugging Face directory, or the --save directory of a run, whose newest
                   checkpoint is converted to OUTPUT/model first
    endpoint       the name of a model that a server has: vLLM, transformers serve, or another one
                   with OpenAI's /v1/completions; prompts are sent as they are, never as chats
    replay         generations: an evaluation's directory, one of its .jsonl files, or a .json file
                   with the reference harness's lists of texts

A sample depends on --seed, its problem and its number only: not on shards, order, batch or
restarts (with an endpoint, as far as its server honors seeds). --shard I/N generates every N-th
problem, for a SLURM array. explain is two tasks: a sample of the second answers the same sample of
the first.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from itertools import groupby

from megatron_ft import __version__
from megatron_ft.config.parser import Help, Parser
from megatron_ft.data.build_once import build_once
from megatron_ft.errors import UserError, run_program
from megatron_ft.evaluation.cutting import cut
from megatron_ft.evaluation.engines.endpoint import Endpoint, check_url
from megatron_ft.evaluation.engines.engine import Engine, Request, Sample, answered
from megatron_ft.evaluation.engines.replay import Replay
from megatron_ft.evaluation.problems import Problem, data_digest, data_directory, load_problems, parse_languages
from megatron_ft.evaluation.prompts import check_style, parse_tasks, prompt_of
from megatron_ft.evaluation.records import (
    Generation,
    RecordWriter,
    generations_file,
    missing_samples,
    open_manifest,
    read_generations,
)
from megatron_ft.evaluation.stall import StallAlarm
from megatron_ft.evaluation.stopping import StopRule
from megatron_ft.files.hub_cache import download_hint, resolve_hub_cache
from megatron_ft.files.jsonl import parse_shard
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.progress import Progress
from megatron_ft.tokenizer import files as tokenizer_files

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("transformers", "endpoint", "replay")
TRACKER = "latest_checkpointed_iteration.txt"  # in the --save directory of a run
# What to do when no sample comes, by engine.
STALLED = {
    "transformers": "one batch should take less: is the GPU shared, or --batch-size too large?",
    "endpoint": "see whether the server is busy, and its log",
    "replay": "see whether the disk answers",
}
# Tokens that a style is made of: in a vocabulary that lacks one, it would be several tokens.
STYLE_TOKENS = {
    **dict.fromkeys(("starcodercommit", "diff"), ("<commit_before>", "<commit_msg>", "<commit_after>")),
    "issue": ("<issue_start>", "<issue_comment>"),
    "starchat": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("model", nargs="?", type=Path, metavar="MODEL", help="model or generations, see above")
    add("--engine", choices=ENGINES, default="transformers", help="where samples come from")
    add("--data", metavar="DIR", help="directory with HumanEvalPack's LANGUAGE.jsonl (default: $HUMANEVALPACK)")
    add("--tasks", default="fixtests,fixdocs,explain,synthesize", help="tasks, separated by commas")
    add("--languages", default="all", help="languages, separated by commas, or all")
    add("--style", required=True, help="prompt style the model was trained with, such as octocoder")
    add("--samples", type=int, default=20, help="samples per problem")
    add("--temperature", type=float, default=0.2, help="0 always takes the likeliest token, for one sample")
    add("--top-p", type=float, default=0.95, help="nucleus sampling: cumulative probability to sample from")
    add("--max-length", type=int, default=2048, metavar="TOKENS", help="longest prompt and answer together")
    add(
        "--batch-size", type=int, default=20,
        help="samples per request, or at a time; halved where memory does not suffice, or the server refuses several",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="seed of all samples")
    add("--shard", default="1/1", metavar="I/N", help="generate part I of N of the problems")
    add("--output", type=Path, metavar="DIR", help="directory of the evaluation")
    add("--endpoint", metavar="URL", help="server of --engine endpoint, like http://gpu7:8000/v1")
    add("--key-variable", metavar="NAME", help="environment variable with the endpoint's API key (default: no key)")
    add("--requests-at-once", type=int, default=8, metavar="N", help="requests to the endpoint at the same time")
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="time for one request to the endpoint")
    add("--attempts", type=int, default=8, metavar="N", help="attempts per request before the endpoint has failed")
    add("--stall-minutes", type=float, default=15, metavar="N", help="log when no sample came for so long; 0 disables")
    add("--write-prompts", metavar="FILE", help="write the prompts as JSONL (problem, prompt) and stop; needs no model")
    args = parser.parse_args(argv)
    args.tasks, args.languages = parse_tasks(args.tasks), parse_languages(args.languages)
    args.shard = parse_shard(args.shard)
    for task in args.tasks:
        check_style(task, args.style)
    if not args.write_prompts and (args.model is None or args.output is None):
        raise UserError("MODEL and --output are needed, or --write-prompts FILE")
    if args.samples < 1 or args.batch_size < 1 or args.max_length < 2:
        raise UserError("--samples and --batch-size must be at least 1, --max-length at least 2")
    if not 0 <= args.temperature < float("inf") or not 0 < args.top_p <= 1:
        raise UserError("--temperature must be 0 (greedy) or above, like 0.2; --top-p above 0 and at most 1")
    check_engine_flags(args)
    if args.engine != "replay" and args.temperature == 0 and args.samples > 1:
        raise UserError(f"--temperature 0 gives {args.samples} equal samples; use --samples 1")
    return args


def main() -> None:
    args = parse_args()
    data = data_directory(args.data)
    problems = {language: load_problems(data, language) for language in args.languages}
    if args.write_prompts:
        write_prompts(args, problems)
        return
    model = args.model
    if args.engine == "transformers" and is_run(model):
        model = converted(model, args.output)
    engine = open_engine(args, model, problems)
    open_manifest(args.output, manifest(args, engine, data))
    for task in args.tasks:
        for language in args.languages:
            generate(args, engine, task, language, problems[language])


def check_engine_flags(args: argparse.Namespace) -> None:
    """Raise UserError if the flags of --engine are missing, bad, or those of another engine."""
    if args.engine == "endpoint" and not args.write_prompts:
        if not args.endpoint:
            raise UserError("--engine endpoint: name the server with --endpoint URL, like http://gpu7:8000/v1")
        check_url(args.endpoint)
        if args.key_variable and not os.environ.get(args.key_variable):
            raise UserError(f"--key-variable {args.key_variable}: not set in the environment")
    elif args.endpoint and args.engine != "endpoint":
        raise UserError("--endpoint needs --engine endpoint")
    if args.requests_at_once < 1 or args.attempts < 1 or not 0 < args.timeout < float("inf"):
        raise UserError("--requests-at-once and --attempts must be at least 1, --timeout above 0")
    if not 0 <= args.stall_minutes < float("inf"):
        raise UserError("--stall-minutes must be 0 or above")


def is_run(directory: Path) -> bool:
    """Whether it is the --save directory of a run, not a Hugging Face model."""
    return (directory / TRACKER).is_file() and not (directory / "config.json").is_file()


def converted(run: Path, output: Path) -> Path:
    """OUTPUT/model, converted from the newest checkpoint of a run unless it exists. Only one of the
    shards that start at once converts it."""

    def convert(directory: Path) -> None:
        from megatron_ft.weights.adapters import open_adapters

        print(f"{run}: a run; converting its newest checkpoint to {output / 'model'}", file=sys.stderr, flush=True)
        program, new = "convert/megatron_to_hf.py", directory / "model"
        flags = ["--load", str(run.resolve()), "--output", str(new), *(["--merge-lora"] if open_adapters(run) else [])]
        done = subprocess.run(
            [sys.executable, program, *flags], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False
        )
        if done.returncode != 0:
            raise UserError(f"{run}: cannot be converted, see above; convert it with {program}, and name its output")
        if not tokenizer_files.files_of(new):
            raise UserError(f"{run}: has no tokenizer; convert it with {program} --tokenizer-file, and name its output")
        for path in list(new.iterdir()):
            path.rename(directory / path.name)
        new.rmdir()

    model = output.resolve() / "model"
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    build_once(model, convert)
    return model


def open_engine(args: argparse.Namespace, model: Path, problems: dict[str, list[Problem]]) -> Engine:
    """The engine that --engine names; UserError if it cannot answer what is asked."""
    if args.engine == "replay":
        return Replay(model, args.tasks, problems, args.samples, args.style)
    sampling = (args.temperature, args.top_p, args.max_length)
    if args.engine == "endpoint":
        key = os.environ[args.key_variable] if args.key_variable else None
        limits = (args.requests_at_once, args.timeout, args.attempts)
        return Endpoint(args.endpoint, str(model), key, *sampling, args.batch_size, *limits)
    directory, notice = resolve_hub_cache(model)
    if notice:
        print(notice, file=sys.stderr)
    if not directory.exists():
        raise UserError(f"{directory}: no such directory{download_hint(directory)}")
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory}: not a Hugging Face model (no config.json)")

    from megatron_ft.evaluation.engines.sampling import LocalModel

    local = LocalModel(directory, *sampling)
    check_tokens(local.tokenizer, args.style, directory)
    return local


def write_prompts(args: argparse.Namespace, problems: dict[str, list[Problem]]) -> None:
    """One row per task, language and problem, in the data's order."""
    tasks = [task for task in args.tasks if task != "explainsynthesize"]
    if tasks != args.tasks:
        print("no prompts of explainsynthesize: they hold what a model describes", file=sys.stderr)
    with OutputFile(args.write_prompts) as output, writing(args.write_prompts):
        for task in tasks:
            for problem in (problem for language in args.languages for problem in problems[language]):
                row = {"task": task, "problem": problem.task_id, "prompt": prompt_of(problem, task, args.style)}
                output.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        output.commit()


def check_tokens(tokenizer, style: str, directory: Path) -> None:
    """Raise UserError if a token that the style is made of is not one token."""
    for token in STYLE_TOKENS.get(style, ()):
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            raise UserError(f"{directory}: its tokenizer has no token {token}, which --style {style} needs")


def manifest(args: argparse.Namespace, engine: Engine, data: Path) -> dict:
    """What every shard of the evaluation must agree on."""
    found = {
        "engine": args.engine,
        **engine.identity(),
        "data_sha256": {language: data_digest(data, language) for language in args.languages},
        "tasks": args.tasks,
        "languages": args.languages,
        "style": args.style,
        "samples": args.samples,
    }
    if args.engine == "transformers" and is_run(args.model):
        found["converted_from"] = str(args.model.resolve())
    if args.engine != "replay":  # whose samples were drawn before
        names = ("temperature", "top_p", "max_length", "seed")
        found |= {name: getattr(args, name) for name in names}
    return {**found, "version": __version__, "eos": engine.eos}


def generate(args: argparse.Namespace, engine: Engine, task: str, language: str, problems: list[Problem]) -> None:
    """Generate the samples that a shard lacks for one task and language."""
    index, count = args.shard
    mine = {problem.task_id: problem for problem in problems[index - 1 :: count]}
    missing = missing_samples(read_generations(args.output, task, language), mine, args.samples)
    requests = requests_for(args, engine, task, language, mine, missing)
    path = generations_file(args.output, task, language, f"{index}-of-{count}")
    name = f"{task}-{language}"
    tokens = 0
    with (
        RecordWriter(path) as writer,
        Progress(name, len(missing), " samples") as progress,
        StallAlarm(name, args.stall_minutes, STALLED[args.engine]) as alarm,
    ):
        for request, samples in answered(engine, requests):
            writer.append(records_of(request, samples))
            alarm.progressed()
            tokens += sum(sample.tokens for sample in samples)
            progress.update(len(samples), f"{tokens / progress.seconds:.0f} tokens/s")
    kept = len(mine) * args.samples - len(missing)
    print(f"{name}: {len(missing):,} samples generated, {kept:,} kept from before", flush=True)


def requests_for(
    args: argparse.Namespace,
    engine: Engine,
    task: str,
    language: str,
    problems: dict[str, Problem],
    missing: list[tuple[str, int]],
) -> Iterator[Request]:
    """The missing samples, those of one prompt together, at most --batch-size of them."""
    rule = StopRule(language, task, args.style, engine.eos)
    descriptions = read_generations(args.output, "explaindescribe", language) if task == "explainsynthesize" else {}
    for task_id, keys in groupby(missing, lambda key: key[0]):
        problem, wanted = problems[task_id], {number for _, number in keys}
        prompts = [prompt_for(args, task, problem, number, descriptions, engine.eos) for number in range(args.samples)]
        for (prompt, _), pairs in groupby(enumerate(prompts), lambda pair: (pair[1], pair[0] // args.batch_size)):
            group = tuple(number for number, _ in pairs)
            if chosen := tuple(number for number in group if number in wanted):
                yield Request(task, problem, prompt, chosen, group, args.seed, rule)


def prompt_for(args, task: str, problem: Problem, sample: int, descriptions: dict, eos: str | None) -> str:
    """The prompt of a sample; explainsynthesize answers the description of the same number."""
    if task != "explainsynthesize":
        return prompt_of(problem, task, args.style)
    described = descriptions.get((problem.task_id, sample))
    if described is None:
        raise UserError(
            f"{args.output}: no description {sample} of {problem.task_id}; generate explaindescribe first, all shards"
        )
    return prompt_of(problem, task, args.style, cut(described.text, problem, "explaindescribe", args.style, eos=eos))


def records_of(request: Request, samples: list[Sample]) -> list[Generation]:
    """The records of an answered request."""
    problem, digest = request.problem, hashlib.sha256(request.prompt.encode()).hexdigest()
    return [
        Generation(
            request.task, problem.language, problem.task_id, number, s.seed, digest, s.text, s.tokens, s.finish, s.prompt_cut
        )
        for number, s in zip(request.numbers, samples, strict=True)
    ]  # fmt: skip


if __name__ == "__main__":
    run_program(main)
