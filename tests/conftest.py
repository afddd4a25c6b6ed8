"""Shared by all tests: shape checks at run time, one thread, the golden numbers."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

# Every shape annotation of the package is checked while tests run (the hook must come before the first import). Modules
# without shapes are left to pyright: checking every call of theirs took a fifth of the suite's time.
SOURCE = Path(__file__).parents[1] / "src"
SHAPED = [
    ".".join(file.relative_to(SOURCE).with_suffix("").parts)
    for file in sorted((SOURCE / "ditlab").rglob("*.py"))
    if "from jaxtyping import" in file.read_text(encoding="utf-8")
]
install_import_hook(SHAPED, "beartype.beartype")

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

GOLDENS = Path(__file__).parent / "data" / "goldens"
SHARED = Path(__file__).parents[2] / "shared"


# ---- golden numbers: outputs of the original implementations, NAME.json beside NAME.safetensors ----
#
# Tests read shapes, settings, names of cases and tolerances from the fixture, so that `pytest -m golden --goldens=DIR`
# runs them on another set of the same form.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens",
        metavar="DIR",
        default=str(GOLDENS),
        help="folder of golden numbers, NAME.json and NAME.safetensors (default: tests/data/goldens)",
    )


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "golden: compares with golden numbers (set by itself on tests that read them)",
        "goldens(pattern, having=''): one case, `golden_name`, for each golden of such a name with a tensor of such a key",
        "golden_keys(name, pattern): one case, `golden_key`, for each tensor of a golden whose key matches the pattern",
    ):
        config.addinivalue_line("markers", line)
    folder = Path(config.invocation_params.dir, config.option.goldens).resolve()
    if not folder.is_dir():
        raise pytest.UsageError(f"--goldens: expected a folder, found none at {folder}")
    config.option.goldens = str(folder)  # absolute also for worker processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker("golden")


@dataclass(frozen=True)
class Golden:
    """Outputs of an original implementation: its JSON (config, mapping, tolerances, values) and tensors by key."""

    name: str
    about: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the original's code."""
        return self.about["config"]

    @property
    def values(self) -> Any:
        """Recorded numbers that are not tensors."""
        return self.about["values"]

    def weights(self) -> dict[str, torch.Tensor]:
        """The original's state dict."""
        return {key.removeprefix("w."): value for key, value in self.tensors.items() if key.startswith("w.")}

    def matches(self, pattern: str) -> list[re.Match[str]]:
        """Tensors whose whole key matches a regular expression."""
        return [match for key in self.tensors if (match := re.fullmatch(pattern, key))]

    def tolerance(self, key: str, place: int = 0) -> float:
        """The number at `place` in the sentence `tolerances[key]`: `1e-4` is at 1 in "1e-5 (forward), 1e-4 x max"."""
        return numbers(self.about["tolerances"][key])[place]

    def mapped(self, key: str) -> list[float]:
        """The numbers in the sentence `mapping[key]`."""
        return numbers(self.about["mapping"][key])


def numbers(sentence: str) -> list[float]:
    """The numbers of a sentence, without digits that belong to a word such as float32."""
    return [float(number) for number in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", sentence)]


def missing_golden(folder: Path, name: str) -> str | None:
    """Which file of a golden is not there, as a reason to skip."""
    path = folder / f"{name}.json"
    # Goldens without a list of tensors are a JSON alone.
    if path.is_file() and "tensors" in json.loads(path.read_text()):
        path = path.with_suffix(".safetensors")
    return None if path.is_file() else f"golden {path.name} is not in {folder}"


def read_golden(folder: Path, name: str) -> Golden:
    """Reads a golden, or skips the test where a file is missing."""
    if missing := missing_golden(folder, name):
        pytest.skip(missing)
    tensors = folder / f"{name}.safetensors"
    about = json.loads((folder / f"{name}.json").read_text())
    return Golden(name, about, load_file(tensors) if tensors.is_file() else {})


def golden_tensors(folder: Path, name: str) -> list[str]:
    """Keys of a golden's tensors, without reading them."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        return []
    with safe_open(path, "pt") as file:
        return list(file.keys())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = Path(metafunc.config.option.goldens)
    for argument, marker in (("golden_name", "goldens"), ("golden_key", "golden_keys")):
        if argument not in metafunc.fixturenames:
            continue
        mark = next(metafunc.definition.iter_markers(marker))
        if argument == "golden_name":
            cases = _matching_names(folder, *mark.args, **mark.kwargs)
            tensor = f" with a tensor {mark.kwargs['having']}" if mark.kwargs else ""
            missing = f"no golden {mark.args[0]}.json{tensor} in {folder}"
        else:
            name, pattern = mark.args
            cases = [key for key in golden_tensors(folder, name) if re.fullmatch(pattern, key)]
            missing = missing_golden(folder, name) or f"golden {name}.safetensors in {folder} has no tensor {pattern}"
        metafunc.parametrize(argument, sorted(cases) or [pytest.param("", marks=pytest.mark.skip(reason=missing))])


def _matching_names(folder: Path, pattern: str, having: str = "") -> list[str]:
    names = [path.stem for path in folder.glob("*.json") if fnmatch(path.stem, pattern)]
    return [name for name in names if not having or any(fnmatch(key, having) for key in golden_tensors(folder, name))]


@pytest.fixture(scope="session")
def golden(request) -> Callable[[str], Golden]:
    """`golden("01_dit_a")` reads a fixture from the folder of `--goldens`."""
    folder = Path(request.config.option.goldens)
    return lambda name: read_golden(folder, name)


@pytest.fixture(scope="session")
def committed_golden() -> Callable[[str], Golden]:
    """Reads a golden of this repository, whatever `--goldens` says: for tests of the mechanism itself."""
    return lambda name: read_golden(GOLDENS, name)


@pytest.fixture(scope="session")
def dit_config() -> Callable[..., Any]:
    """`dit_config(settings)` is the config of a DiT in ditlab's words; what is not set is the original's default."""
    from ditlab.networks.dit import DiTConfig

    def build(settings: Mapping[str, Any]) -> DiTConfig:
        side = settings.get("input_size", 32)
        return DiTConfig(
            image_size=(side, side),
            channels=settings.get("in_channels", 4),
            patch=settings.get("patch_size", 2),
            width=settings.get("hidden_size", 1152),
            depth=settings.get("depth", 28),
            heads=settings.get("num_heads", 16),
            mlp_ratio=settings.get("mlp_ratio", 4.0),
            num_classes=settings.get("num_classes", 1000),
            null_class=settings.get("class_dropout_prob", 0.1) > 0,
            learn_sigma=settings.get("learn_sigma", True),
        )

    return build


@pytest.fixture(scope="session")
def dit_of(dit_config) -> Callable[[Golden], Any]:
    """`dit_of(fixture)` is the DiT of a golden 01, with its weights, in evaluation mode."""
    from ditlab.interop.original_dit import from_original

    return lambda fixture: from_original(fixture.weights(), dit_config(fixture.config)).eval()


@pytest.fixture(scope="session")
def bf_unet_config() -> Callable[..., Any]:
    """`bf_unet_config(settings)` is the config of a bias-free UNet in ditlab's words."""
    from ditlab.networks.bf_unet import BFUNetConfig

    def build(settings: Mapping[str, Any]) -> BFUNetConfig:
        assert not settings["bias"]
        assert settings["padding"] == settings["kernel_size"] // 2
        return BFUNetConfig(
            image_size=tuple(settings["image"][1:]) if "image" in settings else (0, 0),
            channels=settings["num_channels"],
            width=settings["num_kernels"],
            blocks=settings["num_blocks"],
            encoder_convs=settings["num_enc_conv"],
            middle_convs=settings["num_mid_conv"],
            decoder_convs=settings["num_dec_conv"],
            kernel=settings["kernel_size"],
            pool_window=settings["pool_window"],
        )

    return build


@pytest.fixture(scope="session")
def bf_unet_of(bf_unet_config) -> Callable[[Golden], Any]:
    """`bf_unet_of(fixture)` is the bias-free UNet of a golden 04, with its weights, in evaluation mode."""
    from ditlab.networks.bf_unet import BFUNet

    def build(fixture: Golden):
        network = BFUNet(bf_unet_config(fixture.config))
        network.load_state_dict(fixture.weights())  # every name is the published one
        return network.eval()

    return build


@pytest.fixture(scope="session")
def original_frequencies() -> Callable[..., torch.Tensor]:
    """`original_frequencies(t, waves)`: the float32 frequencies on the machine that recorded these sinusoids.

    float32 `exp` differs in the last bit between processors. Of our frequency and its two neighbours, the one whose
    angles give the recorded cosines and sines is the one that was used there.
    """
    from ditlab.nn.embeddings import frequencies

    def recover(t: torch.Tensor, waves: torch.Tensor, spacing: str = "original") -> torch.Tensor:
        half = waves.shape[1] // 2
        ours = frequencies(half, spacing=spacing)
        up, down = torch.full_like(ours, 2.0), torch.zeros_like(ours)
        candidates = torch.stack([ours, ours.nextafter(up), ours.nextafter(down)])
        angles = (t.float()[:, None] * candidates[:, None]).double()  # candidate, step, frequency
        waves = waves.double()
        errors = (angles.cos() - waves[:, :half]).abs() + (angles.sin() - waves[:, half:]).abs()
        return candidates.gather(0, errors.sum(1).argmin(0)[None])[0]

    return recover


@pytest.fixture
def use_frequencies(monkeypatch, original_frequencies) -> Callable[..., None]:
    """`use_frequencies(fixture)`: networks use those of the fixture's machine, so that no tolerance needs slack."""
    from ditlab.nn import embeddings

    def use(fixture: Golden, key: str = "out.t_freq", spacing: str = "original") -> None:
        theirs = original_frequencies(fixture["in.t"], fixture[key], spacing)
        monkeypatch.setattr(embeddings, "frequencies", lambda *_, **__: theirs)

    return use


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared images and weights beside the checkout; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared folder beside the checkout")
    return SHARED


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def in_process(capsys, monkeypatch) -> Callable[..., Done]:
    """`in_process("train", ...)` runs a command line of ditlab in this process."""
    from ditlab.cli.main import main

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["ditlab", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, said.out, said.err)

    return run


@pytest.fixture
def notes() -> Any:
    """A reporter whose `sentences` are the notes that it was told."""
    from ditlab.progress import Reporter

    class Notes(Reporter):
        def __init__(self) -> None:
            self.sentences: list[str] = []

        def note(self, sentence: str) -> None:
            self.sentences.append(sentence)

    return Notes()


@pytest.fixture
def disk_of(tmp_path_factory) -> Iterator[Callable[[str], Path]]:
    """`disk_of("400k")` makes a disk of that size."""
    made: list[Path] = []

    def mount(size: str) -> Path:
        if sys.platform != "linux" or shutil.which("mount") is None:
            pytest.skip("a small disk needs Linux's tmpfs")
        folder = tmp_path_factory.mktemp("disk")
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """Draws that a test makes without a generator of its own are the same in every run, whatever ran before it."""
    torch.manual_seed(0)


TINY: dict[str, Any] = {
    "n": 20,
    "test": 20,
    "network.width": 16,
    "network.heads": 2,
    "network.depth": 2,
    "training.batch_size": 8,
    "training.log_every": 2,
    "training.eval_every": 3,
    "training.save_every": 2,
    "evaluation.images": 4,
    "evaluation.levels": 2,
    "device": "cpu",
    "threads": 1,
}
"""Settings of a run that is trained in a moment."""


class Place:
    """An image set and runs trained on it, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        import ditlab

        self.folder, self.images = folder, folder / "digits"
        self._copies = 0
        self._made: dict[str, dict[str, Any]] = {}
        ditlab.prepare("digits", size=8, out=self.images)

    def train(
        self, out: Path | str, *, preset: str = "dit-nano/1", images: Path | None = None, **settings: Any
    ) -> Path:
        """Trains a tiny run, of six steps where nothing else is said."""
        import ditlab

        ditlab.train(preset, images or self.images, out=out, **{**TINY, "training.steps": 6, **settings})
        return Path(out)

    def trained(self, name: str, **settings: Any) -> Path:
        """A trained run; not to be changed by a test."""
        assert self._made.setdefault(name, settings) == settings, f"two kinds of runs are called {name}"
        out = self.folder / "runs" / name
        return out if out.exists() else self.train(out, **settings)

    def words(self, out: Path, *more: object, preset: str = "dit-nano/1", steps: int = 6) -> list[str]:
        """The command line that trains the same."""
        words = ["train", preset, "--data", self.images, "--out", out, "--training.steps", steps]
        for name, value in TINY.items():
            words += [f"--{name.replace('_', '-')}", value]
        return [*map(str, words), *map(str, more)]

    def copy(self, run: Path) -> Path:
        """A copy of a run, at the same distance from its image set, that a test may damage."""
        self._copies += 1
        return shutil.copytree(run, self.folder / "runs" / f"copy{self._copies}")


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def plain(place) -> Path:
    """Six steps, unconditional, global attention; not to be changed."""
    return place.trained("plain")


@pytest.fixture
def conditional(place) -> Path:
    """Six steps, with classes; not to be changed."""
    return place.trained("conditional", conditional=True)


@pytest.fixture
def contents() -> Callable[[Path], dict[str, str]]:
    """`contents(folder)` has every file and folder below a folder, hidden ones too, and what is in it."""

    def read(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in folder.rglob("*")
        }

    return read


@pytest.fixture
def refused(place, contents, tmp_path, monkeypatch) -> Callable[..., str]:
    """`refused(ditlab.sample, run, steps=0)` checks that a call raises one sentence and not a byte is written."""
    from ditlab.errors import DitlabError

    monkeypatch.chdir(tmp_path)

    def run(call: Callable[..., Any], *arguments: Any, **settings: Any) -> str:
        before = contents(place.folder), contents(tmp_path)
        with pytest.raises(DitlabError) as caught:
            call(*arguments, **settings)
        assert (contents(place.folder), contents(tmp_path)) == before
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


_TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (4, 8, 8),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 4,
}
_TINY_DIT = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "out_channels": 6,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_embeds_ada_norm": 10,
}


@pytest.fixture
def diffusers_folder(tmp_path) -> Callable[..., Path]:
    """`diffusers_folder("unet")` saves a tiny random model of diffusers with its scheduler, as a pipeline's folder.

    A "dit" has equal embedders in all blocks. Keywords change the model's config, `scheduler` is its scheduler.
    """
    import diffusers

    def make(kind: str, name: str = "model", *, scheduler: Any = None, **settings: Any) -> Path:
        folder = tmp_path / name
        if kind == "unet":
            model, part = diffusers.UNet2DModel(**{**_TINY_UNET, **settings}), "unet"
        else:
            model, part = diffusers.DiTTransformer2DModel(**{**_TINY_DIT, **settings}), "transformer"
        with torch.no_grad():
            for value in model.parameters():  # nothing may hide behind weights that start at zero or one
                value.add_(0.02 * torch.randn_like(value))
        if kind != "unet":
            for block in model.transformer_blocks:
                block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
        model.save_pretrained(folder / part)
        (scheduler or diffusers.DDPMScheduler(variance_type="fixed_large")).save_pretrained(folder / "scheduler")
        return folder

    return make


def _conv(
    weights: dict[str, torch.Tensor], name: str, into: int, out: int, *, bias: bool = True, side: int = 3
) -> None:
    generator = torch.Generator().manual_seed(len(weights))
    spread = (into * side * side) ** -0.5
    weights[f"{name}.weight"] = torch.randn(out, into, side, side, generator=generator) * spread
    if bias:
        weights[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1


def _block(weights: dict[str, torch.Tensor], name: str, into: int, out: int, *, pool: bool = False) -> None:
    for place, start in (("conv.0", into), ("conv.2", out), ("conv.4", out)):
        _conv(weights, f"{name}.{place}", start, out)
    if into != out:
        _conv(weights, f"{name}.skip", into, out, bias=False, side=1)
    if pool:
        _conv(weights, f"{name}.pool.0", into, 4 * into, bias=False, side=1)
        weights[f"{name}.pool.1.weight"] = torch.linspace(0.5, 1.5, 4 * into)
        weights[f"{name}.pool.1.bias"] = torch.linspace(-0.5, 0.5, 4 * into)
        _conv(weights, f"{name}.pool.3", 4 * into, into, bias=False, side=1)


def tiny_weights(latents: int = 4) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """State dicts of an encoder and a decoder in the manner of TAESD: factor 2, with a skip and a branch."""
    encoder: dict[str, torch.Tensor] = {}
    _conv(encoder, "0", 3, 8)
    _block(encoder, "1", 8, 8)
    _conv(encoder, "2", 8, 8, bias=False)
    _block(encoder, "3", 8, 12, pool=True)
    _conv(encoder, "4", 12, latents)
    decoder: dict[str, torch.Tensor] = {}
    _conv(decoder, "1", latents, 12)
    _block(decoder, "3", 12, 8, pool=True)
    _conv(decoder, "5", 8, 8, bias=False)
    _block(decoder, "6", 8, 8)
    _conv(decoder, "7", 8, 3)
    return encoder, decoder


@pytest.fixture(scope="session")
def write_pair() -> Callable[..., Path]:
    """`write_pair(folder, name="tiny", latents=4)` writes NAME_encoder.pth and NAME_decoder.pth; gives the folder."""

    def write(folder: Path, name: str = "tiny", latents: int = 4) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for part, weights in zip(("encoder", "decoder"), tiny_weights(latents), strict=True):
            torch.save(weights, folder / f"{name}_{part}.pth")
        return folder

    return write


@pytest.fixture(scope="session")
def write_kl() -> Callable[..., Path]:
    """`write_kl(folder, ...)` writes a random AutoencoderKL of factor 2 in diffusers' format; gives the folder."""

    def write(folder: Path, **changes: object) -> Path:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        torch.manual_seed(0)
        settings = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (4, 8),
            "norm_num_groups": 4,
            "sample_size": 8,
            **changes,
        }
        AutoencoderKL(**settings).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
        return folder

    return write
