"""The model: its special cases, its causality, its padding, what it keeps in memory."""

import gc
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from pldr_model.config import ModelConfig
from pldr_model.convert import to_reference
from pldr_model.decode.decoder import Decoder
from pldr_model.loss import cross_entropy
from pldr_model.model import PLDRModel, is_metric_parameter, load_g_file, to_constant_g

REAL_G = Path("/work/shared/reference/PLDRv51-110M-1.G_LM.safetensors")


def random_ids(config, batch, length):
    return torch.randint(4, config.vocab_size, (batch, length))


def plain_sdpa_decoder(model, ids):
    """A post-norm SDPA decoder written from the equations: explicit scores, softmax and rotation matrices."""
    config, state = model.config, model.state_dict()
    H, K, D, S = config.num_heads, config.head_dim, config.d_model, ids.shape[1]

    def linear(x, name, part=0, parts=1):
        weight = state[f"{name}.weight"].chunk(parts)[part]
        return x @ weight.T + state[f"{name}.bias"].chunk(parts)[part]

    def norm(x, name):
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.pow(2).mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def glu(x, name):
        gate = linear(x, f"{name}.w12", 0, 2)
        return linear(gate * gate.sigmoid() * linear(x, f"{name}.w12", 1, 2), f"{name}.w3")

    def rotate(x):
        out = torch.empty_like(x)
        for pair in range(K // 2):
            first, second = (2 * pair, 2 * pair + 1) if config.rope_style == "interleaved" else (pair, pair + K // 2)
            for position in range(S):
                angle = position * config.rope_base ** (-2 * pair / K)
                c, s = math.cos(angle), math.sin(angle)
                a, b = x[:, :, position, first], x[:, :, position, second]
                out[:, :, position, first], out[:, :, position, second] = c * a - s * b, s * a + c * b
        return out

    x = norm(state["embedding.weight"][ids] * math.sqrt(D), "embedding_norm")
    for i in range(config.num_layers):
        name = f"layers.{i}"
        q, k, v = (linear(x, f"{name}.attention.qkv", part, 3).view(-1, S, H, K).transpose(1, 2) for part in range(3))
        scores = rotate(q) @ rotate(k).mT / math.sqrt(K)
        scores = scores.masked_fill(torch.ones(S, S).triu(1).bool(), float("-inf"))
        heads = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, S, D)
        h = norm(linear(heads, f"{name}.attention.output") + x, f"{name}.attention_norm")
        x = norm(glu(h, f"{name}.feed_forward") + h, f"{name}.feed_forward_norm")
    return linear(x, "output")


@pytest.mark.parametrize("style", ["interleaved", "half"])
def test_identity_g_is_a_plain_sdpa_decoder(style):
    config = ModelConfig(
        vocab_size=61, num_layers=2, num_heads=3, head_dim=6, context_length=32, g_source="identity", rope_style=style
    )
    model = PLDRModel(config).double()
    ids = random_ids(config, 2, 20)
    with torch.no_grad():
        assert (model(ids) - plain_sdpa_decoder(model, ids)).abs().max() < 1e-12
        # The product with the identity that is left out changes nothing.
        assert (model(ids) - model(ids, g_lm=model.g_lm)).abs().max() < 1e-12


def test_only_a_learned_g_sees_the_future(tiny):
    ids = random_ids(tiny, 1, 20)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 57 + 4
    model = PLDRModel(tiny)
    with torch.no_grad():
        g_lm = model.compute_g(ids)
        leak = (model(ids) - model(changed))[:, :-1].abs().max()
        cached = (model(ids, g_lm=g_lm) - model(changed, g_lm=g_lm))[:, :-1].abs().max()
        last = (model(ids, g_lm=g_lm) - model(changed, g_lm=g_lm))[:, -1].abs().max()
    assert leak > 1e-4
    assert cached == 0
    assert last > 1e-4


def test_given_g_is_the_models_own_when_it_is_the_same(tiny):
    model = PLDRModel(tiny).double()
    ids = random_ids(tiny, 3, 17)
    with torch.no_grad():
        logits, outputs = model(ids, return_outputs=True)
        g_lm = model.compute_g(ids)
        assert g_lm.shape == (2, 3, 2, 8, 8)
        assert torch.equal(g_lm, torch.stack([layer.G_LM for layer in outputs]))
        assert (model(ids, g_lm=g_lm) - logits).abs().max() < 1e-12
        # [L,H,K,K] is one G for all rows.
        shared = g_lm[:, 0]
        assert (model(ids, g_lm=shared) - model(ids, g_lm=shared[:, None].expand_as(g_lm))).abs().max() < 1e-12


def test_the_metric_learner_is_not_run_when_g_is_given(tiny):
    model = PLDRModel(tiny)
    ids = random_ids(tiny, 1, 5)
    g_lm = model.compute_g(ids)[:, 0].detach()
    calls = []
    for layer in model.layers:
        layer.attention.plga.register_forward_hook(lambda *_: calls.append(1))
    model(ids, g_lm=g_lm)
    assert calls == []
    model(ids)
    assert len(calls) == 2


def test_to_constant_g_drops_the_metric_learner_and_nothing_else(tiny):
    model = PLDRModel(tiny).double()
    ids = random_ids(tiny, 2, 9)
    g_lm = model.compute_g(ids)[:, 0].detach()
    constant = to_constant_g(model, g_lm)
    assert constant.config.g_source == "file"
    assert torch.equal(constant.g_lm, g_lm)
    assert not [name for name in constant.state_dict() if "plga" in name]
    with torch.no_grad():
        assert torch.equal(constant(ids), model(ids, g_lm=g_lm))
        assert torch.equal(constant.compute_g(ids), g_lm[:, None].expand(-1, 2, -1, -1, -1))
    constant.embedding.weight.data.zero_()
    assert model.embedding.weight.abs().max() > 0


def test_a_trained_constant_g_starts_as_the_sdpa_twin_and_then_is_a_model_of_that_g(tiny):
    config = ModelConfig.from_dict({**tiny.to_dict(), "g_source": "constant"})
    model, ids = PLDRModel(config).double(), random_ids(config, 2, 20)
    names = [name for name, _ in model.named_parameters() if "plga" in name]
    assert names == ["layers.0.attention.plga.G_LM", "layers.1.attention.plga.G_LM"]
    twin = PLDRModel(config.sdpa_twin()).double()
    twin.load_state_dict({n: t for n, t in model.state_dict().items() if n not in names})
    with torch.no_grad():
        assert (model(ids) - twin(ids)).abs().max() < 1e-12
    cross_entropy(model(ids[:, :-1]), ids[:, 1:], pad_id=config.pad_id).backward()
    for layer in model.layers:
        assert layer.attention.plga.G_LM.grad.abs().min() > 0
        with torch.no_grad():
            layer.attention.plga.G_LM.add_(torch.randn(2, 8, 8))
    g_lm = model.constant_g().detach()
    changed = torch.cat((ids[:, :-1], 4 + (ids[:, -1:] - 3) % 57), dim=1)
    fixed = to_constant_g(model, g_lm)
    with torch.no_grad():
        assert torch.equal(model.compute_g(ids), g_lm[:, None].expand(-1, 2, -1, -1, -1))
        assert (model(ids) - fixed(ids)).abs().max() < 1e-12
        assert (model(ids) - twin(ids)).abs().max() > 1e-3
        assert (model(ids) - model(changed))[:, :-1].abs().max() == 0  # no leak, whatever G is
        assert (model(ids, g_lm=torch.zeros_like(g_lm)) - model(ids)).abs().max() > 1e-3  # a given G replaces it
        assert (Decoder.of(model).hidden(ids) - model.hidden(ids)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="return_outputs"):
        model(ids, return_outputs=True)
    with pytest.raises(ValueError, match="the reference has no trained constant G"):
        to_reference(model.state_dict(), config)


def test_a_start_near_the_identity_changes_a_and_b_a_and_no_other_weight(tiny):
    near = ModelConfig.from_dict({**tiny.to_dict(), "g_start": "identity"})
    torch.manual_seed(0)
    paper = PLDRModel(tiny)
    torch.manual_seed(0)
    model = PLDRModel(near)
    other = dict(paper.named_parameters())
    differ = {name for name, p in model.named_parameters() if not torch.equal(p, other[name])}
    assert differ == {f"layers.{i}.attention.plga.{name}" for i in (0, 1) for name in ("a", "b_a")}
    plga, before = model.layers[1].attention.plga, paper.layers[1].attention.plga
    assert torch.equal(plga.a, 0.1 * before.a) and torch.equal(plga.b_a, torch.eye(8).repeat(2, 1, 1))
    assert model.config.num_parameters() == tiny.num_parameters()
    ids = random_ids(tiny, 2, 20)
    eye = torch.eye(8)
    with torch.no_grad():
        apart = [(m.compute_g(ids) - eye).norm() / eye.norm() for m in (model, paper)]
    assert apart[0] < 0.2 * apart[1]


def test_random_g_comes_from_its_seed_alone(tiny):
    config = ModelConfig.from_dict({**tiny.to_dict(), "g_source": "random", "g_seed": 5})
    first = PLDRModel(config)
    torch.manual_seed(99)
    second = PLDRModel(config)
    assert torch.equal(first.g_lm, second.g_lm)
    assert not torch.equal(first.output.weight, second.output.weight)
    assert "g_lm" in first.state_dict()
    assert not torch.equal(first.g_lm, PLDRModel(ModelConfig.from_dict({**config.to_dict(), "g_seed": 6})).g_lm)


def test_g_file_is_read_and_its_faults_are_named(tiny, tmp_path):
    path = tmp_path / "g.safetensors"
    config = ModelConfig.from_dict({**tiny.to_dict(), "g_source": "file", "g_file": str(path)})
    g_lm = torch.randn(2, 2, 8, 8)
    save_file({"g_lm": g_lm}, path)
    assert torch.equal(PLDRModel(config).g_lm, g_lm)
    save_file({"g_lm": g_lm[:, :1].contiguous()}, path)
    with pytest.raises(
        ValueError, match=r"g\.safetensors: g_lm has shape \(2, 1, 8, 8\), the model needs \(2, 2, 8, 8\)"
    ):
        PLDRModel(config)
    save_file({"g_lm": g_lm.clone().fill_(float("nan"))}, path)
    with pytest.raises(ValueError, match=r"g\.safetensors: G_LM holds inf or NaN"):
        PLDRModel(config)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"g\.safetensors: cannot be read as safetensors"):
        PLDRModel(config)
    with pytest.raises(ValueError, match=r"^g_file: missing"):
        PLDRModel(tiny.with_constant_g())


@pytest.mark.skipif(not REAL_G.is_file(), reason="the published G_LM is not on this machine")
def test_published_g_fits_the_published_sizes():
    sizes = {"vocab_size": 32000, "num_layers": 5, "num_heads": 14, "head_dim": 64, "context_length": 1024}
    config = ModelConfig(**sizes, g_source="file", g_file=str(REAL_G))
    with torch.device("meta"):
        model = PLDRModel(config)
    assert model.g_lm.shape == (5, 14, 64, 64)
    assert load_g_file(REAL_G, config).isfinite().all()
    with pytest.raises(ValueError, match="the model needs"):
        load_g_file(REAL_G, ModelConfig(**{**sizes, "num_heads": 12}))


def test_padding_at_the_end_does_not_move_real_positions(tiny):
    """Keys that are padding are hidden; with a constant G the real positions are those of the unpadded row."""
    model = PLDRModel(tiny.sdpa_twin()).double()
    ids = random_ids(tiny, 1, 12)
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    with torch.no_grad():
        assert (model(padded)[:, :12] - model(ids)).abs().max() < 1e-12
        assert (model(ids, padded=True) - model(ids, padded=False)).abs().max() < 1e-12
        # At the padded positions the hidden keys matter, so padded=False must differ there.
        assert (model(padded)[:, 13:] - model(padded, padded=False)[:, 13:]).abs().max() > 1e-6


@pytest.mark.parametrize("g_source", ["learned", "identity"])
def test_rows_without_a_single_real_key_are_finite(tiny, g_source):
    model = PLDRModel(ModelConfig.from_dict({**tiny.to_dict(), "g_source": g_source}))
    ids = random_ids(tiny, 3, 10)
    ids[0] = 0
    ids[1, :4] = 0
    logits = model(ids)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


class _Shapes(TorchDispatchMode):
    """Records the shape of every tensor any operation makes, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return out


def test_no_tensor_is_quadratic_in_the_sequence(tiny):
    model, S = PLDRModel(tiny), 37
    with _Shapes() as shapes:
        model(random_ids(tiny, 2, S), padded=False).sum().backward()
    assert (2, S, 61) in shapes.seen
    assert not [shape for shape in shapes.seen if shape.count(S) > 1]


def test_nothing_deductive_is_kept_unless_asked(tiny):
    model = PLDRModel(tiny)
    ids = random_ids(tiny, 3, 10)

    def deductive_tensors():
        gc.collect()
        shapes = [tuple(o.shape) for o in gc.get_objects() if type(o) is torch.Tensor]
        return [shape for shape in shapes if shape in ((3, 2, 8, 8), (2, 8, 3, 8), (2, 8, 24))]

    with torch.no_grad():
        assert isinstance(model(ids), torch.Tensor)
        assert deductive_tensors() == []
        _, outputs = model(ids, return_outputs=True)
        assert deductive_tensors().count((3, 2, 8, 8)) == 8  # four of each layer
        assert outputs[1].A_P.shape == (3, 2, 8, 8)


def test_calls_that_cannot_be_answered_are_refused(tiny):
    model = PLDRModel(tiny)
    ids = random_ids(tiny, 2, 6)
    with pytest.raises(ValueError, match="over the context_length of 48"):
        model(random_ids(tiny, 1, 49))
    with pytest.raises(ValueError, match=r"g_lm: shape \(2, 8, 8\)"):
        model(ids, g_lm=torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match="return_outputs"):
        model(ids, g_lm=torch.zeros(2, 2, 8, 8), return_outputs=True)
    with pytest.raises(ValueError, match="return_outputs"):
        PLDRModel(tiny.sdpa_twin())(ids, return_outputs=True)


def test_metric_parameters_are_the_residual_units(tiny):
    names = [name for name, _ in PLDRModel(tiny).named_parameters()]
    metric = [name for name in names if is_metric_parameter(name)]
    assert len(metric) == 2 * 2 * (2 * 4 + 2)  # layers x units x (two GLUs of 4 tensors + norm of 2)
    assert not [name for name in metric if name.split(".")[-1] in ("W", "b", "P", "a", "b_a")]
    assert not [name for name in metric if "density_norm" in name or "feed_forward" in name]
