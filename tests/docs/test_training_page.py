"""docs/training.md: its commands run as printed, its table of flags is the program's."""

import pytest
from conftest import ROOT
from doc_commands import run_page

from megatron_ft.config.table import page_with_table


@pytest.mark.slow
def test_commands_train_and_then_find_nothing_left(tmp_path):
    printed = run_page("training.md", tmp_path)
    assert "done: 6 iterations" in printed
    assert (tmp_path / "run/report.html").exists()


def test_the_table_of_flags_is_current():
    page = (ROOT / "docs/training.md").read_text()
    command = "python -m megatron_ft.config.table docs/training.md"
    assert page == page_with_table(page, "docs/training.md"), f"the flags have changed; run `{command}`"
