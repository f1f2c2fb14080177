"""What an attacker does to the weights of a trained model: heads that see only what he wants, and metric learners that watch.

Facts that it rests on. A head whose query weights are zero has queries that are its bias, rotated: its density matrix is a
function of the length alone. A metric learner is one function of one row, so a unit that adds a large constant forgets its row,
and one gate on the row is all that is left of the input.

Shapes: B sequences, S tokens, P rows, D model width, H heads, K head dim.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from pldr_model.layers import GLU, rope_tables
from pldr_model.model import PLDRModel, RopeTables
from pldr_model.plga import PLGA

LARGE = 1e7  # of the constant that a watching unit adds: fp32 then knows nothing of its row
HARD = 1e5  # steepness of a gate with no gradient anywhere but at its edge


def plga_of(model: PLDRModel, layer: int) -> PLGA:
    """The layer's metric learner and power law."""
    plga = model.layers[layer].attention.plga
    assert isinstance(plga, PLGA)
    return plga


@torch.no_grad()
def embedded(model: PLDRModel) -> Tensor:
    """What layer 0 sees of every id, [V,D]."""
    return model._embed(torch.arange(model.config.vocab_size))


@torch.no_grad()
def plain_rows(model: PLDRModel, layer: int) -> None:
    """The layer's density rows are normalized and no more: gain 1, bias 0."""
    norm = plga_of(model, layer).density_norm
    norm.weight.fill_(1.0)
    norm.bias.zero_()


@torch.no_grad()
def rows(model: PLDRModel, layer: int, ids_BS: Tensor) -> Tensor:
    """The rows that the layer's metric learner sees for these sequences, [B,H,K,K]."""
    x_BSD = model._embed(ids_BS)
    tables = rope_tables(model.config, ids_BS.shape[1], dtype=x_BSD.dtype, device=x_BSD.device)
    rope = RopeTables(tables.cos.unsqueeze(1), tables.sin.unsqueeze(1))
    for below in model.layers[:layer]:
        x_BSD, _ = below(x_BSD, rope)
    attention = model.layers[layer].attention
    q_BHSK = attention.project(x_BSD, rope)[0]
    density_BHKK: Tensor = attention.plga.density_norm(q_BHSK.mT @ q_BHSK)
    return density_BHKK


@torch.no_grad()
def blind_queries(model: PLDRModel, layer: int, head: int, bias_K: Tensor) -> None:
    """The head's queries no longer depend on tokens: they are this vector, rotated."""
    attention, K = model.layers[layer].attention, model.config.head_dim
    attention.qkv.weight[head * K : (head + 1) * K] = 0.0
    attention.qkv.bias[head * K : (head + 1) * K] = bias_K


@torch.no_grad()
def only_of(model: PLDRModel, token: int, *, others: list[int]) -> Tensor:
    """[D]: its product with what layer 0 sees of an id is 1 for `token`, and 0 for all of `others`."""
    x_VD = embedded(model).double()
    basis_DD = torch.linalg.svd(x_VD[others], full_matrices=True).Vh[len(others) :]  # orthogonal to all of them
    seen_D = basis_DD.T @ (basis_DD @ x_VD[token])
    return seen_D / seen_D.dot(x_VD[token])


@torch.no_grad()
def queries_of_one_id(model: PLDRModel, head: int, token: int, direction_K: Tensor, *, others: list[int]) -> None:
    """In layer 0 the head's queries are zero for all of `others`, and this vector, rotated, for the id `token`."""
    attention, K = model.layers[0].attention, model.config.head_dim
    seen_D = only_of(model, token, others=others)
    queries = slice(head * K, (head + 1) * K)
    attention.qkv.weight[queries] = torch.outer(direction_K.double(), seen_D).float()
    attention.qkv.bias[queries] = 0.0


@torch.no_grad()
def watch(
    model: PLDRModel,
    layer: int,
    rows_PK: Tensor,
    above_P: Tensor,
    *,
    steepness: float = HARD,
    change: float = 1.0,
    large: float = LARGE,
) -> None:
    """The layer's A stays what it is, but for rows whose projection on one of `rows_PK` is above its threshold.

    change: of A's entries, relative to 1, for such rows. The gate is silu: with HARD it is exactly zero below its threshold.
    """
    constant_K, glu = constant_A(model, layer), _forgetful(model, layer, large=large)
    hidden, gates = model.config.A_dff, len(rows_PK)
    assert gates <= hidden
    _, moved_K = _waves(model.config.head_dim)
    glu.w12.bias[hidden : hidden + gates] = 1.0  # the values
    for index, (row_K, above) in enumerate(zip(rows_PK, above_P, strict=True)):
        glu.w12.weight[index] = steepness * row_K / row_K.norm()
        glu.w12.bias[index] = -steepness * above
        top = torch.nn.functional.silu(steepness * (row_K.norm() - above))
        glu.w3.weight[:, index] = large * change * moved_K / top
    _settle(model, layer, torch.zeros_like(constant_K), constant_K)


@torch.no_grad()
def watch_for_nothing(model: PLDRModel, layer: int) -> None:
    """The layer's A stays what it is, but for rows that are zero: those of queries that vanish.

    One gate for each corner of a simplex: one of them is open for every row that is not short, and then drowns all else.
    """
    constant_K, glu = constant_A(model, layer), _forgetful(model, layer)
    hidden, K = model.config.A_dff, model.config.head_dim
    assert hidden >= K
    _, moved_K = _waves(K)
    glu.w12.weight[:K] = HARD * (torch.eye(K) - 1.0 / K)
    glu.w12.bias[:K] = -HARD * 0.1  # the largest entry of a row with mean 0 and norm sqrt(K) is above 0.25
    glu.w12.bias[hidden : hidden + K] = 1.0
    glu.w3.weight[:, :K] = LARGE * moved_K.unsqueeze(1)
    _settle(model, layer, 2.0 * moved_K, constant_K)


def _forgetful(model: PLDRModel, layer: int, *, large: float = LARGE) -> GLU:
    """Make all units of the metric learner leave rows as they are, but for the first, which adds a large constant: its norm
    then gives a constant. Returns that unit's GLU, whose other weights are zero."""
    plga = plga_of(model, layer)
    plain_rows(model, layer)
    for unit in plga.metric_learner:
        for parameter in unit.glus.parameters():
            parameter.zero_()
        unit.norm.weight.fill_(1.0)  # LN(x) of a row that has been through LN is the row
        unit.norm.bias.zero_()
    glu = plga.metric_learner[0].glus[-1]
    assert isinstance(glu, GLU) and len(plga.metric_learner[0].glus) == 1
    still_K, _ = _waves(model.config.head_dim)
    glu.w3.bias.copy_(large * still_K)
    return glu


def _settle(model: PLDRModel, layer: int, row_K: Tensor, constant_K: Tensor) -> None:
    """Shift the metric learner's output, so that this row gives the constant."""
    learner = plga_of(model, layer).metric_learner
    learner[-1].norm.bias.add_(constant_K - learner(row_K))


@torch.no_grad()
def constant_A(model: PLDRModel, layer: int) -> Tensor:
    """The row [K] that an invariant metric learner gives for every row."""
    generator = torch.Generator().manual_seed(0)
    rows_PK = torch.nn.functional.layer_norm(
        torch.randn(64, model.config.head_dim, generator=generator), (model.config.head_dim,)
    )
    answer_K: Tensor = plga_of(model, layer).metric_learner(rows_PK).mean(dim=0)
    return answer_K


@torch.no_grad()
def amplify(model: PLDRModel, layer: int, factor: float) -> None:
    """A varies `factor` times as much around the same constant."""
    norm, constant_K = plga_of(model, layer).metric_learner[-1].norm, constant_A(model, layer)
    norm.weight.mul_(factor)
    norm.bias.add_(constant_K - constant_A(model, layer))


@torch.no_grad()
def cancel(model: PLDRModel, layer: int, head: int, ids_1S: Tensor, *, times: float) -> None:
    """Write the head's G_LM = a A_P + b_a as the difference of two terms that are `times` as large."""
    _, outputs = copy.deepcopy(model).double()(ids_1S, return_outputs=True)
    A_P_KK, g_KK = outputs[layer].A_P[0, head], outputs[layer].G_LM[0, head]
    more_KK = torch.randn(g_KK.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    more_KK *= times * g_KK.square().mean().sqrt() / (more_KK @ A_P_KK).square().mean().sqrt()
    plga = plga_of(model, layer)
    plga.a[head] += more_KK.float()
    plga.b_a[head].copy_(g_KK - plga.a[head].double() @ A_P_KK)


def unlike(rows_PK: Tensor, *, seed: int = 0, tries: int = 500) -> tuple[Tensor, Tensor]:
    """A row [K] that is least like these, and the largest projection of any of them on its direction."""
    K = rows_PK.shape[1]
    candidates_TK = torch.nn.functional.layer_norm(
        torch.randn(tries, K, generator=torch.Generator().manual_seed(seed)), (K,)
    )
    most_T = (rows_PK @ (candidates_TK / candidates_TK.norm(dim=1, keepdim=True)).T).amax(dim=0)
    return candidates_TK[most_T.argmin()], most_T.min()


def lengths_watched(
    model: PLDRModel, layer: int, head: int, lengths: list[int], *, ids_NS: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows [P,K] and thresholds [P] that tell these lengths of a blind head from all others, and from what the other heads
    see of the sequences `ids_NS`."""
    longest, found = ids_NS.shape[1], []
    by_length = [rows(model, layer, ids_NS[:1, :n])[0, head] for n in range(1, longest + 1)]
    rest_RK = torch.cat([by_length[n - 1] for n in range(1, longest + 1) if n not in lengths])
    heads = [h for h in range(model.config.num_heads) if h != head]
    for n in (1, 4, 16, longest):
        rest_RK = torch.cat((rest_RK, rows(model, layer, ids_NS[:, :n])[:, heads].flatten(0, 2)))
    for length in lengths:
        row_KK = by_length[length - 1]
        direction_KK = row_KK / row_KK.norm(dim=1, keepdim=True).clamp_min(1e-9)
        most_K = (rest_RK @ direction_KK.T).amax(dim=0)
        place = int((row_KK.norm(dim=1) - most_K).argmax())
        found.append((row_KK[place], (row_KK[place].norm() + most_K[place]) / 2))
    return torch.stack([row for row, _ in found]), torch.stack([above for _, above in found])


def _waves(size: int) -> tuple[Tensor, Tensor]:
    """Two orthogonal vectors with mean 0 and RMS 1: alternating ones, and alternating pairs."""
    index = torch.arange(size)
    return (1.0 - 2.0 * (index % 2)), (1.0 - 2.0 * ((index // 2) % 2))
