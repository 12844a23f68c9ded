"""The shipped recipes: R1-Zero resolves to the paper's numbers, and every config file passes the checks."""

from pathlib import Path

import pytest

from r1mega.checks import check
from r1mega.config import value_at
from r1mega.overrides import load

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.py")), ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_every_shipped_config_passes_the_checks(path):
    given = [f"{name}=somewhere" for name in ("model", "data") if not getattr(load(path), name).path]
    check(load(path, given))


def test_r1_zero_has_the_values_of_the_paper():
    config = load(CONFIGS / "r1" / "01_r1_zero.py")
    assert config.stage == "rl"
    assert config.num_steps == 10_400
    assert (config.optimizer.lr, config.grpo.kl_coef, config.rollout.temperature) == (3e-6, 0.001, 1.0)
    assert (config.grpo.group_size, config.grpo.questions_per_step, config.grpo.mini_batches) == (16, 32, 16)
    assert config.grpo.group_size * config.grpo.questions_per_step == 512
    assert (config.questions_per_rollout, config.outputs_per_rollout) == (512, 8192)
    assert config.num_steps // config.grpo.mini_batches == 650
    assert config.grpo.reference_every == 400
    assert config.rewards.weights == {"accuracy": 1.0, "format": 1.0}
    assert not config.rewards.task_weights
    assert (config.grpo.split, config.grpo.ratio, config.grpo.aggregation) == (
        "output",
        "token",
        "sequence_mean",
    )
    assert config.data.template == "r1_zero"


@pytest.mark.parametrize(("step", "limit"), [(0, 32_768), (8_199, 32_768), (8_200, 65_536), (10_399, 65_536)])
def test_r1_zero_lengthens_its_outputs_at_step_8200(step, limit):
    assert value_at(load(CONFIGS / "r1" / "01_r1_zero.py").rollout.max_tokens, step) == limit


def test_gsm8k_takes_model_and_data_from_the_command_line():
    config = load(CONFIGS / "gsm8k" / "r1_zero.py", ["model=some/model", "data=train.jsonl", "num_steps=2"])
    check(config)
    assert (config.model.path, config.data.path, config.num_steps) == ("some/model", "train.jsonl", 2)
