"""The model card of a published model: what the converter has written, with the data, the recipe
and the scores of the run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft.config.command_line import build_parser, with_config
from megatron_ft.config.config import ENTRIES, Config
from megatron_ft.config.config_file import CONFIG, KEPT, as_yaml
from megatron_ft.data.indexed import field_paths, stored_counts
from megatron_ft.data.provenance import Provenance
from megatron_ft.data.splits import groups_of
from megatron_ft.errors import UserError
from megatron_ft.evaluation.problems import LANGUAGES
from megatron_ft.evaluation.report_tables import markdown_table, score_table, settings
from megatron_ft.files.json_file import parse_json, read_small_file, read_small_text
from megatron_ft.metrics.lines import METRICS, VALIDATION, read_log
from megatron_ft.printable import printable
from megatron_ft.weights.hf_files import card_args

README = "README.md"
ARGUMENTS = "## Arguments of the run"  # in the converter's card; the recipe has them, too
EXPECTED_CARD = "a model card that starts with metadata between two lines of ---"


@dataclass(frozen=True)
class About:
    """What a card is about: the directory of the model, that of its training run, and the report of
    its evaluation, None where there is none; and metadata that the user gives."""

    model: Path
    run: Path | None = None
    report: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] | None = None


def model_card(about: About) -> str:
    """The README.md to publish. Raises UserError for an input that is missing or damaged."""
    metadata, text = read_card(about.model)
    metadata |= {name: value for name, value in (about.metadata or {}).items() if value}
    if about.run:
        config = config_of(about.run)
        text = text.partition(ARGUMENTS)[0]
        text = "\n\n".join([text.rstrip(), data_section(config), recipe_section(config, about.run)])
    if about.report:
        metadata["model-index"] = [{"name": about.model.resolve().name, "results": results(about.report)}]
        text = "\n\n".join([text.rstrip(), scores_section(about.report)])
    return f"---\n{as_yaml(metadata)}---\n\n{text.strip()}\n"


def read_card(directory: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text of the card in a model's directory; a short one if there is none."""
    import yaml

    path = directory / README
    if not path.is_file():
        adapter = (directory / "adapter_config.json").is_file()
        library = "peft" if adapter else "transformers"
        text = f"# {directory.resolve().name}\n\nTrained with Megatron-FT."
        return {"library_name": library, "pipeline_tag": "text-generation"}, text
    found = re.match(r"---\n(.*?\n)---\n(.*)", read_small_text(path, EXPECTED_CARD), flags=re.DOTALL)
    try:
        metadata = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        metadata = None
    if found is None or not isinstance(metadata, dict):
        raise UserError(f"{path}: expected {EXPECTED_CARD}; convert the model again, or remove the file")
    return metadata, found[2]


def read_report(directory: Path) -> dict[str, Any]:
    """The report.json of an evaluation. Raises UserError where there is none, or another file."""
    path = directory / "report.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; write it with evaluation/run/report.py {directory}")
    report = parse_json(read_small_file(path), str(path))
    if not {"name", "mode", "manifest", "averages", "scores"} <= report.keys():
        raise UserError(f"{path}: not a report of evaluation/run/report.py; write it again")
    return report


def config_of(run: Path) -> Config:
    """The flags that a run was started with. Raises UserError if it has kept none."""
    if not (run / KEPT).is_file():
        raise UserError(f"{run / KEPT}: not found; expected the --save directory of a run")
    return Config.from_namespace(build_parser(reads_config=False).parse_args(with_config([CONFIG, str(run / KEPT)])))


def data_section(config: Config) -> str:
    """The datasets of training: their weights, documents and tokens, and the files they are from.

    Of names, folders are left out.
    """
    rows = []
    for part in (part for group in groups_of(config, "train") for part in group.parts):
        counts = [stored_counts(path) for path in field_paths(part.prefix) if Path(f"{path}.idx").is_file()]
        documents = f"{counts[0][0]:,}" if counts else ""
        tokens = f"{sum(tokens for _, tokens in counts):,}" if counts else ""
        provenance = Provenance.read(part.prefix)
        files = [name for name, _ in provenance.inputs] if provenance else []
        shown = ", ".join(files[:5]) + (f" and {len(files) - 5} others" if len(files) > 5 else "")
        weight = f"{part.weight:g} x {part.start:g}:{part.end:g}"
        rows.append([printable(Path(part.prefix).name), weight, documents, tokens, printable(shown)])
    table = markdown_table(["dataset", "weight and range", "documents", "tokens", "files"], rows)
    return f"## Training data\n\n{table}"


def recipe_section(config: Config, run: Path) -> str:
    """How far the run went, and its flags without paths of somebody's machine."""
    steps, validation = read_log(run, METRICS), read_log(run, VALIDATION)
    rows = []
    if steps:
        last = steps[-1]
        rows += [["steps", f"{last['iteration']:,}"], ["tokens", shown(last["consumed_tokens"], ",")]]
        rows += [["training loss of the last step", shown(last["loss"], ".4f")]]
    for group in dict.fromkeys(line["group"] for line in validation):
        loss = next(line["loss"] for line in reversed(validation) if line["group"] == group)
        rows.append([f"validation loss, {printable(group)}", shown(loss, ".4f")])
    defaults = {name: entry.default for name, entry in ENTRIES.items() if not entry.flag.local}
    flags = {name.replace("_", "-"): value for name, value in card_args(config.values(), defaults).items()}
    table = markdown_table(["run", ""], rows) + "\n\n" if rows else ""
    return f"## Recipe\n\n{table}```yaml\n{as_yaml(flags)}```"


def shown(value: float | None, format: str) -> str:
    """A number of a log, "unknown" where it has none.

    >>> shown(None, ".2f"), shown(1234, ",")
    ('unknown', '1,234')
    """
    return "unknown" if value is None else f"{value:{format}}"


def scores_section(report: Mapping[str, Any]) -> str:
    """The table of scores with how they were measured; of the model's path only the last part."""
    table = score_table(dict(report))
    manifest = {**report["manifest"], "model": Path(str(report["manifest"].get("model", ""))).name}
    how = settings({**report, "manifest": manifest})
    return (
        f"## Evaluation\n\nHumanEvalPack; {how}.\n\n{markdown_table(table.header, table.rows)}\n\n"
        "In parentheses: 95% bootstrap intervals over problems."
    )


def results(report: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    """The scores as the Hub's metadata has them."""
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": {
                "type": "bigcode/humanevalpack",
                "name": f"HumanEvalPack ({score['task']}, {LANGUAGES[score['language']]})",
            },
            "metrics": [
                {"type": "pass@k", "name": name, "value": round(found["estimate"], 4)}
                for name, found in score["score"].items()
            ],
        }
        for score in report["scores"]
        if score["score"]
    ]
