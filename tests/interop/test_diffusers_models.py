"""Models of diffusers as denoisers: outputs, processes, attention maps, and what is refused (golden 09)."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from ditlab.analyses.attention.config import AttentionConfig
from ditlab.analyses.attention.maps import attention_layers, uniform_grid_layers
from ditlab.analyses.attention.measure import measure_attention
from ditlab.diffusion.samplers import DDIMConfig, DDPMConfig, ImageNoise, sample
from ditlab.diffusion.schedules import make_schedule
from ditlab.errors import DitlabError
from ditlab.interop.diffusers_models import VelocityDenoiser, open_diffusers
from ditlab.nn.attention import capture_attention

diffusers = pytest.importorskip("diffusers")


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def saved(fixture, kind, folder):
    """The golden's weights as a folder of diffusers."""
    config = {key: value for key, value in fixture.config.items() if key != "_use_default_values"}
    model = getattr(diffusers, kind)(**config)
    model.load_state_dict(fixture.weights())
    model.save_pretrained(folder)
    diffusers.DDPMScheduler().save_pretrained(folder)
    return folder


def use_waves(network, fixture, key):
    """Puts the recorded sinusoids in place of the library's, which may differ by the last bit of float32 `exp`."""

    def replace(module, args, output):
        waves, steps = fixture[key], fixture["in.t"]
        assert ((output - waves).abs() <= steps[:, None] * 2**-22 + 1e-6).all()
        return waves

    layers = [layer for name, layer in network.named_modules() if name.rpartition(".")[2] == "time_proj"]
    assert layers
    for layer in layers:
        layer.register_forward_hook(replace)


def test_a_unet_gives_the_goldens_outputs(golden, tmp_path):
    fixture = golden("09_diffusers_unet")
    model = open_diffusers(str(saved(fixture, "UNet2DModel", tmp_path / "flat")))
    use_waves(model.denoiser.network, fixture, "out.t_proj")
    tolerance = fixture.tolerance("out")
    close(model.denoiser.network(fixture["in.x"], fixture["in.t"]), fixture["out.y"], tolerance)
    # And as a denoiser: y = x_t / sqrt(abar_t), eps is what the network puts out.
    schedule = make_schedule("linear", 1000)
    sigma = torch.from_numpy(schedule.sigmas)[fixture["in.t"]].float()
    y = fixture["in.x"] * (1 + sigma**2).sqrt().view(-1, 1, 1, 1)
    close(model.denoiser.predict(y, sigma).eps, fixture["out.y"], 2 * tolerance)
    side = fixture.config["sample_size"]
    assert model.denoiser.shape == (fixture.config["in_channels"], side, side)
    assert (model.name, model.denoiser.num_classes) == ("flat", 0)


def test_a_dit_gives_the_goldens_outputs_though_its_embedders_differ(golden, tmp_path):
    fixture = golden("09_diffusers_dit")
    model = open_diffusers(str(saved(fixture, "DiTTransformer2DModel", tmp_path / "dit")))
    use_waves(model.denoiser.network, fixture, "out.time_proj")
    x, t, label = fixture["in.x"], fixture["in.t"], fixture["in.y"]
    close(model.denoiser.network(x, t, label), fixture["out.y"], fixture.tolerance("out"))
    classes = fixture.config["num_embeds_ada_norm"]
    learned = fixture.config["out_channels"] == 2 * fixture.config["in_channels"]
    assert (model.denoiser.num_classes, model.denoiser.null_class) == (classes, True)
    assert (model.denoiser.variance == "learned-range") == learned
    none = torch.full_like(label, classes)
    assert torch.equal(model.denoiser.network(x, t), model.denoiser.network(x, t, none))


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "scaled_linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_estimates_are_those_of_the_scheduler(diffusers_folder, schedule, prediction):
    scheduler = diffusers.DDPMScheduler(
        beta_schedule=schedule, prediction_type=prediction, variance_type="fixed_large", clip_sample=False
    )
    model = open_diffusers(str(diffusers_folder("unet", scheduler=scheduler)))
    denoiser = model.denoiser
    x, steps = torch.randn(1, 3, 8, 8), [2, 500, 990]
    scheduler.set_timesteps(1000)
    for step in steps:
        with torch.no_grad():
            raw = denoiser.network(x, torch.tensor([step]))
        expected = scheduler.step(raw, step, x).pred_original_sample
        sigma = float(denoiser.levels.sigmas[step])
        prediction_ = denoiser.predict(x * (1 + sigma**2) ** 0.5, sigma)
        # abar is a product of 1,000 float32 numbers there.
        torch.testing.assert_close(prediction_.x0, expected, rtol=2e-4, atol=1e-4)
        torch.testing.assert_close(prediction_.x0 + sigma * prediction_.eps, x * (1 + sigma**2) ** 0.5)
    assert isinstance(denoiser, VelocityDenoiser) == (prediction == "v_prediction")
    betas = scheduler.betas.double().numpy()
    np.testing.assert_allclose(denoiser.schedule.betas, betas, rtol=1e-4)
    if schedule == "linear":
        assert np.array_equal(denoiser.schedule.sigmas, make_schedule("linear", 1000).sigmas)


def test_samples_are_those_of_the_librarys_pipeline(diffusers_folder):
    short = {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2}
    scheduler = diffusers.DDIMScheduler(**short, clip_sample=False)
    folder = diffusers_folder("unet", scheduler=scheduler)
    model = open_diffusers(str(folder))
    noise = ImageNoise([0, 1], model.denoiser.shape).initial()
    scheduler.set_timesteps(100)
    x = noise
    for step in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(model.denoiser.network(x, step.expand(2)), step, x).prev_sample
    ours = sample(model.denoiser, DDIMConfig(steps="100"), noise)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4 * float(x.abs().max()))


def test_default_samplers(diffusers_folder):
    ddpm = open_diffusers(str(diffusers_folder("unet", "a")))
    assert ddpm.sampler == DDPMConfig(steps="250", clip=True)
    assert ddpm.denoiser.variance == "fixed-large"
    ddim = open_diffusers(str(diffusers_folder("unet", "b", scheduler=diffusers.DDIMScheduler(clip_sample=False))))
    assert ddim.sampler == DDIMConfig(steps="50")
    pndm = open_diffusers(str(diffusers_folder("unet", "c", scheduler=diffusers.PNDMScheduler())))
    assert (pndm.sampler.kind, pndm.denoiser.variance) == ("ddim", "fixed-small")


def test_what_no_sampler_of_ours_does_is_noted(diffusers_folder):
    folder = diffusers_folder("unet", "a", scheduler=diffusers.DDPMScheduler(thresholding=True, clip_sample=False))
    (note,) = open_diffusers(str(folder)).notes
    assert "The scheduler of a clips its estimates by dynamic thresholding" in note
    wide = open_diffusers(str(diffusers_folder("unet", "b", scheduler=diffusers.DDIMScheduler(clip_sample_range=2.5))))
    assert "clips its estimates to +-2.5, which ditlab's samplers do not do" in wide.notes[0]
    assert not wide.sampler.clip
    unused = diffusers.DDIMScheduler(clip_sample=False, clip_sample_range=2.5)
    for name, scheduler in (("c", None), ("d", unused)):
        assert open_diffusers(str(diffusers_folder("unet", name, scheduler=scheduler))).notes == ()


def test_digests_tell_models_apart(diffusers_folder):
    model = diffusers_folder("unet", "a")
    digest = open_diffusers(str(model)).digest
    assert open_diffusers(str(model)).digest == digest
    assert open_diffusers(str(model.rename(model.with_name("moved")))).digest == digest
    diffusers.DDIMScheduler().save_pretrained(model.with_name("moved") / "scheduler")
    others = {open_diffusers(str(path)).digest for path in (model.with_name("moved"), diffusers_folder("unet", "b"))}
    assert len(others | {digest}) == 3


def test_an_autoencoder_beside_it_is_found(diffusers_folder):
    folder = diffusers_folder("dit", in_channels=4, out_channels=8)
    assert open_diffusers(str(folder)).decoder is None
    (folder / "vae").mkdir()
    found = open_diffusers(str(folder))
    assert (found.decoder, found.sampler.clip) == (folder / "vae", False)


def test_flat_folders_and_the_old_name_of_the_dit(diffusers_folder, tmp_path):
    folder = diffusers_folder("dit")
    expected = open_diffusers(str(folder)).denoiser
    flat = tmp_path / "flat"
    (folder / "transformer").rename(flat)
    (folder / "scheduler" / "scheduler_config.json").rename(flat / "scheduler_config.json")
    config = json.loads((flat / "config.json").read_text())
    (flat / "config.json").write_text(
        json.dumps({**config, "_class_name": "Transformer2DModel", "caption_channels": None})
    )
    y = torch.randn(2, 3, 8, 8)
    assert torch.equal(open_diffusers(str(flat)).denoiser(y, 0.5), expected(y, 0.5))


def test_classes_of_a_unet(diffusers_folder):
    denoiser = open_diffusers(str(diffusers_folder("unet", num_class_embeds=5))).denoiser
    y, label = torch.randn(2, 3, 8, 8), torch.tensor([0, 4])
    assert not torch.equal(denoiser(y, 0.5, label), denoiser(y, 0.5, label.flip(0)))
    assert (denoiser.num_classes, denoiser.null_class) == (5, False)
    with pytest.raises(DitlabError, match="it has no null class, so every image needs a label"):
        denoiser(y, 0.5)
    with pytest.raises(DitlabError, match="expected labels from 0 to 4, found 5"):
        denoiser(y, 0.5, label + 1)


def test_a_table_of_steps_is_asked_for_whole_steps_only(diffusers_folder):
    folder = diffusers_folder("unet", time_embedding_type="learned", num_train_timesteps=1000)
    denoiser = open_diffusers(str(folder)).denoiser
    between = float(denoiser.levels.sigmas[100] * 0.6 + denoiser.levels.sigmas[101] * 0.4)
    assert denoiser.time(between) == 100
    assert denoiser(torch.randn(2, 3, 8, 8), between).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "settings", "grids"),
    [
        ("unet", {}, [(4, 4)] * 3 + [(2, 2)]),
        ("unet", {"sample_size": (8, 16), "attention_head_dim": None}, [(4, 8)] * 3 + [(2, 4)]),
        ("unet", {"layers_per_block": 2, "norm_num_groups": 4, "attn_norm_num_groups": 2}, [(4, 4)] * 5 + [(2, 2)]),
        ("dit", {}, [(4, 4)] * 2),
    ],
)
def test_attention_maps_are_those_that_the_layers_use(diffusers_folder, kind, settings, grids):
    denoiser = open_diffusers(str(diffusers_folder(kind, **settings))).denoiser
    layers = [module for module in denoiser.network.modules() if type(module).__name__ == "Attention"]
    assert [layer.grid for layer in attention_layers(denoiser)] == grids
    seen = []
    for layer in layers:
        layer.register_forward_hook(
            lambda module, args, named, out: seen.append((module, args[0], out)), with_kwargs=True
        )
    with capture_attention(denoiser.network) as maps:
        denoiser(torch.randn(2, *denoiser.shape), 0.7)
    assert len(seen) == len(layers)
    for layer, given, out in seen:
        x = given.flatten(2).transpose(1, 2) if given.ndim == 4 else given
        normed = x if layer.group_norm is None else layer.group_norm(x.transpose(1, 2)).transpose(1, 2)
        values = layer.to_v(normed).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        weights = maps[layers.index(layer)][0]
        assert weights.shape == (2, layer.heads, x.shape[1], x.shape[1])
        expected = layer.to_out[0]((weights @ values).transpose(1, 2).flatten(2))
        expected = expected.transpose(1, 2).reshape(given.shape) if given.ndim == 4 else expected
        expected = (expected + given if layer.residual_connection else expected) / layer.rescale_output_factor
        close(out, expected, 2e-6)


def test_attention_of_a_unet_is_measured_on_one_grid_at_a_time(diffusers_folder):
    denoiser = open_diffusers(str(diffusers_folder("unet"))).denoiser
    with pytest.raises(DitlabError, match="expected `layers` of one grid and number of heads"):
        measure_attention(denoiser, torch.randn(2, 3, 8, 8), AttentionConfig(images=2, sigmas=(0.5,)))
    chosen = uniform_grid_layers(attention_layers(denoiser))
    assert chosen == (1, 2, 3)
    result = measure_attention(
        denoiser, torch.randn(2, 3, 8, 8), AttentionConfig(images=2, sigmas=(0.5,), layers=chosen)
    )
    assert result.grid == (4, 4)
    dit = open_diffusers(str(diffusers_folder("dit", "dit"))).denoiser
    assert uniform_grid_layers(attention_layers(dit)) == ()


def scheduled(**changes):
    return {"scheduler": diffusers.DDPMScheduler(**changes)}


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        ("unet", {"sample_size": 10}, "sides are multiples of 4 .*, found 10x10"),
        ("unet", {"sample_size": None}, "expected a sample_size in its config.json, found none"),
        ("unet", {"class_embed_type": "timestep"}, "found class_embed_type 'timestep'"),
        ("unet", {"out_channels": 4}, "expected 3 or 6 output channels, found 4"),
        ("unet", scheduled(variance_type="learned"), "expected a variance_type .*, found learned"),
        ("unet", scheduled(variance_type="learned_range"), "found learned_range with 3 output channels for 3"),
        ("unet", scheduled(rescale_betas_zero_snr=True), "level is infinite"),
        (
            "unet",
            {"scheduler": diffusers.EulerDiscreteScheduler(timestep_type="continuous")},
            "found timestep_type 'continuous'",
        ),
        ("unet", {"scheduler": diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True)}, "found use_flow_sigmas"),
        ("unet", {"time_embedding_type": "fourier"}, r"gets the step .*, found 'fourier'"),
        ("unet", {"scheduler": diffusers.EDMEulerScheduler()}, "discrete VP process .*, found EDMEulerScheduler"),
        ("unet", {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}, "found FlowMatchEulerDiscrete"),
    ],
)
def test_models_of_other_kinds_are_refused(diffusers_folder, kind, settings, says):
    with pytest.raises(DitlabError, match=says):
        open_diffusers(str(diffusers_folder(kind, **settings)))


def test_folders_that_are_no_models(diffusers_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DitlabError, match=r"diffusers:empty: expected a model's config.json, found no"):
        open_diffusers(str(tmp_path / "empty"))
    with pytest.raises(DitlabError, match="expected a model's folder or a hub id, found nothing"):
        open_diffusers(str(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(DitlabError, match="found a file"):
        open_diffusers(str(tmp_path / "file"))
    folder = diffusers_folder("unet")
    config, scheduler = folder / "unet" / "config.json", folder / "scheduler" / "scheduler_config.json"
    scheduler.rename(tmp_path / "kept")
    with pytest.raises(DitlabError, match="expected the scheduler's config, without which its noise levels"):
        open_diffusers(str(folder))
    (tmp_path / "kept").rename(scheduler)
    text = config.read_text()
    config.write_text(text.replace("UNet2DModel", "AutoencoderKL"))
    with pytest.raises(DitlabError, match="expected a UNet2DModel or a DiTTransformer2DModel, found AutoencoderKL"):
        open_diffusers(str(folder))
    config.write_text(text[:50])
    with pytest.raises(DitlabError, match=r"as JSON in .*config\.json, found something else"):
        open_diffusers(str(folder))


def test_damaged_and_foreign_weights(diffusers_folder, tmp_path):
    folder, other = diffusers_folder("unet"), diffusers_folder("dit", "other")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(DitlabError, match="its UNet2DModel could not be read"):
        open_diffusers(str(folder))
    file.write_bytes((other / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes())
    with pytest.raises(DitlabError, match=r"its weights and its config\.json do not belong together"):
        open_diffusers(str(folder))
    file.unlink()
    with pytest.raises(DitlabError, match="its UNet2DModel could not be read"):
        open_diffusers(str(folder))


def test_without_the_library(diffusers_folder, monkeypatch):
    folder = diffusers_folder("unet")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DitlabError, match=r'pip install "ditlab\[diffusers\]"'):
        open_diffusers(str(folder))
