"""The page on checkpoints shows commands that run."""

import pytest
from doc_commands import run_page


@pytest.mark.slow
def test_page_stops_and_resumes(tmp_path):
    printed = run_page("checkpoints.md", tmp_path)
    assert "saved: 4\n" in printed
    assert "resume: " in printed and "iter_0000004 (iteration 4" in printed
    assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "8"
