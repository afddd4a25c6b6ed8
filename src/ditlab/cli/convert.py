"""`ditlab convert`: models between ditlab, diffusers and the original codes, and runs to and from the hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from ditlab.cli.console import Output
from ditlab.cli.options import keywords
from ditlab.interop.formats import Format, UNetFile


@dataclass(frozen=True)
class Convert:
    """Convert a DiT or a UNet between ditlab, diffusers and the original codes' checkpoints, or send a run to the hub.

    `ditlab convert DiT-XL-2.pt models/dit` makes a folder that every other verb takes. The outputs stay the same; what
    the other format cannot express is refused.
    """

    source: tyro.conf.Positional[str]
    """A run's folder or one of its checkpoints, a converted model's folder, a checkpoint of the original DiT or of
    improved-diffusion (.pt, .pth, .ckpt, .safetensors), diffusers:PATH_OR_ID or hub:ID."""
    out: tyro.conf.Positional[str]
    """The folder or file to make, or hub:ORG/NAME to send a run there with a model card."""
    to: Format | None = None
    """What to make: a model for ditlab, a diffusers folder, or a checkpoint of the network's original code. If not
    given: the latter for a name that ends in .pt, .pth or .safetensors, else a model for ditlab."""
    checkpoint: int | None = None
    """The checkpoint of a run; the newest if not given."""
    raw: bool = False
    """Take the raw weights instead of the averaged ones."""
    heads: int | None = None
    """Number of attention heads of an original checkpoint, where neither its width nor its settings tell."""
    unet: UNetFile = field(default_factory=UNetFile)
    """What else a checkpoint of improved-diffusion does not say."""
    codec: str | None = None
    """To diffusers: where the autoencoder of a run on latents is now, if it was moved."""
    licence: str = ""
    """For the hub: the licence of the weights, by the hub's short name (apache-2.0, cc-by-4.0, ...)."""
    samples: bool = False
    """For the hub: show the newest samples on the card. Those of a run that memorizes are its training images."""
    dry_run: Path | None = None
    """For the hub: write what would be sent into this new folder, and send nothing."""

    def run(self, output: Output) -> dict[str, Any]:
        """Converts and says what was made."""
        from ditlab import api

        made = api.convert(**keywords(self), reporter=output.reporter)
        output.line(f"{'sent to' if made.sent else 'wrote'} {made.out}: {made.description}")
        if made.difference is not None:
            output.line(f"outputs of both networks differ by {made.difference:.1g} of their standard deviation at most")
        return made.to_json()
