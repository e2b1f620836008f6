"""Rules that need an input of the user's: allowed licenses, owners who opted out, the problems of a
benchmark. Called as those of rules.py."""

from collections import Counter

from megatron_ft.commits.candidate import Candidate
from megatron_ft.commits.contamination import ProblemIndex
from megatron_ft.commits.licenses import UNKNOWN
from megatron_ft.commits.opt_out import has_opted_out
from megatron_ft.commits.rules import Limits


class LicenseRule:
    """Drops rows whose license is not one of `allowed`."""

    def __init__(self, allowed: frozenset[str]):
        self._allowed = allowed

    def __call__(self, row: Candidate, limits: Limits) -> bool:
        return (row.columns.license or UNKNOWN).lower() not in self._allowed


class OptOutRule:
    """Drops rows of a repository whose owner is one of `owners`, in lower case."""

    def __init__(self, owners: frozenset[str]):
        self._owners = owners

    def __call__(self, row: Candidate, limits: Limits) -> bool:
        return has_opted_out(row.columns.repos, self._owners)


class ContaminationRule:
    """Drops rows that hold a problem of a benchmark. `tasks` counts the rows per task id."""

    def __init__(self, problems: ProblemIndex):
        self._problems = problems
        self.tasks: Counter[str] = Counter()

    def __call__(self, row: Candidate, limits: Limits) -> bool:
        found = self._problems.task_ids((row.old, row.new, row.subject))
        self.tasks.update(found)
        return bool(found)
