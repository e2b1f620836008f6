"""report.html of an evaluation: its tables, and every shown sample, on one self-contained page.

No network, no libraries. The samples are JSON in the page; its script shows them as text only, so
nothing that a model wrote is ever markup.
"""

import html
import json
from os.path import commonprefix
from typing import Any

from megatron_ft.evaluation.problems import LANGUAGES
from megatron_ft.evaluation.report_samples import PER_STATUS
from megatron_ft.evaluation.report_tables import to_html
from megatron_ft.printable import printable

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --dim: #57606a; --gone: #a5acb4; --page: #fff; --box: #f4f6f8;
  --line: #d5dae0; --good: #1a7f37; --bad: #b42318; --add: #dafbe1; --drop: #ffe3e0 }
@media (prefers-color-scheme: dark) { :root { --text: #dfe4ea; --dim: #9aa4af; --gone: #6b747e; --page: #14171a;
  --box: #1e2328; --line: #39414a; --good: #56d364; --bad: #ff8a80; --add: #12381f; --drop: #4a1d1a } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1100px;
  margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin: 1.6em 0 .3em } h3 { font-size: .95em; margin: 1em 0 .2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15em 1.2em .15em 0; text-align: left; white-space: nowrap }
th, .key { color: var(--dim); font-weight: normal } .wide { overflow-x: auto } .notes { color: var(--bad) }
pre { background: var(--box); border: 1px solid var(--line); border-radius: 4px; padding: .6em .8em; margin: 0;
  overflow: auto; max-height: 32em; font: 12.5px/1.45 ui-monospace, monospace; white-space: pre-wrap }
.gone { color: var(--gone) } .add { background: var(--add) } .drop { background: var(--drop) }
select, button { font: inherit; color: inherit; background: var(--box); border: 1px solid var(--line);
  border-radius: 4px; padding: .2em .5em } details { border-bottom: 1px solid var(--line); padding: .25em 0 }
summary { cursor: pointer } .passed { color: var(--good) } .failed { color: var(--bad) }
"""

SCRIPT = """
const groups = JSON.parse(document.getElementById("samples").textContent);
const pick = (id) => document.getElementById(id);
const make = (tag, text, className) => {
  const node = document.createElement(tag);
  if (text) node.textContent = text;
  if (className) node.className = className;
  return node;
};
function part(parent, title, pre) {
  parent.append(make("h3", title), pre);
}
function open(details, group, sample) {
  if (details.childElementCount > 1) return;
  const problem = group.problems[sample.problem];
  part(details, "Prompt", make("pre", sample.prompt ?? problem.prompt));
  const raw = make("pre");
  raw.append(make("span", sample.text.slice(0, sample.kept)), make("span", sample.text.slice(sample.kept), "gone"));
  part(details, "Generated (what was cut off is gray)", raw);
  const changes = make("pre");
  for (const line of sample.difference.split("\\n"))
    changes.append(make("span", line + "\\n", { "+": "add", "-": "drop" }[line[0]]));
  if (!sample.difference) changes.textContent = "(none)";
  part(details, "Difference to the canonical solution", changes);
  part(details, "Program", make("pre", problem.before + sample.program + problem.after));
  part(details, "Output", make("pre", sample.output || "(none)"));
}
function show(limit) {
  const group = groups[pick("group").value], status = pick("status").value;
  const found = group.samples.filter((sample) => status === "all" || sample.status === status);
  pick("list").replaceChildren();
  for (const sample of found.slice(0, limit)) {
    const details = make("details"), summary = make("summary", sample.problem + " ");
    const kind = sample.status === "passed" ? "passed" : "failed";
    const signal = sample.signal === null ? "" : ", signal " + sample.signal;
    const numbers = (sample.samples.length > 1 ? "samples " : "sample ") + sample.samples.join(", ");
    summary.append(make("span", sample.status.replace("_", " "), kind),
      make("span", ` ${numbers}; ended by ${sample.finish}${signal}; ${sample.cpu_s.toFixed(2)} s`, "key"));
    details.append(summary);
    details.addEventListener("toggle", () => open(details, group, sample));
    pick("list").append(details);
  }
  if (found.length > limit) {
    const more = make("button", `${found.length - limit} more`);
    more.addEventListener("click", () => show(limit + 500));
    pick("list").append(more);
  } else if (!found.length) pick("list").append(make("p", "No such sample.", "key"));
}
function start() {
  const statuses = new Set(groups[pick("group").value].samples.map((sample) => sample.status));
  pick("status").replaceChildren(...["all", ...statuses].map((status) => {
    const option = make("option", status.replace("_", " "));
    option.value = status;
    return option;
  }));
  show(200);
}
pick("group").addEventListener("change", start);
pick("status").addEventListener("change", () => show(200));
start();
"""


def page(report: dict[str, Any], groups: list[tuple[str, str, list[dict[str, Any]]]]) -> str:
    """The page of a report and of its samples: task, language and `report_samples.samples_of`."""
    options = "".join(
        f"<option value={i}>{html.escape(task)}, {html.escape(LANGUAGES[language])}"
        for i, (task, language, _) in enumerate(groups)
    )
    content = json.dumps([packed(samples) for _, _, samples in groups]).replace("<", "\\u003c")
    title = html.escape(printable(report["name"]))
    return (
        f"<!DOCTYPE html>\n<html lang=en><meta charset=utf-8><title>Evaluation: {title}</title>\n"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>\n{to_html(report)}\n"
        f"<h2>Samples</h2><p class=key>Equal texts are shown once; of each problem, at most {PER_STATUS} texts per "
        f"status.</p>\n<p><select id=group>{options}</select> <select id=status></select></p>\n<div id=list></div>\n"
        f'<script type="application/json" id=samples>{content}</script>\n<script>{SCRIPT}</script></html>\n'
    )


def packed(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples without what the samples of a problem share: the prompt, if it is the same, and the
    start and the end of their programs, which hold the tests."""
    problems: dict[str, Any] = {}
    by_problem: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        by_problem.setdefault(sample["problem"], []).append(sample)
    for name, mine in by_problem.items():
        programs = [sample["program"] for sample in mine]
        before = commonprefix(programs)
        after = commonprefix([program[len(before) :][::-1] for program in programs])[::-1]
        problems[name] = {"prompt": mine[0]["prompt"], "before": before, "after": after}
    shown = []
    for sample in samples:
        common = problems[sample["problem"]]
        program = sample["program"]
        middle = program[len(common["before"]) : len(program) - len(common["after"])]
        own = {key: value for key, value in sample.items() if key != "prompt" or value != common["prompt"]}
        shown.append({**own, "program": middle})
    return {"problems": problems, "samples": shown}
