"""Rows for the rules of the filter: per rule those that it drops, then those that only just pass it
and all other rules. A text stands for GOOD with this subject."""

import json

from megatron_ft.commits.candidate import Candidate, candidate_of, columns_of
from megatron_ft.commits.rules import EXTENSIONS

OLD = "import time\n\ndef wait(seconds):\n    time.sleep(seconds)\n"
NEW = "import time\n\ndef wait(seconds):\n    time.sleep(max(0, seconds))\n    return seconds\n"
GOOD = {
    "commit": "0" * 40,
    "old_file": "src/client.py",
    "new_file": "src/client.py",
    "old_contents": OLD,
    "new_contents": NEW,
    "subject": "Add a lower limit to the time of waiting",
    "message": "Add a lower limit to the time of waiting\n",
    "lang": "Python",
    "license": "mit",
    "repos": "owner/name",
}
HTML = f"<html><body><p>{'Some visible text. ' * 20}</p></body></html>"


def candidate_from(row: dict, line: bytes | None = None) -> Candidate:
    return candidate_of(columns_of(row, line), None, row)


def subject(text: str) -> dict[str, str]:
    return {"subject": text}


def file(path: str, lang: str) -> dict[str, str]:
    return {"old_file": path, "new_file": path, "lang": lang}


# Per rule: rows that it drops, then rows that only just pass it, and all others.
COMMITPACKFT: dict[str, tuple[list[str | dict], list[str | dict]]] = {
    "old_too_long": ([{"old_contents": "é" * 50_000}], [{"old_contents": "é" * 49_999}]),
    "new_empty": ([{"new_contents": ""}], [{"new_contents": "\n"}]),
    "unchanged": ([{"new_contents": OLD}], [{"new_contents": OLD + "\n"}]),
    "hash_sign": (["Add a lower limit to waiting, fixes #12"], []),
    "extension": (
        [file("src/LICENSE", "Text"), file("bin/tool.pyw", "Python"), file("a/x.hpp", "C++"), file("x.PY", "Python")],
        [file(f"src/x.{last}", lang) for lang, all in EXTENSIONS.items() for last in all]
        + [file("x.rb", "Ruby"), file("x.htm", "Handlebars")],
    ),
    "file_name_in_subject": (
        ["Add a lower limit to client waiting", {**subject("Add a test of limits"), **file("x.test.js", "JavaScript")}],
        ["Add a lower limit to Client waiting"],
    ),
    "subject_length": (
        ["Fix a b c ", "Fix limits of waiting", "Fix a b " + "z" * 992],
        ["Fix a b c dd", "Fix a b c " + "z" * 989],
    ),
    "clean_subject": ([], []),
    "clean_subject_length": (["[api] Fix limits of waiting", "fix: Add lower limits again"], []),
    "not_capitalized": (
        ["add a lower limit to waiting", "1 is the lower limit of waiting", "feat: add a lower limit to waiting"],
        ["feat: Add a lower limit to waiting"],
    ),
    "no_verb": (
        [
            "Lower limits to the waiting time",
            "Added a lower limit to waiting",
            "Adda lower limit to the waiting",
            "Fixes a lower limit of waiting",
            "Speed of the waiting is limited",
        ],
        ["Speed up the loop that waits", "Deal with negative times in it", "Brush up the loop that waits"],
    ),
    "noise": ([], []),
    "noise_phrase": (
        [
            "Merge branch 'x' into y again",
            "Merge pull request of the owner",
            "Fix it all Signed-off-by: Jane Doe",
            "Update contributing guide with a limit",
            "Add <?xml to the first lines",
            "Add an auto commit of changes",
        ],
        ["Merge two loops that wait for it"],
    ),
    "version_or_hash": ([], []),
    "cherry_pick": (["Fix waiting (cherry picked from commit abc)"], []),
    "commit_id": ([f"Revert the commit {'a1' * 20} of yesterday"], [f"Revert the commit {'a1' * 10} of yesterday"]),
    "clean_ci_skip": ([], []),
    "mass_update": ([], []),
    "first_person": (
        ["Fix what i broke in it", "Fix what I've broken in it", "Fix it, I'm so very sorry"],
        ["Fix what it is in it", "Fix it in ii and others"],
    ),
    "thanks": (
        ["Fix limits, thanks to Jane for this"],
        ["Fix limits, thanks to Jane and John", "Fix limits, thanks to Jane FOR this"],
    ),
    "code_review": (
        [
            "Fix limits after code review of it",
            "Fix the limits http//codereview of it",
            "Fix the limits of waiting CDPCP-12",
        ],
        ["Fix limits after review of code"],
    ),
    "joke": (
        [
            "Put the thingie in the thingie",
            "Fix that bug where things didn't work but now they should",
            "Add a beter commit message",
        ],
        [],
    ),
    "ticket": (
        ["Fix the issue 12 of waiting", "Fix bug12 in the waiting loop", "Add the Feature  7 to waiting"],
        ["Fix the issue of 12 seconds"],
    ),
    "work_in_progress": (
        ["Add a limit, work in progress still", "Add a limit to waiting (WIP)", "Add wip limits to the waiting"],
        ["Add a swipe gesture to the list", "Make it wipe the whole cache"],
    ),
    "url": (["Add a link to https://a.b there", "Add a link to HTTP://a.b there"], ["Add a link to http: or others"]),
    "leetcode": (["Add the solution of two sums | LeetCode"], []),
    "few_words": (["Fix the loop [ci skip]"], ["Fix the waiting loop [ci skip]"]),
}
# Rules whose rows an earlier rule drops: called by themselves.
HIDDEN = {
    "noise": (["Update README.md", "readme", "Updated readme"], ["Update the readme of it"]),
    "version_or_hash": (
        ["v1.2.3", "1.2.3-rc1 is out", "deadbeef", "ab-12-cd"],
        ["Version 1.2.3", "1.2 is out", "dead beef"],
    ),
    "few_words": (["Fix the loop"], ["Fix the waiting loop"]),
}
LICENSE = "# Copyright 2020 Jane Doe\n# Licensed under the MIT License\n\n"
EDIT: dict[str, tuple[list[str | dict], list[str | dict]]] = {
    "old_too_long": ([{"old_contents": "é" * 50_000}], []),
    "merge_or_revert": (
        ["Merge the branch of limits", "Revert the limits of waiting", {"message": "Undo\n\nThis reverts commit abc."}],
        ["Add merge sort to the limits"],
    ),
    "bot": (
        [{"message": "Bump x\n\nSigned-off-by: dependabot[bot] <a@b.c>"}, "Update x by Renovate to the newest"],
        ["Add a robot to the waiting list"],
    ),
    "clean_subject": ([], []),
    "clean_ci_skip": ([], []),
    "subject_length": (
        ["Fix limits!!", "[a-long-tag] Fix limits", "[ci skip] Fix limits"],
        ["fix the limits", "Lower the limit #12"],
    ),
    "noise_phrase": (["Add it, Signed-off-by: Jane Doe"], []),
    "version_or_hash": (["1.2.3-rc1 is the new one"], []),
    "commit_id": ([f"Fix the commit {'a1' * 20} of yesterday"], []),
    "mass_update": ([], []),
    "work_in_progress": (["Add a limit to waiting (WIP)"], []),
    "url": (["Add a link to https://a.b there"], []),
    "data_language": ([], []),
    "data_size": (
        [
            {**file("a.json", "JSON"), "new_contents": '{"a": 1,\n"b": 2}'},
            {**file("a.yml", "YAML"), "new_contents": "a: 1\n" * 1001},
        ],
        [{**file("a.json", "JSON"), "old_contents": "[]", "new_contents": json.dumps({"a" * 20: "b" * 40}, indent=1)}],
    ),
    "strip_license_header": ([], []),
    "blank_file": ([{"old_contents": " \n"}, {"new_contents": "\t\n", "lang": "Ruby"}, {"old_contents": LICENSE}], []),
    "unchanged": ([{"old_contents": LICENSE + NEW}], []),
    "todo": (
        [{"new_contents": NEW + "# TODO: test\n"}, {"new_contents": NEW + "# FIXME\n"}],
        [{"old_contents": OLD + "# TODO: test\n"}, {"new_contents": NEW + "# TODOS, todo, XFIXME\n"}],
    ),
    "few_letters": (
        [
            {"new_contents": "x = [" + "1, 2, 3,\n" * 40 + "]\n"},
            {"new_contents": "x = '" + "…, 2, 3, " * 40 + "'\ny = 1\nz = 2"},
        ],
        [{"new_contents": "x = '" + "éé1, d2, " * 40 + "'\ny = 1\n"}],
    ),
    "html_markup": (
        [
            {**file("a.html", "HTML"), "new_contents": "<p>Short text only</p>\n" + "<br class='wide'>\n" * 90},
            {
                **file("a.html", "HTML"),
                "new_contents": f"<style>{'color: red; ' * 90}</style>\n<p>\n{'text ' * 10}</p>",
            },
        ],
        [{**file("a.html", "HTML"), "old_contents": HTML + "\n<br>\n", "new_contents": HTML + "\n<p>more of it\n"}],
    ),
    "changed_lines": (
        [
            {"new_contents": OLD + "    return seconds\n"},
            {"new_contents": "".join(f"value{n} = {n}\n" for n in range(201))},
        ],
        [{"new_contents": OLD.replace("sleep(seconds)", "sleep(max(0.5, seconds))")}],
    ),
    "edit_distance": (
        [{"new_contents": OLD.replace("(seconds)", "(second)")}],
        [{"new_contents": OLD.replace("(seconds)", "(minu)")}],
    ),
    "does_not_parse": (
        [
            {"new_contents": NEW + "print 'two'\n"},
            {
                **file("a.json", "JSON"),
                "old_contents": "[]",
                "new_contents": '{"aaaaaaaa": "bbbbbbbbbbbbbbbbbbbb",\n' * 3,
            },
            {**file("a.toml", "TOML"), "new_contents": "a = [\n" * 3 + "b = 'some more text of it'"},
            {"new_contents": NEW + "x = " + "not " * 9000},
            {"new_contents": NEW + "\0 = 1\n"},
        ],
        [{**file("a.rb", "Ruby"), "new_contents": NEW + "print 'two'\n"}, {"new_contents": NEW + "print('\\d')\n"}],
    ),
}
