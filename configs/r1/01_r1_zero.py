"""R1-Zero: reinforcement learning from DeepSeek-V3-Base with rule rewards only (R1 paper, section 2.1).

What the paper gives stands here as given; [open] marks what it leaves open. One rollout is
32 x 16 = 512 questions, 8,192 outputs and 16 policy updates; 10,400 updates are 650 rollouts.
"""

from r1mega.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    GRPOConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)

config = RunConfig(
    stage="rl",
    num_steps=10_400,
    model=ModelConfig(
        path="models/DeepSeek-V3-Base",
        dtype="bfloat16",
        mtp_loss_weight=0.0,  # [open] whether the MTP loss runs during RL
        router_bias_rate=0.0,  # [open] whether the routing bias moves during RL
        recompute="selective",  # V3: norms and MLA up-projections
    ),
    data=DataConfig(
        path="data/r1_zero_questions.jsonl",  # math, code, STEM and logic questions with checkable answers
        eval_path="data/math/aime2024.jsonl",  # the paper's curve; training questions that overlap it are left out
        template="r1_zero",
        max_prompt_tokens=1024,  # [open]
    ),
    # 1,024 GPUs: V3 trained with PP16 x EP64 and no tensor parallelism; a 65,536-token response needs
    # the context axis, which the paper does not describe. [open]
    parallel=ParallelConfig(
        pipeline=16,
        expert=64,
        context=4,
        data=16,
        distributed_optimizer=True,
        tokens_per_chunk=66_560,  # the longest prompt and response
    ),
    optimizer=OptimizerConfig(
        lr=3e-6,
        schedule="constant",  # [open], and so are the warm-up, the betas and the norm limit (V3's here)
        warmup_steps=0,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        clip_grad=1.0,
    ),
    rollout=RolloutConfig(
        engines=16,  # [open] 32 GPUs hold the 671B weights of one engine
        tensor_parallel=32,
        temperature=1.0,
        top_p=1.0,  # [open]
        max_tokens=(
            (0, 32_768),
            (8_200, 65_536),
        ),  # in force from the first rollout that starts at the step or later
        speculative_tokens=1,  # MTP self-speculation shortens the longest outputs (supplement B.1)
    ),
    grpo=GRPOConfig(
        group_size=16,
        questions_per_step=32,
        mini_batches=16,
        split="output",  # "randomly split"
        clip_low=0.2,  # [open] for R1-Zero
        clip_high=0.2,
        kl_coef=0.001,
        reference_every=400,
        aggregation="sequence_mean",
        ratio="token",
        mask_truncated=False,  # [open]
    ),
    rewards=RewardConfig(weights={"accuracy": 1.0, "format": 1.0}),
    checkpoint=CheckpointConfig(every=400, keep=2),
    eval=EvalConfig(every=400, samples=16),  # 16 samples at each point of the curve
)
