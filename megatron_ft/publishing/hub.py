"""Upload a model's directory to the Hub, in one commit that appears when everything is there.

Large files are uploaded first, one by one; what the Hub has already is not sent again, so a command
that was interrupted continues where it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ft.errors import UserError
from megatron_ft.printable import printable
from megatron_ft.publishing.model_card import README

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

# Of a converted model, a PEFT adapter, and their tokenizers. Nothing else is published.
PUBLISHED = (
    "config.json", "generation_config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "LICENSE", "NOTICE",
)  # fmt: skip


@dataclass(frozen=True)
class Destination:
    """A repository on the Hub, and the branch to commit to."""

    repo: str
    revision: str = "main"
    private: bool = False


def files_to_publish(directory: Path) -> list[Path]:
    """The model's files in a directory, sorted. Raises UserError if it is not a converted model."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give what convert/megatron_to_hf.py wrote")
    files = sorted({path for pattern in PUBLISHED for path in directory.glob(pattern) if path.is_file()})
    names = {path.name for path in files}
    if not names & {"config.json", "adapter_config.json"} or not any(name.endswith(".safetensors") for name in names):
        raise UserError(
            f"{directory}: not a Hugging Face model with safetensors; convert it: convert/megatron_to_hf.py"
        )
    return files


def check_repository(repo: str) -> None:
    """Raise UserError if this cannot be the name of a repository; asks nobody."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = str(error).rstrip(".")
        raise UserError(f"{repo!r}: not a name of a repository ({reason}); give NAME or OWNER/NAME") from None


def push(files: list[Path], card: str, destination: Destination, message: str) -> str:
    """Create the repository if there is none, upload everything, and return the commit's address.

    `card` is the text of its README.md. Raises UserError.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    api, repo, revision = HfApi(), destination.repo, destination.revision
    operations = [CommitOperationAdd(path.name, str(path)) for path in files]
    silent = are_progress_bars_disabled()
    disable_progress_bars()  # one line per file instead
    try:
        with one_line_errors(destination):
            api.create_repo(repo, private=destination.private or None, exist_ok=True)
            if revision != "main":
                api.create_branch(repo, branch=revision, exist_ok=True)
            for operation in operations:
                upload(api, operation, destination)
            everything = [CommitOperationAdd(README, card.encode()), *operations]
            return str(api.create_commit(repo, everything, commit_message=message, revision=revision).commit_url)
    finally:
        if not silent:
            enable_progress_bars()


def upload(api, operation: "CommitOperationAdd", destination: Destination) -> None:
    """Upload one file, if it is a large one that the Hub does not have; small ones come with the
    commit."""
    size = operation.upload_info.size
    print(printable(f"{operation.path_in_repo}: {size / 1e6:,.1f} MB"), flush=True)
    api.preupload_lfs_files(destination.repo, additions=[operation], revision=destination.revision, free_memory=False)


@contextmanager
def one_line_errors(destination: Destination) -> Iterator[None]:
    """Raise UserError for what the Hub refuses, and for a connection that fails."""
    from huggingface_hub.errors import HTTPError  # that of its HTTP client

    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(printable(reason(error, destination))) from None


def reason(error: BaseException, destination: Destination) -> str:
    """Why the Hub refused, and what to do. The token is never part of it."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__  # of an upload in a thread
    again = "run the same command again: uploaded files are not sent twice"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it, on a machine with internet"
    if isinstance(error, LocalTokenNotFoundError):
        return "no token: log in with `hf auth login`, or set HF_TOKEN"
    if not isinstance(error, HfHubHTTPError):
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"{destination.repo}: the connection to the Hub failed ({first[:200]}); {again}"
    status = error.response.status_code
    told = error.server_message or error.response.headers.get("X-Error-Message") or error.response.reason_phrase
    told = " ".join(told.split())[:200]
    remedies = {
        400: "correct what it names",
        401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
        403: f"use a token that may write to {destination.repo}, or accept the terms of a gated repository on its page",
        404: "check the owner's name, and that the token may see the repository",
        409: f"somebody else commits to it at the moment; {again}",
        413: "a file is larger than the Hub takes; convert again with a smaller --max-shard-size",
    }
    return f"{destination.repo}: the Hub answered {status} ({told}); {remedies.get(status, again)}"
