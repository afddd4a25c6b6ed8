"""Opens checkpoints of other codes: recognizes the network by its parameter names and builds its denoiser."""

from __future__ import annotations

from pathlib import Path

from ditlab.errors import DitlabError
from ditlab.interop.bias_free import build_bias_free, is_bias_free
from ditlab.interop.formats import UNetFile
from ditlab.interop.imported import ImportedModel
from ditlab.interop.improved_diffusion import build_unet, is_unet
from ditlab.interop.original_dit import build_dit, is_dit
from ditlab.interop.original_files import read_state


def open_checkpoint(
    path: Path, *, ema: bool = True, heads: int | None = None, unet: UNetFile | None = None
) -> ImportedModel:
    """Opens a checkpoint of the original DiT, of improved-diffusion's UNet, or of a published bias-free network.

    Args:
        path: a `.pt`, `.pth`, `.ckpt` or `.safetensors` file.
        ema: whether to read the averaged weights if the file has both.
        heads: number of attention heads, if the file does not say.
        unet: what else a file of improved-diffusion does not say.
    """
    state, args = read_state(path, ema=ema)
    if is_unet(state):
        return build_unet(path, state, args, heads=heads, settings=unet)
    if unet not in (None, UNetFile()):
        raise DitlabError(f"{path}: expected weights of improved-diffusion's UNet for settings of `unet`, found others")
    if is_dit(state):
        return build_dit(path, state, args, ema=ema, heads=heads)
    if is_bias_free(state):
        if heads is not None:
            raise DitlabError(f"{path}: expected no `heads` for a network without attention, found {heads}")
        return build_bias_free(path, state)
    raise DitlabError(
        f"{path}: expected weights of the original DiT, of improved-diffusion's UNet or of a bias-free CNN or UNet, "
        f"found another network's ('{next(iter(state))}')"
    )


__all__ = ["open_checkpoint"]
