"""DiT, the diffusion transformer, with its four kinds of blocks, in pixel or latent space, with any attention pattern.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), section 3.2 and figure 3; widths, order of
chunks and initial values are those of its released code, against whose outputs the tests check adaLN-Zero. The other
three kinds were never released: they follow the paper's words, and their parameters and operations add up to the
paper's numbers. The pixel-space sizes and the local attention windows are those of An et al., "On Inductive Biases That
Enable Generalization of Diffusion Transformers" (figures 5 and 6).

The image is cut into patches, one token each. Time and label are embedded as one token each, too: the condition. A
block is attention and an MLP on normalized tokens, each added to what it was given; the four kinds differ in how the
condition enters (`ditlab.networks.dit_blocks`). The last Linear starts at zero, so a fresh network's output is zero.

An unconditional network has no label: its condition is the time token alone, and nothing stands in the label's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from ditlab.errors import DitlabError, unknown_name
from ditlab.networks.dit_blocks import BLOCKS, Block, BlockKind, FinalLayer, is_modulated
from ditlab.nn.attention import Pattern, check_fits, parse_plan
from ditlab.nn.embeddings import LabelEmbedding, Spacing, TimeEmbedding, position_table


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
    block: BlockKind = "adaln-zero"
    """How time and label enter a block: they regress its norms' shift and scale and its gates (adaln-zero), its norms'
    shift and scale (adaln), are attended to (cross-attention), or are tokens among the image's (in-context)."""
    affine: bool = True
    """Whether the norms of cross-attention and in-context blocks have a gain and a bias of their own: the ViT's
    standard; the paper does not say (inferred). The norms of the other two never have, for the condition sets them."""
    time_frequencies: Spacing = "original"
    """Frequencies of the time embedding: 10000^(-k/128), k < 128 (original), or 10000^(-k/127), as in diffusers."""
    mlp_norm_eps: float = 1e-6
    """Added to the variance in the norm before the MLP; diffusers' DiT has 1e-5 there, and 1e-6 in its other norms."""

    def __post_init__(self) -> None:
        """Refuses sizes that cannot be built, with a sentence."""
        where = "DiT config"
        for name, known in (("block", get_args(BlockKind)), ("time_frequencies", get_args(Spacing))):
            if getattr(self, name) not in known:
                raise unknown_name(f"{where} {name}", getattr(self, name), known)
        for name in ("channels", "patch", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise DitlabError(f"{where}: {name} must be at least 1, found {getattr(self, name)}")
        if self.mlp_norm_eps <= 0:
            raise DitlabError(f"{where}: mlp_norm_eps must be above 0, found {self.mlp_norm_eps}")
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

    @property
    def width_step(self) -> int:
        """What the width must be a multiple of."""
        return lcm(4, self.heads)  # the position table wants the one, the heads the other

    @property
    def condition_tokens(self) -> int:
        """Number of tokens of the condition: time and label, or time alone where there are no classes."""
        return 2 if self.num_classes else 1


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
        self.time = TimeEmbedding(width, spacing=config.time_frequencies)
        self.label = LabelEmbedding(config.num_classes, width, null=config.null_class) if config.num_classes else None
        # In-context conditioning: the condition's tokens stand behind the image's, see all and are seen by all.
        self.appended = config.condition_tokens if config.block == "in-context" else 0
        kind, hidden = BLOCKS[config.block], int(width * config.mlp_ratio)
        self.blocks = nn.ModuleList(
            kind(width, config.heads, hidden, config.grid, pattern, extra=self.appended, affine=config.affine)
            for pattern in config.patterns
        )
        for block in self.blocks:
            assert isinstance(block, Block)
            block.mlp_norm.eps = config.mlp_norm_eps
        outputs = patch * patch * self.outputs
        self.final = FinalLayer(width, outputs, modulated=is_modulated(config.block), affine=config.affine)
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
        """DiT's initial values: Xavier-uniform Linears, adaLN-Zero's modulation and the last Linear zero."""

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
            block.reset()
        self.final.reset()

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
        c = self.condition(t, self._null_label(x) if label is None else label)
        if self.appended:
            tokens = torch.cat([tokens, c.to(tokens.dtype)], dim=1)
        for block in self.blocks:
            tokens = block(tokens, c)
        if self.appended:
            tokens = tokens[:, : -self.appended]
        return self._unpatchify(self.final(tokens, c))

    def condition(self, t: Shaped[Tensor, " b"], label: Int[Tensor, " b"] | None) -> Float[Tensor, "b k d"]:
        """The condition's tokens `[B, K, D]`: the time's, then the label's where the network has classes."""
        time = self.time(t)
        if self.label is None:
            return time[:, None]
        return torch.stack([time, self.label(label)], dim=1)

    def _null_label(self, x: Tensor) -> Int[Tensor, " b"] | None:
        if self.label is None:
            return None
        if not self.config.null_class:
            raise DitlabError("DiT: this network has no null class, so every image needs a label; found none")
        return torch.full((x.shape[0],), self.config.num_classes, device=x.device)

    def _unpatchify(self, patches: Float[Tensor, "b t o"]) -> Float[Tensor, "b c h w"]:
        """`[B, T, patch * patch * C]`, channel fastest, to `[B, C, H, W]`."""
        rows, columns = self.config.grid
        patch = self.config.patch
        x = patches.reshape(-1, rows, columns, patch, patch, self.outputs)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.outputs, rows * patch, columns * patch)
