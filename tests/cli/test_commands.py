"""`megatron-ft` in a checkout: every program has one name, help and completion know them all."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, one_error_line, run_program

from megatron_ft.called_as import FOLDERS, INTERNAL
from megatron_ft.cli.commands import all_commands
from megatron_ft.cli.completion import SHELLS, candidates

COMMANDS = all_commands()


def test_every_program_has_one_name_and_a_summary():
    programs = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert {command.path for command in COMMANDS.values()} == programs - {ROOT / name for name in INTERNAL}
    assert len(COMMANDS) == len(programs) - len(INTERNAL)
    assert all(10 < len(command.summary) < 140 for command in COMMANDS.values())
    single = {words[0] for words in COMMANDS if len(words) == 1}
    assert single >= set("tokenize view plan finetune submit status verify complete merge train-tokenizer".split())
    assert not single & {words[0] for words in COMMANDS if len(words) == 2}


def test_program_becomes_the_process_and_is_named_as_it_was_called():
    done = run_program("megatron_ft.cli.main", "dataset", "dedup-shuffle", "--help", env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.startswith("usage: megatron-ft dataset dedup-shuffle [-h]")
    assert "    megatron-ft dataset dedup-shuffle rows.jsonl" in done.stdout


def test_messages_name_programs_as_they_were_called(tmp_path):
    command = ("megatron_ft.cli.main", "complete", tmp_path)
    by_name = run_program(*command, ok=False, env={"PYTHONPATH": str(ROOT)})
    assert f"convert it with megatron-ft convert megatron-to-hf --load {tmp_path} first" in one_error_line(by_name)
    by_file = run_program("convert/complete.py", tmp_path, ok=False)
    assert f"convert it with convert/megatron_to_hf.py --load {tmp_path} first" in one_error_line(by_file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["tokenizer"],
            "error: tokenizer: no such command; did you mean megatron-ft tokenize? megatron-ft --help lists",
        ),
        (["convert", "verify"], "error: convert verify: no such command; did you mean megatron-ft verify? "),
        (
            ["dataset", "mixx"],
            "error: dataset mixx: no such command; did you mean megatron-ft dataset mix? megatron-ft dataset --help",
        ),
        (["completion", "tcsh"], "error: completion: expected one of bash, zsh, fish"),
    ],
)
def test_unknown_command_is_one_line(words, message):
    done = run_program("megatron_ft.cli.main", *words, ok=False, env={"PYTHONPATH": str(ROOT)})
    assert one_error_line(done).startswith(message) and done.returncode == 2


def test_scripts_for_jobs_are_not_written_below_a_file(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    line = one_error_line(run_program("launch/slurm.py", "init", tmp_path / "rows.jsonl", ok=False))
    assert "rows.jsonl: cannot be written (Not a directory); choose another path" in line


def test_candidates():
    assert candidates(COMMANDS, ["to"]) == ["tokenize"]
    assert candidates(COMMANDS, ["dataset", "near"]) == ["near-dedup"]
    assert candidates(COMMANDS, ["completion", ""]) == sorted(SHELLS)
    assert candidates(COMMANDS, ["tokenize", "rows"]) == []  # a file
    assert candidates(COMMANDS, ["dataset", "dedup-shuffle", "rows", "--out"]) == ["--output", "--output-key"]


ASK = {
    "bash": 'COMP_WORDS=(megatron-ft dataset dedup); COMP_CWORD=2; _megatron_ft; echo "${COMPREPLY[@]}"',
    "zsh": "compadd() { shift; print -l ${(P)1} }; words=(megatron-ft dataset dedup); CURRENT=3; _megatron_ft",
    "fish": "complete -C 'megatron-ft dataset dedup'",
}


@pytest.mark.parametrize("shell", SHELLS)
def test_shell_completes(shell, tmp_path):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    command = tmp_path / "megatron-ft"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m megatron_ft.cli.main "$@"\n')
    command.chmod(0o755)
    script = run_program("megatron_ft.cli.main", "completion", shell, env={"PYTHONPATH": str(ROOT)}).stdout
    path = f"{tmp_path}:/usr/local/bin:/usr/bin:/bin"
    code = {"zsh": "compdef() { :; }\n"}.get(shell, "") + script + ASK[shell]
    done = subprocess.run(
        [shell, "-c", code], env={"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == "dedup-shuffle", done.stderr
