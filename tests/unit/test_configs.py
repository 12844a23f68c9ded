"""The shipped recipes: R1-Zero resolves to the paper's numbers, and every config file passes the checks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r1mega.checks import check
from r1mega.config import RunConfig, value_at
from r1mega.data import preference_votes
from r1mega.data.decontamination import NGRAM
from r1mega.data.recipes import SOURCES
from r1mega.data.suites import SUITES
from r1mega.overrides import bound, load
from r1mega.stages import graph

CONFIGS = Path(__file__).parents[2] / "configs"


PIPELINES = sorted(CONFIGS.rglob("pipeline.py"))
FILES = sorted(set(CONFIGS.rglob("*.py")) - set(PIPELINES))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_shipped_config_passes_the_checks(path):
    config = bound(path, "config", object)
    if not isinstance(config, RunConfig):
        config.check()
        return
    given = [f"{name}=somewhere" for name in ("model", "data") if not getattr(config, name).path]
    check(load(path, given))


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.parent.name)
def test_every_shipped_pipeline_passes_the_checks(path):
    assert len(graph.load(path).stages) > 10


def test_the_stages_of_r1_have_the_values_of_the_paper():
    """Every number that the paper prints (facts of R1 v2: 2.1, 2.4, 3.1, 3.2, B.3, B.4, D.1)."""
    recipe = {stage.name: stage.config for stage in graph.load(CONFIGS / "r1").stages}
    for name in ("dev1", "dev3"):
        sft = recipe[name]
        assert (sft.sft.batch_size, sft.sft.max_length, sft.sft.num_epochs) == (128, 32_768, 2)
        assert (sft.optimizer.lr, sft.optimizer.min_lr, sft.optimizer.schedule) == (5e-5, 5e-6, "cosine")
        assert sft.model.path == recipe["zero"].model.path, "it restarts from the base"
    dev2, r1 = recipe["dev2"], recipe["r1"]
    assert (dev2.grpo.clip_low, dev2.grpo.clip_high) == (10.0, 10.0)
    assert (dev2.optimizer.lr, dev2.rollout.temperature) == (3e-6, 1.0)
    for rl in (dev2, r1):
        assert rl.grpo == replace(
            recipe["zero"].grpo, clip_low=10.0, clip_high=10.0, mini_batches=rl.grpo.mini_batches
        )
        assert rl.optimizer == recipe["zero"].optimizer
    for rl in (recipe["zero"], dev2):
        assert (rl.eval.samples, rl.data.eval_path) == (16, "data/math/aime2024.jsonl")
    assert value_at(dev2.rollout.max_tokens, 0) == value_at(dev2.rollout.max_tokens, 10**6) == 32_768
    assert dev2.rewards.weights == {"accuracy": 1.0, "reasoning_format": 1.0, "language": 1.0}
    assert (r1.num_steps, r1.num_steps - r1.rewards.general_from, r1.rollout.temperature) == (1_700, 400, 0.7)
    assert r1.rewards.task_weights == {
        task: {task: 1.0, "reasoning_format": 1.0, "language": 1.0} for task in ("helpful", "safety")
    }
    cold, evaluation = recipe["cold_start"], recipe["eval_r1"]
    assert (cold.rollout.temperature, cold.review, cold.rewriting) == (1.0, "files", "endpoint")
    assert (evaluation.temperature, evaluation.top_p, evaluation.max_tokens) == (0.6, 0.95, 32_768)
    assert [SUITES[name].k for name in ("aime2024", "gpqa", "math500", "livecodebench")] == [64, 64, 16, 8]


def test_r1s_graph_measures_every_stage_and_distils_all_students_from_the_800k_samples():
    pipeline = graph.load(CONFIGS / "r1")
    students = {path.stem for path in (CONFIGS / "distill").glob("*.py")} - {"rl_after_distillation"}
    trained = {"zero", "dev1", "dev2", "dev3", "r1"} | students
    measured = {stage.inputs["model"] for stage in pipeline.stages if "model" in stage.inputs}
    assert measured == {f"{name}/hf" for name in trained}
    for name in students:
        assert pipeline[name].config == load(CONFIGS / "distill" / f"{name}.py")
        source = {} if name == "qwen2_5_32b_zero" else {"data.path": "rejection/data.jsonl"}
        assert pipeline[name].inputs == source


def test_the_recipe_tells_how_much_data_the_papers_stages_had():
    def told(file: str, name: str) -> Any:
        return bound(CONFIGS / "r1" / file, name, object)

    prompts = told("04_reasoning_rl.py", "PROMPTS") | told("07_all_scenario_rl.py", "PROMPTS")
    assert prompts == {
        "math": 26_000, "code": 17_000, "bug fixing": 8_000, "stem": 22_000, "logic": 15_000,
        "general": 66_000, "harmlessness": 12_000,
    }  # fmt: skip
    assert told("08_reward_helpful.py", "PAIRS") == 66_000
    assert told("08_reward_safety.py", "RESPONSES") == 106_000
    helpful = load(CONFIGS / "r1" / "08_reward_helpful.py")
    assert (helpful.sft.batch_size, helpful.sft.num_epochs, helpful.sft.max_length) == (256, 1, 8192)
    assert (helpful.optimizer.lr, helpful.data.template) == (6e-6, "r1")


def test_the_preference_pairs_of_r1_are_judged_as_the_paper_says():
    pipeline = graph.load(CONFIGS / "r1")
    assert pipeline["helpful"].inputs["data.path"] == "pairs/pairs.jsonl"
    assert pipeline["pairs"].config.judge.model == "deepseek-v3"
    assert (preference_votes.VOTES, preference_votes.THRESHOLD) == (4, 1.0)


def test_the_papers_numbers_in_reports_are_those_of_the_facts():
    paper = json.loads((CONFIGS.parent / "r1mega" / "report_page" / "paper.json").read_text())
    data = paper["data"]
    assert data["Total"] == [804_745, 1.0, 5355.3]
    assert sum(samples for name, (samples, *_) in data.items() if name != "Total") == 804_745
    tokens = sum(samples * mean for name, (samples, _, mean) in data.items() if name != "Total")
    assert tokens / 804_745 == pytest.approx(5355.3, abs=0.2)
    stages = dict(zip(paper["stages"], zip(*paper["benchmarks"].values(), strict=True), strict=True))
    assert stages["R1-Zero"] == (77.9, 95.9, 75.8, 50.0, 1444, 46.6, 24.7, 53.6, 88.8)
    assert stages["R1"] == (79.8, 97.3, 71.5, 65.9, 2029, 83.3, 87.6, 92.3, 90.8)
    curve = paper["curves"]["accuracy"]
    assert curve["marks"] == [8200]
    assert dict(zip(curve["metrics"]["step"], curve["metrics"]["value"], strict=True))[8400] == 0.71


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("qwen2_5_math_1_5b", 1e-4), ("qwen2_5_math_7b", 8e-5), ("qwen2_5_14b", 7e-5), ("qwen2_5_32b", 6e-5),
        ("llama_3_1_8b", 5e-5), ("llama_3_3_70b", 2e-5),
    ],
)  # fmt: skip
def test_the_distilled_models_have_the_rates_of_the_paper(name: str, rate: float):
    config = load(CONFIGS / "distill" / f"{name}.py")
    assert (config.optimizer.lr, config.optimizer.min_lr) == (rate, pytest.approx(rate / 10))
    assert (config.sft.batch_size, config.sft.max_length, config.stage) == (64, 32_768, "sft")
    assert config.sft.num_epochs in (2, 3)
    assert config.optimizer.schedule == "cosine"
    assert config.data == load(CONFIGS / "distill" / "qwen2_5_math_1_5b.py").data, (
        "all learn from the same samples"
    )


def test_the_control_of_the_distillation_is_r1_zero_at_its_own_rate():
    zero, control = load(CONFIGS / "r1" / "01_r1_zero.py"), load(CONFIGS / "distill" / "qwen2_5_32b_zero.py")
    assert (control.optimizer.lr, control.rollout.max_tokens, control.num_steps) == (
        2e-6,
        ((0, 32_768),),
        10_400,
    )
    assert control.grpo == zero.grpo


def test_rl_after_distillation_begins_at_the_distilled_model_with_the_first_rls_recipe():
    dev2, control, config = (
        load(CONFIGS / name)
        for name in (
            "r1/04_reasoning_rl.py",
            "distill/qwen2_5_32b_zero.py",
            "distill/rl_after_distillation.py",
        )
    )
    assert config.model.path == "runs/distill/qwen2_5_32b/hf"
    assert (config.stage, config.data.template, config.rewards) == ("rl", "r1", dev2.rewards)
    assert (config.grpo, config.rollout.max_tokens) == (dev2.grpo, ((0, 32_768),))
    assert (config.optimizer, config.parallel) == (control.optimizer, control.parallel)


def test_the_data_stages_of_r1_filter_as_the_paper_says():
    """R1, B.3.2 and B.3.3: no mixed languages, long paragraphs or code blocks, several samples, right ones only."""
    recipe = {stage.name: stage for stage in graph.load(CONFIGS / "r1").stages}
    cold, rejection = recipe["cold_start"].config, recipe["rejection"].config
    assert {"format", "mixed_language", "long_paragraph", "code_block"} <= set(rejection.filters)
    assert {"format", "mixed_language", "repeated_ngrams", "looping_tail"} <= set(cold.filters)
    assert (rejection.rewards.weights, rejection.judge.model) == ({"accuracy": 1.0}, "deepseek-v3")
    assert min(cold.samples, rejection.samples) > 1
    assert 1_000 < cold.size < 10_000
    assert set(cold.sources) == set(SOURCES)
    evaluation = recipe["eval_r1"].config
    measured = {f"{evaluation.data}/{SUITES[name].file}" for name in evaluation.suites}
    assert measured <= set(cold.decontaminate)
    assert measured <= set(rejection.decontaminate)
    assert (recipe["rejection"].inputs["model.path"], recipe["dev3"].config.model.path) == (
        "dev2/hf", recipe["dev1"].config.model.path,
    )  # fmt: skip
    assert NGRAM == 10


def test_the_reward_models_serve_the_last_stage_and_read_what_the_paper_says():
    recipe = {stage.name: stage for stage in graph.load(CONFIGS / "r1").stages}
    assert recipe["r1"].inputs | {"model.path": ""} == {
        "model.path": "", "rewards.helpful_model": "helpful/hf", "rewards.safety_model": "safety/hf",
    }  # fmt: skip
    reads = [recipe[name].config.reward_model for name in ("helpful", "safety")]
    assert [(one.objective, one.reads) for one in reads] == [
        ("pairwise", "summary"),
        ("pointwise", "response"),
    ]
    templates = {recipe[name].config.data.template for name in ("helpful", "safety", "r1")}
    assert templates == {"r1"}, "a reward model reads what the policy reads"


def test_r1_is_watched_for_reward_hacking_often_in_its_preference_phase():
    r1 = load(CONFIGS / "r1" / "07_all_scenario_rl.py")
    assert (r1.num_steps - r1.rewards.general_from) // r1.eval.every >= 10


def test_r1_zero_has_the_values_of_the_paper():
    config = load(CONFIGS / "r1" / "01_r1_zero.py")
    assert config.stage == "rl"
    assert config.num_steps == 10_400
    assert (config.optimizer.lr, config.grpo.kl_coef, config.rollout.temperature) == (3e-6, 0.001, 1.0)
    assert (config.grpo.group_size, config.grpo.questions_per_step, config.grpo.mini_batches) == (16, 32, 16)
    assert config.grpo.group_size * config.grpo.questions_per_step == 512
    assert (config.questions_per_rollout, config.outputs_per_rollout) == (512, 8192)
    assert config.num_steps // config.grpo.mini_batches == 650
    assert config.grpo.reference_every == 400
    assert config.rewards.weights == {"accuracy": 1.0, "format": 1.0}
    assert not config.rewards.task_weights
    assert (config.grpo.split, config.grpo.ratio, config.grpo.aggregation) == (
        "output",
        "token",
        "sequence_mean",
    )
    assert config.data.template == "r1_zero"


@pytest.mark.parametrize(("step", "limit"), [(0, 32_768), (8_199, 32_768), (8_200, 65_536), (10_399, 65_536)])
def test_r1_zero_lengthens_its_outputs_at_step_8200(step, limit):
    assert value_at(load(CONFIGS / "r1" / "01_r1_zero.py").rollout.max_tokens, step) == limit


def test_gsm8k_takes_model_and_data_from_the_command_line():
    config = load(CONFIGS / "gsm8k" / "r1_zero.py", ["model=some/model", "data=train.jsonl", "num_steps=2"])
    check(config)
    assert (config.model.path, config.data.path, config.num_steps) == ("some/model", "train.jsonl", 2)
