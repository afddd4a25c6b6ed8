"""`ditlab convert`: flags, what it prints, and how it refuses. The work itself is tested in tests/interop."""

from __future__ import annotations

import json
from pathlib import Path


def test_a_run_to_the_original_and_back(ditlab, place):
    run = place.trained("for-original", conditional=True, preset="dit-nano/2")
    done = ditlab("convert", run, "out.pt", "--step", 6)
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[-1].startswith("wrote out.pt: a DiT of ")
    done = ditlab("convert", "out.pt", "converted", "--heads", 2, "--json")
    made = json.loads(done.out)
    assert (made["out"], made["format"]) == ("converted", "ditlab")
    assert "wrote converted: a DiT of " in done.err
    assert ditlab("sample", "converted", "--seeds", "0-1", "--sampler-steps", 2, "--device", "cpu").status == 0


def test_to_the_hub(ditlab, plain):
    done = ditlab("convert", plain, "hub:me/mine", "--dry-run", "export")
    assert done.status == 0, done.err
    assert "note: no --licence was given" in done.out
    assert Path("export/README.md").is_file()


def test_flags_of_files_of_improved_diffusion(refused, tmp_path):
    import torch

    torch.save({"x_embedder.proj.weight": torch.zeros(1)}, tmp_path / "dit.pt")
    says = refused("convert", "dit.pt", "out", "--unet.size", 8)
    assert "expected weights of improved-diffusion's UNet" in says


def test_bad_input(refused, plain):
    assert "is a run of ditlab already; name another format as --to" in refused("convert", plain, "out")
    says = refused("convert", plain, "out", "--to", "original")
    assert says.startswith("convert: expected out to end in .pt")
    assert "--licence, --samples and --dry-run are for the hub" in refused(
        "convert", plain, "out.pt", "--licence", "mit"
    )
    says = refused("convert", plain, "hub:me/mine", "--raw")
    assert "expected no --to, --heads, unet, --raw or --codec, found --raw" in says
