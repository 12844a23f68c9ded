"""Cross-checks of a run, made before anything starts. Every complaint names the setting and the cure.

Each check is a generator of complaints, so that one pass finds them all. What needs the model's own
config.json (heads divisible by the tensor axis, layers by stages) is checked where that is read.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator

from r1mega.config import ConfigError, RunConfig, Schedule

CHOICES: dict[str, tuple[str, ...]] = {
    "stage": ("rl", "sft", "reward_model", "preference_pairs"),
    "platform": ("auto", "cuda", "cpu"),
    "model.init": ("checkpoint", "random"),
    "model.dtype": ("float32", "bfloat16"),
    "model.recompute": ("none", "selective", "full"),
    "parallel.dispatcher": ("alltoall", "alltoall_fp8", "allgather"),
    "parallel.schedule": ("dualpipev", "searched", "zb-v", "1f1b", "zb1p", "interleaved"),
    "optimizer.schedule": ("constant", "cosine"),
    "rollout.dtype": ("float32", "bfloat16"),
    "grpo.split": ("output", "group"),
    "grpo.advantage_std": ("population", "sample", "none"),
    "grpo.aggregation": ("sequence_mean", "token_mean", "fixed_length"),
    "grpo.ratio": ("token", "sequence"),
    "rewards.isolation": ("full", "process"),
    "reward_model.objective": ("pairwise", "pointwise"),
    "reward_model.reads": ("summary", "response"),
    "sft.loss_on": ("response", "all"),
}

POSITIVE = """
    data.max_prompt_tokens data.operations data.size
    parallel.tensor parallel.pipeline parallel.virtual_pipeline parallel.expert parallel.expert_tensor
    parallel.context parallel.data parallel.tokens_per_chunk
    optimizer.lr ppo.lr
    rollout.engines rollout.tensor_parallel rollout.max_concurrent rollout.timeout_seconds
    sync.bucket_mib sync.timeout_seconds
    grpo.questions_per_step grpo.mini_batches grpo.clip_low grpo.clip_high
    rewards.workers rewards.cpu_seconds
    rewards.jails rewards.code_seconds rewards.code_memory_mib
    judge.concurrency judge.timeout_seconds
    sft.batch_size sft.max_length checkpoint.keep eval.samples
    gates.ratio
"""

NON_NEGATIVE = """
    seed num_steps
    model.mtp_loss_weight model.router_bias_rate model.balance_loss data.eval_size parallel.expert_replicas
    optimizer.min_lr optimizer.warmup_steps optimizer.weight_decay optimizer.clip_grad
    rollout.temperature rollout.kv_cache_gib rollout.speculative_tokens
    grpo.kl_coef grpo.reference_every grpo.importance_cap rewards.general_from
    sft.num_epochs judge.requests_per_minute
    checkpoint.every eval.every
"""


def check(config: RunConfig) -> None:
    """Raise ConfigError with the first complaint, and the names of the settings of the others."""
    complaints = list(_types(config)) or list(_values(config)) or [*_general(config), *_stage(config)]
    if complaints:
        others = list(dict.fromkeys(complaint.partition("=")[0] for complaint in complaints[1:]))
        more = f" (also to mend: {', '.join(others)})" if others else ""
        raise ConfigError(complaints[0] + more)


def _get(config: RunConfig, name: str) -> object:
    section, dot, leaf = name.rpartition(".")
    return getattr(getattr(config, section) if dot else config, leaf)


def _types(config: RunConfig) -> Iterator[str]:
    """A config file is Python, so a field can hold anything: compare with its default's type."""
    for entry in dataclasses.fields(config):
        value, default = getattr(config, entry.name), getattr(RunConfig(), entry.name)
        if not dataclasses.is_dataclass(default):
            yield from _type(entry.name, value, default)
        elif type(value) is not type(default):
            yield f"{entry.name}={value!r}: a {type(value).__name__}, it must be a {type(default).__name__}"
        else:
            for leaf in dataclasses.fields(default):
                yield from _type(
                    f"{entry.name}.{leaf.name}", getattr(value, leaf.name), getattr(default, leaf.name)
                )


def _type(name: str, value: object, default: object) -> Iterator[str]:
    wanted = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool)):
        yield f"{name}={value!r}: a {type(value).__name__}, it must be a {type(default).__name__}"
    elif isinstance(value, float) and value - value != 0:
        yield f"{name}={value!r}: it must be a finite number"


def _values(config: RunConfig) -> Iterator[str]:
    """Settings one by one."""
    for name, known in CHOICES.items():
        value = _get(config, name)
        if value not in known:
            near = difflib.get_close_matches(str(value), known, n=1)
            guess = f"did you mean {near[0]!r}? " if near else ""
            yield f"{name}={value}: {guess}It is one of {', '.join(known)}"
    for names, floor, words in ((POSITIVE, 0, "more than 0"), (NON_NEGATIVE, -1, "0 or more")):
        for name in names.split():
            value = _get(config, name)
            assert isinstance(value, int | float), name
            if value < 0 or value == floor:
                yield f"{name}={value}: it must be {words}"
    betas = config.optimizer.betas
    if not _are_two_numbers(betas) or not all(0 <= beta < 1 for beta in betas):
        yield f"optimizer.betas={betas}: AdamW has two, and they lie in [0, 1)"
    for name, share in (("top_p", config.rollout.top_p), ("gpu_memory", config.rollout.gpu_memory)):
        if not 0 < share <= 1:
            yield f"rollout.{name}={share}: it must lie in (0, 1]"
    if not 0 <= config.ppo.gae_lambda <= 1:
        yield f"ppo.gae_lambda={config.ppo.gae_lambda}: it must lie in [0, 1]"
    if config.rollout.speculative_tokens > 8:
        yield f"rollout.speculative_tokens={config.rollout.speculative_tokens}: one MTP layer drafts 1 to 8 tokens"
    yield from _schedule("rollout.max_tokens", config.rollout.max_tokens)
    if not _are_two_numbers(config.judge.price) or min(config.judge.price) < 0:
        yield f"judge.price={config.judge.price}: two prices of a million tokens, prompt and completion, 0 or more"
    bounds = config.gates.logprob
    if not _are_two_numbers(bounds) or not min(bounds) > 0:
        yield f"gates.logprob={bounds}: two bounds, of the mean and of the largest difference, more than 0"
    yield from _weights("rewards.weights", config.rewards.weights)
    for task, row in config.rewards.task_weights.items():
        if isinstance(row, dict):
            yield from _weights(f"rewards.task_weights[{task}]", row)
        else:
            yield f"rewards.task_weights[{task}]={row!r}: it must be a table of term -> weight"


def _are_two_numbers(values: tuple[float, ...]) -> bool:
    return len(values) == 2 and all(type(value) in (int, float) for value in values)


def _weights(name: str, row: dict[str, float]) -> Iterator[str]:
    for term, weight in row.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not isinstance(term, str) or not number or not 0 <= weight < float("inf"):
            yield f"{name}={row}: {term} has weight {weight!r}, it must be a number of 0 or more"
    if not any(row.values()):
        yield f"{name}={row}: every weight is 0, so there is nothing to learn from"


def _schedule(name: str, schedule: Schedule) -> Iterator[str]:
    example = "a schedule looks like 0:32768,8200:65536"
    pairs = all(
        isinstance(entry, tuple) and len(entry) == 2 and all(type(part) is int for part in entry)
        for entry in schedule
    )
    if not pairs or not schedule:
        yield f"{name}={schedule}: not a list of first_step:value; {example}"
        return
    firsts = [first for first, _ in schedule]
    if firsts[0] != 0:
        yield f"{name}={schedule}: the first entry begins at step {firsts[0]}, it must begin at 0; {example}"
    if firsts != sorted(set(firsts)):
        yield f"{name}={schedule}: the steps must ascend; {example}"
    if min(value for _, value in schedule) < 1:
        yield f"{name}={schedule}: every value must be 1 or more"


def _general(config: RunConfig) -> Iterator[str]:
    """What holds for every stage."""
    if not config.model.path and config.stage != "preference_pairs":
        yield "model.path=: give the Hugging Face directory of the model, model=DIR"
    if not config.data.path:
        yield "data.path=: give the questions' file, data=FILE, or data=generated:chain"
    optimizer = config.optimizer
    if optimizer.schedule == "cosine" and optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr={optimizer.min_lr}: more than optimizer.lr={optimizer.lr}, where the cosine begins"
    if optimizer.schedule == "cosine" and 0 < config.num_steps <= optimizer.warmup_steps:
        yield f"optimizer.warmup_steps={optimizer.warmup_steps}: leaves nothing of num_steps={config.num_steps} to the cosine"


def _stage(config: RunConfig) -> Iterator[str]:
    yield from STAGES[config.stage](config)


def _rl(config: RunConfig) -> Iterator[str]:
    grpo, rollout, updates = config.grpo, config.rollout, config.grpo.mini_batches
    if config.num_steps < 1:
        yield f"num_steps={config.num_steps}: set the number of policy updates, for example num_steps={100 * updates}"
    elif config.num_steps % updates:
        near = -(-config.num_steps // updates) * updates
        yield f"num_steps={config.num_steps}: not a multiple of grpo.mini_batches={updates} (updates per rollout); try {near}"
    if grpo.kl_coef > 0 and grpo.reference_every % updates:
        near = -(-grpo.reference_every // updates) * updates
        yield (
            f"grpo.reference_every={grpo.reference_every}: not a multiple of grpo.mini_batches={updates}, "
            f"so the reference would change inside a rollout; try {near}"
        )
    if grpo.group_size < 2 and not config.ppo.enabled:
        yield f"grpo.group_size={grpo.group_size}: a group needs 2 or more outputs to have an advantage"
    if (outputs := grpo.group_size * grpo.questions_per_step) < config.parallel.data:
        yield f"parallel.data={config.parallel.data}: more replicas than the {outputs} outputs of one update"
    if config.questions_per_rollout < rollout.engines:
        yield f"rollout.engines={rollout.engines}: more engines than the {config.questions_per_rollout} questions of a rollout"
    if rollout.temperature == 0:
        yield "rollout.temperature=0: greedy outputs of a group are all equal; training needs a temperature above 0"
    if config.parallel.expert_replicas and rollout.tensor_parallel > 1 and rollout.speculative_tokens:
        yield (
            f"rollout.speculative_tokens={rollout.speculative_tokens} with parallel.expert_replicas and "
            "rollout.tensor_parallel above 1: vLLM loads no replicas of the drafting layer's experts; set one of them to 0"
        )
    if rollout.top_p < 1:
        yield f"rollout.top_p={rollout.top_p}: the trainer's log-probs are of the whole vocabulary; training needs 1.0"
    longest = config.data.max_prompt_tokens + max(value for _, value in rollout.max_tokens)
    if _chunk(config) < longest:
        yield (
            f"parallel.tokens_per_chunk={config.parallel.tokens_per_chunk}: the longest sequence has {longest} tokens "
            f"(data.max_prompt_tokens + rollout.max_tokens) and is never cut; set it to {longest} or more"
        )


def _chunk(config: RunConfig) -> int:
    """Tokens a packed micro-batch can really hold: chunks are padded to the alignment."""
    return config.parallel.tokens_per_chunk // config.token_alignment * config.token_alignment


def _sft(config: RunConfig) -> Iterator[str]:
    sft, parallel = config.sft, config.parallel
    if config.num_steps == 0 and sft.num_epochs == 0:
        yield "sft.num_epochs=0: with num_steps=0 nothing would be trained; set one of them"
    if sft.batch_size < parallel.data:
        yield f"sft.batch_size={sft.batch_size}: fewer sequences than replicas (parallel.data={parallel.data})"
    if _chunk(config) < sft.max_length:
        yield (
            f"parallel.tokens_per_chunk={parallel.tokens_per_chunk}: shorter than sft.max_length={sft.max_length}, "
            f"and a sequence is never cut; set it to {sft.max_length} or more"
        )


def _reward_model(config: RunConfig) -> Iterator[str]:
    yield from _sft(config)
    if config.model.mtp_loss_weight:
        yield f"model.mtp_loss_weight={config.model.mtp_loss_weight}: a reward model predicts no tokens; set it to 0"
    needed = 2 * config.sft.max_length + config.token_alignment - 1
    if config.reward_model.objective == "pairwise" and config.parallel.tokens_per_chunk < needed:
        yield (
            f"parallel.tokens_per_chunk={config.parallel.tokens_per_chunk}: a pair lies in one chunk whole, each text up to "
            f"sft.max_length={config.sft.max_length} tokens; set it to {needed} or more"
        )


def _preference_pairs(config: RunConfig) -> Iterator[str]:
    judge = config.judge
    if not judge.url:
        yield "judge.url=: give the judge's endpoint, for example judge.url=http://127.0.0.1:8000/v1"
    if not judge.model:
        yield "judge.model=: give the model's name at the endpoint"


STAGES = {"rl": _rl, "sft": _sft, "reward_model": _reward_model, "preference_pairs": _preference_pairs}
