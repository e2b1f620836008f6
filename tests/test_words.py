"""Plain words: no phrases that read as if translated, and no British spellings, in text or code.

Each entry of WORDS is a regular expression and what to write instead. A space in an expression also
matches a line break, with the comment sign of the next line. A word that must stay, because it is
another project's name or an old name that users type, is listed in EXCEPTIONS with the reason.
"""

from pathlib import Path

import pytest
import regex as re  # its look-behinds may vary in width
from conftest import ROOT

UNIT = (
    r"(?:bytes|gpus|tokens|rows|ranks|calls|lines?|seconds|hours|steps|documents|processes|numbers|elements|files"
    r"|values|nodes|samples|flops|texts|jobs|checkpoints|[mgk]i?b|tb) an?"
)
PER = (
    r"(?:node|parameter|step|second|minute|hour|day|gpu|rank|row|layer|token|job|line|document|file|batch|position"
    r"|task|epoch|measurement|field|machine|run|process)"
)
STEMS = (
    "initial|normal|summar|recogn|token|serial|optim|synchron|organ|parametr|minim|maxim|special|general|visual|local"
    "|final|util|author|memor|emphas|categor|priorit|stabil|quant|vector|material|random|custom|standard|real|equal"
    "|penal|capital|anonym|character|modern|finger"
)

WORDS = {
    # quantities
    rf"\b{UNIT} {PER}\b|\bmany an? {PER}\b": "per: bytes per parameter, one line per step",
    r"(?<![\w.])[\d.,]+ %(?! ?[\d(=]|\w)|\} %(?= |[\"').,;]|$)": "99% without a space",
    r"\bshares? of\b|\bthe share\b|[-_]shares?\b": "fraction",
    r"\bnumbers a token\b": "elements per token",
    r"\bover-long\b|\bover long\b": "too long",
    r"\b(?:token|row|free) places\b|\bplaces\b(?! the| a| its)": "token positions",
    # negation, existence, repetition
    r"(?<!there )(?<!that )\b(?:is|are|was|were) no (?!longer|more|less|fewer|earlier|later|larger|smaller|\w+er\b)\w+": (
        "is not a ..."
    ),
    r"\b(?<!let )(?<!left )(?<!leave )(?<!leaves )alone\b(?!\.py)": "only",
    r"\b(?:is|are|was|were|be) not (?:there|here)\b|\bthat (?:is|are|was|were) there\b|\bnot there yet\b": (
        "not found, does not exist; existing"
    ),
    r"\banew\b": "again, re-",
    r"\b(?:goes|go|going|went) on\b": "continues, resumes",
    r"\bfor ever\b": "permanently",
    r"\b(?:when|where|if) (?:it is )?not given\b": "(default: ...)",
    r"\bdata sets?\b": "dataset",
    r"\bbeside\b": "next to, in addition to",
    # who speaks
    r"\b(?:hears?|heard) (?:of|from)\b|\bremarked on\b|\bis told\b|\bare told\b|\btold (?:of|by|to)\b": (
        "logs, reports, prints; is called with; triggers a warning"
    ),
    r"\b(?:says|said)\b": "logs, reports, prints, gives",
    r"\bsays of itself\b|\bsent by mail\b|\bby mail\b": "metrics and events of a run; emailed",
    r"\bwants\b": "needs, expects, references",
    r"\bas they are said\b": "in order",
    # precedence and state
    r"\blast one counts\b|\bgoes over\b|\bgo over\b": "takes precedence, overrides",
    r"\bwhole (?:checkpoints?|files?|lines?|road|directory|directories)\b|\b(?:is|are|be|stays?|appears?) whole\b": (
        "complete, intact"
    ),
    r"\btorn\b": "truncated",
    r"\bunbroken\b": "uninterrupted",
    r"\blinear maps?\b": "linear layers",
    r"\bshared out\b": "sharded across",
    r"\buser's mistakes?\b": "user error, usage error",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\bis no number\b|\bis nan\b": "non-finite loss (NaN or Inf)",
    r"\bput(?:s|ting)? aside\b": "moved to damaged-...",
    r"\bon (?:its|their) way out\b": "being deleted",
    r"\bfound by looking\b": "the directory's contents take precedence",
    r"\banother run's\b|\bsomebody else's\b": "saved by a run with different settings; written by another program",
    r"\binput and output at once\b|\bwould be lost\b": "is both input and output and would be overwritten",
    r"\bNEVER\b|\b0 is never\b": 'ZERO_DISABLES, "0 disables"',
    r"\bput(?:s|ting)? off\b": "flags without effect are turned off",
    # jobs and nodes
    r"\b(?:one|next|earlier|last|first|each|every) (?:life|lives)\b|\bl(?:ife|ives) of (?:a|the|one) (?:job|run)\b": (
        "one run of the job, after the requeue"
    ),
    r"\broll[\s_-]call\b": "node probe",
    r"\bsilent nodes?\b": "unresponsive nodes",
    r"\b(?:leave|leaves|left) nodes\b|\bhand(?:s|ed|ing)? (?:itself|themselves) in\b|\bhas moved on\b|\bleft-?overs?\b": (
        "requeue without, resubmit itself, was requeued, stale process"
    ),
    r"\b(?:come|comes|came) back by (?:itself|themselves)\b": "requeue",
    r"\bwish(?:es)? to save\b": "a save request",
    r"\blook(?:s|ed|ing)? at (?:a|the|each|every) nodes?\b": "check a node, probe",
    r"\b(?:run|job|owner|process|it) that is alive\b|\bsigns? of life\b": "in use by a running job; a heartbeat",
    r"\bdecid(?:e|es|ed|ing) together\b": "collective decisions",
    r"\bmeeting (?:point|place)\b": "the rendezvous address (MASTER_ADDR, MASTER_PORT)",
    r"\bkernel lends\b|\b(?:is|are|only) lent\b": "below the ephemeral range; the caller may reuse it after return",
    r"\bnothing finished for\b": "no progress for N minutes",
    r"\bmak(?:e|es|ing) room\b": "free disk space",
    r"\bstands? outside\b": "is outside the quotes",
    r"\bMORE than\b|\bways out\b": "exceeds {gpu} memory; options",
    # prose
    r"\b(?:whole|the) road\b|\broad\.svg\b": "the pipeline, end to end",
    r"\bnobody has to think\b": "automatic resume",
    r"\bwithout seeing each other\b|\blaid end to end\b": "no cross-document attention; concatenated",
    r"\band back, proved\b": "round trip, verified",
    r"\bkeep(?:s|ing)? nothing back\b|\bdocuments validate\b": "hold out nothing; held out for validation",
    r"^#+ Following$|\ball in one\b": "Monitoring; running the whole pipeline",
    r"\bread by hand\b|\bthe way back\b": "read directly; the inverse",
    r"\brest of the house\b": "as used by the rest of the package",
    r"_in_one_line\b|\bthe_branch_s\b|_hunt_for_": "report_one_line_errors; mtf",
    # American spelling
    rf"(?<![a-z])(?:un|re|de)?(?:{STEMS})is(?:e|es|ed|er|ers|ing|ation|ations)(?![a-z])": "-ize",
    r"colour|behaviour|favour|neighbour|honour|flavour|licence|(?<![a-z])centre|catalogue|(?<![a-z])grey(?![a-z])": (
        "color, behavior, license, center, catalog, gray"
    ),
    r"(?:label|cancel|model|travel|signal)l(?:ed|ing)(?![a-z])|analys(?:e|ed|ing)(?![a-z])|artefact|whilst": (
        "labeled, canceled, analyze, artifact, while"
    ),
}

# {file, or folder ending in /: {words that stay: reason}}
EXCEPTIONS: dict[str, dict[str, str]] = {
    "": {
        "validation-share": "the old name of --validation-fraction, still accepted",
        "validation_share": "the old name of --validation-fraction, still accepted",
        "CANCELLED": "the name of SLURM's job state",
        '" is NaN': "a message about a value in a JSON file, which is NaN itself",
    },
    "pyproject.toml": {"cancelled": "what codespell has to accept for that name"},
}

FOLDERS = (
    *("megatron_ft", "dataset", "preprocess", "launch", "convert", "evaluation", "examples", "bench", "slurm"),
    *("tests", "docs", ".ci", ".github"),
)
SUFFIXES = {".py", ".cpp", ".sh", ".md", ".toml", ".yml", ".yaml", ".cff", ".example"}


def texts() -> list[Path]:
    """All files of prose and code, without this one."""
    top = [path for path in ROOT.iterdir() if path.suffix in SUFFIXES or path.name == "Makefile"]
    inner = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    named = [path for path in inner if path.suffix in SUFFIXES or path.parent.name == ".ci"]
    return sorted(path for path in [*top, *named] if path != Path(__file__).resolve())


def compiled(expression: str) -> re.Pattern:
    flags = re.MULTILINE if "NEVER" in expression or "MORE" in expression else re.MULTILINE | re.IGNORECASE
    return re.compile(expression.replace(" ", r"(?:[ \t]|\n[ \t]*(?:#[ \t]*)?)"), flags)


PATTERNS = {compiled(expression): instead for expression, instead in WORDS.items()}


def findings(text: str, name: str) -> list[str]:
    """`line: words -> what to write` of everything WORDS finds in a file."""
    allowed = [word for place, words in EXCEPTIONS.items() if name.startswith(place) for word in words]
    found = []
    for pattern, instead in PATTERNS.items():
        for match in pattern.finditer(text):
            around = text[max(0, match.start() - 40) : match.end() + 40]
            if not any(word in around for word in allowed):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{name}:{line}: {' '.join(match.group().split())!r} -> {instead}")
    return sorted(found, key=lambda finding: int(finding.split(":")[1]))


@pytest.mark.parametrize("path", texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_uses_plain_words(path):
    assert not findings(path.read_text(), str(path.relative_to(ROOT)))


@pytest.mark.parametrize(
    "text",
    [
        "18 bytes a parameter",
        "one line a\n# step",
        "99.9 % filled",
        "runs/first is no directory",
        "adapters alone",
        "the tokenizer is not there",
        "two data sets",
        "def normalise(args):",
    ],
)
def test_translated_words_are_found(text):
    assert findings(text, "README.md")


@pytest.mark.parametrize(
    "text",
    [
        "18 bytes per parameter",
        "there is no checkpoint",
        "index % 4 == 0",
        "raise otherwise",
        "other files are left alone",
        "remainder = 12 % 5",
        "--validation-share is an alias",
    ],
)
def test_plain_words_pass(text):
    assert not findings(text, "README.md")
