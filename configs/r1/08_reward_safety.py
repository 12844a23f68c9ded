"""The safety reward model of the second RL stage: 106,000 responses labelled safe or unsafe, read whole, reasoning
included (R1 paper, section 3.1). Everything else is the helpful model's recipe.
"""

from dataclasses import replace
from pathlib import Path

from r1mega.config import RewardModelConfig
from r1mega.overrides import load

RESPONSES = 106_000
base = load(Path(__file__).with_name("08_reward_helpful.py"))
config = replace(
    base,
    data=replace(base.data, path="data/safety_labels.jsonl"),
    reward_model=RewardModelConfig(
        objective="pointwise",  # binary cross-entropy [open]
        reads="response",
    ),
)
