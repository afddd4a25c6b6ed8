"""What does a step of sampling cost beside the network, ours against diffusers' pipelines?

Both sides get the same network, which gives back a constant tensor at once, the same number of steps and the same
batch, so that what is measured is the loop: the sampler's arithmetic, the noise, whatever is done around the network.
Ours is what `ditlab sample` runs, with noise that belongs to each image's own seed; theirs is the pipeline as it is
called, its progress bar off. Rounds are interleaved in one process; figures are medians over rounds.

    python benchmarks/sampling.py                       # 4x32x32 latents, batches of 1, 4 and 32: two minutes
    python benchmarks/sampling.py --batch 64 --shape 3 32 32 --json
    python benchmarks/sampling.py --device cuda

| case | theirs |
|---|---|
| ddpm | DDPMPipeline, DDPMScheduler with variance_type learned_range |
| ddim | DDIMPipeline, DDIMScheduler |
| dpm++2m | DDPMPipeline's loop with DPMSolverMultistepScheduler (dpmsolver++, order 2) |
| guided | DiTPipeline with guidance_scale 4, DDIMScheduler; ours guides three channels too |
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from clocks import clock
from ditlab.diffusion.guidance import guided
from ditlab.diffusion.guidance_config import GuidanceConfig
from ditlab.diffusion.network_denoisers import VPDenoiser
from ditlab.diffusion.samplers import DDIMConfig, DDPMConfig, DPMSolverConfig, ImageNoise, SamplerConfig, sample
from ditlab.diffusion.schedules import make_schedule

CASES = ("ddpm", "ddim", "dpm++2m", "guided")


class Constant(nn.Module):
    """The network of our side: what it was given to give back."""

    num_classes = 1000

    def __init__(self, output: Tensor, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.in_shape = shape
        self.output = nn.Parameter(output, requires_grad=False)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The constant."""
        return self.output


def ours(
    case: str, config: SamplerConfig, output: Tensor, batch: int, shape: tuple[int, int, int]
) -> Callable[[], Any]:
    """A function that draws a batch."""
    variance = "learned-range" if output.shape[1] > shape[0] else "fixed-small"
    denoiser = VPDenoiser(Constant(output, shape), make_schedule("linear", 1000), variance=variance)
    if case != "guided":
        return lambda: sample(denoiser, config, (noise := ImageNoise(range(batch), shape)).initial(), noise=noise).cpu()
    label = torch.arange(batch)
    guide = guided(denoiser, GuidanceConfig(scale=4.0, channels=3))
    return lambda: sample(guide, config, ImageNoise(range(batch), shape).initial(), label=label).cpu()


def theirs(case: str, steps: int, output: Tensor, batch: int, shape: tuple[int, int, int]) -> Callable[[], Any]:
    """A function that draws a batch with diffusers."""
    diffusers: Any = import_module("diffusers")
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

    class Model(ModelMixin, ConfigMixin):
        """The same constant, as a model of theirs."""

        @register_to_config
        def __init__(self, sample_size: int, in_channels: int, out_channels: int) -> None:
            super().__init__()
            self.output = nn.Parameter(output, requires_grad=False)

        def forward(self, sample: Tensor, timestep: Any, class_labels: Any = None) -> Any:
            """The constant."""
            return SimpleNamespace(sample=self.output)

    class Decoder(ModelMixin, ConfigMixin):
        """An autoencoder that does nothing."""

        @register_to_config
        def __init__(self, scaling_factor: float = 1.0) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1), requires_grad=False)  # a pipeline asks for its dtype

        def decode(self, z: Tensor) -> Any:
            """z."""
            return SimpleNamespace(sample=z)

    model = Model(shape[1], shape[0], output.shape[1])
    linear = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    ddim = diffusers.DDIMScheduler(**linear, clip_sample=False)
    if case == "guided":
        pipeline = diffusers.DiTPipeline(transformer=model, vae=Decoder(), scheduler=ddim)
        more = {"class_labels": list(range(batch)), "guidance_scale": 4.0, "output_type": "pt"}
    elif case == "ddim":
        pipeline, more = diffusers.DDIMPipeline(model, ddim), {"batch_size": batch, "output_type": "np"}
    else:
        scheduler = (
            diffusers.DDPMScheduler(**linear, variance_type="learned_range", clip_sample=False)
            if case == "ddpm"
            else diffusers.DPMSolverMultistepScheduler(**linear, algorithm_type="dpmsolver++", solver_order=2)
        )
        pipeline, more = diffusers.DDPMPipeline(model, scheduler), {"batch_size": batch, "output_type": "np"}
    pipeline = pipeline.to(output.device)
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(num_inference_steps=steps, **more)


def measure(case: str, batch: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a step of both, and their ratio."""
    device = torch.device(asked.device)
    channels, height, width = asked.shape
    shape = (channels, height, width)
    learned = case in ("ddpm", "guided")
    rows = 2 * batch if case == "guided" else batch
    generator = torch.Generator().manual_seed(0)
    output = 0.1 * torch.randn(rows, channels * (1 + learned), height, width, generator=generator).to(device)
    config: SamplerConfig = {
        "ddpm": DDPMConfig(steps=str(asked.steps)),
        "dpm++2m": DPMSolverConfig(steps=asked.steps),
    }.get(case, DDIMConfig(steps=str(asked.steps)))
    sides = {
        "ours": ours(case, config, output, batch, shape),
        "diffusers": theirs(case, asked.steps, output, batch, shape),
    }
    now = clock(device)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for _ in range(asked.rounds):
        for name, run in sides.items():
            start = now()
            run()
            found[name].append((now() - start) / asked.steps * 1e3)
    ratios = [mine / other for mine, other in zip(found["ours"], found["diffusers"], strict=True)]
    return {
        "case": case,
        "batch": batch,
        **{f"{name}_ms": statistics.median(times) for name, times in found.items()},
        "ratio": statistics.median(ratios),
    }


def main() -> None:
    """Measures the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 32])
    parser.add_argument("--shape", nargs=3, type=int, default=[4, 32, 32])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        import diffusers
    except ImportError:
        sys.exit('benchmarks/sampling.py: the peer is missing: pip install "ditlab[diffusers]"')
    device = torch.device(asked.device)
    about = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else torch.cpu.get_capabilities()["cpu_name"],
        "threads": asked.threads,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "images": "x".join(map(str, asked.shape)),
        "steps": asked.steps,
        "clock": f"medians of {asked.rounds} interleaved rounds",
        "command": " ".join(["python", "benchmarks/sampling.py", *sys.argv[1:]]),
    }
    if not asked.json:
        print("\n".join(f"{key}: {value}" for key, value in about.items()) + "\n")
    rows = []
    for case in asked.cases:
        for batch in asked.batch:
            rows.append(row := measure(case, batch, asked))
            if not asked.json:
                print(
                    f"{case:8} batch {batch:3}   ours {row['ours_ms']:.3f} ms a step   "
                    f"diffusers {row['diffusers_ms']:.3f} ms   ours / diffusers {row['ratio']:.2f}",
                    flush=True,
                )
    if asked.json:
        print(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
