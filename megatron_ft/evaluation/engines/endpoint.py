"""Samples from a server that speaks OpenAI's `/v1/completions`: vLLM, transformers serve, others.

Prompts are exact strings, never chats. No stop words are sent: they cannot express where a
function ends. Texts run on, and the function that cuts them makes the score the same.

What may pass is retried with growing pauses: refused connections, timeouts, statuses 408, 425, 429
and 5xx, answers that are not the JSON expected, and choices that are missing. Everything else, and
the last attempt, is a UserError: no sample is ever left out.
"""

import http.client
import json
import re
import threading
import time
import urllib.request
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from megatron_ft.errors import UserError
from megatron_ft.evaluation.engines.engine import LEAST_NEW_TOKENS, Request, Sample
from megatron_ft.evaluation.stopping import StopRule
from megatron_ft.printable import printable

PASSING = (408, 425, 429)  # statuses that may pass, in addition to 5xx
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds; doubled after each attempt
LONGEST_RETRY_AFTER = 300.0  # seconds; a server that asks for more is asked again after these
MAX_ANSWER_BYTES = 64 << 20
SHOWN = 200  # characters of a server's message
VALID_KEY = re.compile(r"[\x21-\x7e]+")
SEED_MASK = (1 << 31) - 1  # some servers take 32 bits only


class _Failed(Exception):
    """An attempt that may be repeated, after `retry_after` seconds if the server named them."""

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


class _Refused(Exception):
    """The server does not accept a request such as this one."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key to another server, and the request without its body."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def check_url(url: str) -> None:
    """Raise UserError if it is not the URL of a server, or has a password in it."""
    if "@" in url:
        raise UserError("--endpoint: holds a name or password; put a key in a variable and give --key-variable NAME")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise UserError(f"--endpoint {url}: expected http://HOST:PORT/v1 or https://HOST/v1, without ? and #")


class Endpoint:
    """The model `model` of the server at `url`, which ends in /v1.

    A request asks for `batch_size` samples of a prompt, with the seed of the first; for one sample
    at a time if the server refuses several. Each may take `timeout` seconds and `attempts`.
    """

    eos: str | None = None

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None,
        temperature: float,
        top_p: float,
        max_length: int,
        batch_size: int,
        at_once: int,
        timeout: float,
        attempts: int,
    ):
        base = url.rstrip("/").removesuffix("/completions")
        self._url, self._model, self._key, self.at_once = f"{base}/completions", model, key, at_once
        self._sampling = {"temperature": temperature} | ({"top_p": top_p} if temperature > 0 else {})
        self._max_length, self._timeout, self._attempts = max_length, timeout, attempts
        self._batch_size, self._one_by_one = batch_size, batch_size == 1
        self._prompt_tokens: dict[str, int] = {}
        self._lock = threading.Lock()
        if key is not None and not VALID_KEY.fullmatch(key):
            raise UserError(
                "the endpoint's API key is empty, or holds spaces or other characters than ASCII; set it again"
            )
        self._opener = urllib.request.build_opener(_NoRedirects)

    def identity(self) -> dict[str, Any]:
        """The model's name, not the server's: another node may serve the same model after a
        restart."""
        return {"model": self._model, "samples_per_request": self._batch_size}

    def sample(self, request: Request) -> list[Sample]:
        """One sample per number. All of the group are asked for, so that a restart gets the same;
        those of `request.numbers` are returned.

        The tokens of a sample are the mean of its request's, since servers report their sum only.
        """
        found: dict[int, Sample] = {}
        limit = max(self._max_length - self._tokens_of(request.prompt), LEAST_NEW_TOKENS)
        waiting = list(request.group)
        failures = 0
        while waiting := [number for number in waiting if number not in found]:
            if self._one_by_one:
                waiting = [number for number in waiting if number in request.numbers]
                if not waiting:
                    break
            asked = waiting[:1] if self._one_by_one else waiting
            seed = request.seed_of(asked[0]) & SEED_MASK
            body = {"prompt": request.prompt, "max_tokens": limit, "n": len(asked), "seed": seed, **self._sampling}
            try:
                answer = self._ask(body)
            except _Refused as refused:
                if len(asked) == 1:
                    raise UserError(str(refused)) from None
                self._one_by_one = True
                continue
            samples = _samples(answer, len(asked), seed, request.rule)
            found |= {asked[index]: sample for index, sample in samples.items()}
            failures = 0 if samples else failures + 1
            if failures == self._attempts:
                raise UserError(self._exhausted("answers without a choice that can be used"))
            if not samples:
                time.sleep(_pause(failures, None))
        return [found[number] for number in request.numbers]

    def _tokens_of(self, prompt: str) -> int:
        """Tokens of a prompt, as the server counts them, by asking for one token more."""
        with self._lock:
            known = self._prompt_tokens.get(prompt)
        if known is None:
            try:
                answer = self._ask({"prompt": prompt, "max_tokens": 1, "temperature": 0})
            except _Refused as refused:
                raise UserError(str(refused)) from None
            usage = answer.get("usage")
            known = usage.get("prompt_tokens") if isinstance(usage, dict) else None
            if not isinstance(known, int) or known < 1:
                raise UserError(f"{self._url}: its answers have no usage.prompt_tokens, which --max-length needs")
            with self._lock:
                self._prompt_tokens[prompt] = known
        return known

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """The server's answer, with a list `choices`. Raises _Refused if the server does not accept
        the request, UserError if it does not answer."""
        for attempt in range(1, self._attempts + 1):
            try:
                return self._attempt({"model": self._model, **body})
            except _Failed as failed:
                reason, retry_after = str(failed), failed.retry_after
            if attempt < self._attempts:
                time.sleep(_pause(attempt, retry_after))
        raise UserError(self._exhausted(reason))

    def _exhausted(self, reason: str) -> str:
        return (
            f"{self._url}: {self._attempts} attempts failed, the last with: {reason}; what was generated is kept: "
            "run the same command again when the server answers"
        )

    def _attempt(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                content = self._read(response)
        except HTTPError as error:
            raise self._failure(error) from None
        except (URLError, http.client.HTTPException, OSError) as error:
            reason = error.reason if isinstance(error, URLError) else error
            raise _Failed(self._shown(f"{reason}" or type(reason).__name__)) from None
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            start = self._shown(content[:SHOWN].decode("utf-8", "replace"))
            raise _Failed(f"not JSON but {start!r}" if content else "an empty answer") from None
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            raise _Failed(f"JSON without choices: {self._shown(json.dumps(answer))}")
        return answer

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        """The body. The timeout of sockets is for each read; this one is for all of them."""
        deadline = time.monotonic() + self._timeout
        content = bytearray()
        while piece := response.read1(1 << 16):
            content += piece
            if len(content) > MAX_ANSWER_BYTES:
                raise _Failed(f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB")
            if time.monotonic() > deadline:
                raise _Failed(f"no complete answer after {self._timeout:g} s")
        return bytes(content)

    def _failure(self, error: HTTPError) -> Exception:
        """What a status other than 200 means."""
        status = error.code
        try:
            text = error.read(1 << 14).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        reason = f"HTTP status {status}: {self._shown(_message(text)) or 'no message'}"
        if status in PASSING or status >= 500:
            return _Failed(reason, _seconds(error.headers.get("Retry-After")))
        if status in (400, 413, 422):
            return _Refused(f"{self._url}: {reason}")
        remedies = {
            401: "name the environment variable of its key with --key-variable",
            403: "name the environment variable of its key with --key-variable",
            404: f"is it the URL that ends in /v1, and {self._model} a model that the server has?",
        }
        return UserError(f"{self._url}: {reason}; {remedies.get(status, 'name another --endpoint')}")

    def _shown(self, text: str) -> str:
        """A server's text for a message: short, on one line, without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        return printable(" ".join(text.split())[:SHOWN])


def _samples(answer: dict[str, Any], asked: int, seed: int, rule: StopRule) -> dict[int, Sample]:
    """The usable choices of an answer by their index, below `asked`."""
    choices = answer["choices"]
    usage = answer.get("usage")
    total = usage.get("completion_tokens") if isinstance(usage, dict) else None
    tokens = round(total / max(len(choices), 1)) if isinstance(total, int) else 0
    samples = {}
    for position, choice in enumerate(choices):
        if not isinstance(choice, dict):
            continue
        index, text, reason = choice.get("index", position), choice.get("text"), choice.get("finish_reason")
        # A server that is stopped ends with "abort", or none: such a text is incomplete.
        if index in range(asked) and isinstance(text, str) and reason in ("stop", "length"):
            finish = "stop" if _complete(text, rule) else "eos" if reason == "stop" else "length"
            samples[index] = Sample(text, tokens, finish, seed)
    return samples


def _complete(text: str, rule: StopRule) -> bool:
    """Whether the answer is complete before or at the end of a text that ran on."""
    ends = [position + 1 for position, character in enumerate(text) if character == "}"]
    return rule.finished(text) or any(rule.finished(text[:end]) for end in ends)


def _message(text: str) -> str:
    """The message in an error's body, which OpenAI's servers nest, else the body."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail") if key in found), json.dumps(found))
    return str(found)


def _pause(attempt: int, retry_after: float | None) -> float:
    """Seconds to wait after the attempt of this number, from 1."""
    if retry_after is not None:
        return min(retry_after, LONGEST_RETRY_AFTER)
    return min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)


def _seconds(header: str | None) -> float | None:
    """Retry-After as seconds from now: a number, or a date; None if it is neither.

    >>> _seconds("7"), _seconds("soon")
    (7.0, None)
    """
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
