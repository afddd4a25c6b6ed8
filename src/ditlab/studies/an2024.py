"""The studies of An et al., "On Inductive Biases That Enable Generalization of Diffusion Transformers" (2410.21273).

`an2024/fig6`: does the PSNR gap fall with the number of training images, and does local attention lower it? (Figs. 2
and 6.) `an2024/fig4`: does attention grow local with the number of training images? (Fig. 4.)
"""

from __future__ import annotations

from dataclasses import replace

from ditlab.analyses.attention.config import AttentionConfig
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.studies.grid import Scale, Study

SMOKE = Scale(
    networks={"dit-nano/1": {"network.depth": 3, "network.width": 32}},
    attention={"global": "global", "local": "3,5,g"},
    n=(10, 50),
    seeds=(0,),
    data=("digits",),
    size=8,
    settings={
        "data.test": 50,
        "training.steps": 60,
        "training.lr": 4e-3,
        "training.log_every": 20,
        "training.eval_every": 20,
        "training.save_every": 60,
        "evaluation.images": 10,
        "evaluation.levels": 5,
    },
    psnr=PSNRConfig(images=50, points=10),
    attention_maps=AttentionConfig(images=4),
    cost="a cell takes about 15 seconds on one CPU core; it shows that everything works, and nothing else",
)

SMALL = Scale(
    networks={"dit-nano/1": {"network.depth": 4, "network.width": 64}},
    attention={"global": "global", "local": "3,5,g*2"},
    n=(10, 30, 100, 300),
    seeds=(0, 1, 2),
    data=("photos",),
    size=16,
    settings={
        "data.test": 300,
        "training.steps": 1050,
        "training.batch_size": 8,
        "training.lr": 2e-3,
        "training.log_every": 50,
        "training.eval_every": 150,
        "training.save_every": 750,
        "evaluation.images": 40,
        "evaluation.levels": 10,
    },
    psnr=PSNRConfig(images=300, points=20),
    cost="a cell takes about three minutes of one CPU core, two of them training",
)

PAPER = Scale(
    networks={"dit-xs/1": {}, "dit-s/1": {}},
    attention={"global": "global", "local": "local"},
    n=(1_000, 10_000, 100_000),
    seeds=(0, 1, 2),
    size=32,
    settings={"data.test": 300, "training.steps": 400_000},
    cost="400,000 steps a cell: days of a large GPU",
)

FIG6 = Study(
    name="an2024/fig6",
    title="PSNR gap of global and local attention (An et al., Figs. 2 and 6)",
    question="Does the PSNR gap fall with the number of training images, and does local attention lower it?",
    scales={"smoke": SMOKE, "small": SMALL, "paper": PAPER},
    analyses=("psnr-gap", "attention"),
    asks=("falls", "full", "lowers", "matched", "best", "locality"),
    published="an2024/fig6",
    margin=0.2,
)

FIG4 = Study(
    name="an2024/fig4",
    title="Attention maps against the number of training images (An et al., Fig. 4)",
    question="Does the attention of a network with global attention grow local with the number of training images?",
    scales={name: replace(scale, attention={"global": "global"}) for name, scale in FIG6.scales.items()},
    analyses=("attention",),
    asks=("locality", "consistency"),
    published="an2024/fig4",
)

STUDIES: dict[str, Study] = {study.name: study for study in (FIG6, FIG4)}
"""Every study by name."""
