"""The data's journey: Prompt -> Rollout -> Reward -> Sample -> PackedBatch.

Each step makes a new frozen object; nothing is filled in later. Dims: n tokens of one sequence,
T packed tokens of one micro-batch, S sequences in it, L layers with experts, K experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    id: str
    """Stable over runs: file name and row, or generator and index."""
    question: str
    answer: str
    """Reference answer, as the data file has it (already extracted: GSM8K's text after ####)."""
    task: str
    """Key that routes to its rewards: "math", "code", "choice", "logic", or a task of the data's own."""
    text: str
    """The question inside its template: exactly what the engine reads."""
    token_ids: tuple[int, ...]
    messages: tuple[tuple[str, str], ...] = ()
    """(role, text) of a conversation, of which `question` is then the whole; empty for a question by itself."""


@dataclass(frozen=True)
class Rollout:
    prompt: Prompt
    index: int
    """Which of the group's G outputs."""
    response_ids: tuple[int, ...]
    """Sampled tokens, the stop token included."""
    response_logprobs: tuple[float, ...]
    """Processed log-probs (after temperature and top-p) the engine sampled with, one per response token."""
    response_text: str
    """Decoded without the stop token; think and answer tags kept."""
    finish_reason: str
    """"stop" | "length"."""
    weight_version: int
    """Version of the weights that sampled it."""
    max_tokens: int = 0
    """The length limit it was sampled under; 0 where nobody set one."""
    routed_experts: np.ndarray | None = field(default=None, compare=False, repr=False)
    """uint8, or uint16 above 256 experts, [n-1, L, K]: the experts that each token of prompt and response but the last was
    sent to, in each layer with experts. None without grpo.routing_replay."""


@dataclass(frozen=True)
class Reward:
    total: float
    terms: dict[str, float]
    """Unweighted value of each term of the prompt's task."""
    verdicts: dict[str, str]
    """Why, for each term: "equal", "timeout", "missing_think", ..."""


@dataclass(frozen=True)
class ScoredRollout:
    rollout: Rollout
    reward: Reward


@dataclass(frozen=True)
class Sample:
    """One training sequence. Entry t of every [n-1] array concerns the prediction of token t+1."""

    token_ids: np.ndarray
    """int64 [n]: prompt then response."""
    loss_mask: np.ndarray
    """float32 [n-1]: 1 where token t+1 is trained on."""
    token_weights: np.ndarray
    """float32 [n-1]: weight of each token's loss in the *global* batch; the loss is a plain weighted sum
    over all ranks, so no layout, padding or packing can change its normalisation."""
    advantages: np.ndarray | None = None
    """float32 [n-1]; None in SFT."""
    rollout_logprobs: np.ndarray | None = None
    """float32 [n-1], 0 where loss_mask is 0; None in SFT."""
    routed_experts: np.ndarray | None = None
    """The rollout's."""


@dataclass(frozen=True)
class PackedBatch:
    """Several sequences end to end, each shifted by one: tokens_T[t] predicts targets_T[t]."""

    tokens_T: Tensor
    """int64."""
    targets_T: Tensor
    """int64."""
    positions_T: Tensor
    """int64, restart at 0 in each sequence."""
    cu_seqlens_S: Tensor
    """int32 [S+1]: sequence s is tokens cu[s]:cu[s+1]; the padding, if any, is the last sequence."""
    loss_mask_T: Tensor
    """float32."""
    token_weights_T: Tensor
    """float32, 0 where loss_mask is 0."""
    num_padding: int = 0
    """Tokens at the end that belong to no sample."""
    members: tuple[int, ...] = ()
    """Which of the packed samples lie here, in order (padding is none)."""
    advantages_T: Tensor | None = None
    rollout_logprobs_T: Tensor | None = None
    old_logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None
    values_T: Tensor | None = None
    """float32: the critic's, before the rollout's first update; None without a critic, and so are the returns."""
    returns_T: Tensor | None = None
    experts_TLK: Tensor | None = None
    """uint8 or int16: the experts of each token, in each layer with experts; None without grpo.routing_replay."""

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens_S) - 1

    @property
    def sequence_of_T(self) -> Tensor:
        """int64 [T]: which sequence each token belongs to."""
        lengths_S = (self.cu_seqlens_S[1:] - self.cu_seqlens_S[:-1]).long()
        return torch.repeat_interleave(torch.arange(self.num_sequences, device=lengths_S.device), lengths_S)
