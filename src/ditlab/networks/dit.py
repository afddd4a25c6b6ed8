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
from jaxtyping import Float
from torch import Tensor, nn

from ditlab.networks.dit_blocks import BLOCKS, Block, FinalLayer
from ditlab.networks.dit_config import DiTConfig
from ditlab.networks.module import ConditionedNetwork
from ditlab.nn.embeddings import LabelEmbedding, TimeEmbedding, position_table


class DiT(ConditionedNetwork[DiTConfig]):
    """The diffusion transformer.

    Example:
        >>> import torch
        >>> network = DiT(DiTConfig(image_size=(8, 8), width=64, depth=2, heads=2, attention="3,g"))
        >>> network(torch.zeros(1, 3, 8, 8), torch.zeros(1)).shape
        torch.Size([1, 6, 8, 8])
    """

    title = "DiT"

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        width, patch = config.width, config.patch
        self.embed = nn.Conv2d(config.channels, width, patch, stride=patch)
        self.register_buffer("positions", position_table(config.grid, width)[None], persistent=False)
        self.time = TimeEmbedding(width, spacing=config.time_frequencies)
        self.label = LabelEmbedding(config.num_classes, width, null=config.null_class) if config.num_classes else None
        # In-context conditioning: the condition's tokens follow the image's, see all tokens and are seen by all.
        self.appended = config.appended_tokens
        self.blocks = nn.ModuleList(BLOCKS[config.block](config, pattern) for pattern in config.patterns)
        self.final = FinalLayer(config, patch * patch * self.outputs)
        self.reset()

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

    def _output(self, x: Float[Tensor, "b c h w"], c: Float[Tensor, "b k d"]) -> Float[Tensor, "b o h w"]:
        # Contiguous, because torch 2.13's compiler computes wrong gradients of a block (by per cents, on the CPU) where
        # its input is a transposed view.
        tokens = (self.embed(x).flatten(2).transpose(1, 2) + self.positions).contiguous()
        if self.appended:
            tokens = torch.cat([tokens, c.to(tokens.dtype)], dim=1)
        for block in self.blocks:
            tokens = block(tokens, c)
        if self.appended:
            tokens = tokens[:, : -self.appended]
        return self._unpatchify(self.final(tokens, c))

    def _condition(self, t: Tensor, label: Tensor | None) -> Float[Tensor, "b k d"]:
        """Returns the condition's tokens `[B, K, D]`: the time's, then the label's if the network has classes."""
        time = self.time(t)
        return time[:, None] if self.label is None else torch.stack([time, self.label(label)], dim=1)

    def _unpatchify(self, patches: Float[Tensor, "b t o"]) -> Float[Tensor, "b c h w"]:
        """Reshapes `[B, T, patch * patch * C]`, channel fastest, to `[B, C, H, W]`."""
        rows, columns = self.config.grid
        patch = self.config.patch
        x = patches.reshape(-1, rows, columns, patch, patch, self.outputs)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.outputs, rows * patch, columns * patch)


__all__ = ["DiT"]
