"""What validation makes of its sums; the sums themselves: test_mean.py."""

import math

import pytest

from pipeline.train.evaluate import order_parameters


def test_an_order_parameter_has_its_logarithm_beside_it_but_for_zero():
    found = order_parameters([[4e-10, 4.0], [0.0, 1.0], [0.0, 0.0], [9.0, 1.0]])
    assert math.isnan(found.pop("invariance/order_parameter_A_P"))
    assert found == {
        "invariance/order_parameter_A": pytest.approx(1e-5),
        "invariance/log10_order_parameter_A": pytest.approx(-5),
        "invariance/order_parameter_A_LM": 0.0,
        "invariance/order_parameter_G": 3.0,
        "invariance/log10_order_parameter_G": pytest.approx(math.log10(3)),
    }
