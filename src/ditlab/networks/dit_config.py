"""Settings of a DiT (`ditlab.networks.dit`)."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import ClassVar, Literal, get_args

from ditlab.errors import DitlabError, unknown_name
from ditlab.networks.base import NetworkConfig
from ditlab.nn import Spacing
from ditlab.nn.attention_plan import parse_plan
from ditlab.nn.patterns import Pattern, check_fits

BlockKind = Literal["adaln-zero", "adaln", "cross-attention", "in-context"]


@dataclass(frozen=True)
class DiTConfig(NetworkConfig):
    """Settings that determine the shape of a DiT."""

    takes_labels: ClassVar[bool] = True
    can_learn_variance: ClassVar[bool] = True
    takes_attention_plan: ClassVar[bool] = True

    kind: Literal["dit"] = "dit"
    image_size: tuple[int, int] = (32, 32)
    """Height and width of the image or latent in pixels, multiples of the patch. 0 0 means not known yet: such a config
    can be changed, not built."""
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
        self.check_counts(where, "channels", "patch", "width", "depth", "heads")
        if self.mlp_norm_eps <= 0:
            raise DitlabError(f"{where}: mlp_norm_eps must be above 0, found {self.mlp_norm_eps}")
        size = tuple(self.image_size)
        if self.sized and any(side < 1 or side % self.patch for side in size):
            raise DitlabError(f"{where}: image_size must be multiples of the patch {self.patch}, found {size}")
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

    @property
    def appended_tokens(self) -> int:
        """Number of the condition's tokens that follow the image's: all with in-context conditioning, else none."""
        return self.condition_tokens if self.block == "in-context" else 0

    def training_bytes(self, images: int) -> int:
        """See `NetworkConfig.training_bytes`: activations, and weights with gradients, average and optimizer."""
        rows, columns = self.grid
        # About forty numbers of a token's width are kept in a block, and sixteen bytes a parameter.
        activations = 4 * 40 * images * rows * columns * self.width * self.depth
        return activations + 20 * 18 * self.width**2 * self.depth


__all__ = ["BlockKind", "DiTConfig"]
