"""What a model is trained on is what it is evaluated with: the formats of rows and the prompts."""

import pytest

from megatron_ft.evaluation.prompts import FIX_STYLES, STYLES
from megatron_ft.prompts import CHAT_FORMATS, COMMIT_FORMATS, Turn

QUESTION = "Fix bugs in f.\ndef f(): return 1"
START = "def f():"


@pytest.mark.parametrize(
    ("format", "style"),
    [("question", "octocoder"), ("alpaca", "wizardcoder"), ("starchat", "starchat"), ("commit", "starcodercommit")],
)
def test_inputs_of_a_question_are_the_prompt_before_the_answer(format, style):
    inputs, _ = CHAT_FORMATS[format]([Turn("user", QUESTION)], START)
    assert STYLES[style](QUESTION, "").strip() == inputs.strip()


def test_inputs_of_a_commit_are_the_prompt_of_a_fix():
    subject, old = QUESTION.split("\n")
    inputs, outputs = COMMIT_FORMATS["starcoder"](old, START, subject)
    assert FIX_STYLES["starcodercommit"](old, subject, START, "f.py") == inputs + outputs
    inputs, _ = COMMIT_FORMATS["octocoder-published"](old, START, subject)
    assert STYLES["octocoder"](QUESTION, "").strip() == inputs
    inputs, _ = COMMIT_FORMATS["octocoder"](old, START, subject)
    assert STYLES["octocoder"](QUESTION, "").strip() != inputs
