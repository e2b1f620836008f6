"""Credentials and personal data: found where they are, and nowhere else."""

import time

import pytest
from filter_cases import GOOD, candidate_from

from megatron_ft.commits.presets import PRESETS
from megatron_ft.commits.rules import Limits
from megatron_ft.commits.secrets import SECRETS, find_secrets, mask, mask_secrets, secret

ALNUM = "aB3dE5gH7jK9mN1pQ2sT4vW6yZ8"  # parts are joined here, so that no scanner takes them for real


def text(*parts: str, length: int = 0) -> str:
    """The parts joined, with `length` letters and digits at the end."""
    return "".join(parts) + (ALNUM * 9)[:length]


# Kind: what is found, its surroundings replaced by the placeholder.
FOUND = {
    "aws_access_key": (f"id = '{text('AK', 'IA', 'IOSFODNN7EXAMPL2')}'", "id = '<KEY>'"),
    "aws_secret_key": (f"AWS_SECRET_ACCESS_KEY={text(length=40)}", "AWS_SECRET_ACCESS_KEY=<KEY>"),
    "github_token": (text("token: gh", "p_", length=36), "token: <KEY>"),
    "gitlab_token": (text("gl", "pat-", length=20), "<KEY>"),
    "slack_token": (text("xo", "xb-123456789012-", length=24), "<KEY>"),
    "slack_webhook": (
        text("https://hooks.slack", ".com/services/T12345678/B12345678/", length=24),
        "https://hooks.slack.com/services/<KEY>",
    ),
    "google_api_key": (f'"{text("AI", "za", length=35)}"', '"<KEY>"'),
    "stripe_key": (text("sk_", "live_", length=24), "<KEY>"),
    "openai_key": (text("sk-", ALNUM[:20], "T3Blbk", "FJ", length=20), "<KEY>"),
    "anthropic_key": (text("sk-", "ant-api03-", length=90), "<KEY>"),
    "hugging_face_token": ("hf" + "_" + "abcdefGHIJ" * 3 + "abcd", "<KEY>"),
    "npm_token": (text("np", "m_", length=36), "<KEY>"),
    "pypi_token": (text("pypi-", "AgEIcHlwaS5vcmc", length=60), "<KEY>"),
    "sendgrid_key": (text("SG", ".", ALNUM[:22], ".", (ALNUM * 2)[:43]), "<KEY>"),
    "private_key": (
        f"a\n-----BEGIN RSA {'PRIVATE KEY'}-----\n{text(length=64)}\n{text(length=64)}\n-----END RSA PRIVATE KEY-----\nb",
        "a\n-----BEGIN RSA PRIVATE KEY-----<KEY>-----END RSA PRIVATE KEY-----\nb",
    ),
    "jwt": (text("Bearer ey", "J", ALNUM[:20], ".ey", "J", ALNUM[:20], ".", length=43), "Bearer <KEY>"),
    "url_password": ("postgres://admin:hunter2x@db.acme.io/x", "postgres://admin:<PASSWORD>@db.acme.io/x"),
    "email": ("by <jane.doe+x@mail.acme.io>", "by <<EMAIL>>"),
    "ipv4": ("ping 93.184.216.34.", "ping <IP_ADDRESS>."),
}
HARMLESS = [
    "icon@2x.png and logo@3x.retina.jpg",
    "git@github.com:owner/name.git",
    "ssh://git@host.org/x and https://user@host.org/",
    "user@example.com, jane@mail.example.org",
    "12+jane@users.noreply.github.com noreply@acme.io",
    "@decorator.name and a@b and x @ y.com",
    "127.0.0.1 10.1.2.3 192.168.1.7 172.16.0.1 0.0.0.0 255.255.255.255 8.8.8.8",
    "version 1.2.3.4.5, 1.0.0.0 and v93.184.216.34, 300.1.1.1, 93.184.216.34-beta, 93.184.216.340",
    "https://host.org:8080/x and http://user:@host.org and http://user:${PASS}@host.org",
    f"AKIA and ASIAN and aws_key = os.environ['X'], {'ghp_' + 'short'}, sk_test_{ALNUM}",
    "-----BEGIN PUBLIC KEY-----\n" + ALNUM * 3 + "\n-----END PUBLIC KEY-----",
    "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
    "eyJhbGciOi.short.x, hf_transfer, npm_config_registry, SG.small",
    "commit a1b2c3d4e5f6a7b8c9d0a1b2c3d4e5f6a7b8c9d0",
]


def test_every_kind_has_a_case():
    assert set(FOUND) == {entry.kind for entry in SECRETS}


@pytest.mark.parametrize("kind", FOUND)
def test_secret_is_found_and_only_it_is_replaced(kind):
    given, masked = FOUND[kind]
    assert {found[0] for found in find_secrets(given)} == {kind}
    assert mask(given) == masked
    assert mask(masked) == masked


@pytest.mark.parametrize("harmless", HARMLESS)
def test_what_only_looks_like_a_secret_stays(harmless):
    assert list(find_secrets(harmless)) == []
    assert mask(harmless) == harmless


def test_second_form_of_a_github_token_is_found():
    token = text("github", "_pat_", ALNUM[:22], "_", length=59)
    assert [found[0] for found in find_secrets(token)] == ["github_token"]


def test_overlapping_secrets_are_replaced_once():
    assert mask("https://user:jane.doe@acme.io/x@y") == "https://user:<PASSWORD>@acme.io/x@y"


def test_long_texts_take_no_time():
    """Patterns do not backtrack over a long run: 0.5 MB of each in a fraction of a second."""
    start = time.process_time()
    for run in (
        "a" * 500_000 + "@",
        "a.b-" * 125_000,
        "1." * 250_000,
        "x://a:" * 80_000,
        "eyJ" * 160_000,
        "a@" * 250_000,
    ):
        mask(run)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("name", ["old_contents", "new_contents", "subject"])
def test_row_is_dropped_or_masked_for_a_secret_in_any_text(name):
    given, masked = FOUND["email"]
    row = GOOD | {name: f"{GOOD[name]} {given}"}
    assert secret(candidate_from(row), Limits()) and not secret(candidate_from(GOOD), Limits())
    candidate = candidate_from(row)
    assert not mask_secrets(candidate, Limits())
    assert candidate.row() == GOOD | {name: f"{GOOD[name]} {masked}"}


def test_row_that_only_changes_a_secret_is_dropped_once_it_is_masked():
    old, new = ("mail = 'jane@acme.io'\n", "mail = 'john@acme.io'\n")
    assert mask_secrets(candidate_from(GOOD | {"old_contents": old, "new_contents": new}), Limits())


def test_preset_edit_masks_and_commitpackft_publishes_as_is():
    assert {name: preset.secrets for name, preset in PRESETS.items()} == {"commitpackft": "off", "edit": "mask"}
