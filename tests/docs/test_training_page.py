"""The commands of docs/training.md run as printed."""

import pytest
from doc_commands import run_page


@pytest.mark.slow
def test_commands_train_and_then_find_nothing_left(tmp_path):
    printed = run_page("training.md", tmp_path)
    assert "done: 6 iterations" in printed
    assert (tmp_path / "run/report.html").exists()
