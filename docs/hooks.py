"""Pages of the site that are made of the README and the code, so that no text is kept twice.

mkdocs calls the functions whose names begin with `on_`. Links of the README and of docs/ are those
that work on GitHub. On the site, files outside of docs/ are pages (PAGES) or only named.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from megatron_ft.config import table
from megatron_ft.metrics import lines, metrics

ROOT = Path(__file__).resolve().parents[1]
# Files of the checkout that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
FLAGS_PAGE = "reference/flags.md"
LINK = re.compile(r"(!?)\[([^]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
# What programs of your own may rely on; the rest of the package serves this project's.
MODULES = (
    "api",
    "errors",
    "prompts",
    "files.tables",
    "data.indexed",
    "data.packed_dataset",
    "model.shape",
    "weights.source",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of docs/."""
    made = {page: (ROOT / file).read_text(encoding="utf-8") for file, page in PAGES.items()}
    made |= {
        FLAGS_PAGE: flags_page(),
        "reference/run_files.md": run_files_page(),
        "reference/modules.md": modules_page(),
    }
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them; the table of flags is on a page of its own."""
    if table.BEGIN in markdown:
        before, after = markdown.split(table.BEGIN)[0], markdown.split(table.END)[1]
        markdown = f"{before}See [all flags of training]({FLAGS_PAGE}).\n{after}"
    uri = page.file.src_uri
    source = next((file for file, made in PAGES.items() if made == uri), f"docs/{uri}")
    return LINK.sub(lambda link: site_link(link, source, uri), markdown)


def site_link(link: re.Match[str], source: str, page: str) -> str:
    """A link of the file `source` of the checkout, as the page `page` of the site has it."""
    image, text, target, anchor = link.groups(default="")
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if file in PAGES or file.startswith("docs/"):
        there = PAGES.get(file, file.removeprefix("docs/"))
        return f"{image}[{text}]({posixpath.relpath(there, posixpath.dirname(page) or '.')}{anchor})"
    if not (ROOT / file).exists():
        raise PluginError(f"{source}: {target} does not exist")
    return text if file in text else f"{text} (`{file}`)"


def flags_page() -> str:
    """The table of flags, from megatron_ft/config/flags.py."""
    return f"""# Flags of training

The flags of `launch/finetune.py`; [training](../training.md) has them by task, and what the columns
mean. Every other program describes its own with `--help`.

{re.sub("^###", "##", table.flags_table(), flags=re.MULTILINE)}"""


def run_files_page() -> str:
    """The keys of a run's files, from megatron_ft/metrics."""
    described = dict(re.findall(r"^      (\w+) {2,}(.+)$", metrics.__doc__ or "", flags=re.MULTILINE))

    def rows(keys: tuple[str, ...]) -> str:
        missing = [key for key in keys if key not in described]
        if missing:
            raise PluginError(f"megatron_ft/metrics/metrics.py: the docstring does not describe {', '.join(missing)}")
        return "".join(f"| `{key}` | {described[key]} |\n" for key in keys)

    others = "".join(
        f"| `{name}` | {', '.join(f'`{key}`' for key in keys)} |\n"
        for name, keys in lines.KEYS.items()
        if name != lines.METRICS
    )
    return f"""# Files of a run

A run writes them to `--save`, one JSON object per line; [logs](../logs.md) has how they behave on a
resume.

## {lines.METRICS}

One line per step. These keys are the same in every run with the same flags:

| key | |
| --- | --- |
{rows(lines.DETERMINISTIC_KEYS)}
These are timings, and facts of one start:

| key | |
| --- | --- |
{rows(lines.TIMING_KEYS)}
## Other files

Keys that this project's own readers use; a line may have more.

| file | keys |
| --- | --- |
{others}"""


def modules_page() -> str:
    """The docstrings of MODULES."""
    sections = "\n".join(f"::: megatron_ft.{module}\n" for module in MODULES)
    return f"""# Modules

What a program of your own can import from the package `megatron_ft`; [Python](../api.md) introduces
the functions. Every error that a user can cause is a `UserError` of one line.

{sections}"""
