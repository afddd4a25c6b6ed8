"""What an image set holds, as a table on a terminal."""

from __future__ import annotations

from typing import Any

from ditlab.cli.console import Output


def print_summary(output: Output, result: dict[str, Any]) -> None:
    """Prints a description of an image set as a table."""
    channels, height, width = result["shape"]
    pools, near = result["pools"], result["near_duplicates"]
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("image set", escape(f"{result['path']}  ({result['source']})"))
    table.add_row("images", f"{result['images']:,} of {channels}x{height}x{width}, {result['megabytes']:,} MB")
    if "latents" in result:
        _latent_rows(table, result["latents"])
    if pools["free"]:
        table.add_row("pools", "free: a split chooses train and test images")
    else:
        table.add_row("pools", f"{pools['train']:,} for training only, {pools['test']:,} for test only")
    if result["classes"]:
        listed = ", ".join(f"{name} {count:,}" for name, count in list(result["classes"].items())[:20])
        more = ", ..." if len(result["classes"]) > 20 else ""
        table.add_row("classes", escape(f"{len(result['classes'])}: {listed}{more}"))
    table.add_row("exact duplicates", f"{result['exact_duplicates_dropped']:,} dropped")
    for dropped, earlier in result["exact_duplicate_files"]:
        table.add_row("", escape(f"{dropped} is {earlier}"))
    if near is not None:
        across = near["pairs_across_train_and_test"]
        table.add_row(
            "near-duplicates",
            f"{near['pairs']:,} pairs, {near['images']:,} images (correlation > {near['threshold']}, kept)"
            + (f"; {across:,} pairs across train and test" if across else ""),
        )
        for first, second in near["most_similar_files"]:
            if first and second:
                table.add_row("", escape(f"{first} and {second}"))
    table.add_row("skipped", escape(result["skipped_summary"].removeprefix("skipped ") or "none"))
    for name, reason in result["skipped_examples"].items():
        table.add_row("", escape(f"{name}: {reason}"))
    for note in result["notes"]:
        table.add_row("note", escape(note))
    table.add_row("hash", result["hash"][:16])
    if "sheet" in result:
        table.add_row("contact sheet", escape(result["sheet"]))
    output.table(table)


def _latent_rows(table: Any, latents: dict[str, Any]) -> None:
    from rich.markup import escape

    codec = latents["codec"]
    size = "x".join(map(str, latents["picture"]))
    stored = {"moments": "mean and standard deviation", "sample": "one sample each", "mean": "the mean"}
    mirrored = ", of the mirrored pictures too" if latents["mirrored"] else ""
    table.add_row("latents", f"of pictures {size}: {stored[latents['store']]}{mirrored}")
    scaled = f"scale {codec['scale']:g}" + (f", shift {codec['shift']:g}" if codec["shift"] else "")
    table.add_row("codec", escape(f"{codec['source']} ({codec['kind']}, {scaled}, {codec['sha256'][:16]})"))
    low, high = min(latents["channel_std"]), max(latents["channel_std"])
    table.add_row(
        "scaled",
        f"standard deviation {latents['overall_std']:.3f} (EDM presets: --objective.sigma-data), "
        f"of single channels {low:.2f} to {high:.2f}",
    )
    if "round_trip_db" in latents:
        table.add_row("round trip", f"{latents['round_trip_db']:.1f} dB PSNR of the pictures on the sheet")
