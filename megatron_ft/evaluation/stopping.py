"""When a generated text is finished: stop words, the end of the function, and their order.

As in the reference (bigcode-evaluation-harness), whose stop words cut the text, too: `cutting`.
"""

from megatron_ft.evaluation.prompts import check_style

END_OF_TEXT = "<|endoftext|>"
COMMIT_TOKENS = ("<commit_before>", "<commit_msg>", "<commit_after>")

# Source: CodeGeeX and MultiPL-E. The other languages end where the function's last brace closes.
CODE_STOP_WORDS = {
    "python": ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\nassert"),
    "go": ("\n//", "\nfunc main(", "struct", "\nfunc"),
}
# A style's own words, in addition to the language's.
STYLE_STOP_WORDS = {"starchat": ("<|end|>",), "issue": ("```",)}
# Styles whose answer is a diff: their words replace the language's.
DIFF_STOP_WORDS = {
    "diff": COMMIT_TOKENS,
    "diff-carper": ("<BEF>", "<MSG>", "<DFF>", "\\ No newline at end of file"),
}
# Braces that the prompt leaves open: of the function, and in Java of the class around it.
OPEN_BRACES = {"cpp": 1, "js": 1, "java": 2, "go": 1, "rust": 1}


def stop_words(language: str, style: str, eos: str | None = None) -> list[str]:
    """The words that end an answer, in the order in which they cut it; `eos` is the tokenizer's."""
    words = [*special_words(style, eos)]
    return words if style in DIFF_STOP_WORDS else [*CODE_STOP_WORDS.get(language, ()), *words]


def special_words(style: str, eos: str | None = None) -> list[str]:
    """The stop words that are not code: the style's, and the end of text."""
    own = DIFF_STOP_WORDS.get(style, STYLE_STOP_WORDS.get(style, ()))
    return list(dict.fromkeys([*own, END_OF_TEXT, *([eos] if eos else [])]))


def is_unindented(line: str) -> bool:
    """Whether a line of Python is neither blank nor indented.

    >>> is_unindented("def f():"), is_unindented("    return"), is_unindented("  ")
    (True, False, False)
    """
    return bool(line.strip()) and line[0] not in " \t"


class StopRule:
    """Tells when a generated text needs no more tokens.

    A description ends at a stop word only, a diff likewise. Other answers end also at the first
    unindented line (Python), or where as many braces are closed as were opened in the prompt.
    """

    def __init__(self, language: str, task: str, style: str, eos: str | None = None):
        check_style(task, style)
        self.words = stop_words(language, style, eos)
        self._language = language
        self._is_code = task != "explaindescribe" and style not in DIFF_STOP_WORDS

    def finished(self, text: str) -> bool:
        """Whether `text`, all that was generated after the prompt, is complete."""
        if any(word in text for word in self.words):
            return True
        if not self._is_code:
            return False
        if self._language == "python":
            return any(map(is_unindented, text.split("\n")))
        return text.count("{") + OPEN_BRACES[self._language] == text.count("}")
