"""Score an evaluation: run each program in a sandbox, and print pass@k.

    export HUMANEVALPACK=/data/humanevalpack
    python evaluation/run/score.py evaluations/first --workers 8
    python evaluation/run/score.py --import-generations generations.json --task fixtests \\
        --languages python --output evaluations/octocoder

Faithful mode gives the scores of the reference (bigcode-evaluation-harness); clean mode does not
fail right answers for the reference's defects. Programs that are equal run once, and what has been
run is not run again. Without a working sandbox or toolchain there is no score, and the exit status
is 1. No GPU is used: run this as a CPU job.
"""

import sys
from pathlib import Path

# The repository root, so that the package is found from any directory.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError, run_program
from megatron_ft.evaluation.cutting import MODES
from megatron_ft.evaluation.problems import (
    EXCLUDED,
    Problem,
    data_digest,
    data_directory,
    load_problems,
    parse_languages,
)
from megatron_ft.evaluation.programs import Program
from megatron_ft.evaluation.prompts import parse_tasks
from megatron_ft.evaluation.records import (
    MANIFEST,
    NO_SCORE,
    STATUSES,
    Result,
    Verdict,
    read_manifest,
    results_file,
)
from megatron_ft.evaluation.runner import default_workers, key_of, run_programs
from megatron_ft.evaluation.samples import Sample, import_lists, programs_of
from megatron_ft.evaluation.sandbox.probes import choose_sandbox
from megatron_ft.evaluation.sandbox.sandbox import KINDS, Sandbox, SandboxError, ToolchainError
from megatron_ft.evaluation.statistics import mean_pass_at_k
from megatron_ft.evaluation.toolchains import smoke
from megatron_ft.evaluation.toolchains.find import find_toolchain
from megatron_ft.evaluation.toolchains.toolchain import RUN_CPU_S, Toolchain
from megatron_ft.evaluation.verdicts import UNCACHED, VerdictCache
from megatron_ft.files.atomic import replace_file
from megatron_ft.files.jsonl_row import to_line
from megatron_ft.files.output import writing
from megatron_ft.printable import printable
from megatron_ft.progress import Progress

EXIT_NO_SCORE = 1
K = (1, 10, 100)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("directory", nargs="?", type=Path, metavar="DIR", help="directory of an evaluation")
    add("--import-generations", type=Path, metavar="FILE", help="score the reference harness's lists instead")
    add("--output", type=Path, metavar="DIR", help="directory to make of --import-generations")
    add("--tasks", "--task", help="tasks, separated by commas (default: all of the evaluation)")
    add("--languages", help="languages, separated by commas, or all (default: all of the evaluation)")
    add("--data", metavar="DIR", help="directory with HumanEvalPack's LANGUAGE.jsonl (default: $HUMANEVALPACK)")
    add("--mode", choices=MODES, default="faithful", help="what to cut, and when a program has passed")
    add("--workers", type=int, metavar="N", help="programs at a time (default: one per core of this process)")
    add("--sandbox", choices=KINDS, help="default: bwrap, else restricted, whichever refuses hostile probes here")
    add("--cpu-limit", type=float, metavar="SECONDS", help="CPU time per program (default: the reference's timeouts)")
    add(
        "--verdicts",
        type=Path,
        metavar="DIR",
        help="verdict cache, which evaluations may share (default: DIR/verdicts)",
    )
    add("--partial", action="store_true", help="score although samples are missing")
    args = parser.parse_args(argv)
    if (args.import_generations is None) != (args.output is None):
        raise UserError("--import-generations FILE and --output DIR belong together")
    if (args.directory is None) == (args.output is None):
        raise UserError("name either DIR, an evaluation, or --import-generations FILE --output DIR")
    args.tasks = parse_tasks(args.tasks) if args.tasks else None
    args.languages = parse_languages(args.languages) if args.languages else None
    if args.import_generations and (len(args.tasks or ()) != 1 or len(args.languages or ()) != 1):
        raise UserError("--import-generations: name its --task and --languages, one of each")
    args.workers = default_workers() if args.workers is None else args.workers
    if args.workers < 1 or (args.cpu_limit is not None and not 0 < args.cpu_limit < 1e6):
        raise UserError("--workers must be at least 1, --cpu-limit above 0")
    return args


def main() -> int:
    args = parse_args()
    data = data_directory(args.data)
    directory = args.directory or args.output
    if args.import_generations:
        task, language = args.tasks[0], args.languages[0]
        import_lists(args.import_generations, directory, task, language, data, load_problems(data, language))
    manifest = read_manifest(directory)
    tasks, languages = chosen(args, manifest, directory)
    problems = {language: load_problems(data, language) for language in languages}
    check_data(manifest, data, languages, directory)
    plan = {
        (task, language): programs_of(directory, manifest, task, language, problems[language], args.mode)
        for language in languages
        for task in tasks
    }
    if missing := sum(count for _, count in plan.values()):
        total = missing + sum(len(samples) for samples, _ in plan.values())
        print(f"{missing:,} of {total:,} samples are missing in {directory}", file=sys.stderr)
        if not args.partial:
            print("error: no score without them; generate the rest, or type --partial", file=sys.stderr)
            return EXIT_NO_SCORE
    try:
        return score(args, directory, plan, problems)
    except SandboxError as error:
        print(f"error: sandbox_error: {printable(error)}", file=sys.stderr)
    except ToolchainError as error:
        print(f"error: toolchain_error: {printable(error)}", file=sys.stderr)
    return EXIT_NO_SCORE


def chosen(args: argparse.Namespace, manifest: Mapping[str, Any], directory: Path) -> tuple[list[str], list[str]]:
    """The tasks and languages to score. Descriptions have no score of their own."""
    answers = []
    for name in ("tasks", "languages"):
        has = manifest.get(name)
        if not isinstance(has, list) or not isinstance(manifest.get("samples"), int):
            raise UserError(f"{directory / MANIFEST}: no list of {name}, or no samples; expected one of generate.py")
        for one in getattr(args, name) or ():
            if one not in has:
                raise UserError(f"{directory}: its {name} are {', '.join(has)}, not {one}")
        answers.append([one for one in getattr(args, name) or has if one != "explaindescribe"])
    return answers[0], answers[1]


def check_data(manifest: Mapping[str, Any], data: Path, languages: list[str], directory: Path) -> None:
    """Raise UserError if the data is not what the answers were generated from."""
    for language in languages:
        if (manifest.get("data_sha256") or {}).get(language) != data_digest(data, language):
            raise UserError(f"{data}: its {language} problems are not those that {directory} was generated from")


Plan = Mapping[tuple[str, str], tuple[list[Sample], int]]


def score(args: argparse.Namespace, directory: Path, plan: Plan, problems: dict[str, list[Problem]]) -> int:
    """Run what has not been run, write the results, and print the scores."""
    sandbox, notice = choose_sandbox(args.sandbox)
    if notice:
        print(f"note: {printable(notice)}", file=sys.stderr)
    toolchains = {language: find_toolchain(language) for language in problems}
    cache_directory = args.verdicts or directory / "verdicts"
    status = 0
    for language, toolchain in toolchains.items():
        cpu_s = args.cpu_limit or RUN_CPU_S[language]
        mine = {task: samples for (task, name), (samples, _) in plan.items() if name == language}
        with VerdictCache(cache_directory, language) as cache:
            run = Run(sandbox, toolchain, cpu_s, args.workers, cache)
            executed = run.execute([sample for samples in mine.values() for sample in samples if not sample.is_empty])
            for task, samples in mine.items():
                results = [run.result(sample) for sample in samples]
                write_results(results_file(directory, task, language, args.mode), results)
                print_results(f"{task}-{language}", args.mode, results, problems[language])
            print(f"{language}: {executed:,} programs executed, {sandbox.kind}, {toolchain.version}")
        if any(result.status in NO_SCORE for samples in mine.values() for result in map(run.result, samples)):
            status = EXIT_NO_SCORE
    return status


@dataclass(frozen=True)
class Run:
    """The programs of a language and their verdicts."""

    sandbox: Sandbox
    toolchain: Toolchain
    cpu_s: float
    workers: int
    cache: VerdictCache

    def key(self, program: Program) -> str:
        return key_of(program, self.toolchain, self.sandbox, self.cpu_s)

    def execute(self, samples: list[Sample]) -> int:
        """Run the programs without a verdict, each once; returns how many."""
        new = {}
        for sample in samples:
            key = self.key(sample.program)
            if key not in self.cache.known or self.cache.known[key].status in NO_SCORE:
                new[key] = sample
        if not new:
            return 0
        smoke.check(self.toolchain, self.sandbox)
        random = {key for key, sample in new.items() if sample.problem in UNCACHED}
        programs = [sample.program for sample in new.values()]
        with Progress(self.toolchain.language, len(programs), " programs") as progress:
            for _, verdict in run_programs(programs, self.toolchain, self.sandbox, self.workers, self.cpu_s):
                self.cache.add(verdict, keep=verdict.key not in random)
                progress.update(1)
        return len(programs)

    def result(self, sample: Sample) -> Result:
        """The verdict on a sample."""
        if sample.is_empty:
            tools = {"sandbox": self.sandbox.kind, "toolchain": self.toolchain.version}
            nothing = Verdict("", sample.program.sha256, "empty", None, None, 0.0, 0.0, 0, "", **tools)
        else:
            nothing = self.cache.known[self.key(sample.program)]
        fields = {name: value for name, value in asdict(nothing).items() if name != "key"}
        return Result(problem=sample.problem, sample=sample.number, **fields)


def write_results(path: Path, results: list[Result]) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, b"".join(to_line(asdict(result)) for result in results))


def print_results(name: str, mode: str, results: list[Result], problems: list[Problem]) -> None:
    """pass@k over the problems, and how many samples have which status."""
    statuses = Counter(result.status for result in results)
    shown = ", ".join(f"{status} {statuses[status]:,}" for status in STATUSES if statuses[status])
    print(f"{name}: {len(results):,} samples, {len({result.program_sha256 for result in results}):,} programs: {shown}")
    for status in NO_SCORE:
        if statuses[status]:
            first = next(result for result in results if result.status == status)
            print(f"error: {status}: {printable(first.output)}", file=sys.stderr)
    if any(statuses[status] for status in NO_SCORE):
        return
    samples = Counter(result.problem for result in results)
    passed = Counter(result.problem for result in results if result.status == "passed")
    ids = [p.task_id for p in problems if samples[p.task_id] and not (mode == "clean" and p.task_id in EXCLUDED)]
    counts = [(samples[task_id], passed[task_id]) for task_id in ids]
    scores = {f"pass@{k}": mean_pass_at_k(counts, k) for k in K if counts and min(counts)[0] >= k}
    for k, value in scores.items():
        print(f"{name}: {mode} {k} {value!r} over {len(ids)} problems")


if __name__ == "__main__":
    run_program(main)
