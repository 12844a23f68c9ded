"""The whole pipeline of R1 (figure 2 of the paper) on two CPU cores, in the toy world of data/bilingual.py.

    r1mega pipeline configs/tiny [dir=DIR] [seed=2] [STAGE.section.field=value]

Sizes are a millionth of the paper's, the order of the stages, the rewards and what each stage starts from are its own.
"""

import sys
from dataclasses import replace
from pathlib import Path

from r1mega.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RewardModelConfig,
    RolloutConfig,
    RunConfig,
    SFTConfig,
)
from r1mega.data.recipes import ColdStart, RejectionSampling
from r1mega.overrides import load
from r1mega.stages.command import CommandStage
from r1mega.stages.evaluation_config import EvaluationConfig
from r1mega.stages.graph import Pipeline, Stage

OPERATIONS = 4
demo = load(Path(__file__).with_name("r1_zero.py"))
model = ModelConfig(path="configs/tiny/model_bilingual", init="random", dtype="float32")
student = ModelConfig(path="configs/tiny/model_student", init="random", dtype="float32")
trained = ModelConfig(dtype="float32")
questions = DataConfig(
    path="generated:bilingual",
    template="r1",
    max_prompt_tokens=64,
    operations=OPERATIONS,
    size=8000,
    eval_size=256,
)
rollout = RolloutConfig(
    engines=2, max_tokens=((0, 64),), dtype="float32", kv_cache_gib=0.25, max_concurrent=256
)

base = RunConfig(
    stage="sft",
    platform="cpu",
    num_steps=1200,
    model=replace(model, router_bias_rate=1e-3),
    data=DataConfig(
        path="generated:bilingual-base", template="tiny_bilingual", operations=OPERATIONS, size=76_800
    ),
    sft=SFTConfig(batch_size=64, max_length=256, num_epochs=1),
    parallel=ParallelConfig(data=2, tokens_per_chunk=4096),
    optimizer=OptimizerConfig(lr=2e-3, min_lr=1e-4, schedule="cosine", warmup_steps=100, weight_decay=0.01),
    checkpoint=CheckpointConfig(every=400, keep=1),
)
zero = replace(
    demo,
    num_steps=60,
    model=trained,
    data=replace(questions, template="tiny_bilingual"),
    eval=EvalConfig(every=20),
    rollout=rollout,
    rewards=RewardConfig(workers=1, weights={"accuracy": 1.0, "format": 1.0, "language": 0.0}),
)
cold_start = ColdStart(
    platform="cpu",
    samples=4,
    per_prompt=1,
    size=500,
    model=trained,
    data=replace(questions, template="tiny_bilingual", size=2000),
    rollout=rollout,
    rewards=RewardConfig(workers=1, weights={"accuracy": 1.0, "format": 1.0, "language": 1.0}),
    rewriting="rules",
)
dev1 = replace(
    base,
    num_steps=0,
    model=trained,
    data=DataConfig(template="r1", eval_size=0),
    sft=SFTConfig(batch_size=32, max_length=256, num_epochs=4),
    optimizer=OptimizerConfig(lr=3e-4, min_lr=1e-4, schedule="cosine", warmup_steps=10, weight_decay=0.01),
    checkpoint=CheckpointConfig(every=0, keep=1),
)
dev2 = replace(
    zero,
    num_steps=40,
    data=questions,
    grpo=replace(zero.grpo, clip_low=10.0, clip_high=10.0),
    rewards=RewardConfig(workers=1, weights={"accuracy": 1.0, "reasoning_format": 1.0, "language": 1.0}),
)
dev2_without_language = replace(
    dev2,
    rewards=RewardConfig(workers=1, weights={"accuracy": 1.0, "reasoning_format": 1.0, "language": 0.0}),
)
rejection = RejectionSampling(
    platform="cpu",
    samples=4,
    per_prompt=2,
    model=trained,
    data=replace(questions, size=1500),
    rollout=rollout,
    rewards=RewardConfig(workers=1, weights={"accuracy": 1.0, "reasoning_format": 1.0, "language": 1.0}),
)
dev3 = replace(
    dev1,
    sft=SFTConfig(batch_size=64, max_length=256, num_epochs=3),
    optimizer=replace(dev1.optimizer, lr=1e-3),
)
helpful = RunConfig(
    stage="reward_model",
    platform="cpu",
    model=trained,
    data=DataConfig(path="generated:preferences", template="r1", size=3200, eval_size=256),
    reward_model=RewardModelConfig(objective="pairwise", reads="summary"),
    sft=SFTConfig(batch_size=32, max_length=256, num_epochs=1),
    parallel=ParallelConfig(data=2, tokens_per_chunk=8192),
    optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, schedule="cosine", warmup_steps=10, weight_decay=0.01),
    checkpoint=CheckpointConfig(every=0, keep=1),
)
safety = replace(helpful, reward_model=RewardModelConfig(objective="pointwise", reads="response"))
GENERAL = {"reasoning_format": 1.0, "language": 1.0}
r1 = replace(
    dev2,
    data=replace(questions, path="generated:scenarios"),
    rollout=replace(rollout, temperature=0.7),
    # Dev-3 is right nearly always: in a group with one wrong answer that one weighs 15 times as much as each right one.
    optimizer=replace(dev2.optimizer, lr=1e-4),
    rewards=replace(
        dev2.rewards,
        general_from=30,
        task_weights={"helpful": {"helpful": 1.0, **GENERAL}, "safety": {"safety": 1.0, **GENERAL}},
    ),
)
student_base = replace(base, num_steps=400, model=student)
distilled = replace(dev3, sft=replace(dev3.sft, num_epochs=6))


def evaluation(template: str) -> EvaluationConfig:
    return EvaluationConfig(
        suites=("bilingual", "small_talk"),
        template=template,
        k=4,
        max_tokens=64,
        operations=OPERATIONS,
        platform="cpu",
        rollout=replace(rollout, engines=1, max_tokens=RolloutConfig().max_tokens),
    )


def measured(name: str, template: str = "r1") -> Stage:
    return Stage(
        f"eval_{name}", evaluation(template), {"model": f"{name}/hf"}, f"{name} on held-out problems"
    )


talk = CommandStage(
    argv=(sys.executable, "-m", "r1mega.data.general_talk", "{out}/general.jsonl", "800"),
    makes=("general.jsonl",),
)
pipeline = Pipeline(
    title="R1 in a toy world",
    dir="runs/tiny_pipeline",  # runs/tiny is the demo's
    stages=(
        Stage("base", base, title="stands in for DeepSeek-V3-Base"),
        Stage("zero", zero, {"model.path": "base/hf"}, "R1-Zero: RL with rule rewards alone"),
        Stage("cold_start", cold_start, {"model.path": "zero/hf"}, "R1-Zero's readable solutions, rewritten"),
        Stage(
            "dev1", dev1, {"model.path": "base/hf", "data.path": "cold_start/data.jsonl"}, "cold-start SFT"
        ),
        Stage("dev2", dev2, {"model.path": "dev1/hf"}, "reasoning RL with language consistency"),
        Stage("dev2_mixed", dev2_without_language, {"model.path": "dev1/hf"}, "the same without it"),
        Stage("talk", talk, title="general data, as an instruct model would write it"),
        Stage(
            "rejection",
            rejection,
            {"model.path": "dev2/hf", "general": "talk/general.jsonl"},
            "right samples of Dev-2, and general data",
        ),
        Stage(
            "dev3", dev3, {"model.path": "base/hf", "data.path": "rejection/data.jsonl"}, "SFT from the base"
        ),
        Stage("helpful", helpful, {"model.path": "dev3/hf"}, "reward model on pairs"),
        Stage("safety", safety, {"model.path": "dev3/hf"}, "reward model on labelled responses"),
        Stage(
            "r1",
            r1,
            {
                "model.path": "dev3/hf",
                "rewards.helpful_model": "helpful/hf",
                "rewards.safety_model": "safety/hf",
            },
            "all-scenario RL",
        ),
        Stage("student_base", student_base, title="stands in for Qwen2.5"),
        Stage(
            "distilled",
            distilled,
            {"model.path": "student_base/hf", "data.path": "rejection/data.jsonl"},
            "the student, on the samples Dev-3 learnt from",
        ),
        Stage("student_zero", zero, {"model.path": "student_base/hf"}, "its control: RL alone"),
        measured("base", "tiny_bilingual"),
        measured("zero", "tiny_bilingual"),
        *(measured(name) for name in ("dev1", "dev2", "dev2_mixed", "dev3", "r1", "distilled")),
        measured("student_zero", "tiny_bilingual"),
    ),
)
