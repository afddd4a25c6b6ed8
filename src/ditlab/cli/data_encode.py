"""`ditlab data encode`: the latents of an image set."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ditlab.cli.console import Output
from ditlab.cli.data_summary import print_summary
from ditlab.cli.options import ComputeFlags, ComputeOptions, keywords
from ditlab.data.encode_config import EncodeConfig


@dataclass(frozen=True)
class Encode:
    """Encode an image set as latents of an autoencoder, as a set of its own that `ditlab train --data` reads.

    Example: `ditlab data encode sets/faces sets/faces-latents --codec stabilityai/sd-vae-ft-ema`

    The same command resumes an interrupted one. Several processes share the work: torchrun --nproc-per-node 2 -m ditlab
    data encode ...
    """

    images: tyro.conf.Positional[Path]
    """The image set's folder."""
    out: tyro.conf.Positional[Path]
    """The folder to make; it appears whole or not at all."""
    codec: str = ""
    """The autoencoder: a hub id, a diffusers folder, or a folder with a pair of files NAME_encoder and NAME_decoder."""
    kind: Literal["auto", "kl", "tiny"] = "auto"
    """Refuse any other kind of autoencoder than this."""
    settings: Annotated[EncodeConfig, tyro.conf.arg(name="")] = field(default_factory=EncodeConfig)
    """How it is encoded."""
    overwrite: bool = False
    """Replace a set that was made from something else or with other settings."""
    compute: ComputeOptions = field(default_factory=ComputeFlags)
    """Where it computes."""

    def run(self, output: Output) -> dict[str, Any]:
        """Encodes, prints what the new set holds, and returns the same as JSON values."""
        from ditlab import api
        from ditlab.data.summary import describe

        images = api.encode(**keywords(self), reporter=output.reporter)
        if images is None:
            return {}
        summary = describe(images)
        print_summary(output, summary)
        output.line(f"Train on it with: ditlab train dit-micro/1 --data {self.out}")
        return summary
