"""R1-Zero on two CPU cores: the demo's base model, GRPO, accuracy + format rewards, nothing else.

One departure from the paper: losses are averaged over the tokens of the batch. The paper's mean per
output weighs the first token, where this model decides whether to think, by 1/length; at lengths of 6
against 23 that favours not thinking four to one.
"""

from r1mega.config import (
    CheckpointConfig,
    DataConfig,
    GateConfig,
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
    data=DataConfig(
        path="generated:chain",
        template="tiny_zero",
        max_prompt_tokens=64,
        operations=4,
        size=20_000,
        eval_size=512,
    ),
    grpo=GRPOConfig(
        group_size=16, questions_per_step=16, kl_coef=0.001, reference_every=0, aggregation="token_mean"
    ),
    rollout=RolloutConfig(
        engines=2, max_tokens=((0, 64),), dtype="float32", kv_cache_gib=0.25, max_concurrent=128
    ),
    parallel=ParallelConfig(data=2, tokens_per_chunk=8192),
    optimizer=OptimizerConfig(lr=3e-4, min_lr=2e-5, schedule="cosine", warmup_steps=10),
    rewards=RewardConfig(workers=1),
    sync=SyncConfig(bucket_mib=16),
    gates=GateConfig(logprob=(1e-4, 0.5)),
    checkpoint=CheckpointConfig(every=20, keep=2),
)
