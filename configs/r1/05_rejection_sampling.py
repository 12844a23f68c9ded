"""The 800K samples for Dev-3: right and readable samples of Dev-2, and general data (R1, B.3.3 and table 5).

About 600,000 reasoning samples, judged by rules or by V3 with the reference answer, and about 200,000 general ones, of
which some have a chain of thought. What the paper gives stands here as given; [open] marks what it leaves open.
"""

from pathlib import Path

from r1mega.config import DataConfig, JudgeConfig, ModelConfig, RewardConfig, RolloutConfig
from r1mega.data.recipes import ColdStart, RejectionSampling
from r1mega.overrides import bound

cold_start = bound(Path(__file__).with_name("02_cold_start.py"), "config", ColdStart)
config = RejectionSampling(
    samples=16,  # "multiple" [open]
    per_prompt=0,  # [open]
    shard_size=1024,
    filters=("format", "wrong_language", "mixed_language", "code_block", "long_paragraph"),
    decontaminate=(*cold_start.decontaminate, "data/gsm8k/test.jsonl"),
    model=ModelConfig(path="models/DeepSeek-R1-Dev2"),
    data=DataConfig(path="data/reasoning_prompts.jsonl", template="r1", max_prompt_tokens=1024),
    rollout=RolloutConfig(
        engines=16, tensor_parallel=32, temperature=1.0, max_tokens=((0, 32_768),), speculative_tokens=1
    ),
    rewards=RewardConfig(weights={"accuracy": 1.0}),
    judge=JudgeConfig(url="http://127.0.0.1:8000/v1", model="deepseek-v3"),
    rewriter=JudgeConfig(url="http://127.0.0.1:8000/v1", model="deepseek-v3"),
    general="data/general.jsonl",
    reasoned=("writing", "translation"),  # "for certain tasks" V3 writes the chain; simple queries get none
)
