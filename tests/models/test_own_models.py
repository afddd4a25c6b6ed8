"""Models of a user's own code: a wrapped function, a network in memory, an object of a file or a module."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ditlab
from ditlab.errors import Incompatible, InvalidConfig, NotFound
from ditlab.models.comparing import open_models
from ditlab.models.external import ExternalModel
from ditlab.models.opening import open_model
from ditlab.models.split_config import SplitConfig

SHAPE = (3, 4, 4)


def half() -> ditlab.Denoiser:
    return ditlab.Denoiser.wrap(lambda y, sigma, label: 0.5 * y, shape=SHAPE)


def test_a_wrapped_function_has_the_split_of_a_run_with_the_same_settings(images, train, tmp_path):
    run = train(tmp_path / "run", seed=3)
    mine = ditlab.Model(half(), images, n=10, test=8, seed=3, name="mine", out=tmp_path / "mine")
    assert mine.split_record == run.split_record
    assert mine.split.train.tolist() == run.split.train.tolist()
    assert mine.split.test.tolist() == run.split.test.tolist()
    assert torch.equal(mine.batch("test", 5)[0], run.batch("test", 5)[0])
    assert mine.test_hash == run.test_hash
    assert mine.provenance().split_hash == run.provenance().split_hash
    other = ditlab.Model(half(), images, n=10, test=8, seed=4)
    assert other.split_record.hash != run.split_record.hash


def test_training_images_are_unknown_unless_they_are_stated(images, tmp_path):
    unknown = ditlab.Model(half(), images, n=10, test=8, seed=3)
    (note,) = unknown.notes
    assert "training images of this model are unknown: the 10 training and 8 test images" in note
    assert "(seed 3)" in note
    assert unknown.provenance().settings["notes"] == [note]
    assert ditlab.Model(half(), images, n=10, test=8, seed=3, own_split=True).notes == ()


def test_a_model_without_images_only_samples(images):
    model = ditlab.Model(half(), name="mine")
    assert model.notes == ()
    assert model.path.match("external/mine-????????")
    assert model.sample(seeds=range(2), steps=3).images.shape == (2, 4, 4, 3)
    assert model.provenance().n is None
    with pytest.raises(NotFound, match="model mine: training images unknown; pass an image set as `data`"):
        _ = model.images
    wide = ditlab.Denoiser.wrap(lambda y, sigma, label: y, shape=(3, 8, 8))
    with pytest.raises(Incompatible, match="model wide: expected images 3x8x8, found 3x4x4 in"):
        _ = ditlab.Model(wide, images, name="wide").images


def test_one_set_of_weights():
    model = ditlab.Model(half(), name="mine")
    with pytest.raises(NotFound, match=r"model mine: expected no `checkpoint`, .* found 3"):
        model.denoiser(step=3)
    with pytest.raises(NotFound, match="model mine: expected raw weights beside averaged ones"):
        model.denoiser(ema=False)


def test_weights_are_hashed_and_name_the_folder():
    def model(weight: float, **wrapped: object) -> ditlab.Model:
        network = torch.nn.Conv2d(3, 3, 1, bias=False)
        torch.nn.init.constant_(network.weight, weight)

        class Net(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = network

            def forward(self, y, sigma, label):
                return self.inner(y)

        return ditlab.Model(ditlab.Denoiser.wrap(Net(), shape=SHAPE, **wrapped), name="net")

    weights = [m.denoiser_and_provenance()[1].weights for m in (model(0.1), model(0.1), model(0.2))]
    assert weights[0] == weights[1] != weights[2]
    assert model(0.1, output="epsilon").denoiser_and_provenance()[1].weights != weights[0]
    assert model(0.1).path == Path(f"external/net-{weights[0][:8]}")
    assert ditlab.Model(half()).denoiser_and_provenance()[1].weights == ""


def test_a_diffusers_model_in_memory_equals_the_one_on_disk(diffusers_folder):
    diffusers = pytest.importorskip("diffusers")
    folder = diffusers_folder("unet")
    module = diffusers.UNet2DModel.from_pretrained(folder / "unet").requires_grad_(False)
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    mine = ditlab.Model.from_diffusers(module, scheduler, name="mine", out="results")
    disk = open_model(f"diffusers:{folder}")
    assert isinstance(mine, ExternalModel)
    assert (mine.name, mine.path) == ("mine", Path("results"))
    y = torch.randn(2, 3, 8, 8)
    for sigma in (0.05, 0.5, 5.0):
        assert torch.equal(mine.denoiser()(y, sigma), disk.denoiser()(y, sigma))
    assert mine.sampler == disk.sampler
    drawn = [m.sample(seeds=range(2), steps=3).images for m in (mine, disk)]
    assert drawn[0].tolist() == drawn[1].tolist()
    with pytest.raises(NotFound, match="expected raw weights beside averaged ones"):
        mine.denoiser(ema=False)


CODE = """
import torch

import ditlab

denoiser = ditlab.Denoiser.wrap(lambda y, sigma, label: 0.25 * y, shape=(3, 4, 4))
number = 3


class Net(torch.nn.Module):
    def forward(self, y, sigma, label):
        return 0.5 * y


net = Net()


def plain(y, sigma, label):
    return 0.75 * y


def make():
    return denoiser


def model():
    return ditlab.Model(denoiser, name="of-its-own")
"""


@pytest.fixture
def code(tmp_path, monkeypatch) -> Iterator[str]:
    """A file of a user's own, importable from the current folder under this name."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize("form", ["{}", "{}.py"])
def test_objects_of_a_users_code(code, images, form):
    place = form.format(code)
    y = torch.randn(2, *SHAPE)
    split = SplitConfig(n=10, test=8, split_seed=3, own_split=True)
    for name, factor in (("denoiser", 0.25), ("make", 0.25), ("net", 0.5), ("Net", 0.5), ("plain", 0.75)):
        model = open_model(f"{place}:{name}", images, split=split)
        assert torch.allclose(model.denoiser()(y, 0.3), factor * y), name
        assert (model.name, model.split_record.seed, model.notes) == (name, 3, ())
    own = open_model(f"{place}:model", out=Path("results"))
    assert own.name == "of-its-own"
    assert own.path.match("external/of-its-own-????????")
    assert open_model(f"{place}:denoiser", out=Path("results")).path.match("results/denoiser-????????")
    assert torch.equal(ditlab.load(f"{place}:denoiser")(y, 0.3), 0.25 * y)


def test_a_model_of_a_users_code_keeps_its_own_images(code, images):
    own = f"{code}.py:model"
    for name, value in (("data", images.path), ("split", SplitConfig(n=5))):
        with pytest.raises(InvalidConfig, match=f"`{name}`: expected None for the model of {own}, which has its own"):
            ditlab.open(own, **{name: value})  # pyright: ignore[reportArgumentType]
    assert ditlab.open(own, split=SplitConfig()).name == "of-its-own"


def test_names_that_do_not_exist(code, images):
    for source, error, says in (
        (f"{code}:nothing", NotFound, f"{code}:nothing: expected the name 'nothing' in {code}, found no such name"),
        (f"{code}.py:net.nothing", NotFound, "expected the name 'nothing' in"),
        ("no_such_module:net", NotFound, "no_such_module: expected a Python module, found none"),
        ("nowhere.py:net", NotFound, r"nowhere\.py: expected a Python file, found nothing"),
        (f"{code}:number", InvalidConfig, "expected a model, a denoiser or a network, found int"),
    ):
        with pytest.raises(error, match=says):
            open_model(source, images)
    for name in ("net", "plain"):
        with pytest.raises(InvalidConfig, match=r"the shape of its images is not known; give an image set as `data`"):
            open_model(f"{code}:{name}")


BROKEN = (
    ("net = (", "SyntaxError in .*broken.py, line 1: '\\(' was never closed"),
    ("\nimport no_such_package", "ModuleNotFoundError in .*broken.py, line 2: No module named 'no_such_package'"),
    ("def net():\n    return 1 / 0", "ZeroDivisionError in .*broken.py, line 2: division by zero"),
)


@pytest.mark.parametrize("source", ["broken.py:net", "broken:net"])
@pytest.mark.parametrize(("text", "sentence"), BROKEN, ids=["syntax", "import", "factory"])
def test_code_that_does_not_run_is_one_sentence(text, sentence, source, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(InvalidConfig, match=f"^broken.*: expected code that runs, found {sentence}$"):
        open_model(source)
    assert text.startswith("def") or "broken" not in sys.modules
    sys.modules.pop("broken", None)


def test_an_open_model_takes_no_other_images(images, tmp_path):
    mine = ditlab.Model(half(), images, n=10, test=8, out=tmp_path / "mine")
    for name, value in (("data", images.path), ("codec", "kl"), ("split", SplitConfig(n=5)), ("out", tmp_path)):
        with pytest.raises(InvalidConfig, match=f"`{name}`: expected None for a model that is open already, found "):
            ditlab.open(mine, **{name: value})  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidConfig, match="`data`: expected None"):
        ditlab.psnr_gap(mine, data=images.path)
    assert ditlab.open(mine) is mine


def test_models_without_images_may_stand_beside_others(images, tmp_path):
    mine = ditlab.Model(half(), images, n=10, test=8, name="mine", out=tmp_path / "mine")
    bare = ditlab.Model(half(), name="bare", out=tmp_path / "bare")
    assert open_models([mine, bare]).names == ("mine", "bare")
    assert open_models([bare, mine]).names == ("bare", "mine")


def test_one_text_is_one_name(images, tmp_path):
    models = [ditlab.Model(half(), images, n=10, test=8, name=name, out=tmp_path / name) for name in ("a", "b")]
    with pytest.raises(InvalidConfig, match="`names`: expected 2 names, one for each model, found 1"):
        open_models(models, names="ab")
    assert open_models(models[:1], names="ab").kinds == ("ab",)
