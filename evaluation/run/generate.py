"""Generate a model's answers to HumanEvalPack; run again to continue where it stopped.

    export HUMANEVALPACK=/data/humanevalpack
    python evaluation/run/generate.py runs/first-hf --style octocoder --output evaluations/first
    python evaluation/run/generate.py --style octocoder --write-prompts p.jsonl --tasks fixtests

MODEL is a Hugging Face directory. A sample depends on --seed, its problem and its number only: not
on shards, order, batch or restarts. --shard I/N generates every N-th problem, for a SLURM array.
explain is two tasks: a sample of the second answers the same sample of the first.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import hashlib
import json
from collections.abc import Sequence
from itertools import groupby

from megatron_ft import __version__
from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.evaluation.cutting import cut
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
from megatron_ft.evaluation.stopping import StopRule
from megatron_ft.files.hub_cache import download_hint, resolve_hub_cache
from megatron_ft.files.jsonl import parse_shard
from megatron_ft.files.output import OutputFile, writing
from megatron_ft.progress import Progress

# Tokens that a style is made of: in a vocabulary that lacks one, it would be several tokens.
STYLE_TOKENS = {
    **dict.fromkeys(("starcodercommit", "diff"), ("<commit_before>", "<commit_msg>", "<commit_after>")),
    "issue": ("<issue_start>", "<issue_comment>"),
    "starchat": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("model", nargs="?", type=Path, metavar="MODEL", help="Hugging Face directory with tokenizer files")
    add("--data", metavar="DIR", help="directory with HumanEvalPack's LANGUAGE.jsonl (default: $HUMANEVALPACK)")
    add("--tasks", default="fixtests,fixdocs,explain,synthesize", help="tasks, separated by commas")
    add("--languages", default="all", help="languages, separated by commas, or all")
    add("--style", required=True, help="prompt style the model was trained with, such as octocoder")
    add("--samples", type=int, default=20, help="samples per problem")
    add("--temperature", type=float, default=0.2, help="0 always takes the likeliest token, for one sample")
    add("--top-p", type=float, default=0.95, help="nucleus sampling: cumulative probability to sample from")
    add("--max-length", type=int, default=2048, metavar="TOKENS", help="longest prompt and answer together")
    add("--batch-size", type=int, default=20, help="samples at a time; halved where memory does not suffice")
    add("--seed", type=int, default=0, help="seed of all samples")
    add("--shard", default="1/1", metavar="I/N", help="generate part I of N of the problems")
    add("--output", type=Path, metavar="DIR", help="directory of the evaluation")
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
    if args.temperature == 0 and args.samples > 1:
        raise UserError(f"--temperature 0 gives {args.samples} equal samples; use --samples 1")
    return args


def main() -> None:
    args = parse_args()
    data = data_directory(args.data)
    problems = {language: load_problems(data, language) for language in args.languages}
    if args.write_prompts:
        write_prompts(args, problems)
        return
    directory, notice = resolve_hub_cache(args.model)
    if notice:
        print(notice, file=sys.stderr)
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory}: not a Hugging Face model (no config.json){download_hint(directory)}")

    from megatron_ft.evaluation.engines.sampling import LocalModel

    model = LocalModel(directory, args.temperature, args.top_p, args.max_length)
    check_tokens(model.tokenizer, args.style, directory)
    open_manifest(args.output, {**manifest(args, directory, data), "eos": model.tokenizer.eos_token})
    for task in args.tasks:
        for language in args.languages:
            generate(args, model, task, language, problems[language])


def write_prompts(args: argparse.Namespace, problems: dict[str, list[Problem]]) -> None:
    """One row per task, language and problem, in the data's order."""
    with OutputFile(args.write_prompts) as output, writing(args.write_prompts):
        for task in args.tasks:
            for problem in (problem for language in args.languages for problem in problems[language]):
                row = {"task": task, "problem": problem.task_id, "prompt": prompt_of(problem, task, args.style)}
                output.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        output.commit()


def check_tokens(tokenizer, style: str, directory: Path) -> None:
    """Raise UserError if a token that the style is made of is not one token."""
    for token in STYLE_TOKENS.get(style, ()):
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            raise UserError(f"{directory}: its tokenizer has no token {token}, which --style {style} needs")


def manifest(args: argparse.Namespace, directory: Path, data: Path) -> dict:
    """What every shard of the evaluation must agree on."""
    names = ("config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json")
    sizes = {name: (directory / name).stat().st_size for name in names if (directory / name).is_file()}
    config = (directory / "config.json").read_bytes()
    return {
        "model": str(directory.resolve()),
        "model_files": sizes,
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "data_sha256": {language: data_digest(data, language) for language in args.languages},
        "tasks": args.tasks,
        "languages": args.languages,
        "style": args.style,
        "samples": args.samples,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_length": args.max_length,
        "seed": args.seed,
        "version": __version__,
    }


def generate(args: argparse.Namespace, model, task: str, language: str, problems: list[Problem]) -> None:
    """Generate the samples that a shard lacks for one task and language."""
    index, count = args.shard
    mine = problems[index - 1 :: count]
    by_id = {problem.task_id: problem for problem in mine}
    done = read_generations(args.output, task, language)
    missing = missing_samples(done, by_id, args.samples)
    rule = StopRule(language, task, args.style, model.tokenizer.eos_token)
    descriptions = read_generations(args.output, "explaindescribe", language) if task == "explainsynthesize" else {}
    path = generations_file(args.output, task, language, f"{index}-of-{count}")
    tokens = 0
    with RecordWriter(path) as writer, Progress(f"{task}-{language}", len(missing), " samples") as progress:
        for name, group in groupby(missing, lambda key: key[0]):
            problem = by_id[name]
            prompts = [(sample, prompt_for(args, task, problem, sample, descriptions, model)) for _, sample in group]
            for prompt, samples in groupby(prompts, lambda pair: pair[1]):
                numbers = [sample for sample, _ in samples]
                for start in range(0, len(numbers), args.batch_size):
                    batch = numbers[start : start + args.batch_size]
                    records = sample_batch(args, model, rule, task, problem, prompt, batch)
                    writer.append(records)
                    tokens += sum(record.tokens for record in records)
                    progress.update(len(batch), f"{tokens / progress.seconds:.0f} tokens/s")


def prompt_for(args, task: str, problem: Problem, sample: int, descriptions: dict, model) -> str:
    """The prompt of a sample; explainsynthesize answers the description of the same number."""
    if task != "explainsynthesize":
        return prompt_of(problem, task, args.style)
    described = descriptions.get((problem.task_id, sample))
    if described is None:
        raise UserError(
            f"{args.output}: no description {sample} of {problem.task_id}; generate explaindescribe first, all shards"
        )
    eos = model.tokenizer.eos_token
    return prompt_of(problem, task, args.style, cut(described.text, problem, "explaindescribe", args.style, eos=eos))


def sample_batch(args, model, rule: StopRule, task: str, problem: Problem, prompt: str, batch: list[int]):
    """Records of these samples of a problem."""
    seeds = [seed_of(args.seed, task, problem.task_id, sample) for sample in batch]
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    return [
        Generation(
            task, problem.language, problem.task_id, number, seed, digest, s.text, s.tokens, s.finish, s.prompt_cut
        )
        for number, seed, s in zip(batch, seeds, model.sample(prompt, seeds, rule), strict=True)
    ]


def seed_of(seed: int, task: str, problem: str, sample: int) -> int:
    """63 bits that depend on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed} {task} {problem} {sample}".encode()).digest()[:8]) >> 1


if __name__ == "__main__":
    run_program(main)
