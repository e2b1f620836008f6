"""The documentation as a site: built strictly, complete, and readable without a network."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from doc_commands import commands_of

from megatron_ft.config.config import ENTRIES
from megatron_ft.metrics.lines import DETERMINISTIC_KEYS, TIMING_KEYS

# What a browser loads by itself; links that a reader clicks may lead anywhere.
LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\s\">]+)")


def build(directory: Path, checkout: Path = ROOT) -> subprocess.CompletedProcess:
    """Run mkdocs as `make docs` does, into `directory`."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(directory)]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    done = build(directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_first_page_is_the_readme_with_links_of_the_site(site):
    page = text(site / "index.html")
    assert "make demo" in page and 'href="training.html"' in page and 'src="pipeline.svg"' in page
    assert 'href="contributing.html"' in page and "docs/training.md</a>" in page


def test_reference_has_every_flag_and_every_key(site):
    flags = text(site / "reference/flags.html")
    assert not [entry.flag.name for entry in ENTRIES.values() if f"<code>{entry.flag.name}</code>" not in flags]
    assert "<table>" not in text(site / "training.html").partition('id="all-flags"')[2], "the table is on one page"
    keys = text(site / "reference/run_files.html")
    assert not [key for key in DETERMINISTIC_KEYS + TIMING_KEYS if f"<code>{key}</code>" not in keys]
    modules = text(site / "reference/modules.html")
    assert "TableWriter" in modules and "exit status" in modules


def test_logs_page_describes_the_keys_of_metrics():
    page = text(ROOT / "docs/logs.md").partition("`metrics.jsonl`, one line per step:")[2]
    described = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert tuple(described[: len(DETERMINISTIC_KEYS + TIMING_KEYS)]) == DETERMINISTIC_KEYS + TIMING_KEYS


def test_no_page_loads_anything_from_another_server(site):
    pages = [*site.rglob("*.html")]
    assert len(pages) > 25
    found = {str(page.relative_to(site)): LOADED.findall(text(page)) for page in pages}
    assert not {page: addresses for page, addresses in found.items() if addresses}
    styles = "".join(text(path) for path in site.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", styles)


def test_lists_and_code_look_as_on_github(site):
    """Markdown of this site needs an empty line before a list, GitHub's does not."""
    for page in site.rglob("*.html"):
        paragraphs = re.findall(r"<p>(.*?)</p>", text(page), flags=re.DOTALL)
        assert not [p for p in paragraphs if re.search(r"\n\s*(?:[-*]|\d+\.) ", p) or "```" in p], page


def test_tutorials_show_commands(site):
    tutorials = sorted((ROOT / "docs/tutorials").glob("*.md"))
    listed = yaml.unsafe_load(text(ROOT / "mkdocs.yml"))["nav"][1]["Tutorials"]
    assert [path.name for path in tutorials] == sorted(Path(page).name for entry in listed for page in entry.values())
    assert all(commands_of(path) for path in tutorials)


def test_a_broken_link_fails_the_build(tmp_path):
    for path in ROOT.iterdir():
        if path.name not in ("docs", "build"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs/logs.md").open("a", encoding="utf-8") as page:
        page.write("\n[missing](missing.md) and [no such heading](training.md#no-such-heading)\n")
    done = build(tmp_path / "site", tmp_path)
    assert done.returncode != 0
    assert "missing.md" in done.stderr and "#no-such-heading" in done.stderr
