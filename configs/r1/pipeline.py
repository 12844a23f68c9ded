"""DeepSeek-R1 at full size as one graph (figure 2 of the paper), with its distillation: `r1mega pipeline configs/r1 --show`.

The numbered files hold the recipe of each stage in their order, configs/distill/ those of the students. The base models, the
prompts and the judge are yours. `--only NAME` runs a part of it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from r1mega.config import RolloutConfig, RunConfig
from r1mega.data.recipes import ColdStart, RejectionSampling
from r1mega.overrides import bound
from r1mega.stages.evaluation_config import EvaluationConfig
from r1mega.stages.graph import Pipeline, Stage

HERE = Path(__file__).parent
STUDENTS = (
    "qwen2_5_math_1_5b",
    "qwen2_5_math_7b",
    "qwen2_5_14b",
    "qwen2_5_32b",
    "llama_3_1_8b",
    "llama_3_3_70b",
)
CONTROL = "qwen2_5_32b_zero"


def stage(name: str, file: str, title: str, kind: type = RunConfig, **inputs: str) -> Stage:
    config: Any = bound(HERE / f"{file}.py", "config", kind)
    return Stage(
        name, config, {setting.replace("__", "."): source for setting, source in inputs.items()}, title
    )


def measured(name: str, template: str = "r1", **engines: int) -> Stage:
    """09_evaluation.py of a stage's model."""
    config = replace(bound(HERE / "09_evaluation.py", "config", EvaluationConfig), template=template)
    config = replace(config, rollout=replace(config.rollout, **engines))
    return Stage(f"eval_{name}", config, {"model": f"{name}/hf"}, f"{name} on the benchmarks")


def measured_student(name: str, template: str = "r1") -> Stage:
    return measured(name, template, tensor_parallel=4, speculative_tokens=RolloutConfig().speculative_tokens)


pipeline = Pipeline(
    title="DeepSeek-R1",
    stages=(
        stage("eval_base", "00_base_evaluation", "DeepSeek-V3-Base before anything", EvaluationConfig),
        stage("zero", "01_r1_zero", "R1-Zero: pure RL from V3-Base"),
        stage("cold_start", "02_cold_start", "readable chains of thought", ColdStart, model__path="zero/hf"),
        stage("dev1", "03_cold_start_sft", "Dev-1: cold-start SFT", data__path="cold_start/data.jsonl"),
        stage("dev2", "04_reasoning_rl", "Dev-2: RL with language consistency", model__path="dev1/hf"),
        stage(
            "rejection", "05_rejection_sampling", "the 800K samples", RejectionSampling, model__path="dev2/hf"
        ),
        stage("dev3", "06_sft", "Dev-3: SFT from V3-Base", data__path="rejection/data.jsonl"),
        stage("pairs", "08_preference_pairs", "V3 judges pairs of responses"),
        stage(
            "helpful",
            "08_reward_helpful",
            "reward model on 66K pairs",
            model__path="dev3/hf",
            data__path="pairs/pairs.jsonl",
        ),
        stage("safety", "08_reward_safety", "reward model on 106K labelled responses", model__path="dev3/hf"),
        stage(
            "r1",
            "07_all_scenario_rl",
            "R1: all-scenario RL",
            model__path="dev3/hf",
            rewards__helpful_model="helpful/hf",
            rewards__safety_model="safety/hf",
        ),
        *(
            stage(
                name, f"../distill/{name}", "distilled: the 800K samples", data__path="rejection/data.jsonl"
            )
            for name in STUDENTS
        ),
        stage(CONTROL, f"../distill/{CONTROL}", "the distillation's control: RL alone"),
        measured("zero", "r1_zero"),
        *(measured(name) for name in ("dev1", "dev2", "dev3", "r1")),
        *(measured_student(name) for name in STUDENTS),
        measured_student(CONTROL, "r1_zero"),
    ),
)
