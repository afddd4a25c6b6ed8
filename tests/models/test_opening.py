"""References to trained networks of every kind, and models that are not runs."""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ditlab
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.psnr_gap.measure import measure_gap as psnr_gap
from ditlab.data.autoencoder import open_autoencoder
from ditlab.data.encode import LatentEncoder
from ditlab.data.imageset import ImageSet
from ditlab.data.preparing import prepare
from ditlab.diffusion.objectives import VPObjectiveConfig
from ditlab.errors import DitlabError
from ditlab.interop.checkpoints import open_checkpoint
from ditlab.interop.converted import open_converted, write_converted
from ditlab.interop.diffusers_dit import convert_diffusers
from ditlab.interop.original_dit import to_original, write_original
from ditlab.models.external import ExternalModel
from ditlab.models.opening import load, open_model
from ditlab.models.run import Run
from ditlab.models.split_config import SplitConfig
from ditlab.networks.dit import DiT, DiTConfig
from ditlab.presets import preset


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """Sets of 30 images: without labels, and of 10 and of 3 classes."""
    folder, made = tmp_path_factory.mktemp("sets"), {}
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    for classes in (0, 3, 10):
        labels = {"labels": np.arange(30) % classes} if classes else {}
        np.savez(folder / f"{classes}.npz", images=pixels, **labels)
        made[str(classes)] = prepare(f"array:{folder / f'{classes}.npz'}", folder / f"set{classes}", size=8).path
    return made


@pytest.fixture
def original(tmp_path) -> Path:
    """An original checkpoint of pixels, with random weights."""
    network = DiT(DiTConfig(image_size=(8, 8), patch=2, width=384, depth=1, heads=6, num_classes=10))
    for value in network.parameters():
        torch.nn.init.normal_(value, std=0.02)
    write_original(network, VPObjectiveConfig(), tmp_path / "dit.safetensors")
    return tmp_path / "dit.safetensors"


def same(a, b) -> bool:
    y, label = torch.randn(2, *a.shape), torch.tensor([0, 1]) if a.num_classes else None
    return torch.equal(a(y, 0.5, label), b(y, 0.5, label))


def test_every_reference_is_a_denoiser(diffusers_folder, original, tmp_path):
    unet, dit = diffusers_folder("unet", "unet"), diffusers_folder("dit", "dit")
    model, _ = convert_diffusers(str(dit))
    write_converted(model, tmp_path / "converted")
    for reference in (f"diffusers:{unet}", f"diffusers:{dit}", original, str(original), tmp_path / "converted"):
        denoiser = ditlab.load(reference)
        assert isinstance(denoiser, ditlab.Denoiser)
        assert denoiser.shape == (3, 8, 8)
        assert denoiser(torch.randn(1, 3, 8, 8), 0.5).isfinite().all()
    assert same(ditlab.load(original), open_checkpoint(original).denoiser)
    assert same(ditlab.load(tmp_path / "converted"), model.denoiser)
    (unet / "model_index.json").write_text("{}")
    with pytest.raises(DitlabError, match=f"found a diffusers model; name it diffusers:{unet}"):
        ditlab.load(unet)
    with pytest.raises(DitlabError, match=r"none\.pt: expected a checkpoint, found nothing"):
        ditlab.load(tmp_path / "none.pt")


def test_steps_and_raw_weights_that_are_not_there(diffusers_folder):
    reference = f"diffusers:{diffusers_folder('unet')}"
    with pytest.raises(DitlabError, match="expected no `checkpoint`, for it has one set of weights, found 3"):
        load(reference, step=3)
    with pytest.raises(DitlabError, match="expected raw weights beside averaged ones, found one set only"):
        load(reference, ema=False)


def test_raw_weights_of_a_training_checkpoint(original, tmp_path):
    state = {key: value.clone() for key, value in open_state(original).items()}
    raw = {key: value if key == "pos_embed" else value * 1.1 for key, value in state.items()}
    torch.save({"model": raw, "ema": state}, tmp_path / "both.pt")
    averaged, last = load(tmp_path / "both.pt"), load(tmp_path / "both.pt", ema=False)
    assert same(averaged, load(original))
    assert not same(averaged, last)


def open_state(path):
    from safetensors.torch import load_file

    return load_file(path)


def test_results_go_to_a_folder_of_the_users_own(diffusers_folder, original, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unet = open_model(f"diffusers:{diffusers_folder('unet', 'unet')}")
    assert isinstance(unet, ExternalModel)
    assert unet.path == Path(f"external/unet-{unet.model.digest[:8]}")
    digest = sha256(original.read_bytes()).hexdigest()[:8]
    assert open_model(original).path == Path(f"external/dit-{digest}")
    assert open_model(original, out=Path("out")).path == Path(f"out/dit-{digest}")
    other = tmp_path / "other" / original.name  # of the same name, so the same folder it must not be
    write_original(open_checkpoint(original).denoiser.network.requires_grad_(True), VPObjectiveConfig(), other)
    assert open_model(other).path == Path(f"external/dit-{digest}")
    weights = {key: value + (key != "pos_embed") * 0.1 for key, value in open_state(original).items()}
    save_file(weights, other)
    assert open_model(other).path.name not in ("dit", f"dit-{digest}")
    write_converted(open_checkpoint(original), tmp_path / "converted")
    assert open_model("converted", out=Path("out")).path == Path("converted")


def test_images_are_asked_for_only_where_they_are_needed(original, sets):
    model = open_model(original)
    assert isinstance(model, ExternalModel)
    assert model.denoiser_and_provenance()[1].n is None
    assert model.settings["network.width"] == 384
    with pytest.raises(DitlabError, match="model dit: training images unknown; pass an image set as `data`"):
        _ = model.images


def test_a_split_that_is_not_its_own(original, sets):
    model = open_model(original, sets["10"], split=SplitConfig(n=10, test=5, split_seed=3))
    record = model.split_record
    assert (record.train, record.test, record.seed) == (10, 5, 3)
    assert not set(model.split.train) & set(model.split.test)
    (note,) = model.notes
    assert "The training images of this model are unknown: the 10 training and 5 test images" in note
    denoiser, about = model.denoiser_and_provenance(label="kind")
    assert (about.n, about.seed, about.step, about.split_hash) == (10, 3, None, record.hash)
    assert about.settings["notes"] == [note]
    assert about.settings["model"]["format"] == "original DiT"
    assert open_model(original, sets["10"], split=SplitConfig(test=5, own_split=True)).notes == ()
    assert open_model(original, sets["10"], split=SplitConfig(test=5)).split_record.train == 25
    (train, labels), (test, _) = model.batch("train", 4), model.batch("test", 4)
    result = psnr_gap(denoiser, train, test, PSNRConfig(images=4, points=3), about=about, train_labels=labels)
    assert type(result).from_json(result.to_json(), {"train_mse": result.train_mse, "test_mse": result.test_mse})


def test_labels_where_the_classes_are_as_many(original, sets):
    assert open_model(original, sets["10"], split=SplitConfig(test=5)).batch("test", 3)[1] is not None
    for name, words in (("3", "has 10 classes and the set 3"), ("0", "has 10 classes and the set none")):
        model = open_model(original, sets[name], split=SplitConfig(test=5))
        assert model.batch("test", 3)[1] is None
        assert words in model.notes[1]


def test_classes_that_a_model_cannot_do_without(diffusers_folder, sets):
    reference = f"diffusers:{diffusers_folder('unet', num_class_embeds=10)}"
    split = SplitConfig(test=5)
    assert open_model(reference, sets["10"], split=split).batch("test", 3)[1] is not None
    for name, found in (("3", "3 classes"), ("0", "no classes")):
        with pytest.raises(DitlabError, match=f"expected images of its 10 classes, .* found {found} in"):
            open_model(reference, sets[name], split=split).batch("test", 3)


def test_images_of_another_size(diffusers_folder, sets):
    for changes, words in (({"sample_size": 16}, "3x16x16"), ({"in_channels": 4, "out_channels": 8}, "4x8x8")):
        reference = f"diffusers:{diffusers_folder('dit', **changes)}"
        with pytest.raises(DitlabError, match=f"model model: expected images {words}, found 3x8x8 in"):
            _ = open_model(reference, sets["0"]).split_record


def test_latents_without_an_autoencoder(diffusers_folder):
    model = open_model(f"diffusers:{diffusers_folder('dit', in_channels=4, out_channels=8)}")
    assert not model.denoiser().pixel_space
    with pytest.raises(
        DitlabError, match=r"so they are latents, and no autoencoder is stored with it .* give one as `codec`"
    ):
        model.decode(torch.zeros(1, 4, 8, 8))


def test_latents_with_the_autoencoder_of_the_pipeline(diffusers_folder):
    diffusers = pytest.importorskip("diffusers")
    folder = diffusers_folder("dit", in_channels=4, out_channels=8)
    autoencoder = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    autoencoder.save_pretrained(folder / "vae")
    model = open_model(f"diffusers:{folder}")
    assert not model.denoiser().pixel_space
    assert model.decode(torch.randn(2, 4, 8, 8)).shape == (2, 3, 16, 16)
    # It goes with a converted model.
    write_converted(convert_diffusers(str(folder))[0], folder.parent / "converted")
    shutil.rmtree(folder)
    assert open_model(folder.parent / "converted").decode(torch.randn(1, 4, 8, 8)).shape == (1, 3, 16, 16)


@pytest.fixture(scope="module")
def latents(sets, tmp_path_factory, write_kl):
    """Sets of latents of autoencoders of factor 2, with 4 channels: one, one of another scale, one of other weights."""
    folder = tmp_path_factory.mktemp("latents")
    pictures = ImageSet.open(sets["0"])
    for name, changes in (("one", {}), ("scale", {"scaling_factor": 0.5}), ("weights", {})):
        place = write_kl(folder / f"{name}-kl", **changes)
        if name == "weights":
            state = open_state(place / "diffusion_pytorch_model.safetensors")
            save_file(
                {key: 1.1 * value for key, value in state.items()},
                place / "diffusion_pytorch_model.safetensors",
                metadata={"format": "pt"},
            )
        work = LatentEncoder(pictures, folder / name, open_autoencoder(place))
        with work.locked():
            work.encode()
            work.finish()
    return folder


def test_latents_of_another_autoencoder(diffusers_folder, latents, sets):
    folder = diffusers_folder("dit", sample_size=4, in_channels=4, out_channels=8)
    shutil.copytree(latents / "one-kl", folder / "vae")
    reference, split = f"diffusers:{folder}", SplitConfig(test=5, own_split=True)
    model = open_model(reference, latents / "one", split=split)
    assert model.images.shape == (4, 4, 4)
    assert not any("autoencoder" in note for note in model.notes)
    for name, words in (("scale", r"with scale 0\.18215, found .* with scale 0\.5"), ("weights", "with sha256 ")):
        with pytest.raises(DitlabError, match=f"expected latents of its own autoencoder .*{words}"):
            _ = open_model(reference, latents / name, split=split).images
    # The same where the user names it; and without any, the set's own is taken, with a note.
    shutil.rmtree(folder / "vae")
    with pytest.raises(DitlabError, match="expected latents of its own autoencoder"):
        _ = open_model(reference, latents / "scale", codec=latents / "one-kl", split=split).images
    model = open_model(reference, latents / "scale", split=split)
    assert "No autoencoder is stored with this model" in model.notes[-1]
    assert "(scale 0.5, shift 0)" in model.notes[-1]
    assert model.codec.record.scale == 0.5
    assert not model.denoiser().pixel_space


def test_pixels_for_a_model_of_latents(diffusers_folder, latents, sets):
    reference = f"diffusers:{diffusers_folder('dit')}"  # of 3x8x8, as are the pictures
    with pytest.raises(DitlabError, match=r"expected latents of the autoencoder .*, found pixels in .*data encode"):
        _ = open_model(reference, sets["0"], codec=latents / "one-kl").images


def test_notes_of_the_model_go_along(tmp_path, sets):
    network = DiT(DiTConfig(image_size=(8, 8), patch=2, width=384, depth=1, heads=6, num_classes=10))
    save_file(to_original(network, VPObjectiveConfig()), tmp_path / "bare.safetensors")
    split = SplitConfig(test=5, own_split=True)
    (note,) = open_model(tmp_path / "bare.safetensors", sets["10"], split=split).notes
    assert "does not say how many attention heads" in note
    write_converted(open_checkpoint(tmp_path / "bare.safetensors"), tmp_path / "converted")
    assert open_model(tmp_path / "converted", sets["10"], split=split).notes == (note,)


def test_a_converted_models_folder(original, tmp_path):
    out = tmp_path / "converted"
    write_converted(open_checkpoint(original), out)
    assert sorted(path.name for path in out.iterdir()) == ["model.json", "model.safetensors"]
    model = open_converted(out)
    assert (model.name, model.source["file"]) == ("converted", "dit.safetensors")
    with pytest.raises(DitlabError, match="expected a new folder, found something there"):
        write_converted(open_checkpoint(original), out)
    weights, record = out / "model.safetensors", out / "model.json"
    whole, text = weights.read_bytes(), record.read_text()
    weights.write_bytes(whole[:-8])
    with pytest.raises(DitlabError, match="expected a whole safetensors file"):
        open_converted(out)
    weights.write_bytes(whole[:-4] + bytes(4))
    with pytest.raises(DitlabError, match=r"its SHA-256 is not the one in model\.json"):
        open_converted(out)
    weights.write_bytes(whole)
    for content, says in (
        ("{", "expected a converted model's record as JSON"),
        ("[]", "with a 'format', found none"),
        (text.replace('"format": 1', '"format": 2'), "its format is 2, this ditlab reads up to 1"),
        (text.replace('"depth": 1', '"depth": 2'), "are these another network's weights"),
        (text.replace('"depth"', '"depths"'), r"unknown key 'network\.depths'"),
    ):
        record.write_text(content)
        with pytest.raises(DitlabError, match=says):
            open_converted(out)


def fetched(monkeypatch, folder: Path) -> list:
    """The hub, which has this folder under every name."""
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def fetch(repo, *, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    return asked


def test_models_on_the_hub(diffusers_folder, original, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_converted(open_checkpoint(original), tmp_path / "converted")
    asked = fetched(monkeypatch, tmp_path / "converted")
    model = open_model("hub:me/mine")
    assert isinstance(model, ExternalModel)
    assert (model.name, model.path) == ("me--mine", Path(f"external/me--mine-{model.model.digest[:8]}"))
    assert asked == [("me/mine", ["*.json"]), ("me/mine", None)]
    assert same(model.denoiser(), load(tmp_path / "converted"))
    unet = diffusers_folder("unet", "unet")
    asked = fetched(monkeypatch, unet)
    assert same(load("hub:me/unet"), load(f"diffusers:{unet}"))
    assert ("me/unet", ["*.json", "*.safetensors"]) in asked


def test_a_run_on_the_hub(sets, tmp_path, monkeypatch):
    from dataclasses import replace

    from ditlab.models.creating import start, train_run
    from ditlab.training.distributed import DistributedContext

    monkeypatch.chdir(tmp_path)
    images, recipe = ImageSet.open(sets["0"]), preset("dit-nano/2")
    config = replace(
        recipe,
        data=replace(recipe.data, n=10, test=5),
        network=replace(recipe.network, image_size=(8, 8), width=16, depth=1),
        training=replace(recipe.training, steps=2, batch_size=2, save_every=1, eval_every=0),
    )
    cpu = torch.device("cpu")
    run = start(tmp_path / "run", config, images, device=cpu)
    train_run(run, DistributedContext(0, 1, cpu))
    home = shutil.move(tmp_path / "run", tmp_path / "cache" / "elsewhere")
    fetched(monkeypatch, Path(home))
    found = open_model("hub:me/mine", sets["0"])
    assert isinstance(found, Run)
    assert (found.name, found.path, found.newest_step) == ("me--mine", Path("external/me--mine"), 2)
    assert found.log
    assert same(found.denoiser(), load(home))
    assert len(found.batch("test", 5)[0]) == 5
    # One of its checkpoints stands for the run.
    first = open_model(Path(home) / "checkpoints" / "000000001", sets["0"])
    assert (first.newest_step, first.denoiser_and_provenance()[1].step) == (1, 1)
    assert not same(first.denoiser(), found.denoiser())
