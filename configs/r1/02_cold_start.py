"""Cold-start data: R1-Zero's samples at temperature 1.0, right, readable, rewritten, reviewed twice (R1, B.3.2).

What the paper gives stands here as given; [open] marks what it leaves open.
"""

from r1mega.config import DataConfig, JudgeConfig, ModelConfig, RewardConfig, RolloutConfig
from r1mega.data.recipes import ColdStart

config = ColdStart(
    samples=16,  # "several" [open]
    per_prompt=1,  # of each source but people [open]
    size=5_000,  # "thousands"
    # what 09_evaluation.py measures
    decontaminate=(
        "data/math/aime2024.jsonl",
        "data/math/math500.jsonl",
        "data/gpqa/gpqa_diamond.csv",
        "data/mmlu/test.jsonl",
        "data/livecodebench/test.jsonl",
        "data/ifeval/input_data.jsonl",
    ),
    model=ModelConfig(path="models/DeepSeek-R1-Zero"),
    data=DataConfig(path="data/cold_start_questions.jsonl", template="r1_zero", max_prompt_tokens=1024),
    rollout=RolloutConfig(
        engines=16, tensor_parallel=32, temperature=1.0, max_tokens=((0, 32_768),), speculative_tokens=1
    ),
    rewards=RewardConfig(weights={"accuracy": 1.0, "format": 1.0}),
    sources=("few_shot", "direct", "r1_zero", "human"),  # as the first version of the paper lists them
    prompted=ModelConfig(path="models/DeepSeek-V3"),
    few_shot="data/few_shot_prompt.txt",  # [open], and so is the next: the paper prints neither prompt
    direct="data/direct_prompt.txt",
    human="data/written_by_people.jsonl",  # [open] how many
    rewriting="endpoint",
    rewriter=JudgeConfig(url="http://127.0.0.1:8000/v1", model="deepseek-v3"),
    review="files",
)
