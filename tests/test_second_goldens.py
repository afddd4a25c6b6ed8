"""`pytest --goldens=DIR`: another set of golden numbers is read and followed, and a wrong number in it is noticed.

The second set is made of the first by changes whose effect is known without the original code: images in another order
and number, more classes, a further layer that adds nothing, scaled inputs of a homogeneous network, fewer cases.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

MODULES = ("test_dit", "test_bf_unet", "test_kernels", "test_patterns", "test_samplers", "test_gaussian")
"""Small ones, wherever they stand; together they read every kind of fixture."""
CLASSES, ORDER = 9, (5, 0, 8, 3, 1, 7, 2)
"""The second DiT has two classes more, and the first one's class k is called ORDER[k]."""


def relabelled(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Labels of the second DiT; the last one stays "no class"."""
    return torch.tensor([*ORDER[:classes], CLASSES])[labels]


def table_of_classes(rows: torch.Tensor, fill: float) -> torch.Tensor:
    """A label table, or its gradient, with rows where the second DiT has them."""
    table = torch.full((CLASSES + 1, rows.shape[1]), fill)
    table[relabelled(torch.arange(len(rows)), len(rows) - 1)] = rows
    return table


def every_image_twice(fixture) -> tuple[dict, dict]:
    """Golden 01_dit_a with a batch of eight, nine classes and a fourth block whose gates are closed."""
    config, tensors = dict(fixture.config), dict(fixture.tensors)
    classes, depth, batch = config["num_classes"], config["depth"], len(tensors["in.x"])
    rows = [1, 0, *range(2, batch)] * 2
    for key, value in fixture.tensors.items():
        if key in ("out.tokens_in", "out.block0"):
            tensors[key] = value[[1, 0]]
        elif key.startswith("out.grad."):
            tensors[key] = 2 * value
        elif "cfg" in key:  # conditional images, then the same without a class
            pair = [1, 0, *range(2, batch // 2)]
            tensors[key] = value[[*pair, *(batch // 2 + row for row in pair)]]
        elif key.startswith(("in.", "out")):
            tensors[key] = value[rows]
        elif key.startswith(f"w.blocks.{depth - 1}."):
            name = key.replace(f".{depth - 1}.", f".{depth}.", 1)
            tensors[name] = torch.zeros_like(value) if "adaLN" in key else value
    for key in ("in.y", "in.cfg_y"):
        tensors[key] = relabelled(tensors[key], classes)
    for key, fill in (
        ("w.y_embedder.embedding_table.weight", 3.0),
        ("out.grad.y_embedder.embedding_table.weight", 0.0),
    ):
        tensors[key] = table_of_classes(tensors[key], fill)
    return {"config": config | {"num_classes": CLASSES, "depth": depth + 1}}, tensors


def two_images(fixture) -> tuple[dict, dict]:
    """Golden 01_dit_b of its second and third image: sums over the batch are left out, the Jacobian is the second's."""
    tensors = {}
    for key, value in fixture.tensors.items():
        if key.startswith("w.") or "cfg" in key:
            tensors[key] = value
        elif key == "out.jacobian_sample2":
            tensors["out.jacobian_sample1"] = value[:40]
        elif not key.startswith("out.grad."):  # of inner layers, only the first two images are recorded
            tensors[key] = value[1:3]
    return {}, tensors


def one_sample(fixture) -> tuple[dict, dict]:
    """Golden 02_sampling of the second image, in some of its cases, for the second DiT's classes."""
    images, tensors = len(fixture["in.x_T"]), {}
    for key, value in fixture.tensors.items():
        if key.endswith(".traj"):
            # Guided loops record a batch of twice the images.
            tensors[key] = value[:, 1::images]
        elif key == "in.noise_seq":
            tensors[key] = value[:, 1:]
        else:
            tensors[key] = value[1:]
    tensors["in.y"] = relabelled(tensors["in.y"], len(ORDER))
    dropped = re.compile(r"linear\.dit\.ddpm_noise.*|linear\.blend\.ddim_on.*")
    return {}, {key: value for key, value in tensors.items() if not dropped.fullmatch(key)}


def three_terms(fixture) -> tuple[dict, dict]:
    """Golden 02_terms of three of its images and one of its schedules."""
    rows, batch = [4, 0, 3], len(fixture["in.t"])
    tensors = {key: value[rows] for key, value in fixture.tensors.items() if not key.startswith("linear.")}
    tensors["cosine.loss_mse.grad_model_output"] *= batch / len(rows)  # of the mean
    name = "fraction with dgll > -8"
    return {"values": fixture.values | {name: (tensors["dgll"] > -8).float().mean().item()}}, tensors


def brighter_jacobian(fixture) -> tuple[dict, dict]:
    """Golden 04_kad_unet_a, which is homogeneous, at a brighter image, and with every image of its batch twice."""
    tensors = dict(fixture.tensors)
    for key in ("in.x", "out.y", "out64.y", "out64.y_train"):  # the batch keeps its deviation
        tensors[key] = fixture[key][[2, 0, 1] * 2]
    tensors["in.x_jac"] = 6 * fixture["in.x_jac"]
    return {}, tensors


def another_shape(fixture) -> tuple[dict, dict]:
    """Golden 05_edm_samplers, whose denoiser is linear and sees each value alone, of doubled values in another shape."""
    shape, tensors = [2, 3, 16, 1], {}
    for key, value in fixture.tensors.items():
        if value.ndim >= 4:
            tensors[key] = 2 * value.reshape(*value.shape[:-4], *shape)
        elif key != "t_steps.ve.40":
            tensors[key] = value
    return {"config": fixture.config | {"latents_shape": shape}}, tensors


def three_heads(fixture) -> tuple[dict, dict]:
    """Golden 08_local_attention of one image, with another number and order of heads, without the largest window."""
    tensors = {}
    for key, value in fixture.tensors.items():
        if not key.endswith(".w7"):
            tensors[key] = value[:1, [0, 1, 0]] if value.ndim == 4 else value
    return {"config": fixture.config | {"B": 1, "heads": 3, "windows": [3, 5]}}, tensors


CHANGES = {
    "01_dit_a": every_image_twice,
    "01_dit_b": two_images,
    "02_sampling": one_sample,
    "02_terms": three_terms,
    "04_kad_unet_a": brighter_jacobian,
    "05_edm_samplers": another_shape,
    "08_local_attention": three_heads,
}
NEW_NAMES = {"01_dit_b": "01_dit_z"}
WRONG = {
    "out.t_emb": "test_embeddings",
    "out.y_tfloat": "test_output",
    "out64.y_train": "test_training_mode_equals_the_original",
    "out64.y_smallvar": "test_norm_epsilon",
    "out64.natten.w5": "test_outputs_equal_the_golden_ones",
    "mask.clipped.w3": "test_masks_equal_the_golden_ones",
    "linear.blend.ddim.clip_True.traj": "test_loops_go_through_the_published_states",
    "k0.3.edm_sampler.churn.18": "test_heun_equals_the_published_sampler",
    "cosine.post_mean": "test_forward_marginals_and_posterior",
}
"""A tensor in which one number is changed -> the tests that must fail, and no other."""


def write_set(golden, folder: Path) -> None:
    """Writes the second set; the goldens of other modules are not in it."""
    folder.mkdir()
    for name, change in CHANGES.items():
        fixture = golden(name)
        about, tensors = change(fixture)
        listed = {
            key: {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
            for key, value in tensors.items()
            if not key.startswith("w.")
        }
        path = folder / NEW_NAMES.get(name, name)
        path.with_suffix(".json").write_text(json.dumps({**fixture.about, **about, "tensors": listed}))
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path.with_suffix(".safetensors"))


def run(root: Path, folder: Path, results: Path) -> dict[str, list[tuple[str, str]]]:
    """Runs the golden tests of `MODULES` on a folder: outcome -> (module, test with its reason)."""
    paths = [str(path) for name in MODULES for path in (root / "tests").rglob(f"{name}.py")]
    assert len(paths) == len(MODULES)
    words = [sys.executable, "-m", "pytest", *paths, "-m", "golden", "--goldens", str(folder), "-q", "--tb=no"]
    words += ["-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={results}"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode in (0, 1), done.stdout + done.stderr
    outcomes: dict[str, list[tuple[str, str]]] = {"passed": [], "skipped": [], "failure": [], "error": []}
    for case in ElementTree.parse(results).iter("testcase"):
        module = case.attrib["classname"].rpartition(".")[2]
        for outcome in ("skipped", "failure", "error"):
            if (element := case.find(outcome)) is not None:
                outcomes[outcome].append((module, f"{case.attrib['name']}: {element.attrib['message']}"))
                break
        else:
            outcomes["passed"].append((module, case.attrib["name"]))
    return outcomes


@pytest.mark.slow
def test_another_set_is_followed_and_its_errors_are_noticed(committed_golden, tmp_path, pytestconfig):
    root, folder = pytestconfig.rootpath, tmp_path / "second"
    write_set(committed_golden, folder)
    outcomes = run(root, folder, tmp_path / "good.xml")
    assert (outcomes["failure"], outcomes["error"]) == ([], [])
    assert {module for module, _ in outcomes["passed"]} == set(MODULES)
    names = " ".join(name for _, name in outcomes["passed"])
    assert "01_dit_z" in names
    assert "01_dit_b" not in names
    assert "mask.natten.w7" not in names
    ((module, reason),) = outcomes["skipped"]
    assert module == "test_bf_unet"
    assert f"golden 04_kad_counts.json is not in {folder}" in reason

    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for key, value in tensors.items():
            if key in WRONG:
                value.view(-1)[-1] = ~value.view(-1)[-1] if value.dtype == torch.bool else value.view(-1)[-1] + 0.01
        save_file(tensors, path)
    outcomes = run(root, folder, tmp_path / "bad.xml")
    assert {module for module, _ in outcomes["failure"]} == set(MODULES)
    failed = sorted({re.split(r"[\[:]", name)[0] for _, name in outcomes["failure"]})
    assert failed == sorted(WRONG.values())
