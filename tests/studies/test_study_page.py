"""A study's page: from plan.json and cells/ alone, with every trial empty, some, or all on record."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from ditlab.metrics.paired import paired_difference
from ditlab.studies.an2024 import STUDIES
from ditlab.studies.findings import answer, verdict
from ditlab.studies.grid import Plan
from ditlab.studies.published import differing, published, settings_here
from ditlab.studies.results import ALONG, CONTRASTS, FULL, Contrast, Facet, facets
from ditlab.studies.store import Store
from ditlab.studies.study_page import StudyPage

NUMBERS = {
    # (N, seed): gap of global, gap of local, with best test PSNR of each.
    (10, 0): (2.0, 1.0, 14.0, 14.2),
    (10, 1): (2.2, 1.1, 14.1, 14.2),
    (10, 2): (2.1, 1.2, 14.2, 14.4),
    (100, 0): (0.5, 0.5, 15.0, 15.3),
    (100, 1): (0.6, 0.5, 15.1, 14.8),
    (100, 2): (0.4, 0.5, 15.2, 15.2),
}


def plan(seeds=(0, 1, 2), analyses=("psnr-gap",)) -> Plan:
    settings = {"psnr-gap": {"images": 50, "points": 3, "reduction": "mse_mean"}, "attention": {"images": 4}}
    cells = [
        {
            "hash": f"{kind}{n}s{seed}",
            "data": "digits",
            "network": "dit-nano/1",
            "attention": kind,
            "n": n,
            "seed": seed,
        }
        for seed in seeds
        for n in (10, 100)
        for kind in ("global", "local")
    ]
    return Plan(
        study="an2024/fig6",
        scale="small",
        axes={
            "data": ["digits"],
            "network": ["dit-nano/1"],
            "attention": ["global", "local"],
            "n": [10, 100],
            "seed": [*seeds],
        },
        plans={"global": "global", "local": "3,g*3"},
        images={"digits": {"source": "digits", "size": 8, "count": 1797, "hash": "ab" * 32}},
        settings={"dit-nano/1": {"training.steps": 30}},
        analyses={name: settings[name] for name in analyses},
        trials=tuple(cells),
        command="ditlab study run an2024/fig6",
    )


def psnr_record(cell: dict, gap: float) -> dict:
    """A PSNR gap of 20 dB on test images at each of three levels, and `gap` more on training images."""
    about = {
        "name": "run", "label": "", "n": cell["n"], "seed": cell["seed"], "step": 30, "ema": True,
        "split_family": f"family{cell['seed']}", "split_hash": f"split{cell['seed']}n{cell['n']}", "settings": {},
    }  # fmt: skip
    config = {
        "images": 50, "points": 3, "levels": None, "reduction": "mse_mean", "draws": 1, "noise_seed": 0, "clip": False,
        "batch_size": 100,
    }  # fmt: skip
    curves = {"train": [20 + gap] * 3, "test": [20.0] * 3, "gap": [gap] * 3}
    return {
        "kind": "psnr-gap", "version": 1, "about": about, "config": config, "levels": [0.1, 1.0, 10.0],
        "timesteps": [10, 100, 500], "peak": 2.0, "images": {"train": 10, "test": 50},
        "draws": {"train": 5, "test": 1}, "notes": ["A note."], "averages": {"mse_mean": {}},
        "curves": {"mse_mean": curves},
    }  # fmt: skip


def write(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def record(root: Path, cell: dict, gap: float, best: float) -> None:
    """A cell's files, as if it had been trained."""
    folder = root / "cells" / cell["hash"]
    points = [
        {"step": step, "train_psnr": train, "test_psnr": test, "psnr_gap": train - test, "train_loss": 1.0}
        for step, train, test in ((0, 5.0, 5.0), (10, best + 0.5, best), (30, best + 3, best - 1))
    ]
    write(folder / "trajectory.json", {"kind": "study-trajectory", "version": 1, "points": points})
    write(
        folder / "cell.json",
        {
            "kind": "study-cell", "version": 1, **cell, "name": cell["hash"], "command": "ditlab train x",
            "environment": {"torch": "2"}, "spent": {"train": {"seconds": 2.0, "cpu_seconds": 1.0}},
            "split": {"family": f"family{cell['seed']}"}, "memory_bytes": 2**20,
        },
    )  # fmt: skip
    write(folder / "psnr-gap.json", psnr_record(cell, gap))


def filled(root: Path, made: Plan, leave_out: tuple[str, ...] = ()) -> Store:
    made.save(root / "an2024-fig6-small")
    for cell in made.trials:
        one, two, best_one, best_two = NUMBERS[cell["n"], cell["seed"]]
        first = cell["attention"] == "global"
        if cell["hash"] not in leave_out:
            record(root, dict(cell), one if first else two, best_one if first else best_two)
    return Store(root)


def facet_of(made: Plan, store: Store) -> Facet:
    (facet,) = facets(made, store)
    return facet


def contrasts(facet: Facet) -> dict[tuple[str, int], Contrast]:
    """(way, N) -> local against global."""
    return {(way, c.n): c for way, row in facet.contrasts("global", "local").items() for c in row}


def test_the_ways_are_the_paired_differences_of_the_records(tmp_path):
    made = plan()
    facet = facet_of(made, filled(tmp_path, made))
    found = {place: contrast.difference for place, contrast in contrasts(facet).items()}
    assert found.keys() == {(what, n) for what in CONTRASTS for n in (10, 100)}
    for n in (10, 100):
        rows = np.array([NUMBERS[n, seed] for seed in range(3)])
        for what, first, second in ((FULL, 0, 1), (ALONG[2], 2, 3)):
            wanted = paired_difference(
                "global", "local", dict(enumerate(rows[:, first].tolist())), dict(enumerate(rows[:, second].tolist()))
            )
            got = found[what, n]
            assert got is not None
            assert (got.mean, got.low, got.high) == pytest.approx((wanted.mean, wanted.low, wanted.high))
    assert answer(facet, "full") == [
        "Full measurement of the gap, local against global: at N = 10 lower; at N = 100 no difference seen."
    ]
    # Along training, by another instrument, every gap of these records is 4 dB at the last step.
    for n in (10, 100):
        equal = found[ALONG[0], n]
        assert equal is not None
        assert equal.differences == pytest.approx([0.0] * 3, abs=1e-9)
    assert answer(facet, "lowers") == [
        "Gap at equal steps along training, local against global: at N = 10, 100 no difference seen."
    ]
    falls = answer(facet, "falls")
    assert falls[0].startswith(
        "Gap of global: 2.10 dB at N = 10, 0.50 dB at N = 100. From the smallest to the largest N"
    )
    assert "N = 100 is lower" in falls[0]


def test_a_partly_filled_grid_compares_what_it_can(tmp_path):
    """Seeds that one side lacks are left out; an N where no seed has both sides has no difference, and no error."""
    made = plan()
    facet = facet_of(made, filled(tmp_path, made, ("local10s0", "local10s1", "local10s2", "global100s1")))
    found = {place: contrast.difference for place, contrast in contrasts(facet).items()}
    for what in CONTRASTS:
        assert found[what, 10] is None
        there = found[what, 100]
        assert there is not None
        assert there.seeds == (0, 2)
    assert answer(facet, "full") == [
        "Full measurement of the gap, local against global: at N = 100 no difference seen; at N = 10 not yet measured."
    ]
    assert answer(facet, "best")[0].endswith("at N = 10 not yet measured.")
    # Kinds that share no seed at all: the first stays.
    apart = facet_of(made, filled(tmp_path / "b", made, tuple(c["hash"] for c in made.trials if apart_(c))))
    assert apart.comparison is not None
    assert apart.comparison.labels == ("global",)
    assert all(c.difference is None for c in contrasts(apart).values())
    # What is on record and not counted is named, here and on the page.
    assert facet.alone == []
    assert sorted(apart.alone) == ["local N=10 seed 2", "local N=100 seed 2"]
    (gap,) = (s for s in StudyPage(STUDIES["an2024/fig6"], [made], Store(tmp_path / "b")).sections() if s.id == "gap")
    assert gap.notes[-1].endswith("has the same seed: local N=10 seed 2, local N=100 seed 2.")


def apart_(cell) -> bool:
    return (cell["attention"] == "global") == (cell["seed"] == 2)


def test_one_seed_says_so(tmp_path):
    made = plan(seeds=(0,))
    facet = facet_of(made, filled(tmp_path, made))
    for about in ("lowers", "best"):
        (line,) = answer(facet, about)
        assert line.endswith("at N = 10, 100 one seed, so nothing can be said.")
    (screen,) = StudyPage(STUDIES["an2024/fig6"], [made], Store(tmp_path)).first_screens()
    (sentence,) = screen.sentences
    assert sentence == (
        "Average PSNR gap, at N = 100 against N = 10: one seed, so nothing can be said (global, local); local against "
        "global: at N = 10, 100 one seed, so nothing can be said."
    )
    assert screen.table.rows[0] == ("global", 10, "22.00", "20.00", "2.00")
    assert not any(c.difference.seen for c in contrasts(facet).values() if c.difference is not None)


def test_verdicts():
    def d(*values: float):
        return paired_difference("a", "b", dict.fromkeys(range(len(values)), 0.0), dict(enumerate(values)))

    found = {10: d(-1.0, -1.1, -0.9), 30: d(-1.0, 1.0, 0.2), 100: d(0.5), 300: None, 600: None, 1000: d(2.0, 2.1)}
    assert verdict([Contrast(n, difference, n != 600) for n, difference in found.items()]) == (
        "at N = 10 lower; at N = 1,000 higher; at N = 30 no difference seen; at N = 100 one seed, so nothing can be "
        "said; at N = 300 cannot be compared; at N = 600 not yet measured"
    )


def test_ranges_that_do_not_overlap_cannot_be_compared(tmp_path):
    """They are measured, so this is not what an empty cell gives."""
    made = plan(seeds=(0,))
    store = filled(tmp_path, made)
    path = store.trial("local10s0") / "trajectory.json"
    changed = json.loads(path.read_text())
    for point in changed["points"]:
        point["train_psnr"] += 50
    path.write_text(json.dumps(changed))
    (line,) = answer(facet_of(made, store), "matched")
    assert line.endswith("at N = 100 one seed, so nothing can be said; at N = 10 cannot be compared.")


@pytest.mark.parametrize(
    ("file", "field"),
    [("psnr-gap", "curves"), ("psnr-gap", "peak"), ("psnr-gap", "config"), ("cell", "split"), ("trajectory", "points")],
)
def test_a_record_that_lacks_a_field_is_not_on_record(ditlab, tmp_path, file, field):
    """It is to be made again; neither the page nor the status falls over it."""
    made = plan()
    store = filled(tmp_path / "studies", made)
    path = store.trial("local10s0") / f"{file}.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != field}))
    assert store.record("local10s0", file) is None
    facet = facet_of(made, store)
    assert next(c for c in facet.trials if c.place["hash"] == "local10s0").status.state != "done"
    for what in CONTRASTS:
        contrast = contrasts(facet)[what, 10]
        expected = (1, 2) if (what == FULL) == (file == "psnr-gap") else (0, 1, 2)
        assert contrast.difference is not None
        assert contrast.difference.seeds == expected
    done = ditlab(tmp_path, "study", "status", "an2024/fig6", "--json")
    assert done.status == 0, done.err


def test_a_damaged_curve_is_one_sentence(ditlab, tmp_path):
    made = plan()
    path = filled(tmp_path / "studies", made).trial("local10s0") / "psnr-gap.json"
    path.write_text(path.read_text().replace('"mse_mean": {"train"', '"mse_mean": {"trian"'))
    done = ditlab(tmp_path, "study", "report", "an2024/fig6")
    assert done.status == 2
    assert done.err.startswith("ditlab: studies/cells/local10s0: a recorded result is damaged (KeyError: 'train')")


def test_the_status_has_no_numbers_of_other_settings(ditlab, tmp_path):
    from dataclasses import replace

    made = plan()
    store = filled(tmp_path / "studies", made)
    for cell in made.trials:
        path = store.trial(cell["hash"]) / "psnr-gap.json"
        changed = json.loads(path.read_text())
        changed["averages"]["mse_mean"] = {"train": 21.0, "test": 20.0, "gap": 1.0}
        path.write_text(json.dumps(changed))

    def averages() -> list:
        return [
            c["averages"] for c in json.loads(ditlab(tmp_path, "study", "status", "an2024/fig6", "--json").out)["cells"]
        ]

    assert averages() == [{"train": 21.0, "test": 20.0, "gap": 1.0}] * 12
    other = replace(made, analyses={"psnr-gap": {**made.analyses["psnr-gap"], "images": 60}})
    other.save(tmp_path / "studies" / "an2024-fig6-small")
    assert averages() == [None] * 12


@pytest.mark.slow
def test_the_page_needs_only_the_plan_and_the_cells(ditlab, tmp_path):
    made = plan()
    filled(tmp_path / "studies", made)
    done = ditlab(tmp_path, "study", "report", "an2024/fig6", "--json")
    assert done.status == 0, done.err
    result = json.loads(done.out)
    page = (tmp_path / result["report"]).read_text()
    for words in (
        "12 of 12 trials are on record (3 paired seeds).",
        "Local against global, three ways",
        "The full measurement takes up to 50 images of each side at 3 noise levels",
        "Gap at matched train PSNR along training, local against global: ",
        "gap at equal steps",
        "-1.25 to -0.75",
        "Average PSNR gap, at N = 100 against N = 10: lower (global, local); local against global: at N = 10 lower, at",
        "2.10",
        "read from a figure",
        "7.49",
        "No trial of this page has a network and an N of the paper",
        "A note.",
        "ditlab study run an2024/fig6",
    ):
        assert words in page, words
    assert len(page) < 10e6
    folder = tmp_path / "studies" / "an2024-fig6-small"
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert float(rows[0]["gap"]) == pytest.approx(2.0)
    assert rows[0]["best_step"] == "10"
    table = json.loads((folder / "table.json").read_text())
    assert table["sentences"] == result["sentences"]
    assert {p.name for p in (folder / "figures").iterdir()} >= {"gap-bars.png", "differences.png", "psnr-curves.png"}
    # The same records make the same page.
    assert ditlab(tmp_path, "study", "report", "an2024/fig6").status == 0
    assert (tmp_path / result["report"]).read_text() == page


def test_the_first_screen_answers_the_question(tmp_path):
    """One verdict that follows from the intervals, a row with intervals for each kind at each N, one figure."""
    made = plan()
    (screen,) = StudyPage(STUDIES["an2024/fig6"], [made], filled(tmp_path, made)).first_screens()
    (sentence,) = screen.sentences
    assert sentence == (
        "Average PSNR gap, at N = 100 against N = 10: lower (global, local); local against global: at N = 10 lower, at "
        "N = 100 no difference seen."
    )
    assert [row[:2] for row in screen.table.rows] == [(kind, n) for n in (10, 100) for kind in ("global", "local")]
    assert screen.table.rows[0][2:] == ("22.10\n21.85 to 22.35", "20.00\n20.00 to 20.00", "2.10\n1.85 to 2.35")
    assert len(screen.pictures) == 1
    (empty,) = StudyPage(STUDIES["an2024/fig6"], [made], Store(tmp_path / "empty")).first_screens()
    assert empty.sentences == ["0 of 12 trials are on record (3 paired seeds)."]
    assert not empty.pictures


@pytest.mark.slow
def test_pages_of_empty_and_half_empty_studies(ditlab, tmp_path):
    made = plan()
    filled(tmp_path / "studies", made, tuple(c["hash"] for c in made.trials))
    assert ditlab(tmp_path, "study", "report", "an2024/fig6").status == 0
    page = (tmp_path / "studies" / "an2024-fig6-small" / "report.html").read_text()
    assert page.count("<td>empty</td>") == 12
    assert "Nothing is on record." in page
    filled(tmp_path / "studies", made, tuple(c["hash"] for c in made.trials if c["seed"] > 0))
    done = ditlab(tmp_path, "study", "report", "an2024/fig6")
    assert done.status == 0, done.err
    page = (tmp_path / "studies" / "an2024-fig6-small" / "report.html").read_text()
    assert page.count("<td>empty</td>") == 8
    assert "4 of 12 trials are on record" in page


def test_several_scales_on_one_page(ditlab, tmp_path):
    from dataclasses import replace

    made = plan()
    filled(tmp_path / "studies", made, tuple(c["hash"] for c in made.trials))
    other = replace(made, scale="paper", plans={"global": "global", "local": "5,g*3"})
    other.save(tmp_path / "studies" / "an2024-fig6-paper")
    done = ditlab(tmp_path, "study", "report", "an2024/fig6", "--scale", "small", "paper")
    assert done.status == 0, done.err
    page = (tmp_path / "studies" / "an2024-fig6-small" / "report.html").read_text()
    assert len(set(re.findall(r'<section id="(cells[^"]*)"', page))) == 2
    headings = re.findall(r"<h2[^>]*>(Trials of the grid.*?)</h2>", page)
    assert [h.rpartition(", ")[2] for h in headings] == ["scale small)", "scale paper)"]


def test_what_belongs_to_a_claim(tmp_path):
    """That local attention lowers the gap is answered with its control beside it."""
    made = plan()
    page = StudyPage(STUDIES["an2024/fig6"], [made], filled(tmp_path, made))
    (claims,) = [section for section in page.sections() if section.id == "claims"]
    lowers = next(part for part in claims.parts if "lowers the gap" in part.title)
    starts = ("Full measurement of the gap", "Gap at equal steps along", "Gap at matched train PSNR along")
    assert len(lowers.points) == len(starts)
    for line, start in zip(lowers.points, starts, strict=True):
        assert line.startswith(start)


def test_published_values_have_a_source_and_a_certainty():
    six = published("an2024/fig6")
    assert six is not None
    assert len([v for v in six.values if v["source"] == "Fig. 6"]) == 72
    for row in (*six.values, *six.settings, *six.claims):
        assert row["certainty"] in six.certainty
        assert row["source"]
    found = six.value(images="CelebA", network="dit-s/1", attention="local", n=10_000, quantity="gap")
    assert found is not None
    assert (found["value"], found["unit"]) == (1.73, "dB")
    assert published("an2024/fig99") is None
    assert published("nobody/fig1") is None


def test_what_differs_from_the_paper():
    six = published("an2024/fig6")
    assert six is not None
    here = settings_here(plan(), "dit-nano/1")
    assert here["windows"] == "3 in layers 1 of 4"
    rows = {name: (there, now) for name, there, _, now in differing(six, plan(), "dit-nano/1")}
    assert rows["training.steps"] == ("400,000", "30")
    assert rows["training.lr"] == ("0.0001", "0.001")
    assert rows["network.width"] == ("252 (dit-xs/1), 384 (dit-s/1)", "64")
    assert "seeds" not in rows
    assert "objective.schedule" not in rows
    (test,) = [setting for setting in six.settings if setting["name"] == "data.test"]
    assert test["certainty"] == "inferred"
