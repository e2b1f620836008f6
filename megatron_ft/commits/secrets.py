"""Credentials and personal data in texts: a few patterns of high precision.

A pattern is tried only on texts that contain one of its keywords. What is replaced becomes one of
the placeholders of StarCoder's training data (arXiv 2305.06161, section 4): <KEY>, <PASSWORD>,
<EMAIL>, <IP_ADDRESS>.
"""

import re
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import NamedTuple

from megatron_ft.commits.candidate import Candidate
from megatron_ft.commits.rules import Limits, unchanged


class Secret(NamedTuple):
    """A pattern. Its group `secret` is what is replaced; without one, all of the match."""

    kind: str
    placeholder: str
    keywords: tuple[str, ...]
    pattern: re.Pattern[str]


def _key(kind: str, keywords: str, pattern: str) -> Secret:
    return Secret(kind, "<KEY>", tuple(keywords.split(" ")), re.compile(pattern))


# A name of two labels or more whose last one is not the suffix of an image, as in logo@2x.png.
_HOST = r"(?:[A-Za-z0-9-]+\.)+(?!(?:png|jpe?g|gif|svg|webp|ico|css|js)\b)[A-Za-z]{2,}(?![\w-]|\.\w)"
SECRETS = (
    _key("aws_access_key", "AKIA ASIA", r"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b"),
    _key(
        "aws_secret_key",
        "aws AWS",
        r"(?i:aws_?(?:secret)?_?(?:access)?_?key)[\"']?\s*(?:=>|[:=])\s*[\"']?(?P<secret>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])",
    ),
    _key("github_token", "ghp_ gho_ ghu_ ghs_ ghr_", r"\bgh[pousr]_[A-Za-z0-9]{36,}\b"),
    _key("github_token", "github_pat_", r"\bgithub_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}\b"),
    _key("gitlab_token", "glpat-", r"\bglpat-[A-Za-z0-9_-]{20,}"),
    _key("slack_token", "xox", r"\bxox[abeoprs]-[0-9]{8,}-[A-Za-z0-9-]{10,}"),
    _key("slack_webhook", "hooks.slack.com", r"hooks\.slack\.com/services/(?P<secret>T\w{8,}/B\w{8,}/\w{20,})"),
    _key("google_api_key", "AIza", r"\bAIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
    _key("stripe_key", "k_live_", r"\b[sr]k_live_[A-Za-z0-9]{20,}\b"),
    _key("openai_key", "T3BlbkFJ", r"\bsk-[A-Za-z0-9_-]{20,}T3BlbkFJ[A-Za-z0-9_-]{20,}"),
    _key("anthropic_key", "sk-ant-", r"\bsk-ant-[a-z0-9]+-[A-Za-z0-9_-]{80,}"),
    _key("hugging_face_token", "hf_", r"\bhf_[A-Za-z]{34}\b"),
    _key("npm_token", "npm_", r"\bnpm_[A-Za-z0-9]{36}\b"),
    _key("pypi_token", "pypi-AgEIcHlwaS5vcmc", r"\bpypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,}"),
    _key("sendgrid_key", "SG.", r"\bSG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])"),
    _key(
        "private_key",
        "PRIVATE KEY",
        r"-----BEGIN (?P<type>[A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?)-----(?P<secret>[^-]{64,})(?:-----END (?P=type)-----)?",
    ),
    _key("jwt", "eyJ", r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{20,}"),
    Secret(
        "url_password",
        "<PASSWORD>",
        ("://",),
        re.compile(r"\b[a-z][a-z0-9+.-]{1,20}://[A-Za-z0-9._-]{1,64}:(?P<secret>[A-Za-z0-9._~!-]{6,128})@" + _HOST),
    ),
    Secret(
        "email",
        "<EMAIL>",
        ("@",),
        re.compile(
            r"(?<![\w.+/:-])(?!git@|no-?reply@)[A-Za-z0-9_][\w.+-]{0,63}@(?!(?:\w+\.)*example\.|users\.noreply)" + _HOST
        ),
    ),
    Secret("ipv4", "<IP_ADDRESS>", (".",), re.compile(r"(?<![\w.+-])[1-9]\d{0,2}(?:\.\d{1,3}){3}(?![\w-]|\.\w)")),
)
# Addresses that name no one: public name servers, in every tutorial.
NAME_SERVERS = frozenset(("8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9"))


def find_secrets(text: str) -> Iterator[tuple[str, str, int, int]]:
    """Kind, placeholder, start and end of each secret of a text; they may overlap."""
    for kind, placeholder, keywords, pattern in SECRETS:
        if not any(keyword in text for keyword in keywords):
            continue
        group = "secret" if "secret" in pattern.groupindex else 0
        for match in pattern.finditer(text):
            if kind != "ipv4" or _is_public_host(match.group()):
                yield kind, placeholder, *match.span(group)


def _is_public_host(text: str) -> bool:
    """Whether this is the address of a host on the internet, and not a version or a network, which
    end in 0."""
    if text in NAME_SERVERS or text.endswith(".0"):
        return False
    try:
        return IPv4Address(text).is_global
    except ValueError:  # 300.1.1.1
        return False


def mask(text: str) -> str:
    """The text with each secret replaced by its placeholder.

    >>> mask("Mail jane.doe@mail.org or ask 10.0.0.1")
    'Mail <EMAIL> or ask 10.0.0.1'
    """
    parts, position = [], 0
    for _, placeholder, start, end in sorted(find_secrets(text), key=lambda found: (found[2], -found[3])):
        if start >= position:
            parts += [text[position:start], placeholder]
            position = end
    return "".join([*parts, text[position:]]) if parts else text


def secret(row: Candidate, limits: Limits) -> bool:
    """The subject or one of the files has a secret."""
    return any(True for text in (row.new, row.old, row.subject) for _ in find_secrets(text))


def mask_secrets(row: Candidate, limits: Limits) -> bool:
    """Replace the secrets of all texts. Drops a row that then changes nothing."""
    row.old, row.new = mask(row.old), mask(row.new)
    subject = mask(row.subject)
    if subject != row.subject:
        row.set_subject(subject)
    return unchanged(row, limits)
