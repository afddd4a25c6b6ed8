"""What `ditlab sample` does with batches that were drawn before: other batch sizes, other settings, another process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ditlab.cli.drawing import draw_batch
from PIL import Image


def interrupted(*args: object, **more: object) -> None:
    raise KeyboardInterrupt


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """Every PNG of a finished folder, uint8 [H, W, C], by its name."""
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in folder.glob("images/**/*.png")}


def cut_short(ditlab, monkeypatch, *words: object, after: int, what=interrupted) -> Path:
    """Runs a command that something befalls when it has drawn so many batches; gives its hidden folder."""
    drawn = []

    def some(*args: object, **more: object):
        if len(drawn) == after:
            return what(*args, **more)
        drawn.append(draw_batch(*args, **more))  # pyright: ignore[reportArgumentType]
        return drawn[-1]

    with monkeypatch.context() as patch:
        patch.setattr("ditlab.cli.sample_job.draw_batch", some)
        done = ditlab(*words)
    assert done.status == (130 if what is interrupted else 2), done
    (folder,) = Path.cwd().glob(".*.unfinished-*")
    return folder


@pytest.mark.parametrize("sweep", [False, True])
def test_another_batch_size_goes_on(ditlab, plain, conditional, tmp_path, monkeypatch, sweep):
    """With what is there already, and the same images come of it; samples.json has both sizes."""
    words = ["sample", conditional if sweep else plain, "--seeds", "0-10", "--sampler", "ddim", "--steps", 2]
    words += ["--guidance-sweep", 1, 3] if sweep else ["--strip", 7]
    left = cut_short(ditlab, monkeypatch, *words, "--out", "a", "--batch", 4, after=2)
    assert sorted(p.name for p in (left / "parts").iterdir()) == ["00000000-4.npz", "00000004-4.npz"]
    (left / "parts" / "00000000-4.npz").unlink()  # as another process may leave a hole
    done = ditlab(*words, "--out", "a", "--batch", 3)
    assert done.status == 0, done.err
    # The hole takes two batches; what is behind it one (3), and in a sweep another guidance's 11 take four.
    assert f"going on: 1 of {8 if sweep else 4} batches are there already\n" in done.out
    assert json.loads((tmp_path / "a" / "samples.json").read_text())["batch"] == [3, 4]
    assert ditlab(*words, "--out", "b").status == 0
    a, b = pictures(tmp_path / "a"), pictures(tmp_path / "b")
    assert a.keys() == b.keys()
    assert len(a) == (22 if sweep else 11)
    for name, picture in a.items():  # a rounding to 8 bits may fall differently
        assert np.abs(picture.astype(int) - b[name]).max() <= 1
    names = [sorted(path.name for path in (tmp_path / out).iterdir()) for out in "ab"]
    assert names[0] == names[1]


def test_what_other_settings_left_is_kept(ditlab, plain, tmp_path, monkeypatch):
    """It is said where it lies, and the command that began it goes on with it."""
    words = ["sample", plain, "--seeds", "0-5", "--steps", 2, "--batch", 2, "--out", "a"]
    left = cut_short(ditlab, monkeypatch, *words, "--strip", 1, after=2)
    before = {p: p.read_bytes() for p in left.rglob("*") if p.is_file()}
    (tmp_path / ".a.unfinished-empty" / "parts").mkdir(parents=True)
    done = ditlab(*words, "--no-images")
    assert done.status == 0, done.err
    assert done.out.startswith(f"note: 4 unfinished images with other settings lie in {left.name}\n")
    assert {p: p.read_bytes() for p in left.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [left.name, "a"]  # nothing is lost with an empty one
    (tmp_path / "a").rename(tmp_path / "b")
    assert "going on: 2 of 3 batches are there already" in ditlab(*words, "--strip", 1).out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_images_that_are_not_finite(ditlab, refused, conditional, plain, tmp_path, monkeypatch):
    """They would be black pictures; here of a guidance so strong that numbers overflow."""
    says = refused("sample", conditional, "--seeds", "3-5", "--steps", 5, "--guidance.scale", 1e38, "--out", "a")
    assert says == (
        "sample: expected finite images, found NaN or infinite values in 3 of the 3 images of a batch, the first of "
        "them of seed 3; nothing of this batch was kept"
    )
    # Earlier batches stay.
    words = ["sample", plain, "--seeds", "0-5", "--steps", 2, "--batch", 2, "--out", "b"]
    broken = torch.zeros(2, 3, 8, 8)
    broken[1, 0, 0, 0] = torch.inf
    left = cut_short(ditlab, monkeypatch, *words, after=2, what=lambda *args, **more: broken)
    assert len(list((left / "images").iterdir())) == 4
    assert "going on: 2 of 3 batches" in ditlab(*words).out


@pytest.mark.parametrize(
    "changes", [{"beta_schedule": "squaredcos_cap_v2"}, {"prediction_type": "v_prediction"}, {"beta_end": 0.03}]
)
def test_another_process_of_the_same_weights(ditlab, diffusers_folder, tmp_path, monkeypatch, changes):
    """Its samples are neither finished nor mixed with those of the one before."""
    folder = diffusers_folder("unet")
    words = ["sample", f"diffusers:{folder}", "--sampler", "ddim", "--steps", 2, "--seeds", "0-3", "--device", "cpu"]
    assert ditlab(*words, "--out", "done").status == 0
    left = cut_short(ditlab, monkeypatch, *words, "--out", "half", "--batch", 2, after=1)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    done = ditlab(*words, "--out", "done")
    assert (done.status, "it holds samples with weights = " in done.err) == (2, True)
    done = ditlab(*words, "--out", "half", "--batch", 2)
    assert done.status == 0, done.err
    assert "going on" not in done.out
    assert f"note: 2 unfinished images with other settings lie in {left.name}" in done.out
    before, now = pictures(tmp_path / "done"), pictures(tmp_path / "half")
    assert before.keys() == now.keys()
    assert any(not np.array_equal(picture, now[name]) for name, picture in before.items())
