"""The model on a GPU against fp64 on the CPU: passes, gradients, losses without whole logits, captured decoding."""

import pytest
import torch

from pipeline.bench.gpu import correct
from pipeline.bench.gpu.setting import TINY, Setting
from pipeline.bench.gpu.training.forms import forms_of
from pipeline.bench.gpu.training.steps import Plain
from pldr_model.config import ModelConfig
from pldr_model.decode.capture import WARM_UP
from pldr_model.linear_cross_entropy import linear_cross_entropy
from pldr_model.metric_learner import run_as_modules
from pldr_model.model import PLDRModel

pytestmark = pytest.mark.gpu

CONFIG = ModelConfig(
    vocab_size=211,
    num_layers=2,
    num_heads=3,
    head_dim=32,
    context_length=96,
    A_dff=40,
    num_reslayerA=2,
    g_start="identity",
)
VARIANTS = {"plga": CONFIG, "twin": CONFIG.sdpa_twin()}
# Of the loss and of the gradient's norm. New PLGA weights have ill-conditioned gradients: in bf16, on a CPU too, they are off
# by 25 to 190 % (four seeds, 2026-11-29), so that only their being finite is asked for.
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-2, 5e-2)}
TOLERANCE_OF_PLGA = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (1e-2, 10.0)}


@pytest.fixture(scope="module")
def ids_BS() -> torch.Tensor:
    return torch.randint(
        4, CONFIG.vocab_size, (3, CONFIG.context_length + 1), generator=torch.Generator().manual_seed(0)
    )


def loss_and_gradient(model: PLDRModel, ids_BS: torch.Tensor, **keywords) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = model(ids_BS[:, :-1], targets=ids_BS[:, 1:], padded=False, **keywords).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.double().cpu().flatten() for p in model.parameters()])


def rounded(config: ModelConfig, dtype: torch.dtype) -> PLDRModel:
    """A model in fp64 on the CPU whose weights are numbers of `dtype`, so that a difference is one of arithmetic."""
    torch.manual_seed(1)
    return PLDRModel(config).to(dtype).double()


@pytest.mark.parametrize("g_from", ["own", "batch"])
@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_loss_and_gradients_are_those_of_fp64_on_the_cpu(gpu, ids_BS, dtype, variant, g_from):
    if variant == "twin" and g_from == "batch":
        pytest.skip("a twin has no G to share")
    exact = rounded(VARIANTS[variant], dtype)
    expected, gradient = loss_and_gradient(exact, ids_BS, g_from=g_from)
    model = PLDRModel(VARIANTS[variant])
    model.load_state_dict(exact.state_dict())
    found, on_gpu = loss_and_gradient(model.to(gpu, dtype), ids_BS.to(gpu), g_from=g_from)
    of_loss, of_gradient = (TOLERANCE if variant == "twin" else TOLERANCE_OF_PLGA)[dtype]
    assert found == pytest.approx(expected, rel=of_loss)
    assert (on_gpu - gradient).norm() <= of_gradient * gradient.norm()


@pytest.mark.parametrize("rows", [None, 7])
def test_losses_in_chunks_are_those_of_fp64(gpu, rows):
    torch.manual_seed(2)
    x_ND, weight_VD, bias_V = torch.randn(50, 24), torch.randn(300, 24), torch.randn(300)
    target_N = torch.randint(0, 300, (50,))
    results = []
    for device, dtype in ((torch.device("cpu"), torch.float64), (gpu, torch.float32)):
        given = [each.to(device, dtype).requires_grad_() for each in (x_ND, weight_VD, bias_V)]
        losses = linear_cross_entropy(*given, target_N.to(device), ignore=0, z_loss=1e-3, rows=rows)
        losses.total.backward()
        results.append(
            [each.detach().double().cpu() for each in (losses.total, losses.nll_N, *(g.grad for g in given))]
        )
    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_captured_step_is_the_step_bit_for_bit_and_agrees_with_fp64(gpu):
    setting = Setting.of(device=gpu.type, tiny=True, reference=None)
    with torch.inference_mode():
        rows = list(correct.correct(setting))
    assert {row["form"] for row in rows} == set(correct.TOLERANCE)
    assert all(row["passed"] and row["captured_is_eager"] for row in rows), rows


def test_the_metric_learner_as_one_function_is_its_modules(gpu, ids_BS):
    fused, modules = (rounded(CONFIG, torch.float32).to(gpu) for _ in range(2))
    run_as_modules(modules)
    (one, gradient), (other, of_modules) = (loss_and_gradient(model, ids_BS.to(gpu)) for model in (fused, modules))
    assert one == pytest.approx(other, rel=1e-12)
    assert (gradient - of_modules).norm() <= 1e-9 * of_modules.norm()


def test_the_metric_learner_in_triton_is_its_modules(gpu, ids_BS, monkeypatch):
    pytest.importorskip("pldr_model.triton_metric_learner", reason="Triton is not installed, or there are no kernels")
    if gpu.type == "cpu":
        pytest.skip("Triton compiles for a GPU; tests/pldr_model/ has what its interpreter can check")
    monkeypatch.setenv("PLDR_METRIC_LEARNER", "triton")
    exact = rounded(CONFIG, torch.float32)
    expected, gradient = loss_and_gradient(exact, ids_BS)
    model = PLDRModel(CONFIG)
    model.load_state_dict(exact.state_dict())
    found, of_triton = loss_and_gradient(model.to(gpu), ids_BS.to(gpu))
    assert found == pytest.approx(expected, rel=1e-4)
    assert (of_triton - gradient).norm() <= 1e-2 * gradient.norm()


def test_a_captured_training_step_trains_like_the_step(gpu):
    form = forms_of(TINY)["plga"]
    plain, graph = (Plain(form, 2, gpu, graph=graph) for graph in (False, True))
    warmed_up = WARM_UP if gpu.type == "cuda" else 0  # steps that train, before the capture
    expected = [plain() for _ in range(warmed_up + 4)][warmed_up:]
    assert [graph() for _ in range(4)] == pytest.approx(expected, rel=1e-2) and expected[3] < expected[0]
