"""The helpful reward model's pairs: V3 judges each four times, sides at random; kept where the mean score differs by more
than 1 and the lengths are alike (R1 paper, section 3.1): 66,000 of them.

data: rows {"prompt", "responses": [...]} or {"prompt", "a", "b"}. Votes, margin and lengths are data/preference_votes.py's.
"""

from r1mega.config import DataConfig, JudgeConfig, RewardModelConfig, RunConfig

config = RunConfig(
    stage="preference_pairs",
    data=DataConfig(path="data/helpful_candidates.jsonl"),
    judge=JudgeConfig(url="http://127.0.0.1:8000/v1", model="deepseek-v3"),
    reward_model=RewardModelConfig(reads="summary"),
)
