"""Shared by all tests: shape checks at run time, one thread, the golden numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

# Every shape annotation of the package is checked while tests run (the hook must come before the first import).
install_import_hook("ditlab", "beartype.beartype")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

GOLDENS = Path(__file__).parent / "data" / "goldens"
SHARED = Path(__file__).parents[2] / "shared"


@dataclass(frozen=True)
class Golden:
    """Outputs of an original implementation: its config, notes, and tensors by key."""

    about: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def weights(self) -> dict[str, torch.Tensor]:
        """The original's state dict."""
        return {key.removeprefix("w."): value for key, value in self.tensors.items() if key.startswith("w.")}


@pytest.fixture(scope="session")
def golden():
    """`golden("01_dit_a")` reads a fixture."""

    def read(name: str) -> Golden:
        return Golden(json.loads((GOLDENS / f"{name}.json").read_text()), load_file(GOLDENS / f"{name}.safetensors"))

    return read


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
