"""CommitPack's language names, looked up by file name."""

from pathlib import PurePosixPath

# Keys are suffixes or complete file names, in lower case. Values are GitHub's (Linguist's) display
# names, which CommitPack uses in its `lang` field.
LANGUAGES = {
    ".c": "C", ".h": "C", ".cc": "C++", ".cpp": "C++", ".cxx": "C++", ".hpp": "C++", ".hh": "C++",
    ".cs": "C#", ".css": "CSS", ".scss": "SCSS", ".clj": "Clojure", ".coffee": "CoffeeScript",
    ".cu": "Cuda", ".dart": "Dart", ".ex": "Elixir", ".exs": "Elixir", ".erl": "Erlang",
    ".f90": "FORTRAN", ".go": "Go", ".groovy": "Groovy", ".hs": "Haskell", ".html": "HTML",
    ".ini": "INI", ".java": "Java", ".js": "JavaScript", ".jsx": "JSX", ".json": "JSON",
    ".jl": "Julia", ".kt": "Kotlin", ".less": "Less", ".lua": "Lua", ".md": "Markdown",
    ".ml": "OCaml", ".php": "PHP", ".pl": "Perl", ".ps1": "PowerShell", ".py": "Python",
    ".pyx": "Cython", ".r": "R", ".rb": "Ruby", ".rs": "Rust", ".rst": "reStructuredText",
    ".sbatch": "Shell", ".scala": "Scala", ".sh": "Shell", ".bash": "Shell", ".sql": "SQL",
    ".swift": "Swift", ".tex": "TeX", ".toml": "TOML", ".ts": "TypeScript", ".tsx": "TSX",
    ".vim": "VimL", ".vue": "Vue", ".xml": "XML", ".yaml": "YAML", ".yml": "YAML", ".zig": "Zig",
    "makefile": "Makefile", "dockerfile": "Dockerfile", "cmakelists.txt": "CMake",
    ".cmake": "CMake",
}  # fmt: skip
UNLISTED = "Text"


def language_of(path: str) -> str:
    """Language of a file by its name or suffix, ignoring case; "Text" if the table lists neither.

    >>> language_of("src/Main.java"), language_of("tools/Makefile"), language_of("NOTES")
    ('Java', 'Makefile', 'Text')
    """
    name = path.rsplit("/", 1)[-1].lower()
    return LANGUAGES.get(name) or LANGUAGES.get(PurePosixPath(name).suffix, UNLISTED)
