"""Fetching from and sending to the Hugging Face hub, and the sentences for all that can go wrong there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ditlab.errors import DitlabError


def download(repo: str, patterns: Sequence[str] | None = None) -> Path:
    """The files of a repository of models, in the hub's own cache on this machine; what is there is not fetched again.

    Args:
        repo: ORGANIZATION/NAME.
        patterns: names of the files to fetch, with * for anything; all of them where not given.

    Raises:
        DitlabError: no such repository, or one that may not be read, no connection, or one that broke off.
    """
    with _told(repo):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo, allow_patterns=None if patterns is None else list(patterns)))


def upload(folder: Path, repo: str) -> str:
    """Makes a repository if there is none, and sends a folder there as one commit; returns the page's address.

    Raises:
        DitlabError: not logged in, no right to write there, or no connection.
    """
    with _told(repo):
        from huggingface_hub import HfApi

        api = HfApi()
        address = api.create_repo(repo, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a run of ditlab")
        return str(address)


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Turns what the hub's library raises into one sentence."""
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
            f"hub:{repo}: no such repository is to be seen; is the name right? A private one needs `hf auth login`"
        ) from None
    except (errors.LocalTokenNotFoundError, PermissionError):
        raise DitlabError(f"hub:{repo}: log in first, with `hf auth login` and a token that may write there") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise DitlabError(
            f"hub:{repo}: the hub cannot be reached and this machine's cache does not hold the files; fetch them where "
            f"there is a network (`hf download {repo}`) and give the folder"
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise DitlabError(
                f"hub:{repo}: the hub refuses (HTTP {status}); `hf auth login` with a token that has the right to"
            ) from None
        raise DitlabError(f"hub:{repo}: the hub answered with an error (HTTP {status}); try again later") from None
    except Exception as error:  # Network libraries raise types of their own that share no base class.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DitlabError(
            f"hub:{repo}: the transfer was interrupted ({first:.100}); the same command again goes on with what is "
            "missing"
        ) from None
