"""All-scenario RL: Dev-3 -> R1 (R1, section 3.2.2): 1,700 steps at temperature 0.7, general prompts in the last 400 alone.

Reward = R_reasoning + R_general + R_lang: reasoning prompts are scored by rules, general ones by a reward model, and
both by format and language. A general prompt is either a helpfulness or a safety prompt; its task says which.
"""

from dataclasses import replace
from pathlib import Path

from r1mega.overrides import load

PROMPTS = {"general": 66_000, "harmlessness": 12_000}
"""Of data/all_scenario_prompts.jsonl, beside the reasoning prompts of 04_reasoning_rl.py (table 4)."""
GENERAL = {"reasoning_format": 1.0, "language": 1.0}
dev2 = load(Path(__file__).with_name("04_reasoning_rl.py"))
config = replace(
    dev2,
    num_steps=1_700,
    model=replace(dev2.model, path="models/DeepSeek-R1-Dev3"),
    data=replace(
        dev2.data, path="data/all_scenario_prompts.jsonl", eval_path="data/math/math500.jsonl", eval_size=500
    ),
    grpo=replace(dev2.grpo, mini_batches=4),  # [open]: 1,700 updates are no whole number of rollouts of 16
    rollout=replace(dev2.rollout, temperature=0.7),
    rewards=replace(
        dev2.rewards,
        task_weights={"helpful": {"helpful": 1.0, **GENERAL}, "safety": {"safety": 1.0, **GENERAL}},
        general_from=1_300,
        helpful_model="models/r1-reward-helpful",
        safety_model="models/r1-reward-safety",
    ),
    eval=replace(dev2.eval, every=40, samples=1),  # [open]: ten looks for hacking while preferences reward
)
