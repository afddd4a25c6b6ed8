"""Presets, JSON both ways, and settings that do not fit together."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ditlab.config import (
    DataConfig,
    EvaluationConfig,
    RunConfig,
    RunRecord,
    SplitRecord,
    differences,
    fit_to_images,
    flat,
    from_json,
    read_record,
    to_json,
)
from ditlab.diffusion.guidance_config import GuidanceConfig
from ditlab.diffusion.objective_configs import BlindObjectiveConfig, EDMObjectiveConfig, VPObjectiveConfig
from ditlab.diffusion.samplers import DDIMConfig, HeunConfig
from ditlab.errors import DitlabError
from ditlab.networks.bf_cnn_config import BFCNNConfig
from ditlab.networks.bf_unet_config import BFUNetConfig
from ditlab.networks.dit import DiT
from ditlab.networks.dit_config import DiTConfig
from ditlab.presets import PRESETS, preset
from ditlab.training.config import TrainingConfig

SPLIT = SplitRecord(seed=1, train=20, test=10, imageset="a", family="b", hash="c")


def test_the_papers_presets():
    xs, s = preset("dit-xs/1"), preset("dit-s/1")
    assert (xs.network.depth, xs.network.width, xs.network.heads, xs.network.patch) == (12, 252, 4, 1)
    assert (s.network.depth, s.network.width, s.network.heads, s.network.patch) == (12, 384, 6, 1)
    assert (xs.training.lr, xs.training.ema, xs.training.steps) == (1e-4, 0.9999, 400_000)
    assert isinstance(xs.objective, VPObjectiveConfig)
    assert (xs.objective.schedule, xs.objective.steps, xs.objective.prediction) == ("linear", 1000, "epsilon")


def test_the_twelve_of_peebles_and_xie():
    shapes = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}
    for size, shape in shapes.items():
        for patch in (2, 4, 8):
            config = preset(f"dit-{size}/{patch}")
            network, training = config.network, config.training
            assert isinstance(network, DiTConfig)
            assert (network.depth, network.width, network.heads, network.patch) == (*shape, patch)
            assert (network.block, network.learn_sigma) == ("adaln-zero", True)
            assert (training.batch_size, training.lr, training.ema) == (256, 1e-4, 0.9999)
            assert (training.flip, training.steps) == (True, 400_000)
            twin = preset(f"dit-{size}/{patch}-edm")
            assert twin.training == training
            assert twin.network == replace(network, learn_sigma=False)


def test_the_other_families():
    an2024 = {"dit-s/1", "dit-xs/1", "dit-xs/2", "dit-xs/4", "dit-xs/8"}
    dits = {name: config for name, config in PRESETS.items() if name.startswith("dit-")}
    for name, config in dits.items():
        if name.startswith(("dit-nano", "dit-micro")):
            assert (config.training.batch_size, config.training.flip) == (32, False)
        elif name.removesuffix("-edm") in an2024:
            assert (config.training.batch_size, config.training.flip) == (64, False)
        else:
            assert (config.training.batch_size, config.training.flip) == (256, True)
    assert len(dits) == 2 * (3 * 4 + 4 + 3 * 3)


def test_kadkhodaies_recipe():
    config = preset("bf-unet")
    assert config.network == BFUNetConfig(width=64, blocks=3)
    assert config.objective == BlindObjectiveConfig(low=0.0, high=1.0, max_level=1.0)
    training = config.training
    # 1,000 epochs of 250,000 images, halved every 100, in batches of 512.
    assert (training.steps, training.lr_halve_every) == (1000 * 250_000 // 512, 100 * 250_000 // 512)
    assert (training.batch_size, training.lr, training.ema, training.weight_decay) == (512, 1e-3, 0.0, 0.0)
    for name in ("bf-unet", "bf-unet-nano", "bf-unet-micro", "bf-cnn", "bf-cnn-nano"):
        twin = preset(f"{name}-vp")
        assert twin.network == preset(name).network
        assert isinstance(twin.objective, VPObjectiveConfig)
        assert (twin.objective.variance, twin.objective.loss) == ("fixed-large", "mse")
        edm = preset(f"{name}-edm")
        assert (edm.network, edm.training) == (twin.network, twin.training)
        assert isinstance(edm.objective, EDMObjectiveConfig)
    assert preset("bf-cnn").objective == BlindObjectiveConfig(max_level=100 / 255)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name):
    config = preset(name)
    assert config.preset == name
    values = json.loads(json.dumps(to_json(config)))
    assert from_json(RunConfig, values, "here") == config
    assert isinstance(config.objective, EDMObjectiveConfig) == name.endswith("-edm")
    assert isinstance(config.sampler, HeunConfig) == (not isinstance(config.objective, VPObjectiveConfig))


def test_unknown_preset_names_the_nearest():
    with pytest.raises(DitlabError, match=r"unknown preset 'dit-sx/1' \(nearest: .*dit-xs/1"):
        preset("dit-sx/1")


def test_a_record_is_written_and_read(tmp_path):
    config = replace(preset("dit-nano/2"), data=DataConfig("../set", 20, 10, 1), sampler=DDIMConfig(steps="10"))
    record = RunRecord(config, SPLIT, "ditlab train", {"torch": "2"})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(record)))
    assert read_record(path) == record


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bogus": 1}, "unknown key 'bogus'"),
        ({"format": 2}, "its format is 2, this ditlab reads up to 1; a newer ditlab wrote it"),
        ({"format": None}, "expected a run's config.json with a 'format', found none"),
        ({"split": {"seed": 1}}, "'split.train': Field required"),
        ({"config": {"training": {"lrr": 1}}}, "unknown key 'config.training.lrr'"),
        ({"config": {"network": {"kind": "dit", "widht": 8}}}, "unknown key 'config.network.widht'"),
        ({"config": {"network": {"kind": "ditto"}}}, "'config.network': Input tag 'ditto'"),
        ({"config": {"training": {"betas": [0.9]}}}, "'config.training.betas.1': Field required"),
        ({"config": {"data": {"n": 0}}}, "data: n must be at least 1, found 0"),
        ({"config": {"training": {"steps": True}}}, "'config.training.steps': expected a number, found True"),
        (
            {"config": {"training": {"betas": [0.9, False]}}},
            "'config.training.betas.1': expected a number, found False",
        ),
    ],
)
def test_records_that_cannot_be_read(tmp_path, change, says):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**to_json(RunRecord(preset("dit-nano/1"), SPLIT)), **change}))
    with pytest.raises(DitlabError) as raised:
        read_record(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert says in str(raised.value)


@pytest.mark.parametrize("text", ["", "[1", "\x00"])
def test_files_that_are_not_json(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(DitlabError, match="expected JSON, found something else"):
        read_record(path)
    with pytest.raises(DitlabError, match=r"expected a run's config\.json, found nothing"):
        read_record(tmp_path / "none.json")


def test_settings_by_dotted_name():
    a = preset("dit-nano/1")
    b = replace(a, network=replace(a.network, attention="3*4"), training=replace(a.training, steps=7))
    assert differences(a, b) == {"network.attention": ("global", "3*4"), "training.steps": (5000, 7)}
    assert differences(a, a) == {}
    assert flat(a)["network.width"] == 64
    assert differences(a, preset("dit-nano/1-edm"))["objective.kind"] == ("vp", "edm")


def test_the_network_follows_the_images():
    config = fit_to_images(preset("dit-nano/2"), (1, 8, 12), 5)
    assert (config.network.image_size, config.network.channels, config.network.num_classes) == ((8, 12), 1, 0)
    conditional = replace(config, network=replace(config.network, num_classes=5))
    assert fit_to_images(conditional, (1, 8, 12), 5).network.num_classes == 5
    with pytest.raises(DitlabError, match=r"expected network\.num_classes 3 or 0, found 5"):
        fit_to_images(conditional, (1, 8, 12), 3)
    with pytest.raises(DitlabError, match=r"multiples of the patch 2, found \(9, 9\)"):
        fit_to_images(preset("dit-nano/2"), (3, 9, 9), 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"network": DiTConfig(learn_sigma=False)}, "'learned-range' needs network.learn_sigma True, found False"),
        ({"objective": VPObjectiveConfig(variance="fixed-small")}, "needs network.learn_sigma False, found True"),
        ({"objective": EDMObjectiveConfig()}, "the edm objective learns no variance"),
        ({"network": BFCNNConfig()}, "a bf-cnn network learns no variance"),
        ({"objective": BlindObjectiveConfig()}, "the blind objective learns no variance"),
        (
            {"network": DiTConfig(learn_sigma=False), "objective": BlindObjectiveConfig()},
            "no noise level, which a dit network needs; expected a bf-cnn or bf-unet network",
        ),
    ],
)
def test_parts_that_do_not_fit(changes, says):
    with pytest.raises(DitlabError, match=says):
        replace(RunConfig(), **changes)


def test_counts_that_cannot_be():
    for kind, change in ((DataConfig, {"n": 0}), (DataConfig, {"test": 0}), (EvaluationConfig, {"images": 0})):
        with pytest.raises(DitlabError, match="must be at least 1"):
            kind(**change)
    with pytest.raises(DitlabError, match="levels at least 0"):
        EvaluationConfig(levels=-1)
    with pytest.raises(DitlabError, match="keep must be at least 1"):
        TrainingConfig(keep=0)


def test_windows_larger_than_the_grid_are_refused():
    with pytest.raises(DitlabError, match="window 9: expected a size of at most 8 on a grid of 8x4 tokens, found 9"):
        DiTConfig(image_size=(8, 4), depth=2, attention="9,g")
    with pytest.raises(DitlabError, match="at most 4 on a grid of 4x4 tokens, found 5"):
        DiTConfig(image_size=(8, 8), patch=2, depth=2, attention="5,g")
    DiTConfig(image_size=(8, 4), depth=2, attention="7,g")


def test_a_config_without_a_size_yet_can_be_filled_in_and_not_built():
    config = DiTConfig(image_size=(0, 0), depth=2, attention="9,g", patch=3)
    assert replace(config, image_size=(27, 27)).grid == (9, 9)
    with pytest.raises(DitlabError, match="found 9"):
        replace(config, image_size=(6, 6))
    with pytest.raises(DitlabError, match="odd size"):
        DiTConfig(image_size=(0, 0), depth=2, attention="4,g")
    with pytest.raises(DitlabError, match="expected a config with an image_size"):
        DiT(config)


def test_dropped_labels_need_a_null_class():
    network = replace(preset("dit-nano/2").network, num_classes=10, null_class=False)
    with pytest.raises(DitlabError, match=r"expected objective.label_dropout 0 .* found 0.1"):
        RunConfig(network=network)
    assert RunConfig(network=network, objective=VPObjectiveConfig(label_dropout=0.0)).network == network


def test_a_preset_without_a_size_gets_classes_and_variance_with_it():
    """`--conditional --guidance.scale 2 --objective.variance fixed-small`: the network follows once images are known."""
    network = DiTConfig(image_size=(0, 0))
    objective = VPObjectiveConfig(variance="fixed-small", label_dropout=0.1)
    config = RunConfig(network=network, objective=objective, guidance=GuidanceConfig(scale=2.0))
    sized = replace(network, image_size=(8, 8), num_classes=5, learn_sigma=False)
    assert replace(config, network=sized).guidance.scale == 2.0
    with pytest.raises(DitlabError, match="expected a class-conditional network"):
        replace(config, network=replace(sized, num_classes=0))
    with pytest.raises(DitlabError, match=r"needs network\.learn_sigma False"):
        replace(config, network=replace(sized, learn_sigma=True))
