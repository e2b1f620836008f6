"""The parser of every program: usage errors are one line, --help shows defaults, and --config reads
flags from a file."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from megatron_ft.called_as import CALLED_AS, as_called
from megatron_ft.config.config_file import CONFIG, PRINT_CONFIG, Setting, as_yaml, is_appended, take_files
from megatron_ft.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose usage errors are UserErrors: one line that names the flag.

    With `reads_config`, --config FILE gives what is not on the command line, and --print-config
    prints the result. Without it, these two are left to another parser.
    """

    def __init__(self, *args: Any, reads_config: bool = True, **kwargs: Any) -> None:
        if CALLED_AS and not (kwargs.get("prog") or "").startswith(CALLED_AS):  # as a subcommand's does
            kwargs["prog"] = CALLED_AS
        super().__init__(*args, **kwargs)
        self.reads_config = reads_config
        if reads_config:
            add_config_flags(self)

    @property
    def actions(self) -> dict[str, argparse.Action]:
        """The action of every option string, for programs that share a command line."""
        return dict(self._option_string_actions)

    @property
    def settable(self) -> dict[str, argparse.Action]:
        """The actions that a file may set: of option strings with two hyphens."""
        other = {"--help", CONFIG, PRINT_CONFIG}
        return {name: a for name, a in self.actions.items() if name.startswith("--") and name not in other}

    def format_help(self) -> str:
        return as_called(super().format_help())

    def error(self, message: str):
        """Raise UserError instead of printing usage and ending the process."""
        raise UserError(f"{message}; see --help")

    def parse_known_args(self, args=None, namespace=None):
        """argparse's, after the settings of --config have become defaults."""
        words = list(sys.argv[1:] if args is None else args)
        if not self.reads_config:
            return super().parse_known_args(words, namespace)
        words, settings = take_files(words)
        printing = PRINT_CONFIG in words
        if printing:
            self._keep_texts()
            words.remove(PRINT_CONFIG)
        for setting in settings:
            self._set_default(setting, words)
        found = super().parse_known_args(words, namespace)
        if printing:
            print(as_yaml(self.settings_of(found[0])), end="")
            self.exit()
        return found

    def check(self, action: argparse.Action, setting: Setting) -> Any:
        """The value of an action that takes some. Raises UserError where it cannot have it."""
        texts = list(setting.values(action))
        try:
            if is_appended(action):
                return [self._get_values(action, [text]) for text in texts]
            return self._get_values(action, texts)
        except argparse.ArgumentError as error:
            raise UserError(f"{setting.where}: {error.message}") from None

    def _set_default(self, setting: Setting, words: Sequence[str]) -> None:
        """Make a setting the default of its action, which is then no longer required.

        It is left out where `words` have its flag, or one that excludes it.
        """
        positionals = self._get_positional_actions()
        option = ""
        if action := next((a for a in positionals if setting.key in _names(a)), None):
            action.nargs = "?" if action.nargs is None else "*" if action.nargs == "+" else action.nargs
        else:
            option = setting.option(self.settable, {})
            action = self.settable[option]
        groups = [group for group in self._mutually_exclusive_groups if action in group._group_actions]
        rivals = [action, *(rival for group in groups for rival in group._group_actions)]
        typed = {word.partition("=")[0] for word in words}
        if any(typed & {*rival.option_strings} for rival in rivals):
            return
        if action.nargs != 0:
            value = self.check(action, setting)
        elif isinstance(action, argparse.BooleanOptionalAction):
            value = setting.switch() != option.startswith("--no-")
        else:
            value = action.const if setting.switch() else action.default
        action.required = False
        for group in groups:
            group.required = False
        self.set_defaults(**{action.dest: value})

    def _keep_texts(self) -> None:
        """Parse values as texts where they would become something that YAML does not know."""
        for action in self._actions:
            if action.type not in (None, int, float):
                action.type = None

    def settings_of(self, parsed: argparse.Namespace, *, all_of_them: bool = True) -> dict[str, Any]:
        """What a file has to set for this result, in the order of --help; values that are not the
        defaults, or `all_of_them`."""
        settings: dict[str, Any] = {}
        for action in [*self._get_positional_actions(), *self.settable.values()]:
            value = getattr(parsed, action.dest, None)
            if value is None or not all_of_them and value == action.default:
                continue
            names = [name for name in action.option_strings if name.startswith("--")]
            key = names[0].removeprefix("--") if names else action.dest.replace("_", "-")
            if isinstance(action, argparse._StoreConstAction) or action.nargs == 0 and action.const is not None:
                settings[key] = value == action.const
            else:
                settings[key] = _plain(value)
        return settings


def _names(positional: argparse.Action) -> set[str]:
    """What a file may call an argument without a flag: its name, or the one in --help."""
    shown = positional.metavar if isinstance(positional.metavar, str) else positional.dest
    return {name.lower().replace("_", "-") for name in (positional.dest, shown)}


def _plain(value: Any) -> Any:
    """A value as YAML has it: lists, numbers and texts."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float)) else str(value)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Describe --config and --print-config, which `parse_known_args` takes out."""
    parser.add_argument(
        CONFIG, metavar="FILE", default=argparse.SUPPRESS,
        help="YAML file with flags' names as keys; what is also on the command line takes precedence",
    )  # fmt: skip
    parser.add_argument(
        PRINT_CONFIG, action="store_true", default=argparse.SUPPRESS, help="print all settings as such a file and exit"
    )


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every flag's default is shown, unless there is none to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        return action.help if none or action.required else super()._get_help_string(action)
