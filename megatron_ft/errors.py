"""What a user can do wrong ends in one clear line: the error, how programs print it, and the exit statuses launchers know."""

import signal
import sys
from collections.abc import Callable

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_RESUME = (
    75  # sysexits' EX_TEMPFAIL: stopped by a signal or a time limit after saving; start the same command again
)


class UserError(ValueError):
    """A mistake a user can mend. The message is one line: what was found, where, what was expected, what to type."""


def run_program(main: Callable[[], int | None]) -> None:
    """Run a program's `main` and exit with its status; a UserError becomes one line on stderr and status 2.

    A broken pipe (`| head`) and Ctrl-C end quietly with the shell's usual statuses; anything else is a bug and keeps its traceback.
    """
    try:
        status = main() or EXIT_DONE
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    except BrokenPipeError:
        sys.stderr.close()
        status = 128 + signal.SIGPIPE
    sys.exit(status)
