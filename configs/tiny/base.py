"""The base model of the demo: a tiny DeepSeek-V3 trained from random weights on a broad mix of generated text.

It stands in for DeepSeek-V3-Base: it has seen facts, copies, direct answers and noisy worked
solutions, and answers fewer than a quarter of the problems correctly when sampled.
"""

from r1mega.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SFTConfig,
)

config = RunConfig(
    stage="sft",
    platform="cpu",
    num_steps=1000,
    model=ModelConfig(path="configs/tiny/model", init="random", dtype="float32", router_bias_rate=1e-3),
    data=DataConfig(path="generated:chain-base", template="tiny_zero", operations=4, size=64_000),
    sft=SFTConfig(batch_size=64, max_length=256, num_epochs=1, loss_on="response"),
    parallel=ParallelConfig(data=2, tokens_per_chunk=4096),
    optimizer=OptimizerConfig(lr=2e-3, min_lr=1e-4, schedule="cosine", warmup_steps=100, weight_decay=0.01),
    checkpoint=CheckpointConfig(every=250, keep=1),
)
