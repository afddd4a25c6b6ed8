"""Pins of what is committed in results/: it loads, its trials keep their hashes, its study pages are made again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "results"
CELLS = sorted((RESULTS / "faces" / "cells").iterdir())
NUMBERS = ("train", "test", "gap")
UNKNOWN = {f"about{place}.weights: new ('')" for place in ("", "[0]", "[1]")}
"""Results of earlier versions have no hash of the weights."""

KINDS = ("attention-locality", "jacobian", "agreement", "two-subsets")
"""Those that load without arrays beside them, which are not committed (a "psnr-gap" needs them)."""

RECOMPUTED = {"pattern_mass", "sentences", "notes"}
"""Values that follow from the others and are not read: older files hold another definition, wording or rounding."""


def kind(path: Path) -> str | None:
    record = json.loads(path.read_text())
    return record.get("kind") if isinstance(record, dict) else None


LOADABLE = [path for path in sorted(RESULTS.rglob("*.json")) if kind(path) in KINDS]


@pytest.mark.parametrize("cell", CELLS, ids=lambda path: path.name)
def test_a_committed_trial_keeps_its_hash(pins, cell):
    record = json.loads((cell / "cell.json").read_text())
    assert record["hash"] == cell.name
    assert pins.trial_hash(record["config"], record["images"]["hash"]) == cell.name


def test_all_trials_of_the_plan_are_committed():
    plan = json.loads((RESULTS / "faces" / "an2024-fig6-small" / "plan.json").read_text())
    assert sorted(cell["hash"] for cell in plan["cells"]) == [path.name for path in CELLS]


@pytest.mark.parametrize("path", LOADABLE, ids=lambda path: path.relative_to(RESULTS).as_posix())
def test_a_committed_result_loads(pins, path):
    loaded = pins.load_result(path)
    record = json.loads(path.read_text())
    lines = [line for key in record for line in pins.differences(record[key], loaded[key], 0.0, key)]
    assert {line for line in lines if re.split(r"[.\[:]", line)[0] not in RECOMPUTED} <= UNKNOWN


def test_runs_configs_give_hashes(pins):
    """Settings of committed runs are still read."""
    paths = sorted(RESULTS.glob("*/config.json"))
    records = {path.parent.name: json.loads(path.read_text()) for path in paths}
    hashes = {name: pins.trial_hash(r["config"], r["split"]["imageset"]) for name, r in records.items()}
    pins.check("committed-runs", hashes)


@pytest.mark.slow
@pytest.mark.parametrize("study", ["an2024/fig6", "an2024/fig4"])
def test_a_study_page_is_made_from_what_is_committed(pins, tmp_path, study):
    """At the smallest and the largest N, to save time; the numbers of all trials are in the next test."""
    folder = shutil.copytree(RESULTS / "faces", tmp_path / "faces")
    name = f"{study.replace('/', '-')}-small"
    plan = json.loads((folder / name / "plan.json").read_text())
    ends = [plan["axes"]["n"][0], plan["axes"]["n"][-1]]
    plan["axes"]["n"], plan["cells"] = ends, [cell for cell in plan["cells"] if cell["n"] in ends]
    (folder / name / "plan.json").write_text(json.dumps(plan))
    committed = json.loads((folder / name / "table.json").read_text())
    (folder / name / "table.json").unlink()
    shutil.rmtree(folder / name / "figures", ignore_errors=True)
    printed = pins.run(tmp_path, "study", "report", study, "--out", "faces", "--hide-training-images")
    table = json.loads((folder / name / "table.json").read_text())
    assert not pins.differences([cell for cell in committed["cells"] if cell["n"] in ends], table["cells"], 1e-9)
    text = (folder / name / "report.html").read_text(encoding="utf-8")
    page = {
        "printed": pins.shape(printed),
        "table": pins.shape({key: table[key] for key in table if key != "cells"}),
        "sections": re.findall(r'<section id="([^"]+)"', text),
        "figures": pins.files(folder / name / "figures"),
    }
    pins.check(f"study-page-{name}", page)


@pytest.mark.parametrize("study", ["an2024/fig6", "an2024/fig4"])
def test_every_committed_trial_is_done(pins, tmp_path, study):
    status = pins.run(tmp_path, "study", "status", study, "--out", shutil.copytree(RESULTS / "faces", tmp_path / "f"))
    table = json.loads((RESULTS / "faces" / f"{study.replace('/', '-')}-small" / "table.json").read_text())["cells"]
    assert {cell["state"] for cell in status["cells"]} == {"done"}
    assert [cell["hash"] for cell in status["cells"]] == [cell["hash"] for cell in table]
    for cell, line in zip(status["cells"], table, strict=True):
        if cell["averages"] is not None:
            assert [cell["averages"][key] for key in NUMBERS] == pytest.approx([line[key] for key in NUMBERS])
