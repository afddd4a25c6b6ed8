"""Batches on disk: the array for ADM's evaluator, and the names that unfinished work is found by."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np

from ditlab.sampling.batch_store import BatchStore, first_images, write_npz
from ditlab.sampling.job import make_job
from ditlab.sampling.options import SampleConfig


def test_the_array_is_written_batch_by_batch(tmp_path):
    """As numpy writes it, and with at most a few batches in memory."""
    store = BatchStore(tmp_path / "out", "key")
    rng = np.random.default_rng(0)
    with store.locked():
        images = [rng.integers(0, 256, (3, 256, 256, 3), dtype=np.uint8) for _ in range(30)]
        for number, batch in enumerate(images):
            store.add(3 * number, images=batch)
        classes = np.arange(90)
        np.savez(tmp_path / "expected.npz", arr_0=np.concatenate(images), arr_1=classes)
        size = images[0].nbytes
        del images, batch
        tracemalloc.start()
        write_npz(tmp_path / "written.npz", store, 90, classes)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 5 * size
        assert (tmp_path / "written.npz").read_bytes() == (tmp_path / "expected.npz").read_bytes()
        assert len(first_images(store, 7)) == 7


def test_the_hidden_folder_of_unfinished_work_keeps_its_name(plain, tmp_path, monkeypatch):
    """Work that an earlier version left unfinished resumes only if the hash of the same settings is the same."""
    job = make_job(plain, SampleConfig(seeds="0-3", sampler="ddim", sampler_steps="4"), "cpu")
    assert list(job.about) == [
        "run", "step", "ema", "weights", "sampler", "guidance", "guidance_sweep", "seeds", "labels", "strip", "images"
    ]  # fmt: skip
    assert job.about["sampler"] == {"kind": "ddim", "steps": "4", "eta": 0.0, "clip": False}
    monkeypatch.setattr("ditlab.__version__", "0.1.0")
    monkeypatch.setattr("torch.__version__", "2.13.0")

    class Model:
        settings = {"network.kind": "dit", "objective.kind": "vp", "training.lr": 0.1}  # noqa: RUF012

    fixed = replace(job, model=Model(), about={**job.about, "run": "plain", "weights": "0" * 16})  # type: ignore[arg-type]
    assert fixed.store(tmp_path / "a").folder == tmp_path / ".a.unfinished-bc577342fc9f"
