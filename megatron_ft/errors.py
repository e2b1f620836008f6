"""User errors end in one clear line: the exception, how programs print it, and the exit statuses
that launchers know."""

import io
import signal
import sys
from collections.abc import Callable

from megatron_ft.called_as import as_called
from megatron_ft.printable import printable

EXIT_DONE = 0
EXIT_USER_ERROR = 2
# EX_TEMPFAIL of sysexits.h: saved and stopped by a signal or a time limit; run the command again
EXIT_RESUME = 75


class UserError(ValueError):
    """An error that the user can fix. The message is one line: what was found, where, what was
    expected, what to type."""


class Terminated(KeyboardInterrupt):
    """SIGTERM without another handler; unwinds the stack as Ctrl-C does."""


def run_program(main: Callable[[], int | None]) -> None:
    """Run a program's `main` and exit with its status; a UserError becomes one line on stderr and
    status 2.

    A broken pipe (`| head`), Ctrl-C and SIGTERM (a scheduler's time limit) exit without traceback,
    with the shell's usual statuses, after partial outputs are removed. Any other exception is a bug
    and keeps its traceback. `main` may set its own signal handlers. Characters that the terminal or
    log cannot encode are printed as escapes.
    """
    escape_what_cannot_be_encoded()
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        status = main() or EXIT_DONE
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {as_called(printable(error))}", file=sys.stderr)
        status = EXIT_USER_ERROR
    except Terminated:
        print("terminated", file=sys.stderr)
        status = 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    except BrokenPipeError:
        sys.stderr.close()
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def escape_what_cannot_be_encoded() -> None:
    r"""Print `\u2192` instead of failing where stdout or stderr is ASCII or Latin-1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _terminate(number: int, frame) -> None:
    raise Terminated
