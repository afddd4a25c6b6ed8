"""The hub: what is asked of it, and one sentence for everything that goes wrong. No test reaches the network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ditlab.errors import DitlabError
from ditlab.interop.diffusers_models import open_diffusers
from ditlab.interop.hub import download, upload

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("huggingface_hub.errors")


def answer(kind: type[Exception], status: int) -> Exception:
    """An error of the hub's library, with the response that it holds."""

    class Response:
        status_code = status
        request = None

    error = kind.__new__(kind)
    Exception.__init__(error, f"{status}")
    error.response = Response()
    return error


def failing(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (answer(hub.errors.GatedRepoError, 403), "is gated; accept its terms on https://huggingface.co/a/b and log in"),
        (answer(hub.errors.RepositoryNotFoundError, 404), r"no such repository; .* `hf auth login`"),
        (answer(hub.errors.HfHubHTTPError, 401), r"access refused \(HTTP 401\)"),
        (answer(hub.errors.HfHubHTTPError, 503), r"answered with an error \(HTTP 503\); try again later"),
        (hub.errors.LocalEntryNotFoundError("x"), r"cannot be reached .*`hf download a/b`"),
        (hub.errors.OfflineModeIsEnabled("x"), "cannot be reached and this machine's cache does not hold the files"),
        (
            ConnectionError("Connection broken: 312 bytes read"),
            r"was interrupted \(Connection broken: 312 bytes read\)",
        ),
        (
            OSError("Consistency check failed: file should be of size 9"),
            "run the same again to resume",
        ),
        (TimeoutError(), r"was interrupted \(TimeoutError\)"),
    ],
)
def test_a_download_that_fails(monkeypatch, error, says):
    monkeypatch.setattr(hub, "snapshot_download", failing(error))
    with pytest.raises(DitlabError, match=says) as told:
        download("a/b")
    assert str(told.value).startswith("hub:a/b: ")
    assert "\n" not in str(told.value)


def test_a_name_that_is_none():
    with pytest.raises(DitlabError, match="expected a repository as ORGANIZATION/NAME"):
        download("a b/c")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DitlabError, match=r'pip install "ditlab\[hub\]"'):
        download("a/b")


def test_ctrl_c_is_no_error_of_the_hub(monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        download("a/b")


def test_a_diffusers_model_on_the_hub(monkeypatch, diffusers_folder):
    folder, asked = diffusers_folder("unet"), []

    def fetch(repo, *, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    model = open_diffusers("someone/faces")
    assert (model.name, model.denoiser.shape) == ("someone--faces", (3, 8, 8))
    assert asked == [("someone/faces", ["*.json", "*.safetensors"])]
    # A repository without safetensors is asked for its pickles, which diffusers reads with weights_only.
    asked.clear()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DitlabError, match="could not be read"):
        open_diffusers("someone/faces")
    assert asked[1] == ("someone/faces", ["*.json", "*.safetensors", "*.bin"])


def test_sending(monkeypatch, tmp_path):
    done = []

    class Api:
        def create_repo(self, repo, **named):
            done.append(("create", repo, named))
            return f"https://huggingface.co/{repo}"

        def upload_folder(self, **named):
            done.append(("upload", named["repo_id"], Path(named["folder_path"])))

    monkeypatch.setattr(hub, "HfApi", Api)
    assert upload(tmp_path, "me/mine") == "https://huggingface.co/me/mine"
    assert done == [
        ("create", "me/mine", {"repo_type": "model", "exist_ok": True}),
        ("upload", "me/mine", tmp_path),
    ]
    monkeypatch.setattr(Api, "create_repo", failing(hub.errors.LocalTokenNotFoundError("x")))
    with pytest.raises(DitlabError, match="hub:me/mine: log in first"):
        upload(tmp_path, "me/mine")
