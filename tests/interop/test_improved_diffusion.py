"""Checkpoints of improved-diffusion: read, written, what they do not say, and what is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ditlab.diffusion.objective_configs import EDMObjectiveConfig, VPObjectiveConfig
from ditlab.errors import DitlabError
from ditlab.interop.checkpoints import open_checkpoint
from ditlab.interop.converted import open_converted, write_converted
from ditlab.interop.formats import UNetFile
from ditlab.interop.imported import objective_of
from ditlab.interop.improved_diffusion import to_original, write_improved
from ditlab.models.opening import open_model
from ditlab.networks.registry import build_network
from ditlab.networks.unet import UNet
from ditlab.networks.unet_config import UNetConfig

SMALL = UNetConfig(image_size=(32, 32), width=32, res_blocks=1, learn_sigma=True)
"""The levels of the published model of CIFAR-10, narrow."""
HYBRID = VPObjectiveConfig(schedule="cosine", steps=4000, rescale_time=True)


def unet(config: UNetConfig) -> UNet:
    network = build_network(config)
    assert isinstance(network, UNet)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.eval().requires_grad_(False)


def outputs(network, label=None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, *network.in_shape, generator=generator)
    return network(x, torch.tensor([3.0, 700.0]), label)


def bare(path, network: UNet):
    """A file as the original's scripts leave it."""
    torch.save(to_original(network), path)
    return path


@pytest.mark.goldens("03_iddpm_unet_?")
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_gives_the_originals_outputs(golden, tmp_path, golden_name, suffix, use_frequencies):
    fixture = golden(golden_name)
    config, weights = fixture.config, fixture.weights()
    use_frequencies(fixture)
    path = tmp_path / f"unet.{suffix}"
    torch.save(weights, path) if suffix == "pt" else save_file(weights, path)
    heads_up = None if config["num_heads_upsample"] == -1 else config["num_heads_upsample"]
    settings = UNetFile(size=config["image_size"], heads_up=heads_up)
    model = open_checkpoint(path, heads=config["num_heads"], unet=settings)
    result = model.denoiser.network(fixture["in.x"], fixture["in.t"], fixture.tensors.get("in.y"))
    torch.testing.assert_close(result, fixture["out.y"], rtol=0, atol=fixture.tolerance("out.*"))
    shape = model.denoiser.network.config
    assert (shape.image_size, shape.channels) == ((config["image_size"],) * 2, config["in_channels"])
    assert (shape.width, shape.res_blocks) == (config["model_channels"], config["num_res_blocks"])
    assert (list(shape.multipliers), shape.scale_shift) == (config["channel_mult"], config["use_scale_shift_norm"])
    assert set(shape.attention_at) == {config["image_size"] // rate for rate in config["attention_resolutions"]}
    assert shape.num_classes == (config["num_classes"] or 0)
    assert shape.learn_sigma == (config["out_channels"] == 2 * config["in_channels"])
    assert model.denoiser.variance == ("learned-range" if shape.learn_sigma else "fixed-large")
    back = to_original(model.denoiser.network)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], value) for key, value in weights.items())


def test_attention_is_in_the_right_order_for_every_number_of_heads(tmp_path):
    network = unet(replace(SMALL, heads=8, heads_up=2))
    model = open_checkpoint(bare(tmp_path / "a.pt", network), heads=8, unet=UNetFile(heads_up=2))
    assert torch.equal(outputs(model.denoiser.network), outputs(network))
    other = open_checkpoint(tmp_path / "a.pt", heads=8)
    assert not torch.allclose(outputs(other.denoiser.network), outputs(network), atol=1e-4)


PUBLISHED = [  # the network, then: heads, schedule, steps, rescaled time, as in the README of the original code
    (SMALL, (4, "cosine", 4000, True)),
    (replace(SMALL, image_size=(64, 64), multipliers=(1, 2, 3, 4)), (4, "cosine", 4000, True)),
    (replace(SMALL, image_size=(64, 64), multipliers=(1, 2, 3, 4), num_classes=10), (4, "cosine", 4000, False)),
    (
        replace(SMALL, image_size=(256, 256), multipliers=(1, 1, 2, 2, 4, 4), attention_at=(16,), scale_shift=False, heads=1),
        (1, "linear", 1000, False),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "recipe"), PUBLISHED)
def test_what_a_file_does_not_say_is_taken_from_the_published_recipes(tmp_path, config, recipe):
    model = open_checkpoint(bare(tmp_path / "model.pt", unet(config)))
    assert model.denoiser.network.config == config
    objective = objective_of(model.denoiser, "here")
    found = (config.heads, objective.schedule, objective.steps, objective.rescale_time)
    assert found == recipe
    (note,) = model.notes
    rescaled = "time rescaled to 1000 steps" if recipe[3] else "time as it is"
    assert note.startswith(
        f"model.pt does not say everything: {recipe[0]} attention heads, images of {config.image_size[0]} pixels, the "
        f"{recipe[1]} schedule, {recipe[2]} steps, {rescaled} were assumed"
    )


def test_what_is_told_is_not_guessed(tmp_path):
    path = bare(tmp_path / "a.pt", unet(SMALL))
    settings = UNetFile(size=64, schedule="linear", steps=500, rescale_time=False, prediction="x0")
    model = open_checkpoint(path, heads=2, unet=settings)
    assert model.notes == ()
    assert model.denoiser.network.config == replace(SMALL, image_size=(64, 64), heads=2, attention_at=(32, 16))
    objective = objective_of(model.denoiser, "here")
    assert (objective.schedule, objective.steps, objective.rescale_time) == ("linear", 500, False)
    assert objective.prediction == "x0"
    assert "4 attention heads" not in open_checkpoint(path, heads=2).notes[0]


OTHERS = [
    {},
    {"conv_resample": False},
    {"attention_at": ()},
    {"num_classes": 4},
    {"res_blocks": 2, "multipliers": (1, 3), "image_size": (8, 8), "attention_at": (4,)},
    {"multipliers": (1,), "image_size": (6, 6), "heads": 2},
]


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_there_and_back(tmp_path, changes):
    network, label = unet(replace(SMALL, **changes)), torch.tensor([0, 3])
    objective = replace(HYBRID, steps=300, schedule="linear", prediction="x0")
    write_improved(network, objective, tmp_path / "a.safetensors")
    model = open_checkpoint(tmp_path / "a.safetensors")
    assert model.notes == ()
    assert torch.equal(outputs(model.denoiser.network, label), outputs(network, label))
    assert objective_of(model.denoiser, "here") == objective


def test_how_the_original_builds_it(tmp_path):
    said = write_improved(unet(replace(SMALL, attention_at=())), HYBRID, tmp_path / "a.pt")
    # Its scripts divide the image size by each size named, and have no word for none; 32 // 64 is the factor of no map.
    assert said == (
        "flags for the original's scripts: --num_channels 32 --num_res_blocks 1 --attention_resolutions 64 "
        "--learn_sigma True --class_cond False --use_scale_shift_norm True --num_heads 4 --num_heads_upsample -1 "
        "--image_size 32 --noise_schedule cosine --diffusion_steps 4000 --rescale_timesteps True "
        "--predict_xstart False --sigma_small False"
    )
    # What the scripts cannot build: other levels, another number of classes, channels, or pooling.
    for number, changes in enumerate(
        ({"image_size": (16, 16)}, {"num_classes": 10}, {"channels": 1}, {"conv_resample": False}), 1
    ):
        said = write_improved(unet(replace(SMALL, **changes)), HYBRID, tmp_path / f"{number}.pt")
        assert "no flags of the original's scripts build this network; its class does: UNetModel(in_channels=" in said
    assert said.endswith(
        "UNetModel(in_channels=3, model_channels=32, out_channels=6, num_res_blocks=1, attention_resolutions=(2, 4), "
        "channel_mult=(1, 2, 2, 2), conv_resample=False, num_classes=None, num_heads=4, num_heads_upsample=-1, "
        "use_scale_shift_norm=True)"
    )
    assert write_improved(unet(replace(SMALL, num_classes=1000)), HYBRID, tmp_path / "b.pt").startswith("flags for")


def test_a_fixed_variance_goes_along(tmp_path):
    network = unet(replace(SMALL, learn_sigma=False))
    for variance in ("fixed-small", "fixed-large"):
        objective = replace(HYBRID, variance=variance)
        write_improved(network, objective, tmp_path / f"{variance}.safetensors")
        assert open_checkpoint(tmp_path / f"{variance}.safetensors").denoiser.variance == variance


def test_a_pickle_is_the_bare_state_dict(tmp_path):
    network = unet(SMALL)
    write_improved(network, HYBRID, tmp_path / "a.pt")
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert found.keys() == to_original(network).keys()
    assert found["input_blocks.3.1.qkv.weight"].shape == (192, 64, 1)
    assert torch.equal(outputs(open_checkpoint(tmp_path / "a.pt").denoiser.network), outputs(network))
    with pytest.raises(DitlabError, match="expected a new file"):
        write_improved(network, HYBRID, tmp_path / "a.pt")


def test_a_reference_to_a_file(tmp_path):
    network = unet(SMALL)
    trained = open_model(bare(tmp_path / "a.pt", network))
    denoiser = trained.denoiser()
    assert denoiser.shape == (3, 32, 32)
    assert torch.equal(outputs(denoiser.module), outputs(network))
    # The network gets t * 1000 / T.
    assert float(denoiser.time(denoiser.levels.sigmas[4])) == pytest.approx(1.0)


def test_converted_it_stays_the_same(tmp_path):
    model = open_checkpoint(bare(tmp_path / "a.pt", unet(SMALL)))
    write_converted(model, tmp_path / "out")
    again = open_converted(tmp_path / "out")
    assert again.denoiser.network.config == SMALL
    y = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    assert torch.equal(again.denoiser(y, 0.7), model.denoiser(y, 0.7))
    assert again.notes == model.notes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"out.2.weight": torch.zeros(4, 32, 3, 3)}, "expected 3 or 6 output channels"),
        ({"extra.weight": torch.zeros(1)}, "'extra.weight' has no counterpart"),
        ({"out.0.weight": None}, "1 parameters are missing, the first 'norm.weight'"),
        ({"out.2.weight": None}, "expected 'out.2.weight' with 4 dimensions among the weights, found none"),
        ({"out.0.weight": torch.zeros(31)}, r"expected 'out.0.weight' with the shape \(32,\), found \(31,\)"),
        ({"input_blocks.3.0.out_layers.3.weight": None}, "levels of equally many residual blocks"),
        ({"input_blocks.3.0.out_layers.3.weight": torch.zeros(40, 40, 3, 3)}, "multiples of 32, found channels"),
        ({"input_blocks.1.0.emb_layers.1.weight": torch.zeros(64, 100)}, "a condition of 128 channels, found 100"),
        ({"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}, "upsampling models, whose input includes a small image"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(tmp_path, change, says):
    state = to_original(unet(SMALL)) | change
    save_file({key: value for key, value in state.items() if value is not None}, tmp_path / "a.safetensors")
    with pytest.raises(DitlabError, match=says):
        open_checkpoint(tmp_path / "a.safetensors")


def test_levels_that_no_script_of_the_original_has(tmp_path):
    path = bare(tmp_path / "a.pt", unet(replace(SMALL, multipliers=(1, 2), image_size=(16, 16))))
    with pytest.raises(
        DitlabError, match=r"its levels \(\(1, 2\)\) do not determine its image size; convert it with `unet.size`"
    ):
        open_checkpoint(path)
    assert open_checkpoint(path, unet=UNetFile(size=16)).denoiser.shape == (3, 16, 16)
    with pytest.raises(DitlabError, match=r"image_size must be multiples of 2, found \(15, 15\)"):
        open_checkpoint(path, unet=UNetFile(size=15))
    with pytest.raises(DitlabError, match="expected heads that divide the 64 channels"):
        open_checkpoint(path, heads=5, unet=UNetFile(size=16))


def test_what_a_file_says_is_not_overruled(tmp_path):
    path = tmp_path / "a.safetensors"
    write_improved(unet(SMALL), HYBRID, path)
    with pytest.raises(DitlabError, match="expected num_heads 4, as the file says, found 2"):
        open_checkpoint(path, heads=2)
    with pytest.raises(DitlabError, match="expected noise_schedule cosine, as the file says, found linear"):
        open_checkpoint(path, unet=UNetFile(schedule="linear"))
    assert open_checkpoint(path, heads=4, unet=UNetFile(schedule="cosine", prediction="epsilon")).notes == ()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"num_heads": "four"}, "expected num_heads among its settings as a whole number, found 'four'"),
        ({"rescale_timesteps": 1}, "expected rescale_timesteps among its settings as bool, found 1"),
        ({"noise_schedule": "sigmoid"}, "unknown noise schedule 'sigmoid'"),
    ],
)
def test_settings_that_cannot_be(tmp_path, args, says):
    save_file(to_original(unet(SMALL)), tmp_path / "a.safetensors", metadata={"args": json.dumps(args)})
    with pytest.raises(DitlabError, match=says):
        open_checkpoint(tmp_path / "a.safetensors")


def test_a_setting_that_is_null_is_not_said(tmp_path):
    path, settings = tmp_path / "a.safetensors", ("num_heads", "num_heads_upsample", "diffusion_steps", "image_size")
    save_file(to_original(unet(SMALL)), path, metadata={"args": json.dumps(dict.fromkeys(settings))})
    model = open_checkpoint(path)
    assert model.denoiser.network.config == SMALL
    assert "4 attention heads, images of 32 pixels, the cosine schedule, 4000 steps" in model.notes[0]


@pytest.mark.parametrize(
    ("changes", "objective", "says"),
    [
        ({"groups": 8}, HYBRID, "has 32 groups in every norm"),
        ({"time_frequencies": "diffusers"}, HYBRID, "time frequencies 'original', this UNet has 32 and 'diffusers'"),
        ({"num_classes": 3, "null_class": True}, HYBRID, "no row for a null class"),
        ({"image_size": (32, 16)}, HYBRID, "square images only, this UNet is for 32x16 pixels"),
        ({}, EDMObjectiveConfig(), "trained on a VP process only"),
    ],
)
def test_what_the_format_cannot_express(tmp_path, changes, objective, says):
    with pytest.raises(DitlabError, match=says):
        write_improved(unet(replace(SMALL, **changes)), objective, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


class Code:
    """Would make a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_files_that_are_not_opened(tmp_path):
    state, path, mark = to_original(unet(SMALL)), tmp_path / "a.pt", tmp_path / "was-run"
    torch.save({**state, "more": Code(mark)}, path)
    with pytest.raises(DitlabError, match=r"it wants to run 'posix\.system' when it is opened"):
        open_checkpoint(path)
    assert not mark.exists()
    torch.save(state, path)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(DitlabError, match=r"found a damaged one|found a file of another kind"):
            open_checkpoint(path)
    with pytest.raises(DitlabError, match="expected a checkpoint, found nothing"):
        open_checkpoint(tmp_path / "none.pt")


def test_files_of_other_networks(tmp_path):
    torch.save({"conv_in.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(DitlabError, match=r"of improved-diffusion's UNet .* another network's \('conv_in.weight'\)"):
        open_checkpoint(tmp_path / "other.pt")
    torch.save({"x_embedder.proj.weight": torch.zeros(1)}, tmp_path / "dit.pt")
    with pytest.raises(DitlabError, match="expected weights of improved-diffusion's UNet for settings of `unet`"):
        open_checkpoint(tmp_path / "dit.pt", unet=UNetFile(steps=1000))
    bare(tmp_path / "unet.pt", unet(SMALL))
    with pytest.raises(DitlabError, match="expected raw weights beside averaged ones"):
        open_checkpoint(tmp_path / "unet.pt", ema=False)
