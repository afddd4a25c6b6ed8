"""Run folders that are damaged, of another version, or changed behind the run's back: one sentence, nothing written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import ditlab
from ditlab.training.checkpoint import write_manifest


def edit(path: Path, names: str, value: object) -> None:
    """Changes a value of a JSON file."""
    record = json.loads(path.read_text())
    *inner, last = names.split(".")
    part = record
    for name in inner:
        part = part[name]
    part[last] = value
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("config.training.stepz", 3, "unknown key 'config.training.stepz'"),
        ("config.network.foo", 3, "unknown key 'config.network.foo'"),
        ("bogus", 1, "unknown key 'bogus'"),
        ("format", 2, "its format is 2, this ditlab reads up to 1; a newer ditlab wrote it"),
        ("format", "new", "expected a run's config.json with a 'format', found none"),
        ("config.training.steps", "many", "'config.training.steps': Input should be a valid integer"),
        ("config.training.steps", 0, "training: steps must be at least 1, found 0"),
        ("config.network.kind", "resnet", "'config.network': Input tag 'resnet'"),
    ],
)
def test_a_config_that_cannot_be_read(refused, place, plain, key, value, sentence):
    run = place.copy(plain)
    edit(run / "config.json", key, value)
    error = refused(ditlab.open, run)
    assert error.startswith(f"{run}/config.json: ")
    assert sentence in error


def test_a_config_that_is_not_json(refused, place, plain):
    run = place.copy(plain)
    (run / "config.json").write_text("steps: 3\n")
    assert refused(ditlab.open, run) == f"{run}/config.json: expected JSON, found something else"


def test_a_truncated_checkpoint_is_passed_over(refused, place, plain):
    run = place.copy(plain)
    paths = [run / "checkpoints" / f"{step:09d}" / "model.safetensors" for step in (6, 4)]
    whole = paths[0].read_bytes()
    paths[0].write_bytes(whole[:1000])
    y = torch.randn(1, 3, 8, 8)
    assert torch.equal(ditlab.load(run)(y, 0.5), ditlab.load(plain, step=4)(y, 0.5))
    assert ditlab.sample(run, seeds=[0], steps=2).settings["step"] == 4
    # Asked for by name, it is an error; and so is a run with no whole checkpoint at all.
    assert "found 1000 (truncated?)" in refused(ditlab.sample, run, checkpoint=6)
    paths[1].write_bytes(paths[1].read_bytes()[:1000])
    assert refused(ditlab.sample, run).startswith(f"no whole checkpoint is left: {paths[0]}: expected ")
    assert refused(place.train, run).startswith(f"no whole checkpoint is left: {paths[0]}: expected ")


def test_a_damaged_byte_is_found(refused, place, plain):
    run = place.copy(plain)
    for step in (4, 6):
        path = run / "checkpoints" / f"{step:09d}" / "ema.safetensors"
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    assert "its SHA-256 is not the recorded one" in refused(ditlab.sample, run)


def test_a_checkpoint_of_a_newer_version(refused, place, plain):
    run = place.copy(plain)
    for step in (4, 6):
        edit(run / "checkpoints" / f"{step:09d}" / "manifest.json", "format", 9)
    error = refused(ditlab.sample, run)
    assert "the checkpoint's format is 9, this ditlab reads up to 2; a newer ditlab wrote it" in error


def test_a_checkpoint_of_another_network(refused, place, plain):
    run = place.copy(plain)
    edit(run / "config.json", "config.network.width", 20)
    says = "'embed.weight' has shape (16, 3, 1, 1), expected (20, 3, 1, 1); are these another network's weights?"
    assert says in refused(ditlab.sample, run)
    with pytest.raises(ditlab.DitlabError, match="another network's weights"):
        place.train(run, **{"network.width": 20, "training.steps": 8})
    edit(run / "config.json", "config.network.width", 16)
    edit(run / "config.json", "config.network.depth", 1)
    assert "belongs to another network; this one has no such weights" in refused(ditlab.sample, run)


class Harmful:
    """Unpickled, it writes a file."""

    def __reduce__(self):
        return exec, ("open('harm', 'w').close()",)


def test_a_pickle_is_never_opened(refused, place, plain, tmp_path):
    torch.save({"w": torch.zeros(2), "x": Harmful()}, tmp_path / "model.pt")
    error = refused(ditlab.sample, tmp_path / "model.pt")
    assert "it wants to run 'exec' when it is opened, which could be any code, so it is not opened" in error
    (tmp_path / "model.pt").rename(tmp_path / "model.pkl")
    for call in (ditlab.sample, ditlab.load):
        error = refused(call, tmp_path / "model.pkl")
        assert error.endswith("expected a run's folder, found a pickle, which could run code and is not opened")
    run = place.copy(plain)
    for content in ((tmp_path / "model.pkl").read_bytes(), pickle.dumps(Harmful())):
        for step in (4, 6):
            (run / "checkpoints" / f"{step:09d}" / "model.safetensors").write_bytes(content)
        assert "truncated?" in refused(ditlab.sample, run)
        # Even where the manifest vouches for it.
        for step in (4, 6):
            write_manifest(run / "checkpoints" / f"{step:09d}", step)
        error = refused(ditlab.sample, run)
        assert "expected a safetensors file, found a pickle, which could run code and is not opened" in error
        assert "found a pickle" in refused(ditlab.load, run)
    assert not Path("harm").exists()


def test_an_image_set_that_has_changed(refused, place, plain):
    run = place.copy(plain)
    edit(run / "config.json", "split.imageset", "0" * 64)
    error = refused(ditlab.psnr_gap, run)
    assert "expected the image set 000000000000 that the run was trained on, found " in error
    edit(run / "config.json", "config.data.path", "../../gone")
    assert "gone, found nothing" in refused(ditlab.psnr_gap, run)


def test_runs_on_different_image_sets(refused, place, plain):
    """Their seeds differ too, so that nothing else gives it away: they would pass for two seeds of one set."""
    other = place.folder / "runs" / "other-set"
    other.mkdir(parents=True, exist_ok=True)
    record = json.loads((plain / "config.json").read_text())
    record["split"] |= {"imageset": "0" * 64, "family": "1" * 64, "seed": 5}
    (other / "config.json").write_text(json.dumps(record))
    error = refused(ditlab.psnr_gap, [plain, other])
    assert f"models {plain} and {other} were trained on different image sets" in error


def test_a_window_is_measured_against_the_images_and_not_the_presets_size(tmp_path):
    """40x40 images take a window of 39 and a patch of 5, which the preset's own 32x32 would not."""
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3), dtype=np.uint8))
    images = ditlab.prepare(f"array:{tmp_path}/a.npy", size=40, out=tmp_path / "set")
    small = {"width": 16, "depth": 1, "batch_size": 2, "evaluation.images": 1, "evaluation.levels": 0}
    for name, change in (("a", {"attention": "39"}), ("b", {"patch": 5})):
        run = ditlab.train(
            "dit-nano/1", images, n=4, test=2, steps=1, out=tmp_path / name, device="cpu", **small, **change
        )
        assert run is not None
        assert run.finished
