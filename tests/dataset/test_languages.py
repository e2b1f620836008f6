"""The table of languages against CommitPack's, and lists of licenses."""

import json

import pytest

from megatron_ft.commits.languages import LANGUAGES, NAMES, directory_name, language_of, listed_language
from megatron_ft.commits.licenses import PERMISSIVE, PUBLISHED, license_of, parse_licenses
from megatron_ft.errors import UserError

OURS = {"CMakeLists.txt", "GNUmakefile", "makefile", ".sbatch", ".slurm"}


def test_table_is_the_published_one_and_five_names(shared_data):
    published = json.loads((shared_data / "programming_languages.json").read_text())
    expected = {name: language for language, names in published.items() for name in names}
    assert (len(published), len(expected)) == (358, 853)
    assert {name: language for name, language in LANGUAGES.items() if name not in OURS} == expected
    assert set(published) == NAMES


@pytest.mark.parametrize(
    ("path", "language"),
    [
        ("src/main.py", "Python"),
        ("vector.C", "C++"),
        ("vector.c", "C"),
        ("list.ML", "Standard ML"),
        ("list.ml", "OCaml"),
        ("model.R", "R"),
        ("SETUP.PY", "Python"),
        ("build.rs.in", "Rust"),
        ("page.html.hl", "HTML"),
        ("docs/index.rst.txt", "reStructuredText"),
        ("notes.txt", "Text"),
        ("CMakeLists.txt", "CMake"),
        ("deploy/Dockerfile", "Dockerfile"),
        ("deploy/Dockerfile.gpu", None),
        ("MyMakefile", None),
        ("job.sbatch", "Shell"),
        (".emacs", "Emacs Lisp"),
        ("a.py/README", None),
        ("archive.py.gz", None),
        ("", None),
        (".", None),
    ],
)
def test_longest_suffix_of_the_base_name_decides(path, language):
    assert listed_language(path) == language
    assert language_of(path) == (language or "Text")


@pytest.mark.parametrize(
    ("language", "directory"),
    [
        ("Python", "python"),
        ("C++", "c++"),
        ("Cap'n Proto", "capn-proto"),
        ("Graphviz (DOT)", "graphviz-dot"),
        ("Ren'Py", "renpy"),
        ("DIGITAL Command Language", "digital-command-language"),
        ("..", "text"),
        ("", "text"),
        ("a/../b", "a-..-b"),
    ],
)
def test_directories_have_the_published_names_and_stay_inside(language, directory):
    assert directory_name(language) == directory


def test_no_two_languages_share_a_directory():
    assert len({directory_name(language) for language in NAMES}) == len(NAMES)


def test_permissive_has_no_copyleft_and_unknown_is_only_in_when_asked():
    assert not PERMISSIVE & {"agpl-3.0", "lgpl-2.1", "mpl-2.0", "epl-1.0", "unknown"}
    assert len(PUBLISHED) == 12 and "unknown" not in PUBLISHED
    assert parse_licenses("permissive, unknown") == PERMISSIVE | {"unknown"}


@pytest.mark.parametrize("text", ["permisive", "mit,nonsense", ",", ""])
def test_unknown_license_names_what_is_expected(text):
    with pytest.raises(UserError, match="permissive"):
        parse_licenses(text)


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("The Artistic License 2.0\n\nCopyright (c)", "artistic-2.0"),
        ("CC0 1.0 Universal\n\nStatement of Purpose", "cc0-1.0"),
        ("Eclipse Public License - v 1.0\n\nTHE ACCOMPANYING", "epl-1.0"),
    ],
)
def test_each_published_license_is_recognized(text, license):
    assert license_of(text) == license
