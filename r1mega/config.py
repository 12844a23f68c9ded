"""Every knob of a run, as frozen dataclasses.

A config file is Python that binds `config` to a `RunConfig`; the command line overrides single
fields (`r1mega run FILE section.field=value`, see overrides.py). This module imports only the
standard library, so that a config can be read, printed and checked anywhere.

Departures from the R1 paper are named at the field. `[open]` marks what the paper leaves open and
this project chose.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Schedule = tuple[tuple[int, int], ...]
"""Piecewise-constant value over steps: ((first_step, value), ...), first_step ascending from 0."""

Weights = dict[str, float]
"""Reward term -> its weight."""
TaskWeights = dict[str, dict[str, float]]
"""Task -> reward term -> its weight."""

PRESETS: dict[str, Weights] = {
    "r1_zero": {"accuracy": 1.0, "format": 1.0},
    "reasoning": {"accuracy": 1.0, "format": 1.0, "language": 1.0},
    "helpful": {"helpful": 1.0, "format": 1.0, "language": 1.0},
    "safety": {"safety": 1.0, "format": 1.0, "language": 1.0},
    "contradicted_by_the_paper_70_30": {"accuracy": 0.7, "format": 0.3},
    "contradicted_by_the_paper_50_30_20": {"helpful": 0.5, "safety": 0.3, "readability": 0.2},
}
"""Named sums, as in rewards.weights=reasoning. The first four are the paper's (R1, 2.2, 3.2); the last two go round
in notes about it (70 % accuracy and 30 % process; 50/30/20 helpful, harmless, readable), and the paper says otherwise."""


class ConfigError(ValueError):
    """A user's mistake in a setting: what, where and how to mend it, in one line."""


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""
    """Hugging Face directory: config.json, *.safetensors, tokenizer files."""
    tokenizer: str = ""
    """Tokenizer directory; empty means `path`."""
    init: str = "checkpoint"
    """"checkpoint": read the safetensors in `path`; "random": draw weights from config.json's initializer_range."""
    dtype: str = "bfloat16"
    """Trainer parameters and activations: "float32" | "bfloat16" (optimizer state is always fp32)."""
    mtp_loss_weight: float = 0.0
    """Weight of the multi-token-prediction loss (V3 eq. 24-25); 0 leaves the MTP layer as it was. [open] in RL."""
    router_bias_rate: float = 0.0
    """gamma of the aux-loss-free bias update, per optimizer step; 0 freezes the bias. [open] in RL."""
    balance_loss: float = 0.0
    """alpha of the sequence-wise balance loss (V3 eq. 17-20)."""
    recompute: str = "none"
    """Activation recomputation: "none" | "selective" (norms, MLA up-projections) | "full"."""


@dataclass(frozen=True)
class DataConfig:
    path: str = ""
    """jsonl, json or parquet file of questions and answers, or "generated:chain"."""
    eval_path: str = ""
    """Held-out file; empty takes `eval_size` rows off the end of `path` (never trained on)."""
    question_field: str = ""
    """Column of the question; empty tries the known formats (GSM8K, MATH, prompt/completion)."""
    answer_field: str = ""
    task: str = "math"
    """Task of rows without a column `task`; it routes a prompt to its rewards: math, code, choice, logic, ..."""
    template: str = "r1_zero"
    """Key of data/chat.py's TEMPLATES."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped and counted."""
    eval_size: int = 256
    operations: int = 4
    """generated:chain only: operations in one problem."""
    size: int = 20000
    """generated:* only: number of training problems or documents."""


@dataclass(frozen=True)
class ParallelConfig:
    tensor: int = 1
    pipeline: int = 1
    schedule: str = "dualpipev"
    """Order of a pipeline's work: "dualpipev" | "zb-v" | "1f1b" | "zb1p" | "interleaved" (parallel/dualpipe.py), or
    "searched": a saved order that is faster in DualPipeV's memory, where there is one for the number of micro-batches."""
    virtual_pipeline: int = 1
    """Stages of each rank under "interleaved"; a V placement (all but "1f1b" and "zb1p") always has two."""
    expert: int = 1
    expert_replicas: int = 0
    """Copies of the busiest experts in each expert-parallel process (models/hot_experts.py), placed anew for each rollout
    or step; in engines with tensor_parallel > 1 too, on GPUs. A run that resumes then goes on to rounding, not to the bit."""
    expert_tensor: int = 1
    dispatcher: str = "alltoall"
    """How tokens reach their experts: "alltoall", "alltoall_fp8" (the rows that go there in fp8, half the bytes; those that
    come back, and gradients, in model.dtype) or "allgather" (every expert rank has all tokens)."""
    context: int = 1
    data: int = 1
    """Data-parallel replicas; world size = tensor * pipeline * context * data (expert divides it)."""
    sequence_parallel: bool = True
    """Split norms' activations over the tensor axis (only where tensor > 1)."""
    distributed_optimizer: bool = False
    """ZeRO-1: optimizer state sharded over the data axis."""
    tokens_per_chunk: int = 8192
    """Capacity of one packed micro-batch, in tokens."""


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 3e-6
    min_lr: float = 0.0
    schedule: str = "constant"
    """"constant" | "cosine" (lr -> min_lr over the run), after a linear warm-up."""
    warmup_steps: int = 0
    betas: tuple[float, ...] = (0.9, 0.95)
    """Of AdamW."""
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    """Global gradient-norm limit. [open] for R1; V3 pre-training used 1.0."""


@dataclass(frozen=True)
class RolloutConfig:
    engines: int = 1
    """Independent vLLM engines; prompts are shared evenly."""
    tensor_parallel: int = 1
    """GPUs (or CPU worker processes) per engine."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: Schedule = ((0, 1024),)
    """Response-length limit by step; the command line takes a plain number too."""
    dtype: str = "bfloat16"
    kv_cache_gib: float = 0.0
    """KV cache per engine; 0 lets vLLM measure (GPU) or takes 1 GiB (CPU)."""
    gpu_memory: float = 0.85
    """Share of GPU memory vLLM may use when kv_cache_gib is 0."""
    max_concurrent: int = 256
    """Sequences decoded at once in one engine (vLLM max_num_seqs)."""
    speculative_tokens: int = 0
    """MTP self-speculative decoding: drafted tokens (needs a model with an MTP layer)."""
    seeded: bool = True
    """One seed per sample, a function of (run seed, step, question, index): reruns repeat, at a small cost."""
    timeout_seconds: float = 3600.0
    """An engine that finishes nothing for this long ends the run, by name."""


@dataclass(frozen=True)
class SyncConfig:
    bucket_mib: int = 512
    """Weights travel in buckets of at most this size (a larger tensor travels alone)."""
    timeout_seconds: float = 600.0


@dataclass(frozen=True)
class GRPOConfig:
    """Group-relative policy optimisation (DeepSeekMath eq. 3; R1 eq. 1-3)."""

    group_size: int = 16
    """G: outputs per question."""
    questions_per_step: int = 32
    """Questions per policy update."""
    mini_batches: int = 1
    """Policy updates per rollout: a rollout has questions_per_step * mini_batches questions."""
    split: str = "output"
    """How a rollout becomes mini-batches: "output" (random, as the paper says; tears groups apart) | "group". [open]"""
    clip_low: float = 0.2
    clip_high: float = 0.2
    """Ratio is clipped to [1 - clip_low, 1 + clip_high]. [open] for R1-Zero; Dev-2 prints epsilon = 10."""
    kl_coef: float = 0.001
    """beta of the k3 KL term in the loss; 0 drops the reference model."""
    reference_every: int = 400
    """The reference becomes the current policy every N steps; 0 keeps the first one."""
    aggregation: str = "sequence_mean"
    """"sequence_mean" (1/G sum_i 1/|o_i| sum_t) | "token_mean" (DAPO) | "fixed_length" (Dr. GRPO: divide by max_tokens)."""
    ratio: str = "token"
    """"token" | "sequence" (GSPO: one length-normalised ratio per output)."""
    advantage_std: str = "population"
    """What a group's advantages are divided by: its standard deviation, "population" | "sample" [open], or "none" (Dr.
    GRPO)."""
    importance_cap: float = 0.0
    """Truncated importance sampling: weight tokens by min(pi_old / pi_rollout, cap); 0 is off."""
    mask_truncated: bool = False
    """Leave outputs cut at max_tokens out of the loss. [open]"""
    routing_replay: bool = False
    """The policy sends each token to the experts that vLLM chose while it sampled ("rollout routing replay", R3: Stabilizing
    MoE Reinforcement Learning by Aligning Training and Inference Routers)."""


@dataclass(frozen=True)
class PPOConfig:
    """The comparison of R1's supplement (A.3): a critic's advantages in place of a group's, all else as in `grpo`."""

    enabled: bool = False
    """Train a critic: the policy's architecture with a scalar head. Off, none is built."""
    gae_lambda: float = 1.0
    """lambda of generalised advantage estimation (gamma is 1): 0.95 was considerably worse than GRPO, 1.0 close to it."""
    lr: float = 1e-5
    """The critic's learning rate; it follows `optimizer` in everything else. [open]"""


@dataclass(frozen=True)
class RewardConfig:
    weights: Weights = field(default_factory=lambda: {"accuracy": 1.0, "format": 1.0})
    """Terms of the sum and their weights (R1-Zero: accuracy + format, equal). A term of weight 0 is measured only."""
    task_weights: TaskWeights = field(default_factory=dict)
    """Tasks with a sum of their own, as {"general": {"helpful": 1.0, "format": 1.0}}; all others use `weights`."""
    model_on_reasoning: bool = False
    """Let a reward model score tasks that a rule can verify; the paper saw it hacked and did not (R1, 2.2)."""
    general_from: int = 0
    """Prompts whose sum has no accuracy term are drawn from this step on; R1: the last 400 of 1,700 (3.2.2)."""
    workers: int = 2
    """Killable scoring processes."""
    cpu_seconds: float = 2.0
    """CPU-time limit of one answer comparison; over it the verdict is "timeout"."""
    last_number: bool = False
    """Without a marked answer, take the last number of the summary for it."""
    jails: int = 4
    """Programs that run at once in jails; a program with assert tests takes two."""
    isolation: str = "full"
    """"full": namespaces, seccomp, rlimits, own uid; the weaker mode must be named, "process": rlimits,
    seccomp, and Landlock where the kernel has it."""
    code_seconds: float = 10.0
    """CPU-time limit of one test of a program."""
    code_memory_mib: int = 512
    exact_chinese: bool = False
    """Count Chinese words by jieba instead of Han characters / 1.6."""
    helpful_model: str = ""
    """Reward model (HF directory with a scalar head) of the term "helpful"; it reads the final summary only."""
    safety_model: str = ""
    """Reward model of the term "safety"; it reads the whole response."""


@dataclass(frozen=True)
class JudgeConfig:
    """A model behind an OpenAI-compatible endpoint: the term "judge" and preference pairs."""

    url: str = ""
    """Base address, for example http://127.0.0.1:8000/v1."""
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; an endpoint that wants none may leave it unset."""
    concurrency: int = 16
    """Requests under way at once."""
    requests_per_minute: int = 0
    """0: no limit."""
    timeout_seconds: float = 120.0
    """Of one try; a request is tried up to six times."""
    cache: str = ""
    """File that keeps every answer, so that a repeated question costs nothing; empty: none."""
    price: tuple[float, ...] = (0.0, 0.0)
    """Cost of a million prompt tokens and of a million completion tokens, in any currency."""


@dataclass(frozen=True)
class RewardModelConfig:
    """Training of a reward model (R1, section 3.1); batch, length and epochs are those of `sft`."""

    objective: str = "pairwise"
    """"pairwise" (helpful: chosen above rejected) | "pointwise" (safety: safe or unsafe)."""
    reads: str = "summary"
    """"summary" (what follows </think>) | "response" (reasoning included)."""


@dataclass(frozen=True)
class SFTConfig:
    batch_size: int = 128
    """Sequences per optimizer step."""
    max_length: int = 32768
    """Longer sequences are dropped and counted, never cut."""
    num_epochs: int = 2
    loss_on: str = "response"
    """"response" | "all" tokens."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 50
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = 2
    """Checkpoints kept; the newest complete one resumes the run."""
    background: bool = True
    """Go on training while the files are written; costs a copy in host memory of what a rank writes."""
    offload: str = "none"
    """Where the trainer's weights, gradients and optimizer go while the engines sample: "none" | "host" | a folder."""


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0
    """Steps between evaluations; before and after are always measured. 0: only those two."""
    samples: int = 1
    """Sampled answers of each held-out problem; the greedy one comes on top."""


@dataclass(frozen=True)
class GateConfig:
    """Bounds beyond which a run stops with the gate's name (design: gates are on by default)."""

    logprob: tuple[float, ...] = (0.02, 2.0)
    """|engine - trainer| log-prob of the sampled tokens: mean, largest. The mean is 1e-6 in fp32 on one machine, about 3e-3
    in bf16."""
    ratio: float = 1e-3
    """|ratio - 1| of the first update after a rollout."""


@dataclass(frozen=True)
class RunConfig:
    stage: str = "rl"
    """"rl" | "sft" | "reward_model" | "preference_pairs"."""
    dir: str = ""
    """Run directory; empty means runs/<config file's folder>/<its name>."""
    seed: int = 1
    platform: str = "auto"
    """"auto" | "cuda" | "cpu"."""
    num_steps: int = 0
    """Policy updates (rl) or optimizer steps (sft; 0 there means num_epochs)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    gates: GateConfig = field(default_factory=GateConfig)

    @property
    def questions_per_rollout(self) -> int:
        return self.grpo.questions_per_step * self.grpo.mini_batches

    @property
    def outputs_per_rollout(self) -> int:
        return self.questions_per_rollout * self.grpo.group_size

    @property
    def world_size(self) -> int:
        """Trainer processes."""
        p = self.parallel
        return p.tensor * p.pipeline * p.context * p.data

    def data_rank(self, rank: int) -> int:
        """Data-parallel index of trainer rank `rank` (Megatron's order: tensor fastest, then context, data, pipeline)."""
        p = self.parallel
        return rank // (p.tensor * p.context) % p.data

    @property
    def token_alignment(self) -> int:
        """Packed micro-batches are padded to this multiple, so that the context axis and sequence parallelism can
        split them (parallel/context.py)."""
        p = self.parallel
        pieces = 2 * p.context if p.context > 1 else 1
        return pieces * (p.tensor if p.sequence_parallel else 1)


def value_at(schedule: Schedule, step: int) -> int:
    """The schedule's value in force at `step` (the last entry whose first_step <= step)."""
    return [value for first, value in schedule if first <= step][-1]
