"""DiT against the original implementation's numbers (golden 01)."""

import pytest
import torch

from ditlab.errors import DitlabError
from ditlab.interop.original_dit import from_original
from ditlab.networks.dit import DiT, DiTConfig
from ditlab.nn import embeddings
from ditlab.nn.attention import attention_kernel
from ditlab.nn.embeddings import frequencies, sinusoid


def config_of(about: dict) -> DiTConfig:
    c = about["config"]
    return DiTConfig(
        image_size=(c["input_size"], c["input_size"]),
        channels=c["in_channels"],
        patch=c["patch_size"],
        width=c["hidden_size"],
        depth=c["depth"],
        heads=c["num_heads"],
        mlp_ratio=c["mlp_ratio"],
        num_classes=c["num_classes"],
        learn_sigma=c["learn_sigma"],
    )


@pytest.fixture(params=["01_dit_a", "01_dit_b"])
def case(request, golden):
    fixture = golden(request.param)
    return fixture, from_original(fixture.weights(), config_of(fixture.about)).eval()


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def original_frequencies(fixture) -> torch.Tensor:
    """The 128 float32 frequencies on the machine that made the fixture.

    float32 `exp` differs in the last bit between processors. Of our frequency and its two neighbours, the one whose
    angle at t = 999 gives the fixture's cosine and sine is the one that was used there.
    """
    row = fixture["out.t_freq"][fixture["in.t"] == 999].double()[0]
    ours = frequencies(128)
    up, down = torch.full_like(ours, 2.0), torch.zeros_like(ours)
    candidates = torch.stack([ours, ours.nextafter(up), ours.nextafter(down)])
    angles = (999 * candidates).double()
    errors = (angles.cos() - row[:128]).abs() + (angles.sin() - row[128:]).abs()
    return candidates.gather(0, errors.argmin(0)[None])[0]


@pytest.fixture
def same_exp(case, monkeypatch):
    """Lets the network use the frequencies of the fixture's machine, so that tolerances need no slack for them."""
    theirs = original_frequencies(case[0])
    monkeypatch.setattr(embeddings, "frequencies", lambda *_: theirs)


def test_frequencies_differ_by_the_last_bit_at_most(golden):
    fixture = golden("01_dit_a")
    torch.testing.assert_close(frequencies(128), original_frequencies(fixture), rtol=2**-23, atol=0)
    # An angle's last bit, and no more, separates the sinusoids: |t| 2^-23, doubled for the product's own rounding.
    bound = fixture["in.t"][:, None] * 2**-22 + 1e-7
    assert ((sinusoid(fixture["in.t"], 256) - fixture["out.t_freq"]).abs() <= bound).all()


@pytest.mark.usefixtures("same_exp")
def test_sinusoid(case):
    fixture, _ = case
    close(sinusoid(fixture["in.t"], 256), fixture["out.t_freq"], 1e-6)


@pytest.mark.usefixtures("same_exp")
def test_embeddings(case):
    fixture, network = case
    close(network.time(fixture["in.t"]), fixture["out.t_emb"], 1e-5)
    close(network.label(fixture["in.y"]), fixture["out.y_emb"], 1e-5)
    dropped = torch.where(fixture["in.force_drop_ids"] == 1, network.num_classes, fixture["in.y"])
    close(network.label(dropped), fixture["out.y_emb_forced"], 1e-5)


def test_first_block(case):
    fixture, network = case
    tokens = network.embed(fixture["in.x"][:2]).flatten(2).transpose(1, 2) + network.positions
    close(tokens, fixture["out.tokens_in"], 1e-5)
    c = fixture["out.t_emb"][:2] + fixture["out.y_emb"][:2]
    close(network.blocks[0](fixture["out.tokens_in"], c[:, None]), fixture["out.block0"], 1e-5)


@pytest.mark.parametrize("kernel", ["auto", "math", "sdpa"])
@pytest.mark.usefixtures("same_exp")
def test_output(case, kernel):
    fixture, network = case
    with attention_kernel(kernel):
        close(network(fixture["in.x"], fixture["in.t"], fixture["in.y"]), fixture["out.y"], 1e-5)
        close(network(fixture["in.x"], fixture["in.t_float"], fixture["in.y"]), fixture["out.y_tfloat"], 1e-5)


@pytest.mark.usefixtures("same_exp")
def test_output_float64(case):
    fixture, network = case
    network = network.double()
    close(network(fixture["in.x"].double(), fixture["in.t"], fixture["in.y"]), fixture["out64.y"], 1e-6)


@pytest.mark.usefixtures("same_exp")
def test_norm_epsilon(case):
    fixture, network = case
    with torch.no_grad():
        for tensor in (network.embed.weight, network.embed.bias, network.positions):
            tensor.mul_(1e-3)
    close(network(fixture["in.x"], fixture["in.t"], fixture["in.y"]), fixture["out.y_smallvar"], 1e-5)
    network.double()
    close(network(fixture["in.x"].double(), fixture["in.t"], fixture["in.y"]), fixture["out64.y_smallvar"], 1e-6)


@pytest.mark.usefixtures("same_exp")
def test_gradients(case):
    fixture, network = case
    network = network.double()
    x = fixture["in.x"].double().requires_grad_()
    (fixture["in.r"].double() * network(x, fixture["in.t"], fixture["in.y"])).sum().backward()
    found = {
        "out.grad_x": x.grad,
        "out.grad.blocks.0.attn.qkv.weight": network.blocks[0].attention.qkv.weight.grad,
        "out.grad.blocks.1.adaLN_modulation.1.bias": network.blocks[1].modulation.bias.grad,
        "out.grad.y_embedder.embedding_table.weight": network.label.table.weight.grad,
        "out.grad.t_embedder.mlp.0.bias": network.time.hidden.bias.grad,
        "out.grad.x_embedder.proj.weight": network.embed.weight.grad,
        "out.grad.final_layer.linear.bias": network.final.out.bias.grad,
    }
    for name, gradient in found.items():
        expected = fixture[name]
        close(gradient.float(), expected, 1e-4 * expected.abs().max().item())


def test_jacobian(golden):
    fixture = golden("01_dit_b")
    network = from_original(fixture.weights(), config_of(fixture.about)).double().eval()
    t, y = fixture["in.t"][2:3], fixture["in.y"][2:3]
    with attention_kernel("math"):
        jacobian = torch.func.jacrev(lambda x: network(x, t, y)[0, 0].flatten())(fixture["in.x"][2:3].double())
    expected = fixture["out.jacobian_sample2"]
    close(jacobian.reshape(64, 192).float(), expected, 1e-4 * expected.abs().max().item())


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
