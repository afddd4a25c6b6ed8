"""`ditlab sample` at work: what it writes, guidance, going on after a kill, several processes, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from ditlab.cli.drawing import draw
from ditlab.cli.sample_parts import Parts
from PIL import Image

import ditlab as package
from ditlab.cli.sample import parse_seeds, seeds_text
from ditlab.diffusion.guidance import GuidanceConfig, guided
from ditlab.diffusion.samplers import DDIMConfig
from ditlab.errors import DitlabError
from ditlab.models.run import Run


def arrays(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "samples.npz") as found:
        return dict(found)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but samples.json, whose times differ."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: content for name, content in files.items() if name != "samples.json"}


def nearly(a: np.ndarray, b: np.ndarray) -> bool:
    """A rounding to 8 bits may fall differently where a matrix product adds up in another order."""
    return np.abs(a.astype(int) - b).max() <= 1 and (a == b).mean() > 0.99


# ---- what is written ----


def test_samples(ditlab, plain, tmp_path):
    """What is written; and an image is the same whatever is drawn beside it."""
    words = ["sample", plain, "--sampler", "ddim", "--steps", "4", "--device", "cpu"]
    result = json.loads(ditlab(*words, "--seeds", "0-4", "--out", "a", "--batch", 5, "--json").out)
    assert (result["step"], result["ema"], result["count"], result["labels"]) == (6, True, 5, None)
    assert (result["seeds"], result["nfe"], result["passes"], result["guidance"]) == ("0-4", 4, 4, None)
    assert result["seconds"] > 0
    assert json.loads((tmp_path / "a" / "samples.json").read_text()) == {k: v for k, v in result.items() if k != "out"}
    assert ditlab(*words, "--seeds", "0-4", "--out", "b", "--batch", 2).status == 0
    for name in "ab":
        folder = tmp_path / name
        assert sorted(p.name for p in folder.iterdir()) == ["grid.png", "images", "samples.json", "samples.npz"]
        found = arrays(folder)
        assert list(found) == ["arr_0"]
        assert (found["arr_0"].dtype, found["arr_0"].shape) == (np.uint8, (5, 8, 8, 3))
        assert sorted(p.name for p in (folder / "images").iterdir()) == [f"00000{i}.png" for i in range(5)]
        with Image.open(folder / "images" / "000003.png") as image:
            assert np.array_equal(np.asarray(image), found["arr_0"][3])
    a = arrays(tmp_path / "a")["arr_0"]
    assert nearly(a, arrays(tmp_path / "b")["arr_0"])
    with Image.open(tmp_path / "a" / "grid.png") as image:
        assert image.width > image.height > 8
    # Ranges and lists, in their order, and no PNGs.
    assert ditlab(*words, "--seeds", "3,1-2,40", "--no-images", "--out", "c").status == 0
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["grid.png", "samples.json", "samples.npz"]
    c = arrays(tmp_path / "c")["arr_0"]
    assert nearly(c[:3], a[[3, 1, 2]])
    # They are what the library draws.
    drawn = draw(package.load(plain), DDIMConfig(steps="4"), range(5))
    assert np.array_equal(Run.open(plain).pixels(drawn).transpose(0, 2, 3, 1), a)


def test_a_finished_folder_is_left_alone(ditlab, refused, plain, tmp_path):
    words = ["sample", plain, "--seeds", "0-3", "--steps", 3, "--out", tmp_path / "a"]
    assert ditlab(*words).status == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    done = ditlab(*words, "--batch", 2)
    assert (done.status, done.out) == (0, f"{tmp_path}/a is finished (4 images)\n")
    assert json.loads(ditlab(*words, "--json").out)["count"] == 4
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")} == before
    says = refused("sample", plain, "--seeds", "0-4", "--steps", 3, "--out", tmp_path / "a")
    assert says == (
        f'sample --out {tmp_path}/a: it holds samples with seeds = "0-3", now "0-4" is asked for; '
        "give another --out, or the same settings"
    )
    assert "it holds samples with sampler = " in refused(*words[:-4], "--steps", 4, "--out", tmp_path / "a")


def test_names_of_folders_in_the_run(ditlab, place, plain, conditional):
    run = place.copy(plain)
    for more in (["--raw"], ["--step", 4], ["--sampler", "euler", "--levels", "edm"]):
        assert ditlab("sample", run, "--seeds", "0,5-6", "--steps", 3, *more).status == 0
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        "000000004-ddpm3-seeds0,5-6",
        "000000006-ddpm3-seeds0,5-6-raw",
        "000000006-euler3-edm-seeds0,5-6",
    ]
    run = place.copy(conditional)
    words = ["sample", run, "--seeds", "0-1", "--steps", 2, "--labels", 3, "--guidance.scale", 2]
    assert ditlab(*words).status == 0
    assert ditlab(*words, "--guidance.schedule", "power-cosine", "--guidance.interval", 0.1, 5).status == 0
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        "000000006-ddpm2-seeds0-1-labels3-w2",
        "000000006-ddpm2-seeds0-1-labels3-w2-power-cosine4-from0.1to5",
    ]


@pytest.mark.parametrize(
    ("sampler", "calls"), [("ddpm", 4), ("ddim", 4), ("euler", 4), ("heun", 7), ("dpm++2m", 4), ("run", 4)]
)
def test_every_sampler_says_what_it_costs(ditlab, plain, sampler, calls):
    words = ["sample", plain, "--seeds", 7, "--sampler", sampler, "--steps", 4, "--out", "a"]
    assert f"{calls} network calls an image, " in ditlab(*words).out
    result = json.loads(ditlab(*words, "--json").out)
    assert (result["nfe"], result["sampler"]["kind"]) == (
        calls,
        {"euler": "heun", "run": "ddpm"}.get(sampler, sampler),
    )


def test_the_path_from_noise_to_image(ditlab, plain, tmp_path):
    words = ["sample", plain, "--seeds", "0-4", "--sampler", "ddim", "--steps", 10, "--batch", 2]
    assert ditlab(*words, "--strip", 3, "--out", "a").status == 0
    with Image.open(tmp_path / "a" / "strip.png") as image:
        assert image.width > 1000
        assert image.height > 600  # three images, two rows each
    # With it or without, the images are the same.
    assert ditlab(*words, "--out", "b").status == 0
    assert contents(tmp_path / "b") == {k: v for k, v in contents(tmp_path / "a").items() if k != "strip.png"}


# ---- classes and guidance ----


def test_classes_go_by_the_seed(ditlab, conditional, tmp_path):
    result = json.loads(
        ditlab("sample", conditional, "--seeds", "0-2", "--steps", 2, "--labels", 7, 10, "--out", "a", "--json").out
    )
    assert result["labels"] == [7, 10]
    assert arrays(tmp_path / "a")["arr_1"].tolist() == [7, 10, 7]
    assert ditlab("sample", conditional, "--seeds", "5-12", "--steps", 2, "--out", "b").status == 0
    found = arrays(tmp_path / "b")
    assert (found["arr_1"].tolist(), found["arr_1"].dtype) == ([5, 6, 7, 8, 9, 0, 1, 2], np.int64)
    denoiser = package.load(conditional)
    assert denoiser.num_classes == 10
    y = torch.randn(2, 3, 8, 8)
    # Six steps of training have moved the label table away from its start, so the label matters.
    assert not torch.equal(denoiser(y, 1.0, torch.tensor([1, 2])), denoiser(y, 1.0, torch.tensor([2, 1])))


def test_guided_samples(ditlab, conditional, tmp_path):
    words = ["sample", conditional, "--seeds", "0-3", "--sampler", "ddim", "--steps", 5]
    # After six steps of training the classes hardly differ.
    given = ["--guidance.scale", 4000, "--guidance.interval", 0.2, 5]
    result = json.loads(ditlab(*words, *given, "--out", "a", "--json").out)
    assert result["guidance"] == {
        "scale": 4000.0, "schedule": "constant", "power": 4.0, "interval": [0.2, 5.0], "channels": 3
    }  # fmt: skip
    assert result["nfe"] == 5
    assert 5 < result["passes"] < 10
    denoiser = guided(package.load(conditional), GuidanceConfig(4000.0, interval=(0.2, 5.0)))
    drawn = draw(denoiser, DDIMConfig(steps="5"), range(4), label=torch.arange(4))
    expected = Run.open(conditional).pixels(drawn).transpose(0, 2, 3, 1)
    assert np.array_equal(arrays(tmp_path / "a")["arr_0"], expected)
    assert ditlab(*words, "--out", "b").status == 0
    assert not np.array_equal(arrays(tmp_path / "b")["arr_0"], expected)


def test_guidance_of_the_runs_settings(ditlab, place, tmp_path):
    """It is a default that may change when the run goes on, and that flags stand above."""
    run = place.trained("guided", "--conditional", "--guidance.scale", 3, "--guidance.power", 2)
    assert Run.open(run).guidance == GuidanceConfig(3.0, power=2.0)
    words = ["sample", run, "--seeds", "0-1", "--steps", 2]
    result = json.loads(ditlab(*words, "--guidance.schedule", "power-cosine", "--out", "a", "--json").out)
    assert {k: result["guidance"][k] for k in ("scale", "schedule", "power")} == {
        "scale": 3.0, "schedule": "power-cosine", "power": 2.0
    }  # fmt: skip
    assert json.loads(ditlab(*words, "--guidance.scale", 1, "--out", "b", "--json").out)["guidance"] is None
    copy = place.copy(run)
    done = ditlab(*place.words(copy, "--conditional", "--guidance.scale", 1.5))
    assert (done.status, done.out) == (0, f"{copy} is finished (6 steps)\n")
    assert Run.open(copy).guidance == GuidanceConfig(1.5)


def test_a_guidance_sweep(ditlab, conditional, tmp_path):
    words = ["sample", conditional, "--sampler", "ddim", "--steps", 3, "--seeds", "0-4"]
    result = json.loads(ditlab(*words, "--guidance-sweep", 1, 2.5, 4000, "--out", "a", "--batch", 3, "--json").out)
    assert (result["guidance_sweep"], result["count"]) == ([1, 2.5, 4000], 15)
    assert (result["nfe"], result["passes"]) == (3, [3, 6, 6])
    assert "scale" not in result["guidance"]
    folder = tmp_path / "a"
    assert sorted(p.name for p in folder.iterdir()) == ["images", "samples.json", "sweep.png"]
    assert sorted(p.name for p in (folder / "images").iterdir()) == ["scale-1", "scale-2.5", "scale-4000"]
    assert ditlab(*words, "--guidance.scale", 2.5, "--out", "b", "--batch", 3).status == 0
    for name in ("000000.png", "000004.png"):
        one = (tmp_path / "b" / "images" / name).read_bytes()
        assert (folder / "images" / "scale-2.5" / name).read_bytes() == one
        assert (folder / "images" / "scale-4000" / name).read_bytes() != one
    with Image.open(folder / "sweep.png") as image:
        assert image.width > image.height


# ---- going on, and sharing the work ----

LONG = ["--sampler", "ddim", "--steps", "40", "--seeds", "0-39", "--batch", "4", "--strip", "6", "--threads", "1"]


def start(folder: Path, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ditlab", "sample", *map(str, words)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def interrupted(*args: object, **more: object) -> None:
    raise KeyboardInterrupt


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_command_goes_on(ditlab, plain, tmp_path):
    """Killed in the middle and given again, it ends with every byte of an unbroken one."""
    words = [plain, *LONG, "--out"]
    process = start(tmp_path, *words, "broken")
    wait_for(lambda: len(list(tmp_path.glob(".broken.unfinished-*/parts/*.npz"))) >= 2)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (folder,) = tmp_path.glob(".broken.unfinished-*")
    kept = {p.name: p.stat().st_mtime_ns for p in (folder / "parts").glob("*.npz")}
    assert 2 <= len(kept) < 10
    assert not (tmp_path / "broken").exists()
    # Half a file that the kill has left counts for nothing.
    (folder / "parts" / "000009.tmp").write_bytes(b"half")
    # Other settings begin from the start, and leave it alone.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ditlab.cli.sample_job.draw_batch", interrupted)
        done = ditlab("sample", *words, "broken", "--raw")
    left = f"note: {4 * len(kept)} unfinished images with other settings lie in {folder.name}\n"
    assert (done.status, done.out) == (130, left)
    assert kept == {p.name: p.stat().st_mtime_ns for p in (folder / "parts").glob("*.npz")}
    done = ditlab("sample", *words, "broken")
    assert done.status == 0, done.err
    assert f"going on: {len(kept)} of 10 batches are there already" in done.out
    assert ditlab("sample", *words, "whole").status == 0
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    # Nothing else is left.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "whole"]


def test_a_kill_just_before_the_end(ditlab, plain, tmp_path, monkeypatch):
    """The folder has everything but its name: the same command gives it that, and draws nothing."""
    words = ["sample", plain, "--seeds", "0-3", "--steps", 2, "--out", tmp_path / "a"]
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "publish", interrupted)
        assert ditlab(*words).status == 130
    assert not (tmp_path / "a").exists()
    with monkeypatch.context() as patch:
        patch.setattr("ditlab.cli.sample_job.draw_batch", None)
        assert ditlab(*words).status == 0
    assert {"grid.png", "samples.npz", "images"} < {p.name for p in (tmp_path / "a").iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_two_commands_do_not_draw_the_same(ditlab, plain, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    words = ["sample", plain, "--seeds", "0-3", "--steps", 2, "--out", tmp_path / "a"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ditlab.cli.sample_job.write_pngs", interrupted)
        patch.setattr("ditlab.cli.sample_parts.shutil.rmtree", lambda *args, **more: None)
        assert ditlab(*words).status == 130
    (folder,) = tmp_path.glob(".a.unfinished-*")
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    done = ditlab(*words)
    assert (done.status, done.err) == (
        2,
        f"ditlab: sample {tmp_path}/a: another process is drawing these samples\n",
    )
    os.close(handle)
    assert ditlab(*words).status == 0


@pytest.mark.slow
def test_two_processes_share_the_work(ditlab, conditional, refused, tmp_path):
    """Together they write what one writes, byte by byte; and what the first refuses, the other takes quietly."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "ditlab"]
    words = ["sample", str(conditional), *LONG, "--seeds", "0-17", "--guidance.scale", "2", "--out"]

    def together(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*torchrun, *words],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = together(*words, "two", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote 18 images to two") == 1
    assert ditlab(*words, "one", "--device", "cpu").status == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    done = together(*words, "three", "--device", "cpu", "--labels", "11")
    assert done.returncode
    said = [line for line in done.stderr.splitlines() if line.startswith("ditlab: ")]
    assert said == ["ditlab: sample --labels: expected classes 0..9 (or 10 for none), found 11"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_the_array_is_written_part_by_part(tmp_path):
    """As numpy writes it, and with no more than a part in memory."""
    parts = Parts(tmp_path / "out", "key")
    rng = np.random.default_rng(0)
    with parts.taken():
        images = [rng.integers(0, 256, (3, 256, 256, 3), dtype=np.uint8) for _ in range(30)]
        for number, part in enumerate(images):
            parts.keep(3 * number, images=part)
        labels = np.arange(90)
        np.savez(tmp_path / "expected.npz", arr_0=np.concatenate(images), arr_1=labels)
        one = images[0].nbytes
        del images, part
        tracemalloc.start()
        parts.write_npz(tmp_path / "found.npz", 90, labels)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 5 * one
        with np.load(tmp_path / "found.npz") as found, np.load(tmp_path / "expected.npz") as expected:
            assert found.files == expected.files
            assert all(np.array_equal(found[name], expected[name]) for name in found.files)
        assert (tmp_path / "found.npz").read_bytes() == (tmp_path / "expected.npz").read_bytes()
        assert len(parts.first(7)) == 7


# ---- what it refuses ----


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-3", [0, 1, 2, 3]), ("7", [7]), ("9,0-2,4", [9, 0, 1, 2, 4]), (" 1 , 2 ", [1, 2]), ("5-5", [5])],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds
    assert parse_seeds(seeds_text(seeds)) == seeds
    assert seeds_text([0, 1, 2, 10, 12, 13]) == "0-2,10,12-13"


@pytest.mark.parametrize("text", ["", "a", "-1", "3-1", "0-", "1,,2", "1.5", "0-2-4", "٣"])
def test_seeds_that_cannot_be_read(text):
    with pytest.raises(DitlabError, match=re.escape(f"such as 0-63 or 0-9,20,30-39, found '{text}'")):
        parse_seeds(text)


def test_bad_input(refused, plain, conditional, tmp_path):
    short = ["--steps", 2, "--seeds", "0-3"]
    for words, says in (
        (["--seeds", "3-1"], "sample --seeds: expected numbers and ranges such as 0-63 or 0-9,20,30-39, found '3-1'"),
        (["--seeds", "0-3,2"], "sample --seeds: expected each seed once, found 2 twice"),
        (["--seeds", "0-99999999999"], "sample --seeds: expected at most 10,000,000 images, found 100,000,000,000"),
        ([*short, "--strip", 5], "sample --strip: expected 0 to 4, the number of images, found 5"),
        (
            [*short, "--guidance.scale", 2],
            "guidance: expected a class-conditional denoiser, found an unconditional one",
        ),
        ([*short, "--guidance.scale", -1], "guidance: expected a scale of at least 0 (1 is no guidance), found -1"),
        (["--steps", 1001], "respacing '1001': expected at most 1000 steps in section 0, found 1001"),
        (["--sampler", "heun", "--steps", 1001], "respacing '1001': expected at most 1000 steps in section 0, found"),
        (["--sampler", "euler", "--steps", "ddim9"], "sample --steps: the euler sampler takes a count, found 'ddim9'"),
        (["--levels", "edm"], "sample --levels: ddpm takes the denoiser's own levels; expected none, found edm"),
        (
            [*short, "--guidance-sweep", 2, 2],
            "sample --guidance-sweep: expected different scales, at least 2, found 2,2",
        ),
    ):
        assert refused("sample", plain, *words).startswith(says)
    sweep = ["sample", conditional, "--steps", 2, "--guidance-sweep", 1, 2]
    assert "expected no --guidance.scale besides" in refused(*sweep, "--guidance.scale", 2)
    assert "expected --strip or --guidance-sweep, found both" in refused(*sweep, "--strip", 1)
    assert "expected at most 16 seeds, found 17" in refused(*sweep, "--seeds", "0-16")
    words = ["sample", conditional, *short, "--guidance.scale", 2]
    assert "expected channels of at most 3, found 4" in refused(*words, "--guidance.channels", 4)
    assert "expected an interval 0 <= low < high" in refused(*words, "--guidance.interval", 2, 1)


def test_guidance_needs_an_estimate_without_a_class(refused, place, tmp_path):
    """A network without that row, and one whose row was never trained."""
    flags = ["--conditional", "--objective.label-dropout", 0]
    never = place.trained("never-dropped", *flags, steps=1)
    none = place.trained("no-null", *flags, "--network.no-null-class", steps=1)
    words = ["--steps", 2, "--seeds", "0-1", "--guidance.scale", 2]
    says = refused("sample", never, *words)
    assert says == (
        "guidance: never-dropped was trained with objective.label_dropout 0, so it knows no estimate without a class"
    )
    assert "so it knows no estimate without a class" in refused("sample", none, *words)
    says = refused("sample", none, "--steps", 2, "--labels", 10)
    assert says == "sample --labels: expected classes 0..9, found 10"
    for more in ([], ["--conditional", "--objective.label-dropout", 0]):
        says = refused(*place.words(tmp_path / "run", "--guidance.scale", 2, *more))
        assert says.startswith("guidance: expected a ")


def test_a_disk_that_fills_up(ditlab, place, plain, disk_of):
    """Finished batches stay, and with room the same command goes on to the very same bytes."""
    disk = disk_of("300k")
    words = ["sample", plain, "--seeds", "0-199", "--steps", 2, "--batch", 40, "--no-images", "--out"]
    with (disk / "fill").open("wb", buffering=0) as file, suppress(OSError):
        for _ in range(60):
            file.write(b"\0" * 4096)
    done = ditlab(*words, disk / "a")
    assert (done.status, len(done.err.splitlines())) == (2, 1)
    kept = re.search(r"\(No space left on device\); (\d) finished batches are kept, the same command goes on", done.err)
    assert kept is not None, done.err
    assert not (disk / "a").exists()
    assert int(kept[1]) == len(list(disk.glob(".a.unfinished-*/parts/*.npz"))) > 0
    (disk / "fill").unlink()
    assert f"going on: {kept[1]} of 5 batches" in ditlab(*words, disk / "a").out
    assert ditlab(*words, "whole").status == 0
    assert contents(disk / "a") == contents(Path("whole"))
