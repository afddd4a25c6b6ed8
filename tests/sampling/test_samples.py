"""Samples in memory and in a folder: what is drawn and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ditlab
from ditlab.diffusion.guidance import guided
from ditlab.diffusion.guidance_config import GuidanceConfig
from ditlab.diffusion.samplers import DDIMConfig
from ditlab.errors import DitlabError
from ditlab.sampling.draw import draw
from ditlab.sampling.options import GuidanceFlags, SampleConfig


def arrays(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "samples.npz") as file:
        return dict(file)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but samples.json, whose times differ."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: content for name, content in files.items() if name != "samples.json"}


def nearly(a: np.ndarray, b: np.ndarray) -> bool:
    """A rounding to 8 bits may fall differently where a matrix product adds up in another order."""
    return bool(np.abs(a.astype(int) - b).max() <= 1 and (a == b).mean() > 0.99)


def test_files(plain, tmp_path):
    """What is written; and an image is the same whatever is drawn beside it."""
    quick = {"sampler": "ddim", "steps": 4, "device": "cpu"}
    samples = plain.sample(seeds="0-4", out=tmp_path / "a", batch=5, **quick)
    settings = samples.settings
    assert (settings["step"], settings["ema"], settings["count"], settings["labels"]) == (6, True, 5, None)
    assert (settings["seeds"], settings["nfe"], settings["passes"], settings["guidance"]) == ("0-4", 4, 4, None)
    assert settings["seconds"] > 0
    assert json.loads((tmp_path / "a" / "samples.json").read_text()) == settings
    plain.sample(seeds=range(5), out=tmp_path / "b", batch=2, **quick)
    for name in "ab":
        folder = tmp_path / name
        assert sorted(p.name for p in folder.iterdir()) == ["grid.png", "images", "samples.json", "samples.npz"]
        written = arrays(folder)
        assert list(written) == ["arr_0"]
        assert (written["arr_0"].dtype, written["arr_0"].shape) == (np.uint8, (5, 8, 8, 3))
        assert sorted(p.name for p in (folder / "images").iterdir()) == [f"00000{i}.png" for i in range(5)]
        with Image.open(folder / "images" / "000003.png") as image:
            assert np.array_equal(np.asarray(image), written["arr_0"][3])
    a = arrays(tmp_path / "a")["arr_0"]
    assert np.array_equal(samples.images, a)
    assert nearly(a, arrays(tmp_path / "b")["arr_0"])
    with Image.open(tmp_path / "a" / "grid.png") as image:
        assert image.width > image.height > 8
    # Ranges and lists, in their order, and no PNGs.
    plain.sample(seeds="3,1-2,40", images=False, out=tmp_path / "c", **quick)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["grid.png", "samples.json", "samples.npz"]
    assert nearly(arrays(tmp_path / "c")["arr_0"][:3], a[[3, 1, 2]])
    drawn = draw(ditlab.load(plain.path), DDIMConfig(steps="4"), range(5))
    assert np.array_equal(plain.decode(drawn).transpose(0, 2, 3, 1), a)


def test_samples_in_memory(conditional, tmp_path, monkeypatch):
    """They write nothing until they are saved, and then the very files of a job with `out`."""
    monkeypatch.chdir(tmp_path)
    settings = {"seeds": range(5), "sampler": "ddim", "steps": 3, "strip": 3, "batch": 2, "classes": (7, 10)}
    samples = ditlab.sample(conditional.path, **settings)
    assert list(tmp_path.iterdir()) == []
    assert (samples.images.dtype, samples.images.shape, len(samples)) == (np.uint8, (5, 8, 8, 3), 5)
    assert (samples.seeds, samples.classes.tolist()) == ([0, 1, 2, 3, 4], [7, 10, 7, 10, 7])
    assert samples.folder is None
    job = conditional.sample(out=tmp_path / "job", **settings)
    assert samples.save("saved") == Path("saved")
    assert contents(tmp_path / "saved") == contents(tmp_path / "job")
    assert samples.settings.keys() == job.settings.keys()
    assert samples.save("saved") == Path("saved")  # the same samples: left alone
    assert job.save(tmp_path / "copy") == tmp_path / "copy"
    assert contents(tmp_path / "copy") == contents(tmp_path / "job")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "job", "saved"]
    with pytest.raises(DitlabError, match="`out` saved: it holds samples with seeds"):
        conditional.sample(**{**settings, "seeds": "5-9"}).save("saved")
    assert samples._repr_png_() == job._repr_png_() == (tmp_path / "job" / "grid.png").read_bytes()
    assert repr(samples) == "<5 samples of 'conditional', ddim in 3 steps, in memory>"


def test_a_model_of_ones_own(tmp_path):
    """A function has no weights to compare, so its samples are never taken for those of another one."""
    for shrink in (1, 2):
        denoiser = ditlab.Denoiser.wrap(
            lambda y, sigma, label, s=shrink: y / (1 + s * sigma.view(-1, 1, 1, 1)), (3, 8, 8)
        )
        model = ditlab.Model(denoiser, name="mine", out=tmp_path / "mine")
        samples = model.sample(seeds=range(2), steps=3)
        assert samples.images.shape == (2, 8, 8, 3)
        if shrink == 1:
            samples.save(tmp_path / "a")
        else:
            with pytest.raises(DitlabError, match="expected a new folder, since mine has no weights to compare"):
                samples.save(tmp_path / "a")


def test_a_finished_folder_is_left_alone(plain, refused, tmp_path):
    settings = {"seeds": "0-3", "steps": 3, "out": tmp_path / "a"}
    assert plain.sample(**settings).drawn
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    samples = plain.sample(**settings, batch=2)
    assert not samples.drawn
    assert samples.images.shape == (4, 8, 8, 3)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")} == before
    message = refused(plain, **{**settings, "seeds": "0-4"})
    assert message == (
        f'`out` {tmp_path}/a: it holds samples with seeds = "0-3", now "0-4" is requested; '
        "give another `out`, or the same settings"
    )
    assert "it holds samples with sampler = " in refused(plain, **{**settings, "steps": 4})


def test_names_of_folders_in_the_run(runs, plain, conditional):
    run = runs.copy(plain)
    for more in ({"raw": True}, {"checkpoint": 4}, {"sampler": "euler", "schedule": "edm"}):
        run.sample(seeds="0,5-6", steps=3, out=True, **more)
    assert sorted(p.name for p in (run.path / "samples").iterdir()) == [
        "000000004-ddpm3-seeds0,5-6",
        "000000006-ddpm3-seeds0,5-6-raw",
        "000000006-euler3-edm-seeds0,5-6",
    ]
    run = runs.copy(conditional)
    settings = {"seeds": "0-1", "steps": 2, "classes": 3, "out": True}
    run.sample(guidance=2, **settings)
    run.sample(guidance=GuidanceFlags(2.0, schedule="power-cosine", interval=(0.1, 5.0)), **settings)
    assert sorted(p.name for p in (run.path / "samples").iterdir()) == [
        "000000006-ddpm2-seeds0-1-labels3-w2",
        "000000006-ddpm2-seeds0-1-labels3-w2-power-cosine4-from0.1to5",
    ]


@pytest.mark.parametrize(
    ("sampler", "calls"), [("ddpm", 4), ("ddim", 4), ("euler", 4), ("heun", 7), ("dpm++2m", 4), ("run", 4)]
)
def test_the_cost_of_every_sampler(plain, sampler, calls):
    settings = plain.sample(seeds=7, sampler=sampler, steps=4).settings
    assert (settings["nfe"], settings["sampler"]["kind"]) == (
        calls,
        {"euler": "heun", "run": "ddpm"}.get(sampler, sampler),
    )


def test_the_path_from_noise_to_image(plain, tmp_path):
    settings = {"seeds": "0-4", "sampler": "ddim", "steps": 10, "batch": 2}
    plain.sample(strip=3, out=tmp_path / "a", **settings)
    with Image.open(tmp_path / "a" / "strip.png") as image:
        assert image.width > 1000
        assert image.height > 600  # three images, two rows each
    # With it or without, the images are the same.
    plain.sample(out=tmp_path / "b", **settings)
    assert contents(tmp_path / "b") == {k: v for k, v in contents(tmp_path / "a").items() if k != "strip.png"}


def test_settings_as_a_config(plain):
    config = SampleConfig(seeds="0-1", sampler="ddim", sampler_steps="2")
    samples = plain.sample(config=config, seeds=(4,))
    assert (samples.seeds, samples.settings["nfe"]) == ([4], 2)


# ---- classes and guidance ----


def test_classes_go_by_the_seed(conditional, tmp_path):
    samples = conditional.sample(seeds="0-2", steps=2, classes=(7, 10), out=tmp_path / "a")
    assert samples.settings["labels"] == [7, 10]
    assert arrays(tmp_path / "a")["arr_1"].tolist() == samples.classes.tolist() == [7, 10, 7]
    conditional.sample(seeds="5-12", steps=2, out=tmp_path / "b")
    written = arrays(tmp_path / "b")["arr_1"]
    assert (written.tolist(), written.dtype) == ([5, 6, 7, 8, 9, 0, 1, 2], np.int64)
    denoiser = ditlab.load(conditional.path)
    assert denoiser.num_classes == 10
    y = torch.randn(2, 3, 8, 8)
    # Six steps of training have moved the label table away from its start, so the label matters.
    assert not torch.equal(denoiser(y, 1.0, torch.tensor([1, 2])), denoiser(y, 1.0, torch.tensor([2, 1])))


def test_guided_samples(conditional):
    settings = {"seeds": "0-3", "sampler": "ddim", "steps": 5}
    # After six steps of training the classes hardly differ, so the scale is large.
    samples = conditional.sample(guidance=GuidanceFlags(scale=4000.0, interval=(0.2, 5.0)), **settings)
    assert samples.settings["guidance"] == {
        "scale": 4000.0, "schedule": "constant", "power": 4.0, "interval": [0.2, 5.0], "channels": 3
    }  # fmt: skip
    assert samples.settings["nfe"] == 5
    assert 5 < samples.settings["passes"] < 10
    denoiser = guided(ditlab.load(conditional.path), GuidanceConfig(4000.0, interval=(0.2, 5.0)))
    drawn = draw(denoiser, DDIMConfig(steps="5"), range(4), label=torch.arange(4))
    expected = conditional.decode(drawn).transpose(0, 2, 3, 1)
    assert np.array_equal(samples.images, expected)
    assert not np.array_equal(conditional.sample(**settings).images, expected)


def test_guidance_of_the_runs_settings(runs):
    run = runs.trained("guided", num_classes=10, guidance=GuidanceConfig(3.0, power=2.0))
    settings = run.sample(seeds="0-1", steps=2, guidance=GuidanceFlags(schedule="power-cosine")).settings
    assert {k: settings["guidance"][k] for k in ("scale", "schedule", "power")} == {
        "scale": 3.0, "schedule": "power-cosine", "power": 2.0
    }  # fmt: skip
    assert run.sample(seeds="0-1", steps=2, guidance=1).settings["guidance"] is None


def test_a_guidance_sweep(conditional, tmp_path):
    settings = {"sampler": "ddim", "steps": 3, "seeds": "0-4", "batch": 3}
    samples = conditional.sample(guidance_sweep=(1, 2.5, 4000), out=tmp_path / "a", **settings)
    assert (samples.settings["guidance_sweep"], samples.settings["count"]) == ([1, 2.5, 4000], 15)
    assert (samples.settings["nfe"], samples.settings["passes"]) == (3, [3, 6, 6])
    assert "scale" not in samples.settings["guidance"]
    folder = tmp_path / "a"
    assert sorted(p.name for p in folder.iterdir()) == ["images", "samples.json", "sweep.png"]
    assert sorted(p.name for p in (folder / "images").iterdir()) == ["scale-1", "scale-2.5", "scale-4000"]
    conditional.sample(guidance=2.5, out=tmp_path / "b", **settings)
    for name in ("000000.png", "000004.png"):
        alone = (tmp_path / "b" / "images" / name).read_bytes()
        assert (folder / "images" / "scale-2.5" / name).read_bytes() == alone
        assert (folder / "images" / "scale-4000" / name).read_bytes() != alone
    with Image.open(folder / "sweep.png") as image:
        assert image.width > image.height
    in_memory = conditional.sample(guidance_sweep=(1, 2.5, 4000), **settings)
    assert in_memory.images.shape == (15, 8, 8, 3)
    assert np.array_equal(samples.images, in_memory.images)
    assert in_memory._repr_png_() == samples._repr_png_() == (folder / "sweep.png").read_bytes()
    without = conditional.sample(guidance_sweep=(1, 2.5), images=False, out=tmp_path / "c", **settings)
    with pytest.raises(DitlabError, match="a sweep without `images` has one picture only"):
        _ = without.images
