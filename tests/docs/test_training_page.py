"""The commands of docs/training.md run as printed, and its table of flags is up to date."""

import pytest
from conftest import ROOT
from doc_commands import run_page

from megatron_ft.config.table import page_with_table


@pytest.mark.slow
def test_commands_train_and_then_find_nothing_left(tmp_path):
    printed = run_page("training.md", tmp_path)
    assert "done: 6 iterations" in printed
    assert (tmp_path / "run/report.html").exists()


def test_flag_table_is_up_to_date():
    page = (ROOT / "docs/training.md").read_text()
    command = "python -m megatron_ft.config.table docs/training.md"
    assert page == page_with_table(page, "docs/training.md"), f"the flags have changed; run `{command}`"
