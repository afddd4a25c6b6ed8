"""Products with a Jacobian against the original's matrix, closed forms and finite differences; the model is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ditlab.analyses.jacobian import operator as jacobian_operator
from ditlab.analyses.jacobian.operator import JacobianOperator
from ditlab.diffusion.baselines import EmpiricalBayesDenoiser, WienerDenoiser
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.guidance import GuidanceConfig, guided
from ditlab.diffusion.network_denoisers import BlindDenoiser, EDMDenoiser, VPDenoiser
from ditlab.diffusion.noise_levels import LevelRange
from ditlab.diffusion.schedules import make_schedule
from ditlab.errors import DitlabError
from ditlab.interop.diffusers_models import open_diffusers
from ditlab.networks.bf_cnn import BFCNN, BFCNNConfig
from ditlab.networks.bf_unet import BFUNet, BFUNetConfig
from ditlab.networks.dit import DiT, DiTConfig
from ditlab.networks.unet import UNet, UNetConfig
from ditlab.nn import kernels
from ditlab.rng import torch_generator

SHAPE = (2, 4, 4)
SIZE = 32
SIGMA = 0.4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch_generator(seed, "test"), dtype=torch.float64)


def stirred(network: nn.Module, spread: float = 0.1) -> nn.Module:
    """With weights that are neither zero nor one anywhere, in evaluation mode."""
    generator = torch_generator(1, "stirred")
    with torch.no_grad():
        for value in network.parameters():
            value.add_(spread * torch.randn(value.shape, generator=generator))
    return network.eval()


def dit(**changes) -> DiT:
    config = DiTConfig(**{"image_size": (4, 4), "channels": 2, "width": 16, "depth": 2, "heads": 2, **changes})
    network = stirred(DiT(config))
    assert isinstance(network, DiT)
    return network


def vp(network: nn.Module) -> VPDenoiser:
    return VPDenoiser(network, make_schedule("linear", 1000))


LINEAR = draw(SIZE, SIZE) / SIZE**0.5


def linear(matrix: Tensor = LINEAR) -> Denoiser:
    """D(y) = A y, A not symmetric."""
    return Denoiser.wrap(lambda y, sigma, label: (y.flatten(1) @ matrix.to(y).T).reshape(y.shape), SHAPE)


def by_differences(denoiser: Denoiser, y: Tensor, sigma: float, label: Tensor | None = None) -> Tensor:
    """dD/dy, column by column, by central differences in float64."""
    step, columns = 1e-5, []
    with torch.no_grad():
        for direction in torch.eye(y.numel(), dtype=y.dtype):
            up, down = (denoiser(y + s * step * direction.reshape(y.shape), sigma, label) for s in (1, -1))
            columns.append((up - down).flatten() / (2 * step))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("mode", ["forward", "reverse", "auto"])
def test_the_matrix_of_the_original(golden, bf_unet_of, mode):
    kad = golden("04_kad_unet_a")
    # In units of its own, sigma 1: the estimated noise is what the network puts out.
    denoiser = BlindDenoiser(bf_unet_of(kad).double(), LevelRange(0.0, 2.0), low=-1.0, high=1.0)
    y, expected, tolerance = kad["in.x_jac"].double(), kad["out.J"].double(), kad.tolerance("out.J")
    residual = JacobianOperator(denoiser, y, 1.0, target="eps").matrix(50, mode)
    torch.testing.assert_close(residual, expected, rtol=0, atol=tolerance)
    clean = JacobianOperator(denoiser, y, 1.0).matrix(50, mode)
    identity = torch.eye(len(expected), dtype=torch.float64)
    torch.testing.assert_close(clean, identity - expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["forward", "reverse", "auto"])
def test_a_linear_denoiser_has_its_matrix(mode, dtype):
    operator = JacobianOperator(linear(), draw(1, *SHAPE).to(dtype), SIGMA)
    seen = []
    found = operator.matrix(5, mode, seen.append)
    assert found.dtype == dtype
    torch.testing.assert_close(found, LINEAR.to(dtype), rtol=0, atol=1e-6)
    assert seen == [5, 10, 15, 20, 25, 30, 32]
    v = draw(3, SIZE).to(dtype)
    torch.testing.assert_close(operator.forward(v), v @ LINEAR.to(dtype).T, rtol=0, atol=1e-5)
    torch.testing.assert_close(operator.reverse(v), v @ LINEAR.to(dtype), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_wiener_is_its_shrinkage(mode):
    denoiser = WienerDenoiser(draw(20, *SHAPE))
    shrinkage = denoiser.variances / (denoiser.variances + SIGMA**2)
    found = JacobianOperator(denoiser, draw(1, *SHAPE), SIGMA).matrix(8, mode)
    torch.testing.assert_close(found, (denoiser.basis * shrinkage) @ denoiser.basis.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_empirical_bayes_is_the_covariance_of_its_weights(mode):
    images, y = 0.5 * draw(6, *SHAPE), 0.5 * draw(1, *SHAPE, seed=1)
    sigma = 1.5
    found = JacobianOperator(EmpiricalBayesDenoiser(images, chunk=4), y, sigma).matrix(8, mode)
    flat = images.flatten(1)
    weights = (-(y.flatten(1) - flat).square().sum(1) / (2 * sigma**2)).softmax(0)
    assert weights.max() < 0.9  # several images matter
    centred = flat - weights @ flat
    torch.testing.assert_close(found, (centred.T * weights) @ centred / sigma**2, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(found).min() > -1e-12


NETWORKS = {
    "dit": lambda: vp(dit()),
    "dit of windows": lambda: vp(dit(attention="3,g")),
    "dit in patches": lambda: vp(dit(patch=2, image_size=(8, 8), block="cross-attention", learn_sigma=True)),
    "edm": lambda: EDMDenoiser(dit(learn_sigma=False)),
    "bf-cnn": lambda: BlindDenoiser(
        stirred(BFCNN(BFCNNConfig(image_size=(4, 4), channels=2, width=6, depth=4))), LevelRange(0.0, 2.0)
    ),
    "bf-unet": lambda: BlindDenoiser(
        stirred(BFUNet(BFUNetConfig(image_size=(4, 4), channels=2, width=4, blocks=1))), LevelRange(0.0, 2.0)
    ),
    "unet": lambda: VPDenoiser(
        stirred(
            UNet(
                UNetConfig(
                    image_size=(4, 4),
                    channels=2,
                    width=8,
                    res_blocks=1,
                    multipliers=(1, 2),
                    attention_at=(4,),
                    heads=2,
                    groups=4,
                )
            )
        ),
        make_schedule("linear", 1000),
        variance="fixed-small",
    ),
    "multihead attention": lambda: Denoiser.wrap(stirred(ExternalModel()), SHAPE),
}


class ExternalModel(nn.Module):
    """A user's own network, with torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(2, 8), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, y: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        """Attends over pixels."""
        tokens = self.widen(y.flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.narrow(nn.functional.gelu(tokens)).transpose(1, 2).reshape(y.shape)


def check_by_differences(denoiser: Denoiser, label: Tensor | None = None) -> None:
    module = denoiser.module
    assert module is not None
    module.double()
    y = 0.5 * draw(1, *denoiser.shape)
    # A level of the process itself, so that both sides are told one time.
    sigma = float(denoiser.levels.nearest(SIGMA)) if hasattr(denoiser.levels, "nearest") else SIGMA
    expected = by_differences(denoiser, y, sigma, label)
    operator = JacobianOperator(denoiser, y, sigma, label)
    assert expected.std() > 1e-3
    for mode in ("forward", "reverse"):
        torch.testing.assert_close(operator.matrix(16, mode), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_with_finite_differences(name):
    check_by_differences(NETWORKS[name]())


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_models_of_diffusers_agree_with_finite_differences(diffusers_folder, kind):
    small = {} if kind == "dit" else {"in_channels": 2, "out_channels": 2}
    folder = diffusers_folder(kind, sample_size=4, **small)
    denoiser = open_diffusers(str(folder)).denoiser
    check_by_differences(denoiser, torch.tensor([3]) if kind == "dit" else None)


def test_guided_denoisers_work_too():
    denoiser = vp(dit(num_classes=3))
    check_by_differences(guided(denoiser, GuidanceConfig(scale=2.0)), torch.tensor([1]))


def test_float32_agrees_with_float64_whatever_kernel_attends():
    denoiser = vp(dit(image_size=(8, 8), attention="3,g"))
    y = draw(1, 2, 8, 8)
    rough = JacobianOperator(denoiser, y.float(), 0.5)
    forward, reverse = rough.matrix(16, "forward"), rough.matrix(16, "reverse")
    denoiser.network.double()
    exact = JacobianOperator(denoiser, y, 0.5).matrix(16, "reverse").float()
    for found in (forward, reverse):
        torch.testing.assert_close(found, exact, rtol=0, atol=2e-5)


def test_the_targets_are_affine_in_one_another():
    denoiser, y = vp(dit()), 0.5 * draw(1, *SHAPE)
    denoiser.network.double()
    sigma = denoiser.levels.nearest(SIGMA)
    of = {t: JacobianOperator(denoiser, y, sigma, target=t) for t in ("x0", "eps", "I-eps")}
    identity, factor = torch.eye(SIZE, dtype=torch.float64), 1 / (sigma * float(denoiser.scale(sigma)))
    assert factor != pytest.approx(1 / sigma, rel=1e-2)
    x0 = of["x0"].matrix(mode="reverse")
    for mode in ("forward", "reverse"):
        torch.testing.assert_close(of["eps"].matrix(mode=mode), factor * (identity - x0), rtol=0, atol=1e-9)
        torch.testing.assert_close(
            of["I-eps"].matrix(mode=mode), identity - factor * (identity - x0), rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("target", ["x0", "eps", "I-eps"])
def test_the_function_is_what_the_matrix_is_the_derivative_of(target):
    denoiser = vp(dit())
    denoiser.network.double()
    y, step = 0.5 * draw(1, *SHAPE), 1e-6 * draw(1, *SHAPE, seed=2)
    sigma = denoiser.levels.nearest(SIGMA)
    operator = JacobianOperator(denoiser, y, sigma, target=target)
    change = operator.function(y + step) - operator.function(y - step)
    unit = 1.0 if target == "x0" else operator.scale
    torch.testing.assert_close(change, 2 * operator.forward(unit * step.reshape(1, -1))[0], rtol=1e-5, atol=1e-12)


def test_the_matrix_needs_no_second_derivative_in_reverse():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 3 * ctx.saved_tensors[0] ** 2 * grad

    denoiser, y = Denoiser.wrap(lambda y, sigma, label: Once.apply(y), SHAPE), draw(1, *SHAPE)
    operator = JacobianOperator(denoiser, y, SIGMA)
    for mode in ("auto", "reverse"):
        torch.testing.assert_close(operator.matrix(mode=mode), torch.diag(3 * y.flatten() ** 2))
    with pytest.raises(DitlabError, match=r"second derivative.*reverse mode"):
        operator.matrix(mode="forward")


def test_a_backward_pass_that_torch_does_not_see_is_refused_forward():
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return torch.from_numpy(2 * grad.detach().numpy())

    # Its products with J would be those of y alone, without a word.
    denoiser = Denoiser.wrap(lambda y, sigma, label: y + Hidden.apply(y), SHAPE)
    operator = JacobianOperator(denoiser, draw(1, *SHAPE), SIGMA)
    torch.testing.assert_close(operator.matrix(), 3 * torch.eye(SIZE, dtype=torch.float64))
    with pytest.raises(DitlabError, match="do not agree"):
        operator.forward(draw(1, SIZE))


@pytest.mark.parametrize("mode", ["forward", "reverse", "auto"])
def test_what_fails_on_the_way_leaves_all_as_it_was(mode):
    network = dit()
    frozen = next(network.parameters()).requires_grad_(False)
    kept, before = network.forward, kernels._active

    def fail(*given, **named):
        kept(*given, **named)
        raise KeyError("half way")

    network.forward = fail
    with torch.no_grad(), pytest.raises(KeyError):
        JacobianOperator(vp(network), draw(1, *SHAPE).float(), SIGMA).matrix(mode=mode)
    assert [value.requires_grad for value in network.parameters()].count(False) == 1
    assert not frozen.requires_grad
    assert all(value.grad is None for value in network.parameters())
    # Neither gradients nor the choice of a kernel nor lean convolutions are left switched.
    assert torch.is_grad_enabled()
    assert torch.overrides._len_torch_function_stack() == 0
    assert kernels._active == before


def test_a_device_without_room_is_said():
    def full(y, sigma, label):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for mode in ("forward", "reverse", "auto"):
        with pytest.raises(DitlabError, match=r"memory of cpu does not hold .* smaller `chunk`"):
            JacobianOperator(Denoiser.wrap(full, SHAPE), draw(1, *SHAPE), SIGMA).matrix(mode=mode)


def test_the_graph_that_is_not_used_is_let_go():
    operator = JacobianOperator(vp(dit()), draw(1, *SHAPE).float(), SIGMA)
    best = operator.fastest()
    assert {which for which, _ in operator._graphs} == {best}


@pytest.mark.parametrize("which", ["forward", "reverse"])
@pytest.mark.parametrize("target", ["x0", "I-eps"])
def test_copies_of_the_image_give_the_products_of_one(which, target, monkeypatch):
    monkeypatch.setattr(jacobian_operator, "_GAIN", float("inf"))
    network = dit(num_classes=3, attention="3,g").double()
    operator = JacobianOperator(vp(network), draw(1, *SHAPE), SIGMA, torch.tensor([1]), target)
    vectors, product = draw(21, SIZE), getattr(operator, which)
    # The first call finds out how many; none of the 21 is left out or given twice.
    for _ in range(2):
        torch.testing.assert_close(product(vectors, together=True), product(vectors), rtol=1e-12, atol=1e-12)
    assert operator._copies == {which: 8}
    assert sorted(operator._graphs) == [(which, 1), (which, 8)]
    assert operator.products == 4 * 21


def test_one_by_one_where_copies_are_not_faster(monkeypatch):
    monkeypatch.setattr(jacobian_operator, "_GAIN", 0.0)
    operator = JacobianOperator(linear(), draw(1, *SHAPE), SIGMA)
    torch.testing.assert_close(operator.matrix(mode="reverse"), LINEAR)
    assert operator._copies == {"reverse": 1}
    assert list(operator._graphs) == [("reverse", 1)]


def mixing(y, sigma, label):
    """Images of a batch see each other, as those of no denoiser should."""
    return y * y.mean(0, keepdim=True)


def one_alone(y, sigma, label):
    return (LINEAR @ y.reshape(SIZE)).reshape(1, *SHAPE)


def asserting(y, sigma, label):
    assert len(y) == 1
    return (y.flatten(1) @ LINEAR.T).reshape(y.shape)


def sparse(y, sigma, label):
    """Keeps a matrix that has no storage, so that the size of its graph is not known."""
    return torch.sparse.mm(LINEAR.to_sparse(), y.flatten(1).T).T.reshape(y.shape)


def gradient(y, sigma, label):
    """A gradient by `torch.func`, which does not let hooks see what is saved."""
    inner = torch.func.grad(lambda x: (x.flatten() @ (LINEAR + LINEAR.T) @ x.flatten()).sum() / 2)
    return torch.func.vmap(inner)(y)


@pytest.mark.parametrize("function", [mixing, one_alone, asserting, sparse, gradient])
@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_denoisers_that_do_not_go_with_copies_are_run_on_one_image(function, mode, monkeypatch):
    monkeypatch.setattr(jacobian_operator, "_GAIN", float("inf"))
    denoiser, y = Denoiser.wrap(function, SHAPE), draw(1, *SHAPE)
    others = {mixing: torch.diag(2 * y.flatten()), gradient: LINEAR + LINEAR.T}
    expected = others.get(function, LINEAR)
    torch.testing.assert_close(JacobianOperator(denoiser, y, SIGMA).matrix(mode=mode), expected)


def test_copies_that_would_not_fit_are_not_made(monkeypatch):
    monkeypatch.setattr(jacobian_operator, "_GAIN", float("inf"))
    # A cube keeps its y, a square too: 32 values of 8 bytes more.
    denoiser, less = (Denoiser.wrap(f, SHAPE) for f in (lambda y, s, _: (y**3) ** 2, lambda y, s, _: y**3))
    needed, fewer = (JacobianOperator(one, draw(1, *SHAPE), SIGMA)._graph_bytes("reverse") for one in (denoiser, less))
    assert needed == fewer + SIZE * 8
    # Eight copies in half of what is free.
    for free, copies in ((16 * needed, 8), (16 * needed - 1, 1), (None, 8)):
        monkeypatch.setattr(jacobian_operator, "available_memory", lambda free=free: free)
        operator = JacobianOperator(denoiser, draw(1, *SHAPE), SIGMA)
        operator.matrix(mode="reverse")
        assert operator._copies == {"reverse": copies}


@pytest.mark.parametrize("attention", ["g,g", "3,3"])
def test_the_memory_of_a_second_derivative_counts_the_scores_of_plain_attention(attention):
    """Which the kernel of the first derivative keeps nothing of; 256 tokens have many."""
    shape = (2, 16, 16)
    operator = JacobianOperator(vp(dit(image_size=shape[1:], attention=attention)), draw(1, *shape).float(), SIGMA)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = operator._forward_graph()
    assert 0.5 < sum(kept.values()) / (3 * operator._graph_bytes("forward")) < 1.2
    assert graph[0].requires_grad


def test_weights_are_not_counted_as_memory_of_the_graph():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(SIZE, SIZE)

        def forward(self, y, sigma, label):
            return self.linear(y.flatten(1)).reshape(y.shape)

    denoiser = Denoiser.wrap(Flat().double().eval(), SHAPE)
    # The weights alone are 8 kB, and its derivative by them would keep y.
    assert JacobianOperator(denoiser, draw(1, *SHAPE), SIGMA)._graph_bytes("reverse") <= 2 * SIZE * 8


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_model_is_left_as_it_was(surroundings):
    denoiser = vp(dit(attention="3,g"))
    network = denoiser.network
    frozen = next(network.parameters())
    frozen.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    wanted = {name: value.requires_grad for name, value in network.named_parameters()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in network.modules()]
    with surroundings():
        y = draw(1, *SHAPE).float()
        operator = JacobianOperator(denoiser, y, SIGMA)
        operator.matrix(8, "forward"), operator.matrix(8, "reverse")
        operator.function(y)
    assert y.grad is None
    assert not y.requires_grad
    assert all(value.grad is None for value in network.parameters())
    assert {name: value.requires_grad for name, value in network.named_parameters()} == wanted
    assert not any(module.training for module in network.modules())
    assert [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in network.modules()
    ] == hooks
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_compiled_networks_run_uncompiled():
    network = dit()
    y = draw(1, *SHAPE).float()
    expected = JacobianOperator(vp(network), y, SIGMA).matrix(mode="reverse")
    network.compile(backend="eager")
    found = JacobianOperator(vp(network), y, SIGMA)
    for mode in ("forward", "reverse"):
        torch.testing.assert_close(found.matrix(mode=mode), expected, rtol=0, atol=1e-5)


def detached(y: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
    return y.detach() * 0.5


def through_numpy(y: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
    return torch.from_numpy(y.detach().numpy() * 0.5)


@torch.inference_mode()
def without_gradients(y: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
    return y * 0.5


_WEIGHT = torch.ones((), dtype=torch.float64, requires_grad=True)


def by_weights_alone(y: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
    return y.detach() * _WEIGHT


@pytest.mark.parametrize("function", [detached, through_numpy, without_gradients, by_weights_alone])
@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_a_denoiser_without_gradients_is_refused(function, mode):
    with pytest.raises(DitlabError, match="expected a differentiable denoiser"):
        JacobianOperator(Denoiser.wrap(function, SHAPE), draw(1, *SHAPE), SIGMA).matrix(mode=mode)


def test_what_cannot_be_used_is_refused():
    denoiser = vp(dit())
    with pytest.raises(DitlabError, match="expected images 2x4x4"):
        JacobianOperator(denoiser, draw(1, 3, 4, 4).float(), SIGMA)
    with pytest.raises(DitlabError, match="noise level"):
        JacobianOperator(denoiser, draw(1, *SHAPE).float(), 1e9)
    denoiser.network.train()
    with pytest.raises(DitlabError, match="evaluation mode"):
        JacobianOperator(denoiser, draw(1, *SHAPE).float(), SIGMA)
    denoiser.network.eval()
    with torch.no_grad():
        next(denoiser.network.parameters()).fill_(torch.nan)
    for mode in ("forward", "reverse"):
        with pytest.raises(DitlabError, match=r"estimate at noise level 0.4 is not finite"):
            JacobianOperator(denoiser, draw(1, *SHAPE).float(), SIGMA).matrix(mode=mode)
    root = Denoiser.wrap(lambda y, sigma, label: y.abs().sqrt(), SHAPE)
    with pytest.raises(DitlabError, match=r"derivative at noise level 0.4 is not finite"):
        JacobianOperator(root, torch.zeros(1, *SHAPE), SIGMA).matrix(mode="reverse")


def test_weights_made_in_inference_mode_are_refused_with_a_sentence():
    with torch.inference_mode():
        network = dit()
    with pytest.raises(DitlabError, match=r"outside torch.inference_mode"):
        JacobianOperator(vp(network), draw(1, *SHAPE).float(), SIGMA).matrix(mode="reverse")
