"""Cold-start SFT: DeepSeek-V3-Base -> Dev-1, on thousands of long, readable chains of thought (R1, supplement B.4.2).

What the paper gives stands here as given; [open] marks what it leaves open.
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
    model=ModelConfig(path="models/DeepSeek-V3-Base", dtype="bfloat16", recompute="selective"),
    data=DataConfig(path="data/cold_start.jsonl", template="r1", eval_size=0),
    sft=SFTConfig(batch_size=128, max_length=32_768, num_epochs=2),  # "2-3 epochs"
    # 1,024 GPUs in V3's layout: PP16 x EP64, no tensor parallelism. [open]
    parallel=ParallelConfig(
        pipeline=16, expert=64, data=64, distributed_optimizer=True, tokens_per_chunk=32_768
    ),
    optimizer=OptimizerConfig(
        lr=5e-5,
        min_lr=5e-6,
        schedule="cosine",
        warmup_steps=0,  # [open], and so are the betas and the norm limit (V3's here)
        betas=(0.9, 0.95),
        weight_decay=0.0,
        clip_grad=1.0,
    ),
    checkpoint=CheckpointConfig(every=50, keep=2),
)
