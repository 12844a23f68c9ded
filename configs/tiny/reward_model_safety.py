"""A safety reward model on two CPU cores: responses labelled safe or unsafe, of which it reads everything.

    r1mega run configs/tiny/reward_model_safety.py [data=FILE]

Without a file it learns the toy rule of data/generated_preferences.py (a secret given away, maybe in the reasoning).
A FILE has labelled responses as jsonl: prompt, response, safe; tools/label_pairs.py makes one of pairs.
"""

from dataclasses import replace
from pathlib import Path

from r1mega.config import RewardModelConfig
from r1mega.overrides import load

base = load(Path(__file__).with_name("reward_model_helpful.py"))
config = replace(base, reward_model=RewardModelConfig(objective="pointwise", reads="response"))
