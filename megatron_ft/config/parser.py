"""The parser of every program: usage errors are one line, and --help shows defaults."""

import argparse

from megatron_ft.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose usage errors are UserErrors: one line that names the flag."""

    @property
    def actions(self) -> dict[str, argparse.Action]:
        """The action of every option string, for programs that share a command line."""
        return dict(self._option_string_actions)

    def error(self, message: str):
        """Raise UserError instead of printing usage and ending the process."""
        raise UserError(f"{message}; see --help")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every flag's default is shown, unless there is none to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        return action.help if none or action.required else super()._get_help_string(action)
