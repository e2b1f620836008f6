"""The commands of docs/checkpoints.md run as printed."""

import pytest
from doc_commands import run_page


@pytest.mark.slow
def test_commands_stop_and_resume_a_run(tmp_path):
    printed = run_page("checkpoints.md", tmp_path)
    assert "saved: 4\n" in printed
    assert "resume: " in printed and "iter_0000004 (iteration 4" in printed
    assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "8"
