"""A helpful reward model on two CPU cores: pairs, of which it reads the final summary only.

    r1mega run configs/tiny/reward_model_helpful.py [data=FILE]

Without a file it learns the toy rules of data/generated_preferences.py (politeness, no repetition). A FILE has pairs
as jsonl: prompt, chosen, rejected, or transcripts like hh-rlhf's.
"""

from r1mega.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardModelConfig,
    RunConfig,
    SFTConfig,
)

config = RunConfig(
    stage="reward_model",
    platform="cpu",
    model=ModelConfig(path="configs/tiny/model", init="random", dtype="float32"),
    data=DataConfig(path="generated:preferences", template="tiny_zero", size=6400, eval_size=512),
    reward_model=RewardModelConfig(objective="pairwise", reads="summary"),
    sft=SFTConfig(batch_size=32, max_length=512, num_epochs=1),
    parallel=ParallelConfig(data=2, tokens_per_chunk=8192),
    optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, schedule="cosine", warmup_steps=20, weight_decay=0.01),
    checkpoint=CheckpointConfig(every=100, keep=1),
    eval=EvalConfig(every=50),
)
