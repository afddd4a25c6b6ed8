"""What an image set holds, as a table on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ditlab.cli.console import Output


def print_summary(output: Output, result: dict[str, Any]) -> None:
    """Prints a description of an image set as a table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in _rows(result):
        table.add_row(name, escape(text))
    output.table(table)


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    channels, height, width = result["shape"]
    pools, classes, near = result["pools"], result["classes"], result["near_duplicates"]
    yield "image set", f"{result['path']}  ({result['source']})"
    yield "images", f"{result['images']:,} of {channels}x{height}x{width}, {result['megabytes']:,} MB"
    if "latents" in result:
        yield from _latent_rows(result["latents"])
    shared = f"{pools['train']:,} for training only, {pools['test']:,} for test only"
    yield "pools", "free: a split chooses train and test images" if pools["free"] else shared
    if classes:
        listed = ", ".join(f"{name} {count:,}" for name, count in list(classes.items())[:20])
        yield "classes", f"{len(classes)}: {listed}{', ...' if len(classes) > 20 else ''}"
    yield "exact duplicates", f"{result['exact_duplicates_dropped']:,} dropped"
    yield from (("", f"{dropped} is {earlier}") for dropped, earlier in result["exact_duplicate_files"])
    if near is not None:
        across = near["pairs_across_train_and_test"]
        counts = f"{near['pairs']:,} pairs, {near['images']:,} images (correlation > {near['threshold']}, kept)"
        yield "near-duplicates", counts + (f"; {across:,} pairs across train and test" if across else "")
        yield from (("", f"{first} and {second}") for first, second in near["most_similar_files"] if first and second)
    yield "skipped", result["skipped_summary"].removeprefix("skipped ") or "none"
    yield from (("", f"{name}: {reason}") for name, reason in result["skipped_examples"].items())
    yield from (("note", note) for note in result["notes"])
    yield "hash", result["hash"][:16]
    if "sheet" in result:
        yield "contact sheet", result["sheet"]


def _latent_rows(latents: dict[str, Any]) -> Iterator[tuple[str, str]]:
    codec, size = latents["codec"], "x".join(map(str, latents["picture"]))
    stored = {"moments": "mean and standard deviation", "sample": "one sample each", "mean": "the mean"}
    mirrored = ", of the mirrored pictures too" if latents["mirrored"] else ""
    yield "latents", f"of pictures {size}: {stored[latents['store']]}{mirrored}"
    scaled = f"scale {codec['scale']:g}" + (f", shift {codec['shift']:g}" if codec["shift"] else "")
    yield "codec", f"{codec['source']} ({codec['kind']}, {scaled}, {codec['sha256'][:16]})"
    low, high = min(latents["channel_std"]), max(latents["channel_std"])
    whole = f"standard deviation {latents['overall_std']:.3f} (EDM presets: --objective.sigma-data), "
    yield "scaled", f"{whole}of single channels {low:.2f} to {high:.2f}"
    if "round_trip_db" in latents:
        yield "round trip", f"{latents['round_trip_db']:.1f} dB PSNR of the pictures on the sheet"
