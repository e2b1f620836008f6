"""CommitPack's languages, looked up by file name: the one table of the project, languages.txt."""

from pathlib import Path

UNLISTED = "Text"


def _read_table() -> dict[str, str]:
    table = {}
    for line in Path(__file__).with_name("languages.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            language, names = line.split("\t")
            table.update(dict.fromkeys(names.split(), language))
    return table


# File suffixes (".py", ".rs.in") and complete file names ("Makefile") to display names, the values
# of CommitPack's `lang` field. Case counts: .c is C, .C is C++.
LANGUAGES = _read_table()
NAMES = frozenset(LANGUAGES.values())
# For names of another case, such as MAIN.PY; keys in lower case keep their language.
_LOWER_CASE = {name.lower(): language for name, language in LANGUAGES.items()} | {
    name: language for name, language in LANGUAGES.items() if name == name.lower()
}


def listed_language(path: str) -> str | None:
    """Language of a file by its complete name, else by its longest listed suffix; None if neither
    is listed. A name that is not listed as written is looked up in lower case.

    >>> [listed_language(path) for path in ("a/x.C", "a/x.c", "X.PY", "x.rs.in", "a.b/x")]
    ['C++', 'C', 'Python', 'Rust', None]
    """
    name = path.rsplit("/", 1)[-1]
    return _find(name, LANGUAGES) or _find(name.lower(), _LOWER_CASE)


def _find(name: str, table: dict[str, str]) -> str | None:
    language = table.get(name)
    dot = name.find(".")
    while language is None and dot >= 0:
        language = table.get(name[dot:])
        dot = name.find(".", dot + 1)
    return language


def language_of(path: str) -> str:
    """As `listed_language`, but "Text" for a file that the table does not list.

    >>> language_of("src/Main.java"), language_of("tools/Makefile"), language_of("NOTES")
    ('Java', 'Makefile', 'Text')
    """
    return listed_language(path) or UNLISTED


def directory_name(language: str) -> str:
    """Name of a language's directory in CommitPack: lower case, blanks as hyphens, no quotes, no
    parentheses. The name is that of one directory whatever the language's name contains.

    >>> directory_name("Graphviz (DOT)"), directory_name("Ren'Py"), directory_name("../C++")
    ('graphviz-dot', 'renpy', '..-c++')
    """
    name = language.lower().translate(str.maketrans(" /\0", "---", "'()"))
    return name if name.strip(".") else UNLISTED.lower()
