"""DiT, the diffusion transformer, with adaLN-Zero blocks, in pixel or latent space and with any attention pattern.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), section 3.2 and figure 3; widths, order of
chunks and initial values are those of its released code, against whose outputs the tests check this file. The
pixel-space sizes and the local attention windows are those of An et al., "On Inductive Biases That Enable
Generalization of Diffusion Transformers" (figures 5 and 6).

The image is cut into patches, one token each; a block is attention and an MLP on normalized tokens, whose shift, scale
and gate are regressed from the sum of the time and label embeddings. The gates start at zero, so a fresh block is the
identity and a fresh network's output is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from ditlab.errors import DitlabError
from ditlab.nn.attention import Pattern, SelfAttention, check_fits, parse_plan
from ditlab.nn.embeddings import LabelEmbedding, TimeEmbedding, position_table
from ditlab.nn.layers import MLP, modulate


@dataclass(frozen=True)
class DiTConfig:
    """Everything that fixes the shape of a DiT."""

    kind: Literal["dit"] = "dit"
    """Names this network in config.json."""
    image_size: tuple[int, int] = (32, 32)
    """Height and width of the image or latent, in pixels; each a multiple of the patch. 0 0 stands for those of an
    image set that is not known yet: such a config can be filled in, not built."""
    channels: int = 3
    """Channels of the image or latent."""
    patch: int = 1
    """Side of a square patch, in pixels: one token each."""
    width: int = 384
    """Channels of a token; a multiple of 4 and of the heads."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 6
    """Attention heads in a block."""
    mlp_ratio: float = 4.0
    """Hidden channels of the MLP, as a multiple of the width."""
    attention: str = "global"
    """Attention plan, one entry a layer ("3,5,7,g*9"), or a name: global, local, local-star, same-a, same-b,
    local-small, local-star-large, with @mix or @tail to place the windows elsewhere than in the first layers."""
    border: Literal["clip", "shift"] = "clip"
    """What a window does at the image's border: clip it (An et al.), or shift it inside (NATTEN)."""
    num_classes: int = 0
    """Number of classes; 0 makes the network unconditional, with no label table at all."""
    null_class: bool = True
    """Whether the label table has one more row that means "no class" (needed for label dropout and guidance)."""
    learn_sigma: bool = True
    """Whether the network has a second set of output channels, v, for the variance of the reverse step."""

    def __post_init__(self) -> None:
        """Refuses sizes that cannot be built, with a sentence."""
        where = "DiT config"
        for name in ("channels", "patch", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise DitlabError(f"{where}: {name} must be at least 1, found {getattr(self, name)}")
        if self.num_classes < 0:
            raise DitlabError(f"{where}: num_classes must be 0 (unconditional) or more, found {self.num_classes}")
        for side in self.image_size if self.sized else ():
            if side < 1 or side % self.patch:
                raise DitlabError(
                    f"{where}: image_size must be multiples of the patch {self.patch}, found {tuple(self.image_size)}"
                )
        if self.width % 4:
            raise DitlabError(f"{where}: width must be a multiple of 4 (position table), found {self.width}")
        if self.width % self.heads:
            raise DitlabError(f"{where}: width must be a multiple of the {self.heads} heads, found {self.width}")
        for pattern in self.patterns:  # reading the plan raises where it does not fit the depth
            if self.sized:
                check_fits(pattern, self.grid)

    @property
    def sized(self) -> bool:
        """Whether the image size is known."""
        return tuple(self.image_size) != (0, 0)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The attention pattern of each layer, first to last."""
        return parse_plan(self.attention, self.depth, self.border)


class Block(nn.Module):
    """One adaLN-Zero block (DiT figure 3, second from the left)."""

    def __init__(self, config: DiTConfig, pattern: Pattern) -> None:
        super().__init__()
        width = config.width
        self.attention_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(width, config.heads, config.grid, pattern)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Float[Tensor, "b t d"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b t d"]:
        """Tokens `[B, T, D]` and condition `[B, D]` to tokens."""
        regressed = self.modulation(nn.functional.silu(c)).chunk(6, dim=1)
        attention_shift, attention_scale, attention_gate, mlp_shift, mlp_scale, mlp_gate = regressed
        x = x + attention_gate[:, None] * self.attention(
            modulate(self.attention_norm(x), attention_shift, attention_scale)
        )
        return x + mlp_gate[:, None] * self.mlp(modulate(self.mlp_norm(x), mlp_shift, mlp_scale))


class FinalLayer(nn.Module):
    """Modulated norm and one Linear from a token to its patch of output pixels."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, outputs)

    def forward(self, x: Float[Tensor, "b t d"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b t o"]:
        """Tokens `[B, T, D]` and condition `[B, D]` to patches `[B, T, outputs]`."""
        shift, scale = self.modulation(nn.functional.silu(c)).chunk(2, dim=1)
        return self.out(modulate(self.norm(x), shift, scale))


class DiT(nn.Module):
    """The diffusion transformer.

    Example:
        >>> import torch
        >>> network = DiT(DiTConfig(image_size=(8, 8), width=64, depth=2, heads=2, attention="3,g"))
        >>> network(torch.zeros(1, 3, 8, 8), torch.zeros(1)).shape
        torch.Size([1, 6, 8, 8])
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        if not config.sized:
            raise DitlabError("DiT: expected a config with an image_size, found (0, 0), which stands for any")
        self.config = config
        width, patch = config.width, config.patch
        self.outputs = config.channels * (2 if config.learn_sigma else 1)
        self.embed = nn.Conv2d(config.channels, width, patch, stride=patch)
        self.register_buffer("positions", position_table(config.grid, width)[None], persistent=False)
        self.time = TimeEmbedding(width)
        self.label = LabelEmbedding(config.num_classes, width, null=config.null_class) if config.num_classes else None
        self.blocks = nn.ModuleList(Block(config, pattern) for pattern in config.patterns)
        self.final = FinalLayer(width, patch * patch * self.outputs)
        self.reset()

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the input."""
        return self.config.channels, *self.config.image_size

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 when unconditional. Label `num_classes` means "no class" where there is a null row."""
        return self.config.num_classes

    def reset(self) -> None:
        """DiT's initial values: Xavier-uniform Linears, all modulation and the last Linear zero."""

        def xavier(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        self.apply(xavier)
        # The patch embedding is a Linear in the shape of a convolution.
        nn.init.xavier_uniform_(self.embed.weight.view(self.config.width, -1))
        if self.embed.bias is not None:
            nn.init.zeros_(self.embed.bias)
        self.time.reset()
        if self.label is not None:
            self.label.reset()
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.final.modulation.weight)
        nn.init.zeros_(self.final.out.weight)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Shaped[Tensor, " b"],
        label: Int[Tensor, " b"] | None = None,
        *,
        augment: Tensor | None = None,
    ) -> Float[Tensor, "b o h w"]:
        """Runs the network.

        Args:
            x: noisy images `[B, C, H, W]`.
            t: time steps `[B]`, whole or fractional.
            label: classes `[B]`, or None for "no class". Ignored by an unconditional network.
            augment: not supported by this network; must be None.

        Returns:
            `[B, C, H, W]`, or `[B, 2C, H, W]` with learn_sigma: the prediction first, then v.

        Raises:
            DitlabError: for images of another shape than the config's, or no label where there is no null class.
        """
        if tuple(x.shape[1:]) != self.in_shape:
            raise DitlabError(f"DiT: expected images of shape {self.in_shape}, found {tuple(x.shape[1:])}")
        if augment is not None:
            raise DitlabError("DiT: augmentation labels are not supported by this network")
        # Contiguous, for torch 2.13's compiler gets the gradients of a block wrong (by per cents, on the CPU) where its
        # input is a transposed view.
        tokens = (self.embed(x).flatten(2).transpose(1, 2) + self.positions).contiguous()
        c = self.time(t)
        if self.label is not None:
            c = c + self.label(self._null_label(x) if label is None else label)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self._unpatchify(self.final(tokens, c))

    def _null_label(self, x: Tensor) -> Int[Tensor, " b"]:
        if not self.config.null_class:
            raise DitlabError("DiT: this network has no null class, so every image needs a label; found none")
        return torch.full((x.shape[0],), self.config.num_classes, device=x.device)

    def _unpatchify(self, patches: Float[Tensor, "b t o"]) -> Float[Tensor, "b c h w"]:
        """`[B, T, patch * patch * C]`, channel fastest, to `[B, C, H, W]`."""
        rows, columns = self.config.grid
        patch = self.config.patch
        x = patches.reshape(-1, rows, columns, patch, patch, self.outputs)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.outputs, rows * patch, columns * patch)
