"""Codecs: against the golden AutoencoderKL, against diffusers itself, against the equations, and on real faces."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from ditlab.data import autoencoder as codecs
from ditlab.data import prepare, to_float
from ditlab.data.autoencoder import Identity, open_autoencoder, reopen_autoencoder, weights_hash
from ditlab.data.autoencoder_record import AutoencoderRecord
from ditlab.data.tiny_autoencoder import TinyAutoencoder
from ditlab.errors import DitlabError


def pictures(count: int = 3, side: int = 8, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_golden_kl_autoencoder(golden, tmp_path):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    fixture = golden("09_diffusers_vae")
    model = AutoencoderKL(**fixture.about["config"])
    model.load_state_dict(fixture.weights())
    model.save_pretrained(tmp_path)

    codec = open_autoencoder(tmp_path)
    record = codec.record
    assert (record.kind, record.latent_channels, record.factor, record.scale, record.shift) == ("kl", 4, 2, 0.18215, 0)
    assert record.sha256 == weights_hash(fixture.weights())
    mean, std = codec.moments(fixture["in.x"])
    assert std is not None
    torch.testing.assert_close(mean, fixture["out.mean"], rtol=0, atol=1e-5)
    torch.testing.assert_close(std, (fixture["out.logvar"] / 2).exp(), rtol=0, atol=1e-5)
    sampled = mean + std * fixture["in.posterior_noise"]
    torch.testing.assert_close(sampled, fixture["out.posterior_sample"], rtol=0, atol=1e-5)
    # What a sampler of scaled latents does.
    decoded = codec.decode(fixture["in.z"])
    torch.testing.assert_close(decoded, fixture["out.decode_z_over_scaling_factor"], rtol=0, atol=1e-5)
    decoded = codec.decode(fixture["out.mean"] * 0.18215)
    torch.testing.assert_close(decoded, fixture["out.decode_mean"], rtol=0, atol=1e-5)


def test_shift_and_scale_of_a_kl_autoencoder(write_kl, tmp_path):
    codec = open_autoencoder(write_kl(tmp_path, scaling_factor=0.36, shift_factor=0.12, latent_channels=3))
    assert (codec.record.scale, codec.record.shift, codec.record.latent_channels) == (0.36, 0.12, 3)
    z = torch.randn(2, 3, 4, 4)
    expected = codec.module.decode(z).sample  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(codec.decode((z - 0.12) * 0.36), expected, rtol=0, atol=1e-5)


def test_the_tiny_autoencoder_of_diffusers(tmp_path):
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    torch.manual_seed(0)
    model = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=5,
        scaling_factor=0.5,
    )
    model.save_pretrained(tmp_path)
    codec, images = open_autoencoder(tmp_path, "tiny"), pictures()
    assert (codec.record.kind, codec.record.latent_channels, codec.record.factor) == ("tiny", 5, 4)
    mean, std = codec.moments(images)
    assert std is None
    assert mean.shape == (3, *codec.record.latent_shape((3, 8, 8)))
    torch.testing.assert_close(mean, model.encode(images).latents)
    torch.testing.assert_close(codec.decode(mean * 0.5), model.decode(mean).sample)


class Plain:
    """The tiny autoencoder of the fixture, written out with functions, layer by layer."""

    def __init__(self, folder: Path) -> None:
        self.weights = {part: torch.load(folder / f"tiny_{part}.pth") for part in ("encoder", "decoder")}

    def conv(self, x, part, name, **more):
        weight = self.weights[part][f"{name}.weight"]
        return F.conv2d(x, weight, self.weights[part].get(f"{name}.bias"), padding=weight.shape[-1] // 2, **more)

    def block(self, x, part, name, *, skip=False, pool=False):
        if pool:
            gain, bias = (self.weights[part][f"{name}.pool.1.{what}"] for what in ("weight", "bias"))
            inner = F.relu(F.group_norm(self.conv(x, part, f"{name}.pool.0"), 4, gain, bias))
            x = x + self.conv(inner, part, f"{name}.pool.3")
        y = F.relu(self.conv(x, part, f"{name}.conv.0"))
        y = self.conv(F.relu(self.conv(y, part, f"{name}.conv.2")), part, f"{name}.conv.4")
        return F.relu(y + (self.conv(x, part, f"{name}.skip") if skip else x))

    def encode(self, x):
        x = self.block(self.conv((x + 1) / 2, "encoder", "0"), "encoder", "1")
        x = self.block(self.conv(x, "encoder", "2", stride=2), "encoder", "3", skip=True, pool=True)
        return self.conv(x, "encoder", "4")

    def decode(self, z):
        x = F.relu(self.conv(3 * torch.tanh(z / 3), "decoder", "1"))
        x = self.block(x, "decoder", "3", skip=True, pool=True)
        x = self.conv(x.repeat_interleave(2, -1).repeat_interleave(2, -2), "decoder", "5")
        return 2 * self.conv(self.block(x, "decoder", "6"), "decoder", "7") - 1


def test_a_pair_of_state_dicts(write_pair, tmp_path):
    folder = write_pair(tmp_path / "weights")
    codec, plain, images = open_autoencoder(folder), Plain(folder), pictures()
    assert codec.record.kind == "tiny"
    assert (codec.record.latent_channels, codec.record.factor, codec.record.scale) == (4, 2, 1.0)
    mean, std = codec.moments(images)
    assert std is None
    torch.testing.assert_close(mean, plain.encode(images), rtol=0, atol=1e-6)
    latents = 4 * torch.randn(3, 4, 4, 4)  # beyond the soft clamp
    torch.testing.assert_close(codec.decode(latents), plain.decode(latents), rtol=0, atol=1e-6)


def test_the_same_pair_as_safetensors_and_in_half_precision(write_pair, tmp_path):
    folder = write_pair(tmp_path / "pth")
    other = tmp_path / "safe"
    other.mkdir()
    for part in ("encoder", "decoder"):
        weights = torch.load(folder / f"tiny_{part}.pth")
        save_file(weights, other / f"x_{part}.safetensors")
    assert open_autoencoder(folder).record.sha256 == open_autoencoder(other / "x").record.sha256
    half = {key: value.half() for key, value in torch.load(folder / "tiny_encoder.pth").items()}
    torch.save(half, folder / "tiny_encoder.pth")
    codec = open_autoencoder(folder)
    assert codec.record.sha256 != open_autoencoder(other).record.sha256
    assert codec.moments(pictures())[0].dtype == torch.float32


def test_decoding_goes_by_batches(write_pair, tmp_path, monkeypatch):
    codec = open_autoencoder(write_pair(tmp_path))
    latents, sizes = torch.randn(10, 4, 4, 4), []
    whole = codec.decode(latents)
    inner = TinyAutoencoder.decode

    def watched(self, z):
        sizes.append(len(z))
        return inner(self, z)

    monkeypatch.setattr(TinyAutoencoder, "decode", watched)
    torch.testing.assert_close(codec.decode(latents, batch=4), whole, rtol=0, atol=1e-6)
    monkeypatch.setattr(codecs, "PIXELS", 3 * 8 * 8)
    torch.testing.assert_close(codec.decode(latents), whole, rtol=0, atol=1e-6)
    monkeypatch.setattr(codecs, "PIXELS", 1)
    assert codec.decode(latents[:2]).shape == (2, 3, 8, 8)
    assert sizes == [4, 4, 2, 3, 3, 3, 1, 1, 1]


def test_the_identity():
    images = pictures()
    codec = Identity()
    assert codec.moments(images)[0] is images
    assert torch.equal(codec.decode(images), images)
    assert codec.record.latent_shape((3, 8, 12)) == (3, 8, 12)
    assert isinstance(reopen_autoencoder(codec.record, Path("x")), Identity)


@pytest.mark.slow
def test_real_faces_through_the_autoencoder_of_flux2(shared, tmp_path):
    images = prepare(f"mosaic:{shared}/data/celeba64", tmp_path / "faces", size=64, near_duplicates=None)
    codec = open_autoencoder(shared / "weights")
    assert (codec.record.latent_channels, codec.record.factor) == (32, 8)
    originals = images.take(range(0, 1280, 80))
    mean, _ = codec.moments(to_float(torch.from_numpy(originals)))
    assert 0.8 < mean.std() < 1.3  # near 1, as a VP process wants it
    for latents in (mean, mean.half().float()):  # float16 at rest costs nothing
        decoded = codec.decode(latents).clamp(-1, 1).add(1).mul(127.5).round().numpy()
        error = ((decoded - originals) ** 2).mean()
        assert 10 * np.log10(255**2 / error) >= 27.5


def test_a_record_moves_with_what_it_stands_beside(write_pair, tmp_path, monkeypatch):
    write_pair(tmp_path / "a" / "weights")
    monkeypatch.chdir(tmp_path)
    codec = open_autoencoder("a/weights")
    assert (codec.record.source, codec.record.place) == ("a/weights", "a/weights")
    record = codec.record.moved(Path.cwd(), tmp_path / "sets" / "faces")
    assert record.place == "../../a/weights"
    assert reopen_autoencoder(record, tmp_path / "sets" / "faces").record == record
    hub = AutoencoderRecord("kl", "org/name", "", "0", 3, 4, 8, 1.0, 0.0)
    assert hub.moved(Path("a"), Path("b")) == hub

    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(
        DitlabError,
        match=r"expected the autoencoder of .*faces at .*found nothing there; pass its new place as `codec`",
    ):
        reopen_autoencoder(record, tmp_path / "sets" / "faces")
    assert reopen_autoencoder(record, tmp_path / "sets" / "faces", "b/weights").record == record
    # Where the user's own words lead from here is looked at too; the hash says that it is the same.
    monkeypatch.chdir(tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert reopen_autoencoder(record, tmp_path / "elsewhere").record == record


def test_another_autoencoder_in_its_place_is_refused(write_pair, tmp_path):
    record = open_autoencoder(write_pair(tmp_path / "weights")).record
    weights = torch.load(tmp_path / "weights" / "tiny_decoder.pth")
    weights["1.bias"] += 1e-3
    torch.save(weights, tmp_path / "weights" / "tiny_decoder.pth")
    with pytest.raises(DitlabError, match=rf"was made with, with sha256 {record.sha256[:12]}, found \w{{12}}$"):
        reopen_autoencoder(record, Path.cwd())
    write_pair(tmp_path / "weights", latents=6)
    with pytest.raises(DitlabError, match=r"sha256|latent_channels"):
        reopen_autoencoder(record, Path.cwd())


def test_what_does_not_fit_is_refused(write_pair, tmp_path):
    codec = open_autoencoder(write_pair(tmp_path / "weights"))
    with pytest.raises(DitlabError, match="sides are multiples of 2, found 9x8"):
        codec.moments(torch.zeros(1, 3, 9, 8))
    with pytest.raises(DitlabError, match="expected pictures of 3 channels, found 1"):
        codec.moments(torch.zeros(1, 1, 8, 8))
    with pytest.raises(DitlabError, match="expected latents of 4 channels, found 3"):
        codec.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(DitlabError, match="expected the kind 'kl', found 'tiny'"):
        open_autoencoder(tmp_path / "weights", "kl")


def test_places_without_an_autoencoder_are_refused(write_pair, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DitlabError, match=r"expected a folder with config.json .*, found a folder with neither"):
        open_autoencoder(tmp_path / "empty")
    with pytest.raises(DitlabError, match="found nothing there"):
        open_autoencoder(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DitlabError, match="found a file"):
        open_autoencoder(tmp_path / "file")
    write_pair(tmp_path / "two", "a")
    write_pair(tmp_path / "two", "b")
    with pytest.raises(DitlabError, match=r"found several: .*two/a, .*two/b$"):
        open_autoencoder(tmp_path / "two")
    assert open_autoencoder(tmp_path / "two" / "b").record.latent_channels == 4


class Trap:
    """Unpickling it would write a file."""

    def __reduce__(self):
        return Path.touch, (Path("trap-was-sprung"),)


def test_a_pickle_with_code_is_not_opened(write_pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_pair(tmp_path / "weights")
    torch.save({"0.weight": Trap()}, folder / "tiny_encoder.pth")
    with pytest.raises(DitlabError, match=r"tiny_encoder.pth: expected a state dict .*save it again as .safetensors"):
        open_autoencoder(folder)
    (folder / "tiny_encoder.pth").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DitlabError, match=r"tiny_encoder\.pth"):
        open_autoencoder(folder)
    assert not Path("trap-was-sprung").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop("3.conv.2.bias"), "layer 3: expected a convolution or a block"),
        (lambda w: w.update({"4.weight": torch.zeros(4, 12, 1, 1)}), "layer 4: expected a convolution or a block"),
        (lambda w: w.update({"down.weight": torch.zeros(1)}), "expected the keys of a tiny autoencoder"),
        (lambda w: w.update({"4.bias": 7}), "expected a tensor under '4.bias', found int"),
        (lambda w: w.pop("4.bias"), "expected a convolution with a bias at both ends"),
        (lambda w: [w.pop(key) for key in list(w)], "expected the layers of a tiny autoencoder, found 0"),
        (lambda w: w.update({"4.weight": torch.zeros(9, 12, 3, 3), "4.bias": torch.zeros(9)}), "that belong together"),
    ],
)
def test_other_state_dicts_are_refused(write_pair, tmp_path, change, sentence):
    folder = write_pair(tmp_path)
    weights = torch.load(folder / "tiny_encoder.pth")
    change(weights)
    torch.save(weights, folder / "tiny_encoder.pth")
    with pytest.raises(DitlabError, match=sentence):
        open_autoencoder(folder)


def test_damaged_files_are_refused(write_pair, tmp_path):
    folder = write_pair(tmp_path)
    path = folder / "tiny_encoder.pth"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DitlabError, match=r"tiny_encoder\.pth"):
        open_autoencoder(folder)
    torch.save([1], path)
    with pytest.raises(DitlabError, match="expected a state dict, found list"):
        open_autoencoder(folder)
    path.unlink()
    for part in ("encoder", "decoder"):
        (folder / f"tiny_{part}.safetensors").write_bytes(b"xx")
    with pytest.raises(DitlabError, match=r"tiny_encoder\.safetensors: could not be read as weights"):
        open_autoencoder(folder)


def test_diffusers_folders_that_cannot_be_used(write_kl, tmp_path):
    folder = write_kl(tmp_path / "kl")
    config = json.loads((folder / "config.json").read_text())

    def put(**changes):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    put(_class_name="UNet2DModel")
    with pytest.raises(
        DitlabError, match=r"expected AutoencoderKL or AutoencoderTiny in its config.json, found UNet2D"
    ):
        open_autoencoder(folder)
    put(latents_mean=[0.0] * 4)
    with pytest.raises(DitlabError, match="found latents_mean"):
        open_autoencoder(folder)
    put(use_quant_conv=False)  # weights without a place
    with pytest.raises(DitlabError, match=r"do not belong together, e\.g\. quant_conv"):
        open_autoencoder(folder)
    put(layers_per_block=2)  # places without weights, which diffusers would fill with random values
    with pytest.raises(DitlabError, match="do not belong together"):
        open_autoencoder(folder)
    put()
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DitlabError, match="its files could not be read"):
        open_autoencoder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DitlabError, match="its files could not be read"):
        open_autoencoder(folder)


def test_a_hub_id_without_a_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DitlabError, match=r"hub cache and could not be fetched \(fetch it .* `hf download org/vae`"):
        open_autoencoder("org/vae")


def test_an_interrupted_download(monkeypatch):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    def broken(*words, **more):
        raise ConnectionError("peer closed connection\nwithout sending the complete body")

    monkeypatch.setattr(AutoencoderKL, "load_config", lambda *words, **more: {"_class_name": "AutoencoderKL"})
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", broken)
    with pytest.raises(DitlabError, match=r"not complete .* closed connection without sending the complete body$"):
        open_autoencoder("org/vae")


def test_without_diffusers(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "diffusers.models.autoencoders.autoencoder_kl", None)
    with pytest.raises(DitlabError, match=r'needs the package diffusers \(pip install "ditlab\[diffusers\]"\)'):
        open_autoencoder(tmp_path)
