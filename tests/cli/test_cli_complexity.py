"""`ditlab complexity`: the table, JSON, files, and how it refuses. The numbers are tested in tests/analyses."""

from __future__ import annotations

import json

import ditlab as package


def test_table_json_and_files(ditlab, tmp_path):
    words = ["complexity", "dit-s/8", "dit-s/4", "--channels", 4, "--classes", 1000, "--no-memory"]
    done = ditlab(*words, "--out", "costs", "--json")
    assert done.status == 0, done.err
    result = json.loads(done.out)
    costs = package.complexity(["dit-s/8", "dit-s/4"], channels=4, classes=1000, memory=False)
    assert result == {**json.loads(json.dumps(costs.to_json())), "files": result["files"]}
    assert [tmp_path / name for name in result["files"]] == [
        tmp_path / "costs" / name for name in ("complexity.json", "complexity.png")
    ]
    for text in ("dit-s/8", "0.36", "(256 x 400,000)"):
        assert text in done.err
    done = ditlab(*words)
    assert (done.err, "0.36" in done.out) == ("", True)
    assert [path.name for path in tmp_path.iterdir()] == ["costs"]


def test_flags_change_the_network(ditlab):
    changed = ("--depth", 2, "--width", 64, "--heads", 2, "--attention", "3,g", "--block", "in-context")
    done = ditlab("complexity", "dit-nano/2", *changed, "--size", 8, 12, "--no-memory", "--batch", 3, "--json")
    [network] = json.loads(done.out)["networks"]
    assert network["name"] == "dit-nano/2, depth 2, attention 3,g, block in-context"  # width and heads are its own
    assert network["network"]["image_size"] == [8, 12]
    assert (network["batch_size"], network["steps"], network["activation_bytes"]) == (3, 5000, None)
    assert "MiB" not in done.err


def test_bad_input(refused):
    for words, sentence in (
        ("dit-s/8 --linear", "complexity: --linear says what --match compares; expected --match with it, found none"),
        ("dit-s/8 --size 8 8 8", "complexity: --size: expected one side or height and width, found [8, 8, 8]"),
        ("unet-nano --attention g", "unet-nano: expected settings of a unet network, found --attention"),
        ("", "complexity: expected at least one preset (e.g. dit-s/2), found none"),
        ("dit-sx/2", "unknown preset 'dit-sx/2' (nearest: "),
    ):
        assert refused("complexity", *words.split(), "--out", "costs").startswith(sentence)
