"""The settings of a request, and the seeds of its prompts."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from pldr_model.sampling import Sampling, read_sampling, seeds_of

GOOD = {
    "max_new_tokens": 3,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": 0,
}


def _written(value):
    """Python writes out no integer of more than 4300 digits."""
    return f"{value.bit_length()} bits" if isinstance(value, int) else repr(value)


def read(**changes):
    return read_sampling(**(GOOD | changes))


WRONG_TYPES = [
    None,
    "3",
    b"3",
    True,
    False,
    [3],
    (3,),
    {},
    3j,
    Decimal(3),
    np.bool_(True),
    np.array([3]),
    torch.tensor(3),
]


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("value", WRONG_TYPES, ids=lambda value: type(value).__name__)
def test_a_value_of_a_wrong_type_is_named(name, value):
    if name == "seed" and value is None:
        assert read(seed=None).seed is not None, "a fresh one"
        return
    with pytest.raises(ValueError, match=f"^{name}: .* is no (integer|number); give one$") as caught:
        read(**{name: value})
    assert len(str(caught.value)) < 100 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["max_new_tokens", "top_k", "seed"])
@pytest.mark.parametrize("value", [2.5, 8.0, math.nan, math.inf, np.float32(1), Fraction(1, 2)])
def test_a_count_is_an_integer(name, value):
    with pytest.raises(ValueError, match=f"^{name}: .* is no integer"):
        read(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("temperature", v)
            for v in (-1, -1e-320, math.nan, math.inf, -math.inf, 10**400, -(10**400), np.float32("nan"))
        ),
        *(("top_p", v) for v in (0, 0.0, -0.5, 1 + 1e-15, math.nan, math.inf, 10**400)),
        *(("min_p", v) for v in (-1e-300, 1 + 1e-15, math.nan, math.inf, -(10**400))),
        *(("repetition_penalty", v) for v in (0, -1.5, math.nan, math.inf, 10**400)),
        *(("top_k", v) for v in (-1, -(10**30), -(10**5000))),
        *(("max_new_tokens", v) for v in (0, -1, -(10**5000))),
        *(("seed", v) for v in (2**64, -(2**63) - 1, 10**5000)),
    ],
    ids=_written,
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: .* must ") as caught:
        read(**{name: value})
    assert len(str(caught.value)) < 120 and "\n" not in str(caught.value)


def test_numbers_of_all_kinds_become_plain_ones():
    got = read(
        max_new_tokens=np.int64(10**12),
        temperature=np.float32(0.5),
        top_k=np.uint8(3),
        top_p=Fraction(1, 2),
        min_p=np.float16(0.25),
        repetition_penalty=2,
        seed=np.int32(-4),
    )
    assert got == Sampling(10**12, 0.5, 3, 0.5, 0.25, 2.0, -4)
    assert [type(value) for value in vars(got).values()] == [int, float, int, float, float, float, int]
    assert read(max_new_tokens=10**5000, top_k=10**5000, temperature=1).temperature == 1.0
    assert read(temperature=0).seed is None, "greedy draws nothing"
    assert read(seed=2**64 - 1).seed == 2**64 - 1 and read(seed=-(2**63)).seed == -(2**63)


def test_the_seed_of_a_prompt_depends_on_its_tokens_and_its_copies_alone():
    one, two, three = seeds_of([[1, 2], [3], [1, 2]], 7)
    assert len({one, two, three}) == 3 and seeds_of([[3], [1, 2]], 7) == [two, one]
    assert seeds_of([[1, 2]], 8) != [one] and all(0 <= seed < 2**63 for seed in (one, two, three))
