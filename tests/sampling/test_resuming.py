"""Jobs that were interrupted, and processes that share one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ditlab
from ditlab.errors import DitlabError
from ditlab.sampling.batch_store import BatchStore

LONG = {"sampler": "ddim", "steps": 40, "seeds": "0-39", "batch": 4, "strip": 6, "threads": 1, "device": "cpu"}
SCRIPT = """
import json, sys
import ditlab
settings = json.loads(sys.argv[2])
try:
    samples = ditlab.sample(sys.argv[1], **settings)
    sys.stdout.write(f"drew {len(samples)} {samples.images.shape}\\n")  # one write, so that lines do not mix
except ditlab.DitlabError as error:
    sys.stdout.write(f"refused: {error}\\n")
    sys.exit(2)
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but samples.json, whose times differ."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: content for name, content in files.items() if name != "samples.json"}


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """Every PNG of a finished folder, uint8 [H, W, C], by its name."""
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in folder.glob("images/**/*.png")}


def interrupted(*args: object, **more: object) -> None:
    raise KeyboardInterrupt


def words(run, script: Path, **settings: object) -> list[str]:
    """The command line of a script that samples."""
    script.write_text(SCRIPT)
    return [str(script), str(run.path), json.dumps(settings)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_killed_job_resumes(with_notes, plain, tmp_path, monkeypatch):
    """Killed in the middle and called again, it ends with every byte of one that ran through."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "script.py"
    process = subprocess.Popen([sys.executable, *words(plain, script, **LONG, out="broken")], env=environment())
    end = time.monotonic() + 120
    while len(list(tmp_path.glob(".broken.unfinished-*/parts/*.npz"))) < 2:
        assert time.monotonic() < end, "no batch was finished"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (folder,) = tmp_path.glob(".broken.unfinished-*")
    finished = {p.name: p.stat().st_mtime_ns for p in (folder / "parts").glob("*.npz")}
    assert 2 <= len(finished) < 10
    assert not (tmp_path / "broken").exists()
    # Half a file that the kill has left counts for nothing.
    (folder / "parts" / "000009.tmp").write_bytes(b"half")
    # Other settings begin from the start, and leave it alone.
    with monkeypatch.context() as patch:
        patch.setattr("ditlab.sampling.job.draw_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            plain.sample(**LONG, out="broken", raw=True)
    assert finished == {p.name: p.stat().st_mtime_ns for p in (folder / "parts").glob("*.npz")}
    _, notes = with_notes(plain, **LONG, out="broken")
    assert notes == [f"resuming: {len(finished)} of 10 batches are finished"]
    plain.sample(**LONG, out="whole")
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "script.py", "whole"]


def test_a_kill_just_before_the_end(plain, tmp_path, monkeypatch):
    """The folder has everything but its name: the same call gives it that, and draws nothing."""
    settings = {"seeds": "0-3", "steps": 2, "out": tmp_path / "a"}
    with monkeypatch.context() as patch:
        patch.setattr(BatchStore, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            plain.sample(**settings)
    assert not (tmp_path / "a").exists()
    with monkeypatch.context() as patch:
        patch.setattr("ditlab.sampling.job.draw_batch", None)
        assert plain.sample(**settings).images.shape == (4, 8, 8, 3)
    assert {"grid.png", "samples.npz", "images"} < {p.name for p in (tmp_path / "a").iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_kill_while_the_batches_are_removed(plain, tmp_path, monkeypatch):
    settings = {"seeds": "0-3", "steps": 2, "out": tmp_path / "a"}
    with monkeypatch.context() as patch:
        patch.setattr("ditlab.sampling.batch_store.flush", interrupted)
        with pytest.raises(KeyboardInterrupt):
            plain.sample(**settings)
    (folder,) = tmp_path.glob(".a.unfinished-*")
    assert not (folder / "parts").exists()
    assert plain.sample(**settings).images.shape == (4, 8, 8, 3)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["grid.png", "images", "samples.json", "samples.npz"]


def test_two_jobs_do_not_draw_the_same(plain, cut_short, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    settings = {"seeds": "0-3", "steps": 2, "batch": 2, "out": tmp_path / "a"}
    folder = cut_short(plain, after=1, **settings)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(DitlabError, match=re.escape(f"samples {tmp_path}/a: another process is drawing them")):
        plain.sample(**settings)
    os.close(handle)
    assert plain.sample(**settings).drawn


@pytest.mark.slow
def test_two_processes_share_the_work(conditional, tmp_path, monkeypatch):
    """Together they write what one writes, byte by byte; if rank 0 refuses, the other ends silently."""
    monkeypatch.chdir(tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    settings = {**LONG, "seeds": "0-17", "guidance": 2}
    script = tmp_path / "script.py"

    def together(**more: object) -> subprocess.CompletedProcess[str]:
        line = [*torchrun, *words(conditional, script, **settings, **more)]
        return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120)

    done = together(out="two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("drew 18 (18, 8, 8, 3)") == 2
    conditional.sample(**settings, out="one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert together(out="two").stdout.count("drew 18 (18, 8, 8, 3)") == 2
    done = together(out="three", classes=11)
    assert done.returncode
    refusals = [line for line in done.stdout.splitlines() if "refused" in line]
    assert refusals == ["refused: `classes`: expected classes 0..9 (or 10 for none), found 11"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "script.py", "two"]


@pytest.mark.parametrize("sweep", [False, True])
def test_another_batch_size_resumes(with_notes, plain, conditional, cut_short, tmp_path, sweep):
    """It draws the same images; samples.json has both sizes."""
    model = conditional if sweep else plain
    settings = {"seeds": "0-10", "sampler": "ddim", "steps": 2}
    settings |= {"guidance_sweep": (1, 3)} if sweep else {"strip": 7}
    folder = cut_short(model, after=2, out=tmp_path / "a", batch=4, **settings)
    assert sorted(p.name for p in (folder / "parts").iterdir()) == ["00000000-4.npz", "00000004-4.npz"]
    (folder / "parts" / "00000000-4.npz").unlink()  # as another process may leave a hole
    samples, notes = with_notes(model, out=tmp_path / "a", batch=3, **settings)
    # The hole takes two batches; what is behind it one (3), and in a sweep another guidance's 11 take four.
    assert notes == [f"resuming: 1 of {8 if sweep else 4} batches are finished"]
    assert samples.settings["batch"] == [3, 4]
    model.sample(out=tmp_path / "b", **settings)
    a, b = pictures(tmp_path / "a"), pictures(tmp_path / "b")
    assert a.keys() == b.keys()
    assert len(a) == (22 if sweep else 11)
    for name, picture in a.items():  # a rounding to 8 bits may fall differently
        assert np.abs(picture.astype(int) - b[name]).max() <= 1
    names = [sorted(path.name for path in (tmp_path / out).iterdir()) for out in "ab"]
    assert names[0] == names[1]


def test_unfinished_work_of_other_settings_is_kept(with_notes, plain, cut_short, tmp_path):
    """A note says where it is, and the job that began it resumes it."""
    settings = {"seeds": "0-5", "steps": 2, "batch": 2, "out": tmp_path / "a"}
    folder = cut_short(plain, after=2, strip=1, **settings)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    (tmp_path / ".a.unfinished-empty" / "parts").mkdir(parents=True)
    _, notes = with_notes(plain, images=False, **settings)
    assert notes == [f"4 unfinished images with other settings are in {folder}"]
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [folder.name, "a"]  # nothing is lost with an empty one
    (tmp_path / "a").rename(tmp_path / "b")
    _, notes = with_notes(plain, strip=1, **settings)
    assert notes == ["resuming: 2 of 3 batches are finished"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_batches_before_one_that_is_not_finite_are_kept(with_notes, plain, cut_short, tmp_path):
    broken = torch.zeros(2, 3, 8, 8)
    broken[1, 0, 0, 0] = torch.inf
    settings = {"seeds": "0-5", "steps": 2, "batch": 2, "out": tmp_path / "b"}
    folder = cut_short(plain, after=2, instead=lambda *args, **more: broken, **settings)
    assert len(list((folder / "images").iterdir())) == 4
    assert with_notes(plain, **settings)[1] == ["resuming: 2 of 3 batches are finished"]


def test_saving_over_an_unfinished_job(plain, cut_short, tmp_path):
    settings = {"seeds": "0-5", "steps": 2, "batch": 2}
    cut_short(plain, after=2, out=tmp_path / "a", **settings)
    samples = plain.sample(**{**settings, "batch": 4})
    samples.save(tmp_path / "a")
    assert np.array_equal(np.load(tmp_path / "a" / "samples.npz")["arr_0"], samples.images)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "changes", [{"beta_schedule": "squaredcos_cap_v2"}, {"prediction_type": "v_prediction"}, {"beta_end": 0.03}]
)
def test_another_process_of_the_same_weights(with_notes, diffusers_folder, cut_short, tmp_path, changes):
    """Its samples are neither finished nor mixed with those of the one before."""
    folder = diffusers_folder("unet")
    source = f"diffusers:{folder}"
    settings = {"sampler": "ddim", "steps": 2, "seeds": "0-3", "device": "cpu"}
    ditlab.sample(source, out=tmp_path / "done", **settings)
    hidden = cut_short(ditlab.open(source), after=1, out=tmp_path / "half", batch=2, **settings)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(DitlabError, match="it holds samples with weights = "):
        ditlab.sample(source, out=tmp_path / "done", **settings)
    _, notes = with_notes(ditlab.open(source), out=tmp_path / "half", batch=2, **settings)
    assert notes == [f"2 unfinished images with other settings are in {hidden}"]
    before, now = pictures(tmp_path / "done"), pictures(tmp_path / "half")
    assert before.keys() == now.keys()
    assert any(not np.array_equal(picture, now[name]) for name, picture in before.items())


def test_a_disk_that_fills_up(with_notes, plain, disk_of, tmp_path):
    """Finished batches stay, and with room the same call resumes to the very same bytes."""
    disk = disk_of("300k")
    settings = {"seeds": "0-199", "steps": 2, "batch": 40, "images": False}
    with (disk / "fill").open("wb", buffering=0) as file, suppress(OSError):
        for _ in range(60):
            file.write(b"\0" * 4096)
    with pytest.raises(DitlabError) as caught:
        plain.sample(out=disk / "a", **settings)
    message = str(caught.value)
    match = re.search(r"\(No space left on device\); (\d) finished batches are kept; the same call resumes", message)
    assert match is not None, message
    assert not (disk / "a").exists()
    assert int(match[1]) == len(list(disk.glob(".a.unfinished-*/parts/*.npz"))) > 0
    (disk / "fill").unlink()
    assert with_notes(plain, out=disk / "a", **settings)[1] == [f"resuming: {match[1]} of 5 batches are finished"]
    plain.sample(out=tmp_path / "whole", **settings)
    assert contents(disk / "a") == contents(tmp_path / "whole")
