"""Python programs."""

from collections.abc import Sequence

from megatron_ft.evaluation.problems import Problem

# Of the reference; typing and collections last, so that their names take precedence.
IMPORTS = """\
import math
import re
import sys
import copy
import datetime
import itertools
import collections
import heapq
import statistics
import functools
import hashlib
import numpy
import numpy as np
import string
from typing import *
from collections import *"""


def faithful(problem: Problem, answer: str, earlier: Sequence[str]) -> str:
    """The answer after the imports that answers may use."""
    return f"{IMPORTS}\n{answer}".strip()


def clean(problem: Problem, answer: str) -> str:
    """The same program as in faithful mode."""
    return faithful(problem, answer, ())


def proving(test: str, nonce: str) -> str:
    """The tests, and then the nonce on stdout."""
    return f'{test}\n__import__("os").write(1, b"\\n{nonce}\\n")\n'
