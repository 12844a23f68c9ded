"""Cross-checks of a run: a sound run passes, and each mistake is named with its cure."""

from dataclasses import replace

import pytest

from r1mega.checks import CHOICES, NON_NEGATIVE, POSITIVE, check
from r1mega.config import ConfigError, DataConfig, GRPOConfig, ModelConfig, RolloutConfig, RunConfig
from r1mega.overrides import settings

SOUND = RunConfig(
    num_steps=8,
    model=ModelConfig(path="model"),
    data=DataConfig(path="generated:chain"),
    grpo=GRPOConfig(mini_batches=4),
)


def changed(name, value, base=SOUND):
    section, dot, leaf = name.partition(".")
    if not dot:
        return replace(base, **{name: value})
    return replace(base, **{section: replace(getattr(base, section), **{leaf: value})})


def complaint(config):
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sound_runs_pass():
    check(SOUND)
    check(changed("parallel.tokens_per_chunk", 32768, replace(SOUND, stage="sft", num_steps=0)))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.path", "", "model=DIR"),
        ("data.path", "", "data=FILE"),
        ("num_steps", 0, "set the number of policy updates"),
        ("num_steps", 10, "not a multiple of grpo.mini_batches=4 (updates per rollout); try 12"),
        ("seed", -1, "seed=-1: it must be 0 or more"),
        ("grpo.group_size", 1, "2 or more outputs"),
        ("grpo.questions_per_step", 0, "more than 0"),
        ("grpo.reference_every", 6, "try 8"),
        ("grpo.clip_low", 0.0, "more than 0"),
        ("grpo.clip_high", -0.2, "more than 0"),
        ("grpo.kl_coef", -1.0, "0 or more"),
        ("grpo.advantage_std", "std", "one of population, sample, none"),
        ("grpo.aggregation", "token_meen", "did you mean 'token_mean'?"),
        ("grpo.split", "outputs", "did you mean 'output'? It is one of output, group"),
        ("rollout.temperature", 0.0, "training needs a temperature above 0"),
        ("rollout.top_p", 0.9, "training needs 1.0"),
        ("rollout.top_p", 0.0, "(0, 1]"),
        ("rollout.gpu_memory", 1.5, "(0, 1]"),
        ("rollout.speculative_tokens", -1, "0 or more"),
        ("rollout.speculative_tokens", 20, "1 to 8"),
        ("parallel.expert_replicas", -1, "0 or more"),
        ("parallel.dispatcher", "alltoall_fp4", "did you mean 'alltoall_fp8'?"),
        ("gates.logprob", (0.02,), "two bounds"),
        ("gates.logprob", (0.02, 0.0), "more than 0"),
        ("judge.price", ("free", "free"), "two prices"),
        ("rollout.engines", 129, "more engines than the 128 questions"),
        ("rollout.max_tokens", ((0, 9000),), "set it to 10024 or more"),
        ("rollout.max_tokens", ((0, 10), (4, 9000)), "set it to 10024 or more"),
        ("rollout.max_tokens", (), "0:32768,8200:65536"),
        ("rollout.max_tokens", (512,), "not a list of first_step:value"),
        ("rollout.max_tokens", ((1, 512),), "must begin at 0"),
        ("rollout.max_tokens", ((0, 8), (5, 9), (5, 10)), "must ascend"),
        ("rollout.max_tokens", ((0, 0),), "1 or more"),
        ("parallel.tokens_per_chunk", 1024, "set it to 2048 or more"),
        ("parallel.data", 1024, "more replicas than the 512 outputs"),
        ("optimizer.betas", (0.9, 1.0), "[0, 1)"),
        ("optimizer.betas", (0.9,), "two"),
        ("rewards.weights", {"accuracy": -0.5}, "accuracy has weight -0.5, it must be a number of 0 or more"),
        ("rewards.weights", {"accuracy": "1"}, "it must be a number"),
        ("rewards.weights", {"accuracy": 0.0, "format": 0.0}, "nothing to learn"),
        ("rewards.task_weights", {"code": {"accuracy": 0.0}}, "rewards.task_weights[code]"),
        ("rewards.task_weights", {"code": 1.0}, "a table of term -> weight"),
        ("judge.price", (1.0,), "two prices"),
        ("ppo.gae_lambda", 1.5, "[0, 1]"),
        ("ppo.lr", 0.0, "more than 0"),
        ("model.dtype", "fp32", "one of float32, bfloat16"),
        ("optimizer.lr", "3e-6", "a str, it must be a float"),
        ("grpo.group_size", True, "a bool, it must be a int"),
        ("grpo.group_size", 4.0, "a float, it must be a int"),
        ("optimizer.lr", float("nan"), "finite"),
        ("grpo", {"group_size": 4}, "a dict, it must be a GRPOConfig"),
    ],
)
def test_each_mistake_is_named_with_its_cure(name, value, words):
    message = complaint(changed(name, value))
    assert words in message
    assert message.startswith(name) or name in ("rollout.max_tokens", "data.path")


def test_a_cosine_that_rises_is_refused():
    config = changed("optimizer.min_lr", 1e-3, changed("optimizer.schedule", "cosine"))
    assert "more than optimizer.lr" in complaint(config)


def test_a_warm_up_as_long_as_the_run_leaves_no_cosine():
    config = changed("optimizer.warmup_steps", 8)
    check(config)
    assert "leaves nothing of num_steps=8" in complaint(changed("optimizer.schedule", "cosine", config))


def test_a_drafting_layer_has_no_replicas_in_vllm():
    config = changed("rollout.speculative_tokens", 1, changed("parallel.expert_replicas", 2))
    check(config)
    assert "vLLM loads no replicas" in complaint(changed("rollout.tensor_parallel", 2, config))


def test_sft_has_its_own_checks():
    sft = replace(SOUND, stage="sft")
    assert "shorter than sft.max_length=32768" in complaint(sft)
    sft = changed("sft.max_length", 4096, sft)
    check(changed("rollout.temperature", 0.0, sft))
    assert "fewer sequences than replicas" in complaint(
        changed("sft.batch_size", 2, changed("parallel.data", 4, sft))
    )
    assert "nothing would be trained" in complaint(changed("sft.num_epochs", 0, replace(sft, num_steps=0)))


def test_other_complaints_are_named_after_the_first():
    config = replace(SOUND, num_steps=10, rollout=RolloutConfig(temperature=0.0, max_tokens=((0, 9000),)))
    message = complaint(config)
    assert message.startswith("num_steps=10")
    assert message.endswith("(also to mend: rollout.temperature, parallel.tokens_per_chunk)")


def test_every_checked_name_is_a_setting():
    known = settings(RunConfig())
    assert {*CHOICES, *POSITIVE.split(), *NON_NEGATIVE.split()} <= set(known)
    assert not set(POSITIVE.split()) & set(NON_NEGATIVE.split())


def test_every_numeric_setting_has_a_bound():
    elsewhere = {
        "grpo.group_size",
        "ppo.gae_lambda",
        "rollout.top_p",
        "rollout.gpu_memory",
    }
    numeric = {name for name, value in settings(RunConfig()).items() if type(value) in (int, float)}
    assert numeric == {*POSITIVE.split(), *NON_NEGATIVE.split()} | elsewhere


def test_a_pair_must_fit_into_one_chunk():
    config = changed("sft.max_length", 512, replace(SOUND, stage="reward_model"))
    for objective, chunk, words in (
        ("pairwise", 1023, "set it to 1024"),
        ("pairwise", 1024, ""),
        ("pointwise", 512, ""),
    ):
        changed_config = changed(
            "reward_model.objective", objective, changed("parallel.tokens_per_chunk", chunk, config)
        )
        if words:
            assert words in complaint(changed_config)
        else:
            check(changed_config)
    assert "predicts no tokens" in complaint(changed("model.mtp_loss_weight", 0.1, config))


def test_a_judge_needs_an_address_and_a_name():
    pairs = replace(SOUND, stage="preference_pairs")
    assert "judge.url=" in complaint(pairs)
    assert "judge.model=" in complaint(changed("judge.url", "http://127.0.0.1:1/v1", pairs))
    check(
        changed(
            "model.path",
            "",
            changed("judge.model", "m", changed("judge.url", "http://127.0.0.1:1/v1", pairs)),
        )
    )
