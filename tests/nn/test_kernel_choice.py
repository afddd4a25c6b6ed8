import pytest
import torch

from ditlab.nn.kernel_choice import choose_kernel, processor, reached_share, tiles_choice
from ditlab.nn.patterns import Global, Partition, Window


def chosen(pattern, grid, dtype=torch.float32, *, grad=True, on="avx512-bf16", device="cpu", head_dim=64):
    return choose_kernel(pattern, grid, device=device, dtype=dtype, head_dim=head_dim, needs_grad=grad, on=on)


@pytest.mark.parametrize(("grid", "tile"), [((32, 32), (4, 32)), ((7, 5), (2, 3)), ((6, 10), (4, 4))])
@pytest.mark.parametrize("pattern", [Window(3), Window(5, "shift"), Window(9)])
def test_reached_is_what_tiles_reach(pattern, grid, tile):
    mask = pattern.mask(grid).view(*grid, *grid)
    keys = 0
    for row in range(0, grid[0], tile[0]):
        for column in range(0, grid[1], tile[1]):
            part = mask[row : row + tile[0], column : column + tile[1]]
            seen = part.any(0).any(0)
            keys += part.shape[0] * part.shape[1] * int(seen.any(1).sum() * seen.any(0).sum())
    assert reached_share(pattern, grid, tile) == pytest.approx(keys / (grid[0] * grid[1]) ** 2)


@pytest.mark.parametrize("on", ["amx", "avx512-bf16", "other"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_small_windows_on_large_grids_take_strips_everywhere(on, dtype, grad):
    assert chosen(Window(3), (32, 32), dtype, grad=grad, on=on).kernel == "tiles"
    assert chosen(Window(7), (64, 64), dtype, grad=grad, on=on).kernel == "tiles"


@pytest.mark.parametrize("on", ["amx", "avx512-bf16", "other"])
@pytest.mark.parametrize("grad", [True, False])
def test_float32_leaves_global_attention_and_tiny_grids_to_torch(on, grad):
    assert chosen(Global(), (32, 32), grad=grad, on=on).kernel == "sdpa"
    assert chosen(Window(13), (5, 7), grad=grad, on=on).kernel == "sdpa"
    assert chosen(Window(3), (8, 8), grad=grad, on=on).kernel == "sdpa"


def test_bfloat16_training_avoids_torchs_slow_backward_at_short_sequences():
    for on in ("amx", "avx512-bf16"):
        assert chosen(Global(), (8, 8), torch.bfloat16, on=on).kernel == "tiles"
    assert chosen(Global(), (32, 32), torch.bfloat16).kernel == "tiles"
    assert chosen(Global(), (32, 32), torch.bfloat16, on="amx").kernel == "sdpa"
    assert chosen(Global(), (32, 32), torch.bfloat16, on="other").kernel == "sdpa"


def test_wide_windows_in_bfloat16_training_follow_the_processor():
    assert chosen(Window(13), (32, 32), torch.bfloat16).kernel == "tiles"
    assert chosen(Window(9), (32, 32), torch.bfloat16, on="amx").kernel == "tiles"
    assert chosen(Window(13), (32, 32), torch.bfloat16, on="amx").kernel == "sdpa"


def test_flash_backward_never_follows_another_forward():
    for on in ("amx", "avx512-bf16", "other"):
        for dtype in (torch.float32, torch.bfloat16):
            for grid in ((8, 8), (12, 12), (16, 16), (32, 32), (64, 64)):
                for pattern in (Global(), Window(3), Window(9), Window(13, "shift")):
                    choice = chosen(pattern, grid, dtype, on=on)
                    if choice.forward and choice.backward and choice.backward.engine == "flash":
                        assert choice.forward.engine == "flash"


def test_cuda_takes_flex_for_windows_that_skip_blocks():
    assert chosen(Window(7), (32, 32), torch.bfloat16, device="cuda").kernel == "flex"
    assert chosen(Window(3), (8, 8), torch.bfloat16, device="cuda").kernel == "sdpa"
    assert chosen(Global(), (32, 32), torch.bfloat16, device="cuda").kernel == "sdpa"


@pytest.mark.parametrize("pattern", [Window(3), Partition(3)])
def test_what_has_no_strips_goes_to_torch(pattern):
    assert chosen(pattern, (32, 32), torch.float64).kernel == "sdpa"
    assert chosen(Partition(3), (32, 32)).kernel == "sdpa"
    assert chosen(pattern, (32, 32), device="mps").kernel == "sdpa"


def test_this_processor_has_a_class():
    assert processor() in ("amx", "avx512-bf16", "other")
    assert tiles_choice((8, 40), torch.float32).kernel == "tiles"
