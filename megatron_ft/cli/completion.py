"""Completion of `megatron-ft` in shells: scripts that ask the command itself what fits.

Commands are found in their folders, flags in the program's --help: nothing here has to be kept in
step with them.
"""

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

from megatron_ft.cli.commands import Command

SHELLS = {
    "bash": """\
_megatron_ft() {
  mapfile -t COMPREPLY < <(megatron-ft completion words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o default -F _megatron_ft megatron-ft
""",
    "zsh": """\
#compdef megatron-ft
_megatron_ft() {
  local -a found=(${(f)"$(megatron-ft completion words "${(@)words[2,CURRENT]}" 2>/dev/null)"})
  if (( $#found )); then compadd -a found; else _files; fi
}
compdef _megatron_ft megatron-ft
""",
    "fish": """\
function __megatron_ft
  megatron-ft completion words (commandline -opc)[2..] (commandline -ct) 2>/dev/null
end
complete -c megatron-ft -a '(__megatron_ft)'
""",
}


def candidates(commands: Mapping[tuple[str, ...], Command], words: Sequence[str]) -> list[str]:
    """What the last of `words`, those after `megatron-ft`, could become; [] where a file is meant.

    Commands first, then the flags of the command that is complete.
    """
    *before, last = words or [""]
    for length in (2, 1):
        if command := commands.get(tuple(before[:length])):
            return [flag for flag in flags_of(command) if flag.startswith(last)] if last.startswith("-") else []
    fitting = {
        name[len(before)] for name in commands if len(name) > len(before) and name[: len(before)] == tuple(before)
    }
    fitting |= {"completion"} if not before else set(SHELLS) if before == ["completion"] else set()
    return sorted(word for word in fitting if word.startswith(last))


def flags_of(command: Command) -> list[str]:
    """All flags with two hyphens that the program's --help describes."""
    shown = subprocess.run(
        [sys.executable, "-P", str(command.path), "--help"], capture_output=True, encoding="utf-8", errors="replace"
    )
    return sorted(set(re.findall(r"^ +(?:-\w, )?(--[a-z][\w-]*)", shown.stdout, flags=re.MULTILINE)))
