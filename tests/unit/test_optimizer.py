"""The learning-rate schedule."""

import pytest

from r1mega.config import OptimizerConfig
from r1mega.training.optimizer import learning_rate


def test_warm_up_is_linear_and_ends_at_the_full_rate():
    config = OptimizerConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(step, config, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_goes_from_lr_to_min_lr():
    config = OptimizerConfig(lr=5e-5, min_lr=5e-6, schedule="cosine", warmup_steps=10)
    assert learning_rate(10, config, 110) == pytest.approx(5e-5)
    assert learning_rate(60, config, 110) == pytest.approx((5e-5 + 5e-6) / 2)
    assert learning_rate(110, config, 110) == pytest.approx(5e-6)
    rates = [learning_rate(step, config, 110) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)
