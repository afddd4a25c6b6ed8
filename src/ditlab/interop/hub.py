"""Downloads from and uploads to the Hugging Face hub, with one sentence for each of its errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ditlab.errors import DitlabError


def download(repo: str, patterns: Sequence[str] | None = None) -> Path:
    """Downloads a model repository, or its files of these patterns, into the hub's cache; returns their folder."""
    with _hub_errors(repo):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo, allow_patterns=None if patterns is None else list(patterns)))


def upload(folder: Path, repo: str) -> str:
    """Uploads a folder as one commit, to a repository that is created if needed; returns the page's address."""
    with _hub_errors(repo):
        from huggingface_hub import HfApi

        api = HfApi()
        address = api.create_repo(repo, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a run of ditlab")
        return str(address)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turns exceptions of the hub's library into a DitlabError with one sentence."""
    try:
        from huggingface_hub import errors
    except ImportError:
        raise DitlabError('hub: needs the package huggingface_hub (pip install "ditlab[hub]")') from None
    try:
        yield
    except Exception as error:  # Network libraries raise types of their own that share no base class.
        raise DitlabError(f"hub:{repo}: {_sentence(error, repo, errors)}") from None


def _sentence(error: Exception, repo: str, errors: Any) -> str:
    """Returns what a user should know of an error; `errors` is the module of the library's own."""
    if isinstance(error, errors.HFValidationError):
        return "expected a repository as ORGANIZATION/NAME"
    if isinstance(error, errors.GatedRepoError):
        terms = f"accept its terms on https://huggingface.co/{repo}"
        return f"the repository is gated; {terms} and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository; check the name, or log in with `hf auth login` if it is private"
    if isinstance(error, (errors.LocalTokenNotFoundError, PermissionError)):
        return "log in first, with `hf auth login` and a token that may write there"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return (
            "the hub cannot be reached and this machine's cache does not hold the files; download them where there is "
            f"a network (`hf download {repo}`) and pass the folder"
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            return f"access refused (HTTP {status}); use `hf auth login` with a token that has this right"
        return f"the hub answered with an error (HTTP {status}); try again later"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"the transfer was interrupted ({first:.100}); run the same again to resume"


__all__ = ["download", "upload"]
