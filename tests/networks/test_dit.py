"""DiT against the original implementation's numbers (golden 01)."""

import pytest
import torch

from ditlab.errors import DitlabError
from ditlab.interop.original_dit import modules_of
from ditlab.interop.original_files import original_name
from ditlab.networks.dit import DiT
from ditlab.networks.dit_config import DiTConfig
from ditlab.nn.attention import attention_kernel
from ditlab.nn.embeddings import frequencies, sinusoid

pytestmark = pytest.mark.goldens("01_dit_?")


@pytest.fixture
def case(golden_name, golden, dit_of):
    fixture = golden(golden_name)
    return fixture, dit_of(fixture)


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.fixture
def same_exp(case, use_frequencies):
    use_frequencies(case[0])


def test_frequencies_differ_by_the_last_bit_at_most(case, original_frequencies):
    fixture, _ = case
    t, waves = fixture["in.t"], fixture["out.t_freq"]
    width = waves.shape[1]
    torch.testing.assert_close(frequencies(width // 2), original_frequencies(t, waves), rtol=2**-23, atol=0)
    # An angle's last bit, and no more, separates the sinusoids: |t| 2^-23, doubled for the product's own rounding.
    assert ((sinusoid(t, width) - waves).abs() <= t[:, None] * 2**-22 + 1e-7).all()


@pytest.mark.usefixtures("same_exp")
def test_sinusoid(case):
    fixture, _ = case
    close(sinusoid(fixture["in.t"], fixture["out.t_freq"].shape[1]), fixture["out.t_freq"], 1e-6)


@pytest.mark.usefixtures("same_exp")
def test_embeddings(case):
    fixture, network = case
    tolerance = fixture.tolerance("out.*")
    close(network.time(fixture["in.t"]), fixture["out.t_emb"], tolerance)
    close(network.label(fixture["in.y"]), fixture["out.y_emb"], tolerance)
    dropped = torch.where(fixture["in.force_drop_ids"] == 1, network.num_classes, fixture["in.y"])
    close(network.label(dropped), fixture["out.y_emb_forced"], tolerance)


def test_first_block(case):
    fixture, network = case
    tolerance, count = fixture.tolerance("out.*"), len(fixture["out.tokens_in"])
    tokens = network.embed(fixture["in.x"][:count]).flatten(2).transpose(1, 2) + network.positions
    close(tokens, fixture["out.tokens_in"], tolerance)
    c = fixture["out.t_emb"][:count] + fixture["out.y_emb"][:count]
    close(network.blocks[0](fixture["out.tokens_in"], c[:, None]), fixture["out.block0"], tolerance)


@pytest.mark.parametrize("kernel", ["auto", "math", "sdpa"])
@pytest.mark.usefixtures("same_exp")
def test_output(case, kernel):
    fixture, network = case
    tolerance = fixture.tolerance("out.*")
    with attention_kernel(kernel):
        close(network(fixture["in.x"], fixture["in.t"], fixture["in.y"]), fixture["out.y"], tolerance)
        close(network(fixture["in.x"], fixture["in.t_float"], fixture["in.y"]), fixture["out.y_tfloat"], tolerance)


@pytest.mark.usefixtures("same_exp")
def test_output_float64(case):
    fixture, network = case
    result = network.double()(fixture["in.x"].double(), fixture["in.t"], fixture["in.y"])
    close(result, fixture["out64.y"], fixture.tolerance("out64.*"))


@pytest.mark.usefixtures("same_exp")
def test_norm_epsilon(case):
    fixture, network = case
    x, t, label = fixture["in.x"], fixture["in.t"], fixture["in.y"]
    with torch.no_grad():
        for tensor in (network.embed.weight, network.embed.bias, network.positions):
            tensor.mul_(1e-3)
    close(network(x, t, label), fixture["out.y_smallvar"], fixture.tolerance("out.*"))
    close(network.double()(x.double(), t, label), fixture["out64.y_smallvar"], fixture.tolerance("out64.*"))


@pytest.mark.usefixtures("same_exp")
def test_gradients(case):
    fixture, network = case
    network = network.double()
    x = fixture["in.x"].double().requires_grad_()
    (fixture["in.r"].double() * network(x, fixture["in.t"], fixture["in.y"])).sum().backward()
    results = {"out.grad_x": x.grad}
    modules = modules_of(network.config.depth)
    parameters = {original_name(name, modules): value for name, value in network.named_parameters()}
    for match in fixture.matches(r"out\.grad\.(.+)"):
        results[match[0]] = parameters[match[1]].grad
    for key, gradient in results.items():
        expected = fixture[key]
        close(gradient.float(), expected, fixture.tolerance("out.*", 1) * expected.abs().max().item())


@pytest.mark.goldens("01_dit_?", having="out.jacobian_sample*")
@pytest.mark.usefixtures("same_exp")
def test_jacobian(case):
    fixture, network = case
    network = network.double()
    for match in fixture.matches(r"out\.jacobian_sample(\d+)"):
        sample, expected = int(match[1]), fixture[match[0]]
        x, t, y = (fixture[f"in.{name}"][sample : sample + 1] for name in ("x", "t", "y"))
        with attention_kernel("math"):
            jacobian = torch.func.jacrev(network)(x.double(), t, y).reshape(-1, x.numel())
        # The first rows are recorded.
        difference = jacobian[: len(expected)].float() - expected
        assert difference.abs().max() <= fixture.tolerance("out.*", 1) * expected.abs().max()


def test_fresh_blocks_are_identities_and_output_is_zero():
    network = DiT(DiTConfig(image_size=(4, 6), width=16, depth=2, heads=2, attention="3,g"))
    tokens, c = torch.randn(2, 24, 16), torch.randn(2, 1, 16)
    assert torch.equal(network.blocks[0](tokens, c), tokens)
    assert torch.equal(network(torch.randn(2, 3, 4, 6), torch.zeros(2)), torch.zeros(2, 6, 4, 6))


def test_non_square_patches_land_where_they_came_from():
    """With an identity-like embedding and final layer the output is the input: rows, columns and patches in order."""
    network = DiT(DiTConfig(image_size=(4, 6), patch=2, width=12, depth=1, heads=1, learn_sigma=False))
    with torch.no_grad():
        network.embed.weight.zero_()
        for k in range(12):
            channel, row, column = k % 3, k // 6, k // 3 % 2
            network.embed.weight[k, channel, row, column] = 1
        network.positions.zero_()
        network.final.out.weight.copy_(torch.eye(12))
        network.final.norm = torch.nn.Identity()
    x = torch.randn(2, 3, 4, 6)
    close(network(x, torch.zeros(2)), x, 1e-6)


@pytest.mark.parametrize(("preset", "million"), [("xs", 14.02), ("s", 32.47)])
def test_published_sizes(preset, million):
    """An et al.'s pixel-space DiT-XS/1 and DiT-S/1 (spec 1.1), unconditional, without the fixed position table."""
    from ditlab.presets import preset as recipe

    with torch.device("meta"):
        network = DiT(recipe(f"dit-{preset}/1").network)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == million
    assert not any("label" in name for name, _ in network.named_parameters())


def test_no_label_means_the_null_class(case):
    fixture, network = case
    null = torch.full_like(fixture["in.y"], network.num_classes)
    x, t = fixture["in.x"], fixture["in.t"]
    assert torch.equal(network(x, t), network(x, t, null))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_size": (9, 8), "patch": 2}, "multiples of the patch 2, found \\(9, 8\\)"),
        ({"width": 62}, "multiple of 4"),
        ({"width": 64, "heads": 5}, "multiple of the 5 heads"),
        ({"attention": "4,g*11"}, "odd"),
        ({"attention": "3,g"}, "12"),
        ({"attention": "locale"}, "local"),
        ({"depth": 0}, "at least 1"),
        ({"num_classes": -1}, "num_classes"),
    ],
)
def test_configs_that_cannot_be(change, says):
    with pytest.raises(DitlabError, match=says):
        DiTConfig(**change)


def test_wrong_shapes_and_labels():
    network = DiT(DiTConfig(image_size=(4, 4), width=16, depth=1, heads=1, num_classes=3, null_class=False))
    with pytest.raises(DitlabError, match=r"\(3, 4, 4\), found \(3, 5, 4\)"):
        network(torch.zeros(1, 3, 5, 4), torch.zeros(1))
    with pytest.raises(DitlabError, match="no null class"):
        network(torch.zeros(1, 3, 4, 4), torch.zeros(1))
