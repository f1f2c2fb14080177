"""A G_LM that is a parameter (g_source `constant`), free or kept to a part of all matrices (`g_constraint`).

    none       G                        what all of G_LM can do without the input
    low_rank   I + U V^T                U, V [H,K,r]: plain attention and r directions more
    rotary     rotary_part(C)           what W_q can absorb: SDPA in another parametrization (rotary_part.py)
    nonrotary  I + M - rotary_part(M)   plain attention, and only what W_q cannot absorb

All start at G = I, and the model's other weights are drawn as those of its SDPA twin: V and M are zero, U is drawn apart.
Weight decay pulls the parameters to zero. So it pulls G itself to zero with `none` and `rotary`, as it pulls W_q, and to the
identity, plain attention, with `low_rank` and `nonrotary`.

Shapes: B batch, H heads, S sequence, K head dim, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pldr_model.config import ModelConfig
from pldr_model.layers import at_least_float32
from pldr_model.rotary_part import rotary_part


class ConstantG(nn.Module):
    """A G_LM [H,K,K] that is a parameter, invariant by construction; starts at the identity. Queries [B,H,S,K] -> q G_LM.

    The missing control of the papers: what of PLGA's effect is the bilinear form, and what its dependence on the input?
    A separate module in place of PLGA that maps queries to queries, so that ZeRO-3's hooks see it in both passes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, K, rank = config.num_heads, config.head_dim, config.g_rank
        self.config, self.constraint = config, config.g_constraint
        if self.constraint == "none":
            self.G_LM = nn.Parameter(torch.eye(K).repeat(H, 1, 1))
        elif self.constraint == "low_rank":
            assert rank is not None, "ModelConfig asks for it"
            self.U = nn.Parameter(_drawn_apart(H, K, rank) * K**-0.5)  # columns of norm 1, about
            self.V = nn.Parameter(torch.zeros(H, K, rank))
        elif self.constraint == "rotary":
            self.C = nn.Parameter(torch.eye(K).repeat(H, 1, 1))
        else:
            self.M = nn.Parameter(torch.zeros(H, K, K))

    def forward(self, q_BHSK: Tensor) -> Tensor:
        return q_BHSK @ self.composed().to(q_BHSK.dtype)

    def composed(self) -> Tensor:
        """G_LM [H,K,K]: the parameter itself with `none`, else composed from the parameters in fp32 at least."""
        if self.constraint == "none":
            return self.G_LM
        first = next(self.parameters())
        device, wide = first.device, at_least_float32(first.dtype)
        identity_KK = torch.eye(self.config.head_dim, dtype=wide, device=device)
        with torch.autocast(device.type, enabled=False):
            if self.constraint == "low_rank":
                return identity_KK + self.U.to(wide) @ self.V.to(wide).mT
            if self.constraint == "rotary":
                return rotary_part(self.C.to(wide), self.config)
            M_HKK = self.M.to(wide)
            return identity_KK + (M_HKK - rotary_part(M_HKK, self.config))


def _drawn_apart(*shape: int) -> Tensor:
    """Standard normal entries that follow from torch's seed, and leave the generator as it was for the weights that are drawn
    after them."""
    with torch.random.fork_rng(devices=[]):
        seed = int(torch.randint(2**31, (), device="cpu"))
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return drawn.to(torch.get_default_device())
