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

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from ditlab.errors import DitlabError
from ditlab.networks.dit_blocks import BLOCKS, Block, FinalLayer, is_modulated
from ditlab.networks.dit_config import DiTConfig
from ditlab.nn.embeddings import LabelEmbedding, TimeEmbedding, position_table


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


__all__ = ["DiT"]
