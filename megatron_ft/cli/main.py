"""The command `megatron-ft`: every program under one name, wherever the package is installed.

    megatron-ft tokenize rows.jsonl --output-prefix data/rows --tokenizer-file tokenizer.json
    megatron-ft dataset near-dedup --help
    megatron-ft completion bash

A program runs as its own process, from the same file as `python preprocess/tokenize.py` in a
checkout.
"""

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ft import __version__
from megatron_ft.called_as import NAME
from megatron_ft.cli.commands import Command, all_commands
from megatron_ft.cli.completion import SHELLS, candidates
from megatron_ft.errors import EXIT_DONE, UserError, run_program


def main() -> int:
    """Find the command and become its program, or print help; the exit status."""
    words = sys.argv[1:]
    if words[:1] == ["--version"]:
        print(f"{NAME} {__version__}")
        return EXIT_DONE
    if words[:1] == ["completion"]:
        return complete(words[1:])
    commands = all_commands()
    for length in (2, 1):
        if command := commands.get(tuple(words[:length])):
            become(command, words[length:])
    group = words[:1]
    listed = [command for name, command in commands.items() if name[: len(group)] == tuple(group)]
    if listed and words[len(group) :] in ([], ["-h"], ["--help"]) or group in ([], ["-h"], ["--help"]):
        print(help_text(listed or list(commands.values()), group if listed else []))
        return EXIT_DONE
    shown = words[: 2 if listed else 1]
    near = nearest(shown[-1], commands)
    hint = f"did you mean {NAME} {' '.join(near.words)}? " if near else ""
    raise UserError(
        f"{' '.join(shown)}: no such command; {hint}{NAME}{' ' + group[0] if listed else ''} --help lists them"
    )


def nearest(word: str, commands: Mapping[tuple[str, ...], Command]) -> Command | None:
    """The command that `word` probably means: a typing error, no group or another, or a file."""
    last_words = {words[-1]: command for words, command in commands.items()}
    name = Path(word).stem.replace("_", "-")
    found = difflib.get_close_matches(name, last_words, n=1, cutoff=0.75)
    return last_words[found[0]] if found else None


def become(command: Command, arguments: Sequence[str]) -> None:
    """Replace this process by the program, so that signals and the exit status are its own."""
    os.environ["MEGATRON_FT_CALLED_AS"] = " ".join([NAME, *command.words])
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", str(command.path), *arguments])


def help_text(commands: Sequence[Command], group: Sequence[str]) -> str:
    """The commands of a group, or all of them, with what they do."""
    width = max(len(" ".join(command.words)) for command in commands)
    lines = [f"  {' '.join(command.words):{width}}  {command.summary}" for command in commands]
    usage = f"usage: {' '.join([NAME, *group])} COMMAND [arguments]\n\n"
    if not group:
        lines += [f"  {'completion SHELL':{width}}  Print the completion script of {', '.join(SHELLS)}"]
    return usage + "\n".join(lines) + f"\n\n{NAME} COMMAND --help describes one of them."


def complete(words: Sequence[str]) -> int:
    """`completion SHELL` prints that shell's script; `completion words WORD...`, which the scripts
    call, what the last word could become."""
    if words and words[0] in SHELLS:
        print(SHELLS[words[0]], end="")
    elif words and words[0] == "words":
        print(*candidates(all_commands(), words[1:]), sep="\n")
    else:
        raise UserError(f"completion: expected one of {', '.join(SHELLS)}; like: source <({NAME} completion bash)")
    return EXIT_DONE


def run() -> None:
    """What the installed command calls."""
    run_program(main)


if __name__ == "__main__":
    run()
