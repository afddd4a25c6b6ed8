"""The DiT of diffusers converted into ditlab's and back: equal outputs, or a sentence (golden 09)."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from ditlab.diffusion.objective_configs import EDMObjectiveConfig, VPObjectiveConfig
from ditlab.diffusion.sampler_configs import DDIMConfig, DDPMConfig, HeunConfig
from ditlab.errors import DitlabError
from ditlab.interop.diffusers_dit import (
    convert_diffusers,
    from_diffusers,
    largest_difference,
    scheduler_config,
    to_diffusers,
    write_diffusers,
)
from ditlab.interop.diffusers_models import open_diffusers
from ditlab.interop.imported import objective_of
from ditlab.networks.dit import DiT
from ditlab.networks.dit_config import DiTConfig
from ditlab.nn import embeddings

diffusers = pytest.importorskip("diffusers")

GOOD = DiTConfig(
    image_size=(8, 8),
    channels=4,
    patch=2,
    width=24,
    depth=2,
    heads=2,
    num_classes=6,
    time_frequencies="diffusers",
    mlp_norm_eps=1e-5,
)


@pytest.fixture
def same_exp(monkeypatch):
    """The library's frequencies, in float32, so that the last bit of `exp` needs no slack in tolerances."""

    def theirs(count, spacing="original"):
        assert spacing == "diffusers"
        exponents = -torch.log(torch.tensor(10_000.0, dtype=torch.float64)).item() * torch.arange(count).float()
        return torch.exp(exponents / (count - 1))

    monkeypatch.setattr(embeddings, "frequencies", theirs)


def shuffled(network: DiT) -> DiT:
    """Every weight random, so that none hides behind its initial zero."""
    for value in network.parameters():
        torch.nn.init.normal_(value, std=0.2)
    return network.eval().requires_grad_(False)


@pytest.fixture
def theirs(golden):
    """The golden's model, as it is."""
    fixture = golden("09_diffusers_dit")
    config = {key: value for key, value in fixture.config.items() if key != "_use_default_values"}
    model = diffusers.DiTTransformer2DModel(**config).eval()
    model.load_state_dict(fixture.weights())
    return fixture, model


def share_embedder(model) -> None:
    """Gives every block the first one's embedder."""
    first, *others = model.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())


@pytest.mark.usefixtures("same_exp")
def test_a_converted_model_gives_the_librarys_outputs(theirs):
    fixture, model = theirs
    depth = fixture.config["num_layers"]
    if depth > 1:
        with pytest.raises(DitlabError, match=f"expected one time and label embedder for all {depth} blocks, found an"):
            from_diffusers(model, "golden")
    share_embedder(model)
    ours = from_diffusers(model, "golden").eval()
    inputs = fixture["in.x"], fixture["in.t"], fixture["in.y"]
    with torch.no_grad():
        expected = model(*inputs).sample
        torch.testing.assert_close(ours(*inputs), expected, rtol=0, atol=5e-6)


@torch.no_grad()
def test_a_converted_model_has_the_originals_embeddings(theirs, use_frequencies):
    """The golden's own numbers, as far as its one shared embedder goes."""
    fixture, model = theirs
    use_frequencies(fixture, "out.time_proj", "diffusers")
    share_embedder(model)
    ours = from_diffusers(model, "golden").eval()
    condition = ours.condition(fixture["in.t"], fixture["in.y"]).sum(1)
    torch.testing.assert_close(condition, fixture["out.emb_block0"], rtol=0, atol=fixture.tolerance("out"))
    torch.testing.assert_close(ours.positions, fixture["buffer.pos_embed.pos_embed"], rtol=0, atol=1e-6)


def test_the_epsilon_before_the_mlp_is_carried(theirs):
    fixture, model = theirs
    share_embedder(model)
    ours = from_diffusers(model, "golden").eval()
    assert {block.mlp_norm.eps for block in ours.blocks} == {fixture.config["norm_eps"]}
    assert {block.attention_norm.eps for block in ours.blocks} == {fixture.values["norm1.eps"]}
    for block in ours.blocks:
        block.mlp_norm.eps = 1e-2
    with pytest.raises(DitlabError, match="outputs differ by"):
        largest_difference(ours, model)


def test_there_and_back(diffusers_folder):
    folder = diffusers_folder("dit")
    model, difference = convert_diffusers(str(folder))
    assert difference < 1e-4
    original = open_diffusers(str(folder)).denoiser
    back = to_diffusers(model.denoiser.network)
    expected = original.network.model.state_dict()
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in back.state_dict().items())
    assert {key: value for key, value in back.config.items() if key[0] != "_"} == {
        key: value for key, value in original.network.model.config.items() if key[0] != "_"
    }
    y, label = torch.randn(2, 3, 8, 8), torch.tensor([3, 10])
    torch.testing.assert_close(model.denoiser(y, 1.0, label), original(y, 1.0, label), rtol=0, atol=2e-5)
    assert objective_of(model.denoiser, "here") == VPObjectiveConfig()


@pytest.mark.usefixtures("same_exp")
@pytest.mark.parametrize(
    "objective",
    [
        VPObjectiveConfig(),
        VPObjectiveConfig(schedule="cosine", steps=500, prediction="x0"),
        VPObjectiveConfig(steps=200, variance="fixed-small"),
        VPObjectiveConfig(variance="fixed-large"),
    ],
)
def test_a_written_folder_is_the_same_denoiser(tmp_path, objective):
    ours = shuffled(DiT(replace(GOOD, learn_sigma=objective.variance == "learned-range")))
    assert write_diffusers(ours, objective, tmp_path / "out") < 1e-3
    found = open_diffusers(str(tmp_path / "out")).denoiser
    expected = objective.build().denoiser(ours)
    assert objective_of(convert_diffusers(str(tmp_path / "out"))[0].denoiser, "here") == objective
    y, label = torch.randn(3, 4, 8, 8), torch.tensor([0, 5, 6])
    for sigma in (0.1, 2.0, 10.0):
        theirs, mine = found.predict(y, sigma, label), expected.predict(y, sigma, label)
        torch.testing.assert_close(theirs.x0, mine.x0, rtol=1e-4, atol=1e-4)
        if mine.v is not None:
            torch.testing.assert_close(theirs.v, mine.v, rtol=1e-4, atol=1e-4)
    assert (found.variance, found.prediction) == (expected.variance, expected.prediction)
    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert len(scheduler) == objective.steps


@pytest.mark.parametrize(
    ("scheduler", "sampler"),
    [
        (diffusers.DDIMScheduler(), DDIMConfig(steps="50", clip=True)),
        (diffusers.DDPMScheduler(clip_sample=False), DDPMConfig(steps="250")),
        (diffusers.DDPMScheduler(num_train_timesteps=100), DDPMConfig(steps="100", clip=True)),
    ],
)
def test_a_converted_model_draws_as_the_scheduler_says(diffusers_folder, scheduler, sampler):
    folder = str(diffusers_folder("dit", scheduler=scheduler))
    assert convert_diffusers(folder)[0].sampler == open_diffusers(folder).sampler == sampler


def test_a_written_scheduler_clips_where_the_sampler_does(tmp_path):
    ours = shuffled(DiT(GOOD))
    for number, sampler in enumerate((DDPMConfig(clip=True), DDIMConfig(clip=False), HeunConfig(), None)):
        write_diffusers(ours, VPObjectiveConfig(), tmp_path / str(number), sampler)
        found = open_diffusers(str(tmp_path / str(number))).sampler
        assert found.clip == (number == 0)


@pytest.mark.parametrize(("variance", "sampler"), [("learned-range", DDIMConfig()), ("fixed-large", DDPMConfig())])
def test_an_autoencoder_makes_it_a_pipeline_of_the_library(tmp_path, write_kl, variance, sampler):
    autoencoder = diffusers.AutoencoderKL.from_pretrained(write_kl(tmp_path / "kl"))
    ours, objective = shuffled(DiT(replace(GOOD, learn_sigma=variance == "learned-range"))), VPObjectiveConfig()
    objective = replace(objective, variance=variance)
    write_diffusers(ours, objective, tmp_path / "out", DDPMConfig(clip=True), autoencoder)
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline([0, 5], guidance_scale=1.0, num_inference_steps=2, output_type="np").images
    assert drawn.shape == (2, 16, 16, 3)
    assert not pipeline.scheduler.config.clip_sample  # these are latents
    weights = autoencoder.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in pipeline.vae.state_dict().items())
    found, _ = convert_diffusers(str(tmp_path / "out"))
    assert (found.decoder, found.sampler) == (tmp_path / "out" / "vae", sampler)
    assert objective_of(found.denoiser, "here") == objective


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"block": "in-context"}, "knows adaln-zero blocks only, this DiT has in-context blocks"),
        ({"attention": "g,3"}, "has local windows in layers 2"),
        ({"image_size": (8, 16)}, "knows square images only"),
        ({"num_classes": 0}, "knows class-conditional networks only"),
        ({"null_class": False}, "always has a null class"),
        ({"mlp_ratio": 2.0}, "MLPs of 4 times the width, this DiT of 2 times"),
        ({"time_frequencies": "original"}, r"has other time frequencies .* outputs would change"),
    ],
)
def test_what_diffusers_cannot_express(tmp_path, change, says):
    with pytest.raises(DitlabError, match=says):
        write_diffusers(DiT(replace(GOOD, **change)).eval(), VPObjectiveConfig(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_processes_that_diffusers_cannot_express(tmp_path):
    with pytest.raises(DitlabError, match="trained in EDM's framework"):
        write_diffusers(DiT(GOOD), EDMObjectiveConfig(), tmp_path / "out")
    with pytest.raises(DitlabError, match=r"was trained with t \* 1000 / 500"):
        scheduler_config(VPObjectiveConfig(steps=500, rescale_time=True))


def test_what_ditlab_cannot_hold(diffusers_folder):
    with pytest.raises(DitlabError, match="found a UNet2DModel, for which ditlab has no network; open it unconverted"):
        convert_diffusers(str(diffusers_folder("unet")))
    with pytest.raises(DitlabError, match="expected attention_bias True, found False"):
        convert_diffusers(str(diffusers_folder("dit", "nobias", attention_bias=False)))
    with pytest.raises(DitlabError, match="DiT config: image_size must be multiples of the patch 3"):
        convert_diffusers(str(diffusers_folder("dit", "odd", patch_size=3, sample_size=8)))
    folder = diffusers_folder("dit", "scaled", scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear"))
    with pytest.raises(DitlabError, match="expected the linear or the cosine schedule, found another"):
        objective_of(convert_diffusers(str(folder))[0].denoiser, "here")
    velocity = diffusers.DDPMScheduler(prediction_type="v_prediction")
    folder = diffusers_folder("dit", "velocity", scheduler=velocity)
    with pytest.raises(DitlabError, match="expected a model that predicts the noise or the image"):
        objective_of(convert_diffusers(str(folder))[0].denoiser, "here")
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"
