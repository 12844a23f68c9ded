"""Preference pairs from a judge at an OpenAI-compatible endpoint, for example a local `vllm serve`.

Needs data=FILE with rows {"prompt", "responses": [...]} or {"prompt", "a", "b"}; see judge.* for the endpoint.
"""

from r1mega.config import JudgeConfig, RewardModelConfig, RunConfig

config = RunConfig(
    stage="preference_pairs",
    judge=JudgeConfig(url="http://127.0.0.1:8000/v1", model="judge", concurrency=8),
    reward_model=RewardModelConfig(reads="summary"),
)
