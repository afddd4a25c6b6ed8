"""The layer under torch.compile, in a process of its own: there without the type checks, which the compiler cannot read."""

import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import sys
import torch
from ditlab.nn.attention import Global, Partition, SelfAttention, Window, attention_kernel

device = sys.argv[1]
torch.set_num_threads(1)


def run(module, x, bfloat16):
    x = x.detach().requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
        out = module(x).float()
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]


# The whole compiler for one case; for the others what comes before the generated code.
cases = (True, Window(3), "inductor"), (False, Window(3), "aot_eager"), (True, Global(), "aot_eager")
cases = [(*case, 36) for case in (*cases, (False, Partition(4), "aot_eager"))]
if device == "cpu":
    # A second width, without a reset: torch then takes that of the input for a symbol.
    cases.append((False, Window(3), "aot_eager", 34))
for bfloat16, pattern, backend, width in cases:
    torch.manual_seed(0)
    if width == 36:
        torch._dynamo.reset()
    layer = SelfAttention(width, 2, (32, 16), pattern).to(device)
    x = torch.randn(2, 512, width, device=device)
    with attention_kernel("math"):
        expected = run(layer, x, bfloat16)
    found = run(torch.compile(layer, fullgraph=True, backend=backend), x, bfloat16)
    for ours, reference in zip(found, expected, strict=True):
        error = (ours - reference).abs().max() / reference.abs().max()
        assert error <= (3e-2 if bfloat16 else 2e-5), (bfloat16, pattern, error)
print("all equal")
"""


def check(device):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, device], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all equal" in done.stdout


@pytest.mark.slow
def test_the_layer_compiles_without_a_graph_break_and_equals_math():
    check("cpu")


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_same_on_cuda_with_flex():
    check("cuda")
