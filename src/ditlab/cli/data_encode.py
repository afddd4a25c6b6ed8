"""`ditlab data encode`: the latents of an image set."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from ditlab.cli.common import use_threads
from ditlab.cli.data import BarReporter, print_summary, summary
from ditlab.data.autoencoder import open_autoencoder
from ditlab.data.encode import EncodeConfig, LatentEncoder
from ditlab.data.imageset import ImageSet
from ditlab.errors import DitlabError
from ditlab.training.distributed import DistributedContext, init_distributed, pick_device


@dataclass(frozen=True)
class Encode:
    """Turn an image set into latents with an autoencoder, as a set of its own that `ditlab train --data` reads.

    Example: `ditlab data encode sets/faces sets/faces-latents --codec stabilityai/sd-vae-ft-ema`

    The same command again goes on where an interrupted one was. Several processes: torchrun --nproc-per-node 2 -m
    ditlab data encode ... share the work.
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
    device: str | None = None
    """cpu, cuda or cuda:N; CUDA where there is one."""
    threads: int | None = None
    """CPU threads; all cores where not given."""

    def run(self, console: Console) -> dict[str, Any]:
        """Encodes, prints what the new set holds, and returns the same as a JSON-able dict."""
        use_threads(self.threads)
        pick_device(self.device)
        if not self.codec:
            raise DitlabError("data encode --codec: expected an autoencoder's hub id or folder, found nothing")
        pictures = ImageSet.open(self.images)
        with init_distributed(self.device) as here, ExitStack() as held:
            work, found, refusal = None, None, None
            try:
                codec = open_autoencoder(self.codec, self.kind).to(here.device)
                work = LatentEncoder(pictures, self.out, codec, self.settings, overwrite=self.overwrite)
                found = work.existing()
                if found is None and here.is_main:
                    held.enter_context(work.locked())
            except DitlabError as error:
                refusal = error
            if not here.raise_together(refusal) or work is None:
                return {}
            if found is None:
                self._encode(work, here, console)
                found = work.finish() if here.is_main else None
            if found is None or not here.is_main:
                return {}
        result = summary(found)
        print_summary(console, result)
        console.print(f"Train on it with: ditlab train dit-micro/1 --data {escape(str(self.out))}")
        return result

    def _encode(self, work: LatentEncoder, here: DistributedContext, console: Console) -> None:
        work.encode(here.rank, here.world, BarReporter(console if here.is_main else Console(quiet=True)))
        here.wait()
