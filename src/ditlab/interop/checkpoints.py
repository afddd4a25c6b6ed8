"""A file of weights that somebody else's code left, told by its names: which network it is, and that as a denoiser."""

from __future__ import annotations

from pathlib import Path

from ditlab.errors import DitlabError
from ditlab.interop.bias_free import bias_free_of, is_bias_free
from ditlab.interop.imported import ImportedModel
from ditlab.interop.improved_diffusion import UNetFile, is_unet, unet_of
from ditlab.interop.original_dit import dit_of, is_dit
from ditlab.interop.original_files import read_state


def open_checkpoint(
    path: Path, *, ema: bool = True, heads: int | None = None, unet: UNetFile | None = None
) -> ImportedModel:
    """A checkpoint of the original DiT, of improved-diffusion's UNet, or of a published bias-free network.

    Args:
        path: a `.pt`, `.pth`, `.ckpt` or `.safetensors` file; it is read once.
        ema: the averaged weights where the file has both.
        heads: number of attention heads where the file does not tell.
        unet: what else a file of improved-diffusion does not tell.

    Raises:
        DitlabError: it cannot be read safely or whole, is of none of these networks, or what is told does not apply.
    """
    state, args = read_state(path, ema=ema)
    if is_unet(state):
        return unet_of(path, state, args, heads=heads, told=unet)
    if unet not in (None, UNetFile()):
        raise DitlabError(f"{path}: expected weights of improved-diffusion's UNet with --unet flags, found others")
    if is_dit(state):
        return dit_of(path, state, args, ema=ema, heads=heads)
    if is_bias_free(state):
        if heads is not None:
            raise DitlabError(f"{path}: expected no --heads for a network without attention, found {heads}")
        return bias_free_of(path, state)
    raise DitlabError(
        f"{path}: expected weights of the original DiT, of improved-diffusion's UNet or of a bias-free CNN or UNet, "
        f"found another network's ('{next(iter(state))}')"
    )
