"""R1-Zero on real questions: any DeepSeek-V3, Qwen2 or Llama directory, any file of questions and answers.

    r1mega run configs/gsm8k/r1_zero.py model=DIR data=FILE

Sized for a model of about 1B parameters on two GPUs (trainer and engine) with GSM8K-like questions; smaller than the paper's
recipe (configs/r1/01_r1_zero.py) in everything but the algorithm. On CPU add platform=cpu and
model.dtype=float32 rollout.dtype=float32, and lower rollout.max_tokens.
"""

from r1mega.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    GRPOConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
)

config = RunConfig(
    stage="rl",
    num_steps=400,
    data=DataConfig(template="r1_zero", max_prompt_tokens=512, eval_size=256),
    parallel=ParallelConfig(tokens_per_chunk=8192),
    optimizer=OptimizerConfig(lr=1e-6, warmup_steps=8),
    rollout=RolloutConfig(temperature=1.0, max_tokens=((0, 1024),)),
    grpo=GRPOConfig(group_size=8, questions_per_step=32, kl_coef=0.001, reference_every=100),
    checkpoint=CheckpointConfig(every=20),
    eval=EvalConfig(every=50),
)
