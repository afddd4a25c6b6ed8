"""DiT, the diffusion transformer: four kinds of blocks, pixel or latent space, any attention pattern.

Sources:
- Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), section 3.2 and figure 3. Widths, order of chunks
  and initial values are those of its released code; tests compare adaLN-Zero with that code's outputs. The other three
  kinds were never released; they follow the paper's text and match its numbers of parameters and operations.
- An et al., "On Inductive Biases That Enable Generalization of Diffusion Transformers", figures 5 and 6: the
  pixel-space sizes and the local attention windows.

The image is cut into patches, one token each. Time and label are embedded as one token each; together they are the
condition. A block is self-attention and an MLP, both on normalized tokens and with a residual connection; the four
kinds differ in how the condition enters (`ditlab.networks.dit_blocks`). The last Linear starts at zero, so a new
network's output is zero. The condition of an unconditional network is the time token only.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from ditlab.errors import DitlabError, unknown_name
from ditlab.networks.base import NetworkConfig, register
from ditlab.networks.dit_blocks import BLOCKS, Block, BlockKind, FinalLayer, is_modulated
from ditlab.nn.attention import Pattern, check_fits, parse_plan
from ditlab.nn.embeddings import LabelEmbedding, Spacing, TimeEmbedding, position_table


@dataclass(frozen=True)
class DiTConfig(NetworkConfig):
    """Settings that determine the shape of a DiT."""

    takes_labels: ClassVar[bool] = True
    can_learn_variance: ClassVar[bool] = True
    takes_attention_plan: ClassVar[bool] = True

    kind: Literal["dit"] = "dit"
    """Name of this network in config.json."""
    image_size: tuple[int, int] = (32, 32)
    """Height and width of the image or latent in pixels, multiples of the patch. 0 0 means not known yet: such a config
    can be changed, not built."""
    channels: int = 3
    """Channels of the image or latent."""
    patch: int = 1
    """Side of a square patch in pixels; each patch is one token."""
    width: int = 384
    """Channels of a token, a multiple of 4 and of the heads."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 6
    """Attention heads in each block."""
    mlp_ratio: float = 4.0
    """Hidden channels of the MLP, as a multiple of the width."""
    attention: str = "global"
    """Attention plan: one entry for each layer ("3,5,7,g*9"), or a name: global, local, local-star, same-a, same-b,
    local-small, local-star-large. @mix or @tail after a name places the windows elsewhere than in the first layers."""
    border: Literal["clip", "shift"] = "clip"
    """How a window is treated at the image's border: clip it (An et al.), or shift it inside (NATTEN)."""
    num_classes: int = 0
    """Number of classes; 0 for an unconditional network, which has no label table."""
    null_class: bool = True
    """Whether the label table has a row for "no class", which label dropout and guidance need."""
    learn_sigma: bool = True
    """Whether the network has a second set of output channels, v, for the variance of the reverse step."""
    block: BlockKind = "adaln-zero"
    """How time and label enter a block: they set shift and scale of its norms and its gates (adaln-zero), shift and
    scale of its norms (adaln), are attended to (cross-attention), or are tokens beside the image's (in-context)."""
    affine: bool = True
    """Whether the norms of cross-attention and in-context blocks have a learned gain and bias, as in the ViT; the paper
    does not say (inferred). No effect on adaln-zero and adaln, where the condition takes their place."""
    time_frequencies: Spacing = "original"
    """Frequencies of the time embedding: 10000^(-k/128), k < 128 (original), or 10000^(-k/127), as in diffusers."""
    mlp_norm_eps: float = 1e-6
    """Epsilon of the norm before the MLP; diffusers' DiT uses 1e-5 there and 1e-6 in its other norms."""

    def __post_init__(self) -> None:
        """Refuses sizes that cannot be built."""
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
        for pattern in self.patterns:  # parsing raises if the plan does not match the depth
            if self.sized:
                check_fits(pattern, self.grid)

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
        """Number that `width` must be a multiple of: of 4 for the position table, and of the heads."""
        return lcm(4, self.heads)

    @property
    def condition_tokens(self) -> int:
        """Number of tokens of the condition: time and label, or time only without classes."""
        return 2 if self.num_classes else 1

    def training_bytes(self, images: int) -> int:
        """See `NetworkConfig.training_bytes`: activations, and weights with gradients, average and optimizer."""
        rows, columns = self.grid
        # About forty numbers of a token's width are kept in a block, and sixteen bytes a parameter.
        activations = 4 * 40 * images * rows * columns * self.width * self.depth
        return activations + 20 * 18 * self.width**2 * self.depth


@register(DiTConfig)
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
            raise DitlabError("DiT: expected a config with an image_size, found (0, 0), which means not known yet")
        self.config = config
        width, patch = config.width, config.patch
        self.outputs = config.channels * (2 if config.learn_sigma else 1)
        self.embed = nn.Conv2d(config.channels, width, patch, stride=patch)
        self.register_buffer("positions", position_table(config.grid, width)[None], persistent=False)
        self.time = TimeEmbedding(width, spacing=config.time_frequencies)
        self.label = LabelEmbedding(config.num_classes, width, null=config.null_class) if config.num_classes else None
        # In-context conditioning: the condition's tokens follow the image's, see all tokens and are seen by all.
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
        """Number of classes; 0 if unconditional. With a null class, the label `num_classes` means "no class"."""
        return self.config.num_classes

    def reset(self) -> None:
        """Sets DiT's initial values: Xavier-uniform Linears; zero for adaLN-Zero's modulation and the last Linear."""

        def xavier(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        self.apply(xavier)
        # The patch embedding is a convolution, initialized like a Linear.
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
            DitlabError: for images of another shape than the config's, or a missing label without a null class.
        """
        if tuple(x.shape[1:]) != self.in_shape:
            raise DitlabError(f"DiT: expected images of shape {self.in_shape}, found {tuple(x.shape[1:])}")
        if augment is not None:
            raise DitlabError("DiT: augmentation labels are not supported by this network")
        # Contiguous, because torch 2.13's compiler computes wrong gradients of a block (by per cents, on the CPU) where
        # its input is a transposed view.
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
        """Returns the condition's tokens `[B, K, D]`: the time's, then the label's if the network has classes."""
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
        """Reshapes `[B, T, patch * patch * C]`, channel fastest, to `[B, C, H, W]`."""
        rows, columns = self.config.grid
        patch = self.config.patch
        x = patches.reshape(-1, rows, columns, patch, patch, self.outputs)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.outputs, rows * patch, columns * patch)


__all__ = ["DiT", "DiTConfig"]
