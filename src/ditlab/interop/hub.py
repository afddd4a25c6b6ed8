"""Downloads from and uploads to the Hugging Face hub, with one sentence for each of its errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ditlab.errors import DitlabError


def download(repo: str, patterns: Sequence[str] | None = None) -> Path:
    """Downloads files of a model repository into the hub's cache on this machine; returns their folder.

    Args:
        repo: ORGANIZATION/NAME.
        patterns: names of the files, with * as wildcard; all files by default.

    Raises:
        DitlabError: the repository is missing or not readable, or the connection failed.
    """
    with _hub_errors(repo):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo, allow_patterns=None if patterns is None else list(patterns)))


def upload(folder: Path, repo: str) -> str:
    """Uploads a folder as one commit, to a repository that is created if needed; returns the page's address.

    Raises:
        DitlabError: not logged in, no right to write, or no connection.
    """
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
    except errors.HFValidationError:
        raise DitlabError(f"hub:{repo}: expected a repository as ORGANIZATION/NAME") from None
    except errors.GatedRepoError:
        raise DitlabError(
            f"hub:{repo}: the repository is gated; accept its terms on https://huggingface.co/{repo} and log in with "
            "`hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise DitlabError(
            f"hub:{repo}: no such repository; check the name, or log in with `hf auth login` if it is private"
        ) from None
    except (errors.LocalTokenNotFoundError, PermissionError):
        raise DitlabError(f"hub:{repo}: log in first, with `hf auth login` and a token that may write there") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise DitlabError(
            f"hub:{repo}: the hub cannot be reached and this machine's cache does not hold the files; download them "
            f"where there is a network (`hf download {repo}`) and pass the folder"
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise DitlabError(
                f"hub:{repo}: access refused (HTTP {status}); use `hf auth login` with a token that has this right"
            ) from None
        raise DitlabError(f"hub:{repo}: the hub answered with an error (HTTP {status}); try again later") from None
    except Exception as error:  # Network libraries raise types of their own that share no base class.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DitlabError(
            f"hub:{repo}: the transfer was interrupted ({first:.100}); run the same again to resume"
        ) from None


__all__ = ["download", "upload"]
