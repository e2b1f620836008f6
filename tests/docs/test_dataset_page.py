"""The commands of docs/dataset.md run as printed: from a repository to packed rows."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from doc_commands import run_page

LICENSE = "Permission is hereby granted, free of charge, to any person obtaining a copy\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """12 commits that each change a Python file, and three that add one."""
    path = tmp_path / "repository"
    path.mkdir()

    def git(*words: str) -> None:
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(path), *identity, *words], check=True, capture_output=True)

    git("init", "--quiet")
    (path / "LICENSE").write_text(LICENSE, encoding="utf-8")
    for i in range(15):
        lines = [f"def check_{i}_{j}(value):\n    return value * {i + j} > {j} or value == {i}\n" for j in range(9)]
        (path / f"module_{i % 3}.py").write_text("\n".join(lines), encoding="utf-8")
        git("add", ".")
        git("commit", "--quiet", "-m", f"Add the checks of stage {i} to the pipeline\n")
    return path


def test_commands_build_a_dataset(tmp_path, repository):
    work = tmp_path / "work"
    (work / "starcoder").mkdir(parents=True)
    shutil.copy(ROOT / "tests/fixtures/tokenizer.json", work / "starcoder")
    printed = run_page("dataset.md", work, REPOSITORY=str(repository), HUMANEVALPACK="")
    assert printed.count(" query --use_legacy_sql=false") == 6, "one command per stage, and the export"
    rows = [json.loads(line) for line in (work / "mixed.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 6, "five commits and the answer that does not refuse"
    assert sum(row["inputs"].startswith("Question: Add the checks") for row in rows) == 5
    assert sum("What is a tuple?" in row["inputs"] for row in rows) == 1
    reports = sorted(path.name for path in work.glob("*_report.json"))
    assert len(reports) >= 7, reports
    assert "6 documents" in printed and "documents dropped" not in printed
