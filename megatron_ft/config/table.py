"""The table of flags as Markdown, for docs/training.md.

python -m megatron_ft.config.table docs/training.md     # write it between the page's two marks
"""

import sys
from pathlib import Path

from megatron_ft.config.config import ENTRIES, GROUPS, Entry
from megatron_ft.config.flag import Mtf
from megatron_ft.errors import UserError, run_program

BEGIN, END = "<!-- flags: begin -->", "<!-- flags: end -->"
HEADER = "| flag | default | meaning | bounds | on a resume | `mtf` | engine |\n| --- | --- | --- | --- | --- | --- | --- |\n"
MTF = {Mtf.SAME: "same", Mtf.TRANSLATED: "translated", Mtf.UNKNOWN: "refused"}


def flags_table() -> str:
    """All flags, one table per group."""
    sections = []
    for group, kind in GROUPS.items():
        title = (kind.__doc__ or "").strip().rstrip(".").partition(":")[0]
        rows = "".join(_row(entry) for entry in ENTRIES.values() if entry.group == group)
        sections.append(f"### {title}\n\n{HEADER}{rows}")
    return "\n".join(sections)


def _row(entry: Entry) -> str:
    described, default = entry.flag, entry.default
    shown = "" if default is None or default is False else "on" if default is True else f"{default}"
    name = f"`{described.name}`" + (" (`--no-...`)" if described.negatable else "")
    branch = described.mtf if isinstance(described.mtf, Mtf) else None
    cells = [
        name,
        shown,
        described.help.replace("|", "\\|"),
        str(described.bounds or ""),
        described.resume.name.lower(),
        MTF[branch] if branch else f"`{described.mtf}`",
        described.only or "",
    ]
    return f"| {' | '.join(cells)} |\n"


def page_with_table(page: str, where: str) -> str:
    """`page` with the table between its marks. Raises UserError where they are missing."""
    if BEGIN not in page or END not in page:
        raise UserError(f"{where}: no {BEGIN} and {END}; add both lines where the table belongs")
    return page[: page.index(BEGIN) + len(BEGIN)] + "\n\n" + flags_table() + "\n" + page[page.index(END) :]


def main() -> None:
    """Rewrite the table in the page that is named."""
    if len(sys.argv) != 2:
        raise UserError("usage: python -m megatron_ft.config.table PAGE.md")
    path = Path(sys.argv[1])
    path.write_text(page_with_table(path.read_text(encoding="utf-8"), str(path)), encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
