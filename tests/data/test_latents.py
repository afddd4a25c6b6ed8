"""Latent image sets: what is stored, that it is the codec's, resuming, sharing, and what is refused."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from ditlab.data import ImageSet, encode, make_split, prepare
from ditlab.data.autoencoder import Autoencoder, open_autoencoder
from ditlab.data.autoencoder_record import AutoencoderRecord
from ditlab.data.encode import LatentEncoder
from ditlab.data.encode_config import EncodeConfig
from ditlab.data.latents import LATENTS, LATENTS_STD, MIRRORED, MIRRORED_STD
from ditlab.data.manifest import content_hash
from ditlab.errors import DitlabError
from ditlab.progress import Reporter


class Blocks(Autoencoder):
    """A variational codec that a reader can follow: means of 2x2 blocks and their differences left to right."""

    def __init__(self, scale: float = 0.5, shift: float = 0.25) -> None:
        self.record = AutoencoderRecord("kl", "blocks", "", "0" * 64, 3, 3, 2, scale, shift)
        self.seen = 0

    def moments(self, pictures):
        self.seen += len(pictures)
        left, right = pictures[..., ::2], pictures[..., 1::2]
        mean = (left + 2 * right).unfold(2, 2, 2).mean(-1)
        return mean, 0.1 + (left - right).abs().unfold(2, 2, 2).mean(-1)

    def decode(self, latents, batch=64):
        return latents.repeat_interleave(2, -1).repeat_interleave(2, -2)


class Killed(Exception):
    """Stands for a kill in the midst of the work."""


@pytest.fixture
def pictures(tmp_path) -> ImageSet:
    """110 pictures of 3x8x8 in ten classes, with pools."""
    draw = np.random.default_rng(0)
    folder = tmp_path / "files"
    from PIL import Image

    for number in range(110):
        place = folder / ("test" if number % 5 == 0 else "train") / f"class{number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(place / f"{number:03d}.png")
    return prepare(f"folder:{folder}", tmp_path / "sets" / "pictures", size=8)


def run(pictures: ImageSet, out, codec: Autoencoder | None = None, **settings) -> ImageSet:
    work = LatentEncoder(pictures, out, codec or Blocks(), EncodeConfig(**settings))
    found = work.existing()
    if found is not None:
        return found
    with work.locked():
        work.encode()
        return work.finish()


def test_moments_are_the_codecs(pictures, tmp_path):
    made = run(pictures, tmp_path / "latents", mirrored=True, batch=7)
    every = np.arange(len(pictures))
    mean, std = Blocks().moments(pictures.batch(every))
    flipped_mean, flipped_std = Blocks().moments(pictures.batch(every).flip(-1))
    assert (made.shape, len(made), made.stochastic) == ((3, 4, 4), 110, True)
    for name, expected in {
        LATENTS: mean,
        LATENTS_STD: std,
        MIRRORED: flipped_mean,
        MIRRORED_STD: flipped_std,
    }.items():
        stored = np.load(made.path / name)
        assert stored.dtype == np.float16
        assert np.array_equal(stored, expected.half().numpy())

    chosen = [5, 3, 99]
    noise = torch.randn(3, 3, 4, 4)
    flip_mask = torch.tensor([True, False, True])
    half = [x.half().float()[chosen] for x in (mean, std, flipped_mean, flipped_std)]
    torch.testing.assert_close(made.batch(chosen), (half[0] - 0.25) * 0.5)
    torch.testing.assert_close(made.batch(chosen, noise), (half[0] + half[1] * noise - 0.25) * 0.5)
    either = [torch.where(flip_mask[:, None, None, None], b, a) for a, b in ((half[0], half[2]), (half[1], half[3]))]
    torch.testing.assert_close(made.batch(chosen, noise, flip_mask), (either[0] + either[1] * noise - 0.25) * 0.5)
    torch.testing.assert_close(made.batch(chosen, None, flip_mask), (either[0] - 0.25) * 0.5)


def test_labels_pools_and_splits_are_those_of_the_pictures(pictures, tmp_path):
    made = run(pictures, tmp_path / "latents")
    assert made.class_names == pictures.class_names
    assert np.array_equal(made.labels, pictures.labels)  # pyright: ignore[reportArgumentType]
    assert np.array_equal(made.pool, pictures.pool)  # pyright: ignore[reportArgumentType]
    assert torch.equal(made.batch_labels([4, 9]), pictures.batch_labels([4, 9]))  # pyright: ignore[reportArgumentType]
    for n, seed in ((20, 0), (None, 3)):
        ours, theirs = make_split(made, n, 15, seed), make_split(pictures, n, 15, seed)
        assert np.array_equal(ours.train, theirs.train)
        assert np.array_equal(ours.test, theirs.test)
        assert ours.test_hash != theirs.test_hash


def test_statistics_of_the_scaled_latents(pictures, tmp_path):
    record = run(pictures, tmp_path / "a").latents.record  # pyright: ignore[reportOptionalMemberAccess]
    mean, std = Blocks().moments(pictures.batch(np.arange(len(pictures))))
    draws = torch.cat([(mean + std * torch.randn_like(std) - 0.25) * 0.5 for _ in range(50)]).double()
    assert np.allclose(record.mean, draws.mean((0, 2, 3)), atol=0.005)
    assert np.allclose(record.std, draws.std((0, 2, 3)), rtol=0.01)
    assert np.isclose(record.overall_std, draws.std(), rtol=0.01)


def test_one_sample_or_the_mean(pictures, tmp_path):
    made = run(pictures, tmp_path / "a", store="sample", seed=3, batch=5)
    assert not made.stochastic
    assert made.manifest.files.keys() == {LATENTS, "labels.npy", "pool.npy", "sources.json"}
    mean, std = Blocks().moments(pictures.batch(np.arange(len(pictures))))
    noise = (torch.from_numpy(made.array.astype(np.float32)) - mean) / std
    assert noise.flatten().std().sub(1).abs() < 0.03
    assert noise.mean().abs() < 0.03
    # The draw belongs to the seed and the picture, whatever the batch.
    assert np.abs(run(pictures, tmp_path / "b", store="sample", seed=3, batch=64).array - made.array).max() < 0.01
    assert np.abs(run(pictures, tmp_path / "c", store="sample", seed=4).array - made.array).mean() > 0.1

    plain = run(pictures, tmp_path / "d", store="mean")
    assert np.array_equal(plain.array, mean.half().numpy())
    with pytest.raises(DitlabError, match="expected stored moments to sample from, found 'mean'"):
        plain.batch([0], torch.zeros(1, 3, 4, 4))
    with pytest.raises(DitlabError, match=r"found none; encode the set with `mirrored`, or train without flips"):
        plain.batch([0], None, torch.tensor([True]))
    with pytest.raises(DitlabError, match="expected latents to sample, found pixels"):
        pictures.batch([0], torch.zeros(1, 3, 8, 8))


def test_a_codec_without_deviations_stores_its_latents(pictures, tmp_path, write_pair):
    made = run(pictures, tmp_path / "latents", open_autoencoder(write_pair(tmp_path / "weights")), store="moments")
    assert made.latents is not None
    assert (made.latents.record.store, made.stochastic) == ("mean", False)
    assert made.latents.record.codec.place == "../weights"


def test_bf16(pictures, tmp_path, write_pair):
    codec = open_autoencoder(write_pair(tmp_path / "weights"))
    exact = run(pictures, tmp_path / "a", codec).array.astype(np.float32)
    rough = run(pictures, tmp_path / "b", codec, precision="bf16").array.astype(np.float32)
    assert 0 < np.abs(rough - exact).max() < 0.1


def test_the_manifest(pictures, tmp_path):
    made = run(pictures, tmp_path / "latents")
    values = json.loads((made.path / "manifest.json").read_text())
    assert values["version"] == 2
    assert values["latents"]["path"] == "../sets/pictures"
    assert values["latents"]["pictures"] == pictures.hash
    assert values["latents"]["picture"] == [3, 8, 8]
    assert (values["source"], values["size"]) == (pictures.manifest.source, 8)
    assert made.hash == content_hash(made.manifest.files, made.class_names, made.latents.record)  # pyright: ignore
    made.verify()
    # The same numbers under another scale are other images.
    again = run(pictures, tmp_path / "scaled", Blocks(scale=0.4))
    assert again.manifest.files == made.manifest.files
    assert again.hash != made.hash
    # An edited scale is found out.
    values["latents"]["codec"]["scale"] = 0.4
    (made.path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DitlabError, match="expected the hash"):
        ImageSet.open(made.path)


def test_manifests_of_pixels_stay_as_they_were(pictures, tmp_path):
    before = (pictures.path / "manifest.json").read_bytes()
    assert b"latents" not in before
    assert json.loads(before)["version"] == 1
    pictures.manifest.write(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == before
    newer = json.loads(before) | {"version": 3}
    (tmp_path / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(DitlabError, match="expected version 1 of the format, found 3"):
        ImageSet.open(tmp_path)


def test_finding_the_pictures_again(pictures, tmp_path):
    made = run(pictures, tmp_path / "latents")
    assert pictures.original is pictures
    found = made.original
    assert found is not None
    assert np.array_equal(found.take([3]), pictures.take([3]))
    pictures.path.rename(tmp_path / "moved")
    assert made.original is None
    # Another set in its place is not taken for it.
    prepare(f"folder:{tmp_path / 'files'}", pictures.path, size=4)
    assert made.original is None


def test_a_killed_encoding_goes_on(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "PART", 16)
    whole = run(pictures, tmp_path / "whole", batch=6)

    class Dying(Blocks):
        def moments(self, pictures):
            if self.seen >= 40:
                raise Killed
            return super().moments(pictures)

    out = tmp_path / "latents"
    with pytest.raises(Killed):
        run(pictures, out, Dying(), batch=6)
    assert not out.exists()
    parts = sorted(path.name for path in (tmp_path / ".latents.encoding").glob("part-*"))
    assert parts == ["part-000000.npz", "part-000001.npz"]

    codec, shown = Blocks(), []

    class Shown(Reporter):
        @contextmanager
        def bar(self, title, total=None):
            yield lambda done, total: shown.append((done, total))

    work = LatentEncoder(pictures, out, codec, EncodeConfig(batch=6))
    with work.locked():
        work.encode(reporter=Shown())
        made = work.finish()
    assert codec.seen == 110 - 32
    assert shown[0] == (16, 110)
    assert shown[-1] == (110, 110)
    assert made.hash == whole.hash
    assert not work.work.exists()

    again = Blocks()
    assert run(pictures, out, again).hash == whole.hash
    assert again.seen == 0


def test_several_processes_share_the_parts(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "PART", 16)
    seen = []
    work = LatentEncoder(pictures, tmp_path / "shared", codec := Blocks(), EncodeConfig())
    with work.locked():
        for rank in (2, 0, 1):
            before = codec.seen
            work.encode(rank, 3)
            seen.append(codec.seen - before)
        made = work.finish()
    assert seen == [32, 46, 32]
    assert made.hash == run(pictures, tmp_path / "alone").hash


def test_two_jobs_do_not_mix(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "PART", 16)
    out = tmp_path / "latents"
    first = LatentEncoder(pictures, out, Blocks())
    with first.locked():
        first.encode(0, 2)
        with (
            pytest.raises(DitlabError, match="another process is encoding it"),
            LatentEncoder(pictures, out, Blocks()).locked(),
        ):
            pass
    other = LatentEncoder(pictures, out, Blocks(scale=1.0))
    with pytest.raises(DitlabError, match="unfinished encoding with other settings"), other.locked():
        pass
    with pytest.raises(DitlabError, match=r"part-000001.npz: expected a part of an encoding"), first.locked():
        first.finish()
    assert not out.exists()
    over = LatentEncoder(pictures, out, codec := Blocks(scale=1.0), overwrite=True)
    with over.locked():
        over.encode()
        assert over.finish().latents.record.codec.scale == 1.0  # pyright: ignore[reportOptionalMemberAccess]
    assert codec.seen == 110


def test_what_cannot_be_encoded(pictures, tmp_path):
    made = run(pictures, tmp_path / "latents")
    with pytest.raises(DitlabError, match="expected an image set of pixels, found one of latents"):
        LatentEncoder(made, tmp_path / "twice", Blocks())
    with pytest.raises(DitlabError, match="expected another folder for the latents"):
        LatentEncoder(pictures, pictures.path, Blocks())
    coarse = Blocks()
    coarse.record = replace(coarse.record, factor=3)
    with pytest.raises(DitlabError, match="sides are multiples of 3, found 8x8"):
        LatentEncoder(pictures, tmp_path / "odd", coarse)
    coarse.record = replace(coarse.record, factor=4)
    with pytest.raises(DitlabError, match=r"expected latents \[3, 2, 2\], found \[3, 4, 4\]"):
        run(pictures, tmp_path / "odd", coarse)
    with pytest.raises(DitlabError, match="expected a batch of 1 to 64 pictures, found 65"):
        EncodeConfig(batch=65)
    with pytest.raises(DitlabError, match=r"already holds another image set .*3x4x4, latents\); choose another folder"):
        LatentEncoder(pictures, made.path, Blocks(scale=2.0)).existing()
    other = prepare("digits", tmp_path / "digits", size=8)
    with pytest.raises(DitlabError, match=r"already holds another image set \(digits, 3x8x8, pixels\)"):
        LatentEncoder(pictures, other.path, Blocks()).existing()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    with pytest.raises(DitlabError, match="is not an image set that can be reused"):
        LatentEncoder(pictures, tmp_path / "notes", Blocks(), overwrite=True).existing()


def test_latents_that_float16_cannot_hold(pictures, tmp_path):
    class Loud(Blocks):
        def moments(self, pictures):
            return pictures[..., ::2, ::2] * 1e6, None

    with pytest.raises(DitlabError, match=r"float16 can hold \(up to 65504\), found 1e\+06"):
        run(pictures, tmp_path / "loud", Loud())

    class Broken(Blocks):
        def moments(self, pictures):
            return pictures[..., ::2, ::2] * float("nan"), None

    with pytest.raises(DitlabError, match="float16 can hold"):
        run(pictures, tmp_path / "broken", Broken())


def test_a_full_disk(pictures, disk_of):
    small, big = disk_of("400k"), Blocks()
    big.record = replace(big.record, latent_channels=4000)
    with pytest.raises(DitlabError, match="MB free on its disk"):
        run(pictures, small / "latents", big)
    assert not list(small.iterdir())
