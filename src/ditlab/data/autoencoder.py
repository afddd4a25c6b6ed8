"""Autoencoders: between pictures and the images that a denoiser sees.

Denoisers of pixels have the identity, denoisers of latents a trained autoencoder (Rombach et al. 2022). An autoencoder
encodes pictures `[B, 3, H, W]` in [-1, 1] to the mean and, if it is variational, the standard deviation of latents z
`[B, c, h, w]`. A denoiser sees scaled latents, (z - shift) * scale: 0.18215 z for the autoencoders of Stable Diffusion
and DiT. `decode` takes scaled latents. Nothing is clipped.

A REF names an autoencoder: a hub id, such as stabilityai/sd-vae-ft-ema, or a folder of a diffusers AutoencoderKL or
AutoencoderTiny; or a folder, or the beginning of the paths, of a pair of files NAME_encoder and NAME_decoder
(.safetensors, .pth or .pt): a tiny autoencoder (ditlab.data.tiny_autoencoder).
"""

from __future__ import annotations

import hashlib
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ditlab.data.autoencoder_record import AutoencoderRecord
from ditlab.data.tiny_autoencoder import TinyAutoencoder
from ditlab.errors import DitlabError

Kind = Literal["auto", "kl", "tiny"]

PIXELS = 2**20
"""Pixels of the pictures that are decoded at once, at most, but for a larger picture: 16 pictures of 256x256."""

__all__ = ["PIXELS", "Autoencoder", "Identity", "Kind", "open_autoencoder", "reopen_autoencoder", "weights_hash"]

_SUFFIXES = (".safetensors", ".pth", ".pt")


class Autoencoder(ABC):
    """Turns pictures into latents and back, on one device, in batches."""

    record: AutoencoderRecord
    device: torch.device = torch.device("cpu")
    """The device that it computes on."""

    @abstractmethod
    def moments(self, pictures: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b k g v"], Tensor | None]:
        """Returns mean and standard deviation (None if there is none) of unscaled latents of pictures in [-1, 1]."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "n k g v"], batch: int = 64) -> Float[Tensor, "n c h w"]:
        """Returns pictures, float32 on the CPU, about [-1, 1] and not clipped, of scaled latents.

        Args:
            latents: scaled, as a denoiser sees them.
            batch: at most so many are decoded at once, and no more than `PIXELS` pixels, which bounds the memory.
        """

    def to(self, device: torch.device | str) -> Autoencoder:
        """Moves to a device; returns itself."""
        return self


class Identity(Autoencoder):
    """Does nothing: for denoisers of pixels."""

    def __init__(self, channels: int = 3) -> None:
        self.record = AutoencoderRecord("identity", "", "", "", channels, channels, 1, 1.0, 0.0)

    def moments(self, pictures: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], None]:
        """Returns its argument."""
        return pictures, None

    def decode(self, latents: Float[Tensor, "n c h w"], batch: int = 64) -> Float[Tensor, "n c h w"]:
        """Returns its argument."""
        return latents.float().cpu()


class _ModuleAutoencoder(Autoencoder):
    """An autoencoder with weights, on a device, in batches."""

    def __init__(self, module: nn.Module, record: AutoencoderRecord) -> None:
        self.module = module.eval().requires_grad_(False)
        self.record = record

    def to(self, device: torch.device | str) -> Autoencoder:
        self.module.to(device)
        self.device = torch.device(device)
        return self

    @torch.no_grad()
    def moments(self, pictures: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b k g v"], Tensor | None]:
        _, channels, height, width = pictures.shape
        self.record.latent_shape((channels, height, width))
        return self._encode(pictures.to(self.device))

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n k g v"], batch: int = 64) -> Float[Tensor, "n c h w"]:
        if latents.shape[1] != self.record.latent_channels:
            raise DitlabError(
                f"codec '{self.record.source}': expected latents of {self.record.latent_channels} channels, "
                f"found {latents.shape[1]}"
            )
        height, width = (side * self.record.factor for side in latents.shape[2:])
        batch = min(batch, max(1, PIXELS // (height * width)))
        z = latents.float() / self.record.scale + self.record.shift
        return torch.cat([self._decode(part.to(self.device)).float().cpu() for part in z.split(batch)])

    @abstractmethod
    def _encode(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]: ...

    @abstractmethod
    def _decode(self, z: Tensor) -> Tensor: ...


class _Diffusers(_ModuleAutoencoder):
    """diffusers' AutoencoderKL or AutoencoderTiny."""

    module: Any

    def _encode(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        encoded = self.module.encode(pictures)
        if self.record.variational:
            return encoded.latent_dist.mean, encoded.latent_dist.std
        return encoded.latents, None

    def _decode(self, z: Tensor) -> Tensor:
        return self.module.decode(z).sample


class _PlainTiny(_ModuleAutoencoder):
    """A tiny autoencoder of two state dicts; it works on [0, 1]."""

    module: TinyAutoencoder

    def _encode(self, pictures: Tensor) -> tuple[Tensor, None]:
        return self.module.encode((pictures + 1) / 2), None

    def _decode(self, z: Tensor) -> Tensor:
        return self.module.decode(z) * 2 - 1


def open_autoencoder(source: str | Path, kind: Kind = "auto") -> Autoencoder:
    """Loads the autoencoder that a REF names, on the CPU in float32.

    Args:
        source: see the module.
        kind: refuse any other kind than this; "auto" takes either.

    Raises:
        DitlabError: there is nothing of that name, it cannot be loaded, or it is another kind.
    """
    text = str(source)
    path = Path(text).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        codec = _diffusers(text, str(path), os.path.relpath(path.resolve()))
    elif (pair := _pair(path)) is not None:
        codec = _plain(text, *pair)
    elif path.exists() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        actual = "a folder with neither" if path.is_dir() else "a file" if path.exists() else "nothing there"
        raise DitlabError(
            f"codec '{text}': expected a folder with config.json (diffusers), a pair of files NAME_encoder and "
            f"NAME_decoder ({', '.join(_SUFFIXES)}), or a hub id OWNER/NAME, found {actual}"
        )
    else:
        codec = _diffusers(text, text, "")
    if kind not in ("auto", codec.record.kind):
        raise DitlabError(f"codec '{text}': expected the kind '{kind}', found '{codec.record.kind}'")
    return codec


def reopen_autoencoder(record: AutoencoderRecord, folder: Path, moved: str | Path | None = None) -> Autoencoder:
    """Loads the autoencoder of a record in a set's or run's folder, or from `moved`, and checks that it is the same."""
    if record.kind == "identity":
        return Identity(record.image_channels)
    if moved is not None:
        source = str(moved)
    elif record.place:
        # Its path from this folder, or else the user's path from here: the hash tells whether it is the same.
        places = (folder / record.place, Path(record.source).expanduser())
        source = next((str(place) for place in places if place.exists() or _pair(place) is not None), None)
        if source is None:
            raise DitlabError(
                f"codec '{record.source}': expected the autoencoder of {folder} at {places[0]}, found nothing there; "
                "pass its new place as `codec`"
            )
    else:
        source = record.source
    codec = open_autoencoder(source)
    if (wrong := record.difference(codec.record)) is not None:
        name, expected, actual = wrong
        raise DitlabError(
            f"codec '{source}': expected the autoencoder that {folder} was made with, with {name} {expected}, "
            f"found {actual}"
        )
    codec.record = record
    return codec


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 over names, shapes and float32 values of weights, sorted by name: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _diffusers(text: str, where: str, place: str) -> Autoencoder:
    """Loads an AutoencoderKL or AutoencoderTiny from a folder or the hub."""
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    except ImportError:
        raise DitlabError(f"codec '{text}': needs the package diffusers (pip install \"ditlab[diffusers]\")") from None
    known: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    loading = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        name = AutoencoderKL.load_config(where).get("_class_name")  # pyright: ignore[reportAttributeAccessIssue]
        module, info = known[name].from_pretrained(where, **loading) if name in known else (None, {})
    # Download layers, file systems and readers of weights raise types without a common base.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if place:
            raise DitlabError(f"codec '{text}': its files could not be read: {reason[:300]}") from None
        raise DitlabError(
            f"codec '{text}': the autoencoder is not complete in this machine's hub cache and could not be fetched "
            f"(fetch it where there is a network with `hf download {text}`, or give a local folder): {reason[:200]}"
        ) from None
    if module is None:
        raise DitlabError(f"codec '{text}': expected {' or '.join(known)} in its config.json, found {name}")
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:  # diffusers itself would continue with random values in their place
        raise DitlabError(f"codec '{text}': its weights and its config.json do not belong together, e.g. {wrong[0]}")
    config = module.config
    if getattr(config, "latents_mean", None) is not None or getattr(config, "latents_std", None) is not None:
        raise DitlabError(
            f"codec '{text}': expected one scale for all latent channels, found latents_mean and latents_std"
        )
    variational = name == "AutoencoderKL"
    stages = len(config.block_out_channels if variational else config.encoder_block_out_channels)
    record = AutoencoderRecord(
        kind="kl" if variational else "tiny",
        source=text,
        place=place,
        sha256=weights_hash(module.state_dict()),
        image_channels=config.in_channels,
        latent_channels=config.latent_channels,
        factor=2 ** (stages - 1),
        scale=float(config.scaling_factor),
        shift=float(config.shift_factor or 0.0),
    )
    return _Diffusers(module, record)


def _plain(text: str, encoder: Path, decoder: Path) -> Autoencoder:
    """Loads a tiny autoencoder from two files."""
    module = TinyAutoencoder(_read(encoder), _read(decoder), where=f"codec '{text}'")
    record = AutoencoderRecord(
        kind="tiny",
        source=text,
        place=os.path.relpath(Path(text).expanduser().resolve()),
        sha256=weights_hash(module.state_dict()),
        image_channels=module.image_channels,
        latent_channels=module.latent_channels,
        factor=module.factor,
        scale=1.0,
        shift=0.0,
    )
    return _PlainTiny(module, record)


def _pair(path: Path) -> tuple[Path, Path] | None:
    """Returns the files NAME_encoder and NAME_decoder in a folder, or whose paths begin with `path`; None if none."""
    folder, prefix = (path, "") if path.is_dir() else (path.parent, path.name)
    pairs: dict[str, tuple[Path, Path]] = {}
    for suffix in reversed(_SUFFIXES):
        for encoder in sorted(folder.glob(f"*encoder{suffix}")):
            name = encoder.name.removesuffix(f"encoder{suffix}")
            decoder = folder / f"{name}decoder{suffix}"
            if decoder.is_file() and (not prefix or name.rstrip("_") == prefix):
                pairs[name] = (encoder, decoder)
    if len(pairs) > 1:
        named = ", ".join(str(folder / name.rstrip("_")) for name in sorted(pairs))
        raise DitlabError(f"codec '{path}': expected one pair of an encoder and a decoder, found several: {named}")
    return next(iter(pairs.values()), None)


def _read(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from a file without running code in it."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DitlabError(
            f"{path}: expected a state dict of tensors alone, found a pickle that could run code or a damaged one, "
            "which is not opened; save it again as .safetensors where you trust it"
        ) from None
    except Exception as error:  # safetensors and torch's zip reader raise types of their own for damaged files.
        raise DitlabError(f"{path}: could not be read as weights: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(weights, dict):
        raise DitlabError(f"{path}: expected a state dict, found {type(weights).__name__}")
    return weights
