"""Checkpoints of the original DiT code: read safely, told apart, written back (golden 01)."""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ditlab.diffusion.objective_configs import EDMObjectiveConfig, VPObjectiveConfig
from ditlab.errors import DitlabError
from ditlab.interop.checkpoints import open_checkpoint
from ditlab.interop.original_dit import infer_config, to_original, write_original
from ditlab.interop.original_files import read_state
from ditlab.networks.dit import DiT
from ditlab.networks.dit_config import DiTConfig


@pytest.fixture
def fixture(golden_name, golden):
    return golden(golden_name)


@pytest.fixture(scope="module")
def weights():
    """A small network's state dict in the original's format, random everywhere."""
    config = DiTConfig(image_size=(8, 8), channels=4, patch=2, width=48, depth=3, heads=4, num_classes=7)
    network = DiT(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    return to_original(network, VPObjectiveConfig())


def training_file(path, weights, **args):
    """What the original's training script leaves: raw weights, averaged ones, optimizer, arguments."""
    raw = {key: value if key == "pos_embed" else value + 1 for key, value in weights.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    everything = {"model": raw, "ema": weights, "opt": optimizer, "args": argparse.Namespace(**args)}
    torch.save(everything, path)
    return path


def outputs(model, fixture):
    return model.denoiser.network(fixture["in.x"], fixture["in.t"], fixture["in.y"])


@pytest.mark.goldens("01_dit_?")
@pytest.mark.parametrize("kind", ["bare", "legacy", "training", "safetensors"])
def test_a_file_gives_the_originals_outputs(fixture, tmp_path, kind, use_frequencies):
    config, weights = fixture.config, fixture.weights()
    use_frequencies(fixture)
    path = tmp_path / ("dit.safetensors" if kind == "safetensors" else "dit.pt")
    if kind == "training":
        training_file(path, weights, model="DiT-T/2", num_classes=config["num_classes"], image_size=64, ckpt=None)
    elif kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "bare")
    model = open_checkpoint(path, heads=config["num_heads"])
    torch.testing.assert_close(outputs(model, fixture), fixture["out.y"], rtol=0, atol=fixture.tolerance("out.*"))
    shape, side = model.denoiser.network.config, config["input_size"]
    assert (shape.image_size, shape.channels, shape.patch) == (
        (side, side),
        config["in_channels"],
        config["patch_size"],
    )
    assert (shape.width, shape.depth) == (config["hidden_size"], config["depth"])
    assert (shape.num_classes, shape.learn_sigma) == (config["num_classes"], config["learn_sigma"])
    assert model.denoiser.variance == ("learned-range" if config["learn_sigma"] else "fixed-large")
    assert len(model.denoiser.schedule) == 1000
    assert model.name == "dit"


def test_averaged_weights_are_preferred(weights, tmp_path):
    path = training_file(tmp_path / "a.pt", weights, model="DiT-T/2")
    assert torch.equal(read_state(path)[0]["final_layer.linear.bias"], weights["final_layer.linear.bias"])
    raw, args = read_state(path, ema=False)
    assert torch.equal(raw["final_layer.linear.bias"], weights["final_layer.linear.bias"] + 1)
    assert args == {"model": "DiT-T/2"}
    torch.save(weights, tmp_path / "bare.pt")
    with pytest.raises(DitlabError, match="expected raw weights beside averaged ones, found one set"):
        read_state(tmp_path / "bare.pt", ema=False)


class Malicious:
    """Would make a file when it is unpickled."""

    def __init__(self, mark: pathlib.Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("where", ["args", "top", "ema", "plain pickle"])
def test_code_in_a_checkpoint_is_not_run(weights, tmp_path, where):
    mark, path = tmp_path / "was-run", tmp_path / "dit.pt"
    bad = Malicious(mark)
    if where == "plain pickle":
        path.write_bytes(pickle.dumps({"ema": bad}, protocol=4))
    else:
        content = {
            "args": {"ema": weights, "args": bad},
            "top": bad,
            "ema": {"ema": {**weights, "x": bad}},
        }[where]
        torch.save(content, path)
    with pytest.raises(DitlabError) as error:
        open_checkpoint(path, heads=4)
    assert "it is not opened" in str(error.value)
    assert "safetensors.torch.save_file" in str(error.value)
    if where != "plain pickle":
        assert "it wants to run 'posix.system'" in str(error.value)
    assert not mark.exists()
    # The file does what it is said to do when it is trusted.
    with path.open("rb") as file:
        torch.load(file, weights_only=False) if where != "plain pickle" else pickle.load(file)
    assert mark.exists()


def test_another_class_is_named(weights, tmp_path):
    torch.save({"ema": weights, "args": argparse.Namespace(out=tmp_path)}, tmp_path / "dit.pt")
    with pytest.raises(DitlabError, match=r"it wants to run 'pathlib\.PosixPath'"):
        open_checkpoint(tmp_path / "dit.pt", heads=4)


def test_damaged_files(weights, tmp_path):
    path = tmp_path / "dit.pt"
    for settings in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(weights, path, **settings)
        whole = path.read_bytes()
        for size in (0, 10, len(whole) // 2, len(whole) - 10):
            path.write_bytes(whole[:size])
            with pytest.raises(DitlabError, match=r"found a damaged one|found a file of another kind"):
                read_state(path)
    path.write_text("not a checkpoint")
    with pytest.raises(DitlabError, match="found a file of another kind"):
        read_state(path)
    save_file(weights, tmp_path / "dit.safetensors")
    (tmp_path / "dit.safetensors").write_bytes((tmp_path / "dit.safetensors").read_bytes()[:999])
    with pytest.raises(DitlabError, match="expected a whole safetensors file"):
        read_state(tmp_path / "dit.safetensors")
    with pytest.raises(DitlabError, match="expected a checkpoint, found nothing"):
        read_state(tmp_path / "none.pt")


def test_weights_of_other_networks(weights, tmp_path):
    save_file({"conv_in.weight": torch.zeros(3)}, tmp_path / "unet.safetensors")
    with pytest.raises(DitlabError, match=r"of the original DiT, .* found another network's \('conv_in.weight'\)"):
        open_checkpoint(tmp_path / "unet.safetensors")
    for content, says in (
        ([1, 2], "expected a state dict of tensors, found list"),
        ({"ema": 3}, "expected a state dict of tensors, found int"),
        ({}, "expected a state dict of tensors, found dict"),
    ):
        torch.save(content, tmp_path / "dit.pt")
        with pytest.raises(DitlabError, match=says):
            open_checkpoint(tmp_path / "dit.pt")
    for change, says in (
        ({"y_embedder.embedding_table.weight": None}, ""),
        ({"blocks.1.mlp.fc1.bias": None}, "1 parameters are missing, the first 'blocks.1.mlp.hidden.bias'"),
        ({"further": torch.zeros(1)}, "'further' has no counterpart"),
        ({"pos_embed": None}, "expected 'pos_embed' with 3 dimensions"),
        ({"pos_embed": weights["pos_embed"].flip(1)}, "expected the fixed sin-cos table"),
        ({"pos_embed": weights["pos_embed"][:, :15]}, "expected a square grid of tokens in 'pos_embed', found 15"),
        ({"final_layer.linear.weight": torch.zeros(12, 48)}, "expected 4 or 8 output channels .*, found 3"),
        ({"t_embedder.mlp.0.weight": torch.zeros(48, 100)}, r"with the shape \(48, 256\), found \(48, 100\)"),
    ):
        state = {key: value for key, value in {**weights, **change}.items() if value is not None}
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "dit.safetensors")
        if not says:  # without a label table it is an unconditional DiT
            assert open_checkpoint(tmp_path / "dit.safetensors", heads=4).denoiser.num_classes == 0
            continue
        with pytest.raises(DitlabError, match=says):
            open_checkpoint(tmp_path / "dit.safetensors", heads=4)


def test_classes(weights):
    assert infer_config(weights, {}, "here", heads=4).num_classes == 7
    assert infer_config(weights, {"num_classes": 7}, "here", heads=4).null_class
    without = infer_config(weights, {"num_classes": 8}, "here", heads=4)  # no label dropout, so no row for none
    assert (without.num_classes, without.null_class) == (8, False)
    with pytest.raises(DitlabError, match=r"here: expected a label table of 1000 or 1001 rows .*, found 8"):
        infer_config(weights, {"num_classes": 1000}, "here", heads=4)


def test_heads():
    state = to_original(
        DiT(DiTConfig(image_size=(4, 4), width=384, depth=1, heads=6, num_classes=2)), VPObjectiveConfig()
    )
    assert infer_config(state, {}, "here").heads == 6
    assert infer_config(state, {"model": "DiT-B/4"}, "here").heads == 12
    assert infer_config(state, {"model": "Mine/4"}, "here", heads=3).heads == 3
    with pytest.raises(DitlabError, match="here: DiT config: width must be a multiple of the 5 heads"):
        infer_config(state, {}, "here", heads=5)
    small = to_original(
        DiT(DiTConfig(image_size=(4, 4), width=16, depth=1, heads=2, num_classes=2)), VPObjectiveConfig()
    )
    with pytest.raises(DitlabError, match=r"do not determine the number of attention heads; convert it with `heads`"):
        infer_config(small, {}, "here")


def test_assumed_heads_are_noted(tmp_path):
    network = DiT(DiTConfig(image_size=(4, 4), width=384, depth=1, heads=3, num_classes=2))
    torch.save(to_original(network, VPObjectiveConfig()), tmp_path / "bare.pt")
    (note,) = open_checkpoint(tmp_path / "bare.pt").notes
    assert "bare.pt does not say how many attention heads it has: 6 were assumed" in note
    assert open_checkpoint(tmp_path / "bare.pt", heads=3).notes == ()
    for name in ("told.pt", "told.safetensors"):  # a guess by the width would be 6
        write_original(network, VPObjectiveConfig(), tmp_path / name)
        model = open_checkpoint(tmp_path / name)
        assert model.denoiser.network.config == network.config
        assert model.notes == ()
        with pytest.raises(DitlabError, match="expected `heads` 3, as the file says, found 6"):
            open_checkpoint(tmp_path / name, heads=6)


def test_the_originals_own_reader_takes_what_is_written(tmp_path):
    network = DiT(DiTConfig(image_size=(4, 4), width=16, depth=1, heads=2, num_classes=2))
    write_original(network, VPObjectiveConfig(), tmp_path / "dit.pt")
    found = torch.load(tmp_path / "dit.pt", weights_only=True)  # without an allow-list
    assert found["args"] == {"num_classes": 2, "num_heads": 2}
    state = found.get("ema", found)  # its sampling takes "ema" where it is there, else the file itself
    expected = to_original(network, VPObjectiveConfig())
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


def test_settings_and_shapes_that_make_no_sense(weights, tmp_path):
    path = tmp_path / "dit.pt"
    embed, table = "x_embedder.proj.weight", "pos_embed"
    for change, args, says in (
        ({}, {"num_classes": "10"}, "expected num_classes among its settings as a whole number, found '10'"),
        ({}, {"num_heads": "4"}, "expected num_heads among its settings as a whole number, found '4'"),
        ({3: torch.zeros(1)}, {}, "expected a state dict with names as keys, found the key 3"),
        ({embed: torch.zeros(48, 4, 0, 0)}, {}, r"'x_embedder.*' with 4 dimensions .* \(48, 4, 0, 0\)"),
        ({embed: torch.zeros(0, 4, 2, 2)}, {}, r"'x_embedder.*' with 4 dimensions .* \(0, 4, 2, 2\)"),
        ({embed: torch.zeros(48, 4, 2, 1)}, {}, r"square patches in .* \(48, 4, 2, 1\)"),
        ({table: torch.zeros(1, 0, 48)}, {}, r"'pos_embed' with 3 dimensions .* \(1, 0, 48\)"),
        ({table: weights[table].repeat(2, 1, 1)}, {}, "expected the fixed sin-cos table"),
        ({table: weights[table].int()}, {}, "expected the fixed sin-cos table"),
        ({"y_embedder.embedding_table.weight": torch.tensor(1.0)}, {}, "expected 'y_embedder.*' with 2 dimensions"),
        (
            {"blocks.999999999999.attn.proj.bias": torch.zeros(48)},
            {},
            "expected blocks numbered from 0, found 4 with gaps",
        ),
    ):
        torch.save({"ema": {**weights, **change}, "args": argparse.Namespace(**args)}, path)
        with pytest.raises(DitlabError, match=says):
            open_checkpoint(path, heads=None if "num_heads" in args else 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tables_of_every_dtype(weights, tmp_path, dtype):
    path = tmp_path / "dit.pt"
    torch.save({key: value.to(dtype) for key, value in weights.items()}, path)
    assert open_checkpoint(path, heads=4).denoiser.num_classes == 7
    for other in (weights["pos_embed"] * torch.nan, weights["pos_embed"] + 0.02):
        torch.save({key: value.to(dtype) for key, value in {**weights, "pos_embed": other}.items()}, path)
        with pytest.raises(DitlabError, match="expected the fixed sin-cos table"):
            open_checkpoint(path, heads=4)


@pytest.mark.goldens("01_dit_?")
def test_there_and_back(fixture, tmp_path):
    config = fixture.config
    torch.save(fixture.weights(), tmp_path / "one.pt")
    model = open_checkpoint(tmp_path / "one.pt", heads=config["num_heads"])
    objective = VPObjectiveConfig(variance=model.denoiser.variance)
    for name in ("two.pt", "two.safetensors"):
        write_original(model.denoiser.network, objective, tmp_path / name)
        back, _ = read_state(tmp_path / name)
        assert back.keys() == fixture.weights().keys()
        for key, value in fixture.weights().items():
            if key == "pos_embed":  # computed anew
                torch.testing.assert_close(back[key], value, rtol=0, atol=1e-6)
            else:
                assert torch.equal(back[key], value), key
    with pytest.raises(DitlabError, match="expected a new file, found something there"):
        write_original(model.denoiser.network, objective, tmp_path / "two.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.pt", "two.pt", "two.safetensors"]


def test_what_the_original_cannot_express():
    good = DiTConfig(image_size=(8, 8), width=16, depth=2, heads=2, num_classes=3, patch=2)
    for change, says in (
        ({"block": "adaln"}, "knows adaln-zero blocks only, this DiT has adaln blocks"),
        ({"attention": "3,g"}, r"knows global attention only, this DiT \(3,g\) has local windows in layers 1"),
        ({"image_size": (8, 4)}, "knows square images only, this DiT is for 8x4 pixels"),
        ({"num_classes": 0}, "knows class-conditional networks only"),
        ({"null_class": False}, "needs a row for the null class .*, this DiT's has none"),
        ({"time_frequencies": "diffusers"}, "this DiT has 'diffusers'"),
        ({"mlp_norm_eps": 1e-5}, "1e-05 before the MLP"),
    ):
        with pytest.raises(DitlabError, match=says):
            to_original(DiT(replace(good, **change)), VPObjectiveConfig())
    for objective in (VPObjectiveConfig(schedule="cosine"), VPObjectiveConfig(steps=500), EDMObjectiveConfig()):
        with pytest.raises(DitlabError, match="knows the linear schedule with 1000 steps and a predicted noise only"):
            to_original(DiT(good), objective)
