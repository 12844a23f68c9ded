"""The helpful reward model of the second RL stage: 66,000 pairs, the final summary only (R1 paper, section 3.1).

What the paper gives stands here as given; [open] marks what it leaves open. 66,000 pairs less those held out are
one epoch of about 255 steps.
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

PAIRS = 66_000
config = RunConfig(
    stage="reward_model",
    model=ModelConfig(
        path="models/DeepSeek-R1-Dev3",  # [open] "the policy's architecture"; here its weights too
        dtype="bfloat16",
        recompute="selective",
    ),
    data=DataConfig(
        path="data/helpful_pairs.jsonl",  # 08_preference_pairs.py makes them
        template="r1",  # the policy's, as in RL
        eval_size=1024,  # [open] held out, to measure the accuracy that the paper does not report
    ),
    reward_model=RewardModelConfig(
        objective="pairwise",  # -log sigmoid(chosen - rejected) [open]
        reads="summary",
    ),
    sft=SFTConfig(batch_size=256, max_length=8192, num_epochs=1),
    # 1,024 GPUs in V3's layout: PP16 x EP64, no tensor parallelism. [open]
    parallel=ParallelConfig(
        pipeline=16,
        expert=64,
        data=64,
        distributed_optimizer=True,
        tokens_per_chunk=16_384,  # a pair lies in one chunk
    ),
    optimizer=OptimizerConfig(
        lr=6e-6,
        schedule="constant",  # [open], and so are the warm-up, the betas and the norm limit (V3's here)
        warmup_steps=0,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        clip_grad=1.0,
    ),
    checkpoint=CheckpointConfig(every=50, keep=2),
    eval=EvalConfig(every=50),
)
