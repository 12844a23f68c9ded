"""R1-Zero on two CPU cores: the demo's base model, GRPO, accuracy + format rewards, nothing else."""

from r1mega.config import (
    CheckpointConfig,
    DataConfig,
    GRPOConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SyncConfig,
)

config = RunConfig(
    stage="rl",
    platform="cpu",
    num_steps=60,
    model=ModelConfig(path="runs/tiny/base/hf", dtype="float32"),
    data=DataConfig(path="generated:chain", template="tiny_zero", max_prompt_tokens=64, operations=4, size=20_000),
    grpo=GRPOConfig(group_size=16, questions_per_step=16, kl_coef=0.001, reference_every=0),
    rollout=RolloutConfig(
        engines=2, max_tokens=((0, 64),), dtype="float32", kv_cache_gib=0.25, max_concurrent=128
    ),
    parallel=ParallelConfig(data=2, tokens_per_chunk=8192),
    optimizer=OptimizerConfig(lr=3e-4, warmup_steps=10),
    rewards=RewardConfig(workers=1),
    sync=SyncConfig(bucket_mib=16),
    checkpoint=CheckpointConfig(every=20, keep=2),
)
