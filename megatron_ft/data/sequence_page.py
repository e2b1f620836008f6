"""Packed sequences as people read them: their documents as text, and a page that shows them.

The page is self-contained: no scripts, no network. Each document has its own color, context and
tokens with loss differ, and thin lines end tokens.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_ft.printable import counted, printable

HUES = (210, 130, 40, 290, 5)  # of documents, which take them in turn


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a document with the same loss weight, which is 0 for context."""

    num_tokens: int
    weight: float  # of each token
    text: str
    pieces: tuple[str, ...] = ()  # the text, cut between tokens; several tokens may share a character


@dataclass(frozen=True)
class DecodedDocument:
    """A document of a packed sequence; `number` is its number in the dataset."""

    number: int
    spans: list[Span] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(span.num_tokens for span in self.spans)


@dataclass(frozen=True)
class DecodedSequence:
    """A packed sequence, ready to be shown; `padding` is a number of tokens."""

    number: int
    documents: list[DecodedDocument]
    padding: int

    @property
    def summary(self) -> str:
        positions = sum(document.num_tokens for document in self.documents) + self.padding
        learned = sum(span.num_tokens for document in self.documents for span in document.spans if span.weight)
        return (
            f"sequence {self.number}: {counted(positions, 'token position')}, {counted(len(self.documents), 'document')}, "
            f"loss on {counted(learned, 'token')}, {self.padding:,} padding"
        )


def title_of(i: int, document: DecodedDocument) -> str:
    """The line above the i-th document of a sequence."""
    return f"document {i + 1} (number {document.number} of the dataset), {counted(document.num_tokens, 'token')}"


PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }}
pre {{ font: 13px/1.55 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }}
section {{ border: 1px solid #8885; border-radius: 8px; margin: 1.2rem 0; overflow: hidden }}
h2 {{ font-size: 1rem; margin: 0; padding: .5rem 1rem; background: #8882 }}
div.document {{ padding: .4rem 1rem; border-left: 4px solid hsl(var(--hue) 60% 50%) }}
div.document > small, div.padding {{ color: #888; display: block }}
div.padding {{ padding: .4rem 1rem }}
.context {{ color: light-dark(hsl(var(--hue) 45% 32%), hsl(var(--hue) 45% 70%)) }}
.context i, .loss i {{ font-style: normal; box-shadow: inset -1px 0 color-mix(in srgb, currentColor 28%, transparent) }}
.loss {{ background: light-dark(hsl(var(--hue) 80% 84%), hsl(var(--hue) 60% 26%)); border-radius: 2px }}
{hues}
</style>
<h1>{title}</h1>
<p>{settings}</p>
<p class="h1">Each document has its own color: <span class="context">context</span>, <span class="loss">tokens with loss</span>. Thin lines end tokens.</p>
{stats}{sequences}
</html>
"""


def html_page(sequences: Sequence[DecodedSequence], name: str, settings: str, stats: str = "") -> str:
    """The sequences of the dataset `name` as one self-contained page.

    `settings` describes the packing; `stats`, lines of text, are shown above the sequences.
    """
    return PAGE.format(
        title=f"Packed sequences of {html.escape(printable(name))}",
        settings=html.escape(settings),
        hues="\n".join(f".h{i} {{ --hue: {hue} }}" for i, hue in enumerate(HUES, 1)),
        stats=f"<pre>{html.escape(stats)}</pre>" if stats else "",
        sequences="\n".join(map(html_sequence, sequences)),
    )


def html_sequence(sequence: DecodedSequence) -> str:
    """A sequence as a section of the page."""
    parts = [f"<section><h2>{sequence.summary}</h2>"]
    for i, document in enumerate(sequence.documents):
        hue = f"h{i % len(HUES) + 1}"
        parts.append(f'<div class="document {hue}"><small>{title_of(i, document)}</small><pre>')
        for span in document.spans:
            kind, weight = ("loss", f", weight {span.weight:.3g} each") if span.weight else ("context", "")
            title = f"{counted(span.num_tokens, 'token')}{weight}"
            tokens = "".join(f"<i>{html.escape(piece)}</i>" for piece in span.pieces)
            parts.append(f'<span class="{kind}" title="{title}">{tokens}</span>')
        parts.append("</pre></div>")
    if sequence.padding:
        parts.append(f'<div class="padding">{sequence.padding:,} padding</div>')
    return "".join([*parts, "</section>"])
