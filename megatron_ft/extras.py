"""Packages that only some programs need: the extras of setup.py."""

import importlib
from types import ModuleType

from megatron_ft.errors import UserError


def require(name: str, extra: str) -> ModuleType:
    """The module `name`; UserError with the command that installs it where it is missing.

    >>> require("no_such", "dataset")
    Traceback (most recent call last):
    megatron_ft.errors.UserError: no_such is not installed; pip install -e '.[dataset]' installs it
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name not in (name, package):
            raise
        raise UserError(f"{package} is not installed; pip install -e '.[{extra}]' installs it") from None
