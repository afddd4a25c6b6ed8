"""A run on its way to the hub: its files, its card, and what is not on it; and back."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import ditlab

MEASURED = {"images": 4, "points": 3, "baselines": False, "device": "cpu"}


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_an_export(refused, place, plain):
    run = place.copy(plain)
    ditlab.psnr_gap(run, **MEASURED)
    ditlab.attention(run, images=2, device="cpu")
    ditlab.sample(run, seeds=range(4), steps=2, device="cpu", out=True)
    made = ditlab.convert(run, "hub:me/mine", dry_run="export", licence="cc-by-4.0", samples=True)
    assert made.sent is False
    out = Path("export")
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "config.json",
        "log.jsonl",
        *(f"analysis/{name}" for name in ("attention.json", "attention.npz")),
        *(f"analysis/psnr-gap.{kind}" for kind in ("csv", "json", "npz")),
        *(f"checkpoints/000000006/{name}.safetensors" for name in ("ema", "model", "optimizer")),
        *(f"checkpoints/000000006/{name}.json" for name in ("manifest", "state")),
        *(
            f"figures/{name}.png"
            for name in ("attention-locality", "gap-along-training", "losses", "psnr-curves", "samples")
        ),
    }
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ditlab\nlicense: cc-by-4.0\n")
    for target in re.findall(r"!\[.*?\]\((.*?)\)", card):
        assert (out / target).is_file()
    gap = json.loads((run / "analysis" / "psnr-gap.json").read_text())["averages"]["mse_mean"]
    assert f"| PSNR gap | {gap['gap']:.2f} dB" in card
    assert f"| PSNR on training images | {gap['train']:.2f} dB |" in card
    assert "| training images | 20 |" in card
    assert "| steps | 6 |" in card
    assert 'ditlab.load("hub:me/mine")' in card
    # Where the images lay is nobody's concern, and they did not come along.
    assert json.loads((out / "config.json").read_text())["config"]["data"]["path"] == ""
    ditlab.load(out)
    says = refused(ditlab.psnr_gap, out)
    assert says == "run export: its images did not come with it; give their set's folder as `data`"
    ditlab.psnr_gap(out, data=place.images, **MEASURED)


def test_an_export_of_other_weights_has_no_numbers_of_these(place, plain, notes):
    run = place.copy(plain)
    ditlab.psnr_gap(run, **MEASURED)
    ditlab.convert(run, "hub:me/mine", dry_run="export", checkpoint=4, reporter=notes)
    assert any("no `licence` was given" in note for note in notes.sentences)
    card = Path("export/README.md").read_text()
    assert "PSNR gap |" not in card
    assert "license:" not in card
    assert not Path("export/analysis").exists()


def test_a_damaged_result_is_named_and_stays_here(place, plain, notes):
    run = place.copy(plain)
    ditlab.psnr_gap(run, **MEASURED)
    file = run / "analysis" / "psnr-gap.json"
    file.write_text(file.read_text()[:50])
    ditlab.convert(run, "hub:me/mine", dry_run="export", licence="cc-by-4.0", reporter=notes)
    [note] = notes.sentences
    assert note.startswith(f"not used: {file}: expected a JSON result, found something else")
    assert "PSNR gap |" not in Path("export/README.md").read_text()
    assert not Path("export/analysis").exists()


def test_the_card_says_on_which_images_attention_was_measured(place, plain):
    """Beside PSNR on held-out images; a result on held-out images goes before a newer one on others."""
    run = place.copy(plain)
    for images_from, words in (("train", "training images"), ("test", "held-out images"), ("train", "held-out images")):
        ditlab.attention(run, images=2, images_from=images_from, device="cpu")
        shutil.rmtree("export", ignore_errors=True)
        ditlab.convert(run, "hub:me/mine", dry_run="export")
        card = Path("export/README.md").read_text()
        assert re.search(rf"\| mean attention distance \| [\d.]+ tokens on \d+x\d+, of {words} \|", card)
        assert f"How far its attention reaches, on {words}." in card


@pytest.mark.parametrize("kind", ["raw", "split"])
def test_numbers_of_raw_weights_and_of_other_splits_are_not_on_the_card(place, plain, kind):
    run = place.copy(plain)
    ditlab.psnr_gap(run, raw=kind == "raw", **MEASURED)
    if kind == "split":
        file = run / "analysis" / "psnr-gap.json"
        values = json.loads(file.read_text())
        values["about"]["split_hash"] = "0" * 64
        file.write_text(json.dumps(values))
    ditlab.convert(run, "hub:me/mine", dry_run="export")
    assert "PSNR gap |" not in Path("export/README.md").read_text()
    assert not Path("export/analysis").exists()


def test_sending_and_fetching(refused, plain, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    sent = tmp_path / "on-the-hub"

    class Api:
        def create_repo(self, repo, **_):
            return f"https://huggingface.co/{repo}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, sent)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, *, allow_patterns: str(sent))
    made = ditlab.convert(plain, "hub:me/mine")
    assert (made.sent, made.out) == (True, "https://huggingface.co/me/mine")
    for settings in ({"checkpoint": 4}, {"raw": True}):
        says = refused(ditlab.convert, "hub:me/mine", "fetched", **settings)
        assert "is a run, fetched as it is; expected no `checkpoint` or `raw`, found one" in says
    ditlab.convert("hub:me/mine", "fetched")
    y = torch.randn(1, 3, 8, 8)
    expected = ditlab.load(plain)(y, 0.5)
    assert torch.equal(ditlab.load("fetched")(y, 0.5), expected)
    assert torch.equal(ditlab.load("hub:me/mine")(y, 0.5), expected)
    samples = ditlab.sample("hub:me/mine", seeds=range(2), steps=2, device="cpu", out=True)
    assert next((tmp_path / "external" / "me--mine" / "samples").glob("*/grid.png")).parent.samefile(samples.folder)


def test_an_interrupted_download(refused, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def broken(*_, **__):
        raise ConnectionError("Connection broken: 1048576 bytes read, 99 more expected")

    monkeypatch.setattr(hub, "snapshot_download", broken)
    assert "run the same again to resume" in refused(ditlab.convert, "hub:me/mine", "out")
    assert "run the same again to resume" in refused(ditlab.sample, "diffusers:me/mine")
    assert "run the same again to resume" in refused(ditlab.psnr_gap, "hub:me/mine")
