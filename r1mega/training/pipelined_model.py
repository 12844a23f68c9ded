"""The stages of one model in this process, and how micro-batches go through the whole of it.

Without a pipeline there is one stage, the model. Everything else is the same: the trainer knows no other way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.config import ModelConfig, ParallelConfig
from r1mega.parallel import dualpipe
from r1mega.parallel.mesh import Mesh
from r1mega.parallel.messages import Messages
from r1mega.parallel.pipeline import Pipeline, run_forward
from r1mega.parallel.schedule import Schedule, Task
from r1mega.parallel.searched import load_searched
from r1mega.parallel.stages import StagePart, plan_stages, rank_of_stage
from r1mega.parallel.weight_gradients import delaying_modules, teach_megatron
from r1mega.platforms import has_streams
from r1mega.samples import PackedBatch

if TYPE_CHECKING:  # r1mega.models imports Megatron, which Platform.prepare_megatron must meet first
    from r1mega.models.hot_experts import HotExperts
    from r1mega.models.trunk import Hidden, Trunk
    from r1mega.parallel.overlap import Pieces
    from r1mega.training.stage_gradients import StageGradients

Compute = Callable[[torch.nn.Module, PackedBatch, "Hidden | None"], Any]
"""(stage, micro-batch, what the stage before handed on) -> Hidden, or what the last stage computes."""


class PipelinedModel:
    def __init__(
        self,
        build: Callable[[StagePart], Trunk],
        hf_config: dict[str, Any],
        model: ModelConfig,
        parallel: ParallelConfig,
        mesh: Mesh,
        *,
        overlap: bool | None = None,
    ) -> None:
        """build: makes one stage, with its weights.

        overlap: run X layer by layer, where the model's layers can; None: where the platform gains by it.
        """
        self.parallel, self.mesh = parallel, mesh
        parts = plan_stages(hf_config, parallel, mtp=model.mtp_loss_weight > 0)
        self.rank_of = rank_of_stage(parallel)
        self.here = [stage for stage, rank in enumerate(self.rank_of) if rank == mesh.pipeline_rank]
        """Numbers of the stages in this process."""
        self.stages = [build(parts[stage]) for stage in self.here]
        if len(parts) > 1:
            teach_megatron()
            self._join_embeddings()
        self._hot_experts = self._replicate_experts()
        wanted = has_streams() if overlap is None else overlap
        self._overlap = wanted and len(parts) > 1 and self._divides_into_pieces()

    @property
    def has_last(self) -> bool:
        """Whether losses and log-probs come out in this process."""
        return self.rank_of[-1] == self.mesh.pipeline_rank

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Of the stages in this process, under their names in the whole model."""
        for stage in self.stages:
            for name, parameter in stage.named_parameters():
                yield stage.name_in_model(name), parameter

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    def train(self) -> None:
        for stage in self.stages:
            stage.train()

    def eval(self) -> None:
        for stage in self.stages:
            stage.eval()

    def requires_grad_(self, requires_grad: bool) -> None:
        for stage in self.stages:
            stage.requires_grad_(requires_grad)

    def copy_weights_of(self, other: PipelinedModel) -> None:
        for mine, its in zip(self.stages, other.stages, strict=True):
            mine.load_state_dict(its.state_dict())

    # ---------------------------------------------------------------- runs

    def forward_backward(
        self,
        wrapped: Sequence[StageGradients],
        batches: Sequence[PackedBatch],
        compute: Compute,
        loss: Callable[[Any, int], Tensor],
    ) -> None:
        """Gradients of the sum of all micro-batches' losses, left in `main_grad`.

        Their sum over the data axis begins, each stage's when its last is there; `finalize_model_grads` must follow.

        wrapped: this process's stages inside Megatron's data-parallel wrappers. loss: of what the last stage computed for
        the i-th micro-batch; called in the process that has it.
        """
        modules = dict(zip(self.here, wrapped, strict=True))
        schedule = schedule_for(self.parallel, len(batches))

        def forward(task: Task, states: Tensor | None) -> Tensor:
            batch = batches[task.micro_batch]
            output = compute(modules[task.stage], batch, _hidden(states))
            return (
                loss(output, task.micro_batch) if task.stage == len(self.rank_of) - 1 else output.states_T1D
            )

        def reduce(stage: int) -> None:
            if stage not in held:
                modules[stage].start_grad_sync()

        def in_pieces(task: Task, states: Tensor | None) -> Pieces:
            from r1mega.parallel.overlap import Pieces

            stage, batch = stages[task.stage], batches[task.micro_batch]
            hidden = _hidden(states)

            def leave(states: Tensor) -> Tensor:
                output = compute(modules[task.stage], batch, _hidden(states, after_layers=True))
                return loss(output, task.micro_batch)

            layers, last = stage.decoder.layers, task.stage == len(self.rank_of) - 1
            in_layers = set(delaying_modules(layers))
            arguments = stage.layer_arguments(batch)
            return Pieces(
                layers,
                arguments,
                lambda: stage.enter(batch, arguments["packed_seq_params"], hidden),
                leave if last else None,
                [module for module in delaying[task.stage] if module not in in_layers],
            )

        held = self._sharing_embedding()
        stages = dict(zip(self.here, self.stages, strict=True))
        delaying = {number: delaying_modules(stage) for number, stage in stages.items()}
        late = {number: _first_layer(stage) for number, stage in stages.items()}
        pairs = any(action.kind == "X" for order in schedule.orders for action in order)
        pipeline = Pipeline(
            schedule,
            self.mesh.pipeline_rank,
            forward,
            self._messages(schedule, batches),
            in_pieces=in_pieces if self._overlap and pairs else None,
            first_layer_weights=late if self.mesh.pipeline_size > 1 else None,
            delaying_modules=delaying,
            stage_done=reduce,
        )
        with self._placed_experts():
            pipeline.run()
        self._sum_copies()
        for stage in held:
            modules[stage].start_grad_sync()

    def outputs(self, batches: Sequence[PackedBatch], compute: Compute) -> list[Any]:
        """What the last stage computes for each micro-batch, without gradients; None in the other processes."""
        results: list[Any] = [None] * len(batches)
        modules = dict(zip(self.here, self.stages, strict=True))
        schedule = dualpipe.forward_only(self.rank_of, len(batches))

        def forward(task: Task, states: Tensor | None) -> Any:
            output = compute(modules[task.stage], batches[task.micro_batch], _hidden(states))
            if task.stage < len(self.rank_of) - 1:
                return output.states_T1D
            results[task.micro_batch] = output
            return None

        messages = self._messages(schedule, batches)
        with self._placed_experts():
            run_forward(schedule, self.mesh.pipeline_rank, forward, messages)
        return results

    @property
    def expert_balance(self) -> dict[str, tuple[float, int]]:
        """The busiest expert-parallel rank's load over the mean, as hot_experts.py has it; empty without replicas."""
        return {} if self._hot_experts is None else self._hot_experts.balance

    def place_experts(self) -> None:
        """Give the experts that were busiest of late their replicas, where there are any (parallel.expert_replicas)."""
        if self._hot_experts is not None:
            self._hot_experts.place()

    def _replicate_experts(self) -> HotExperts | None:
        if not self.parallel.expert_replicas:
            return None
        from r1mega.models.hot_experts import HotExperts

        return HotExperts(self.stages, self.parallel.expert_replicas)

    def _placed_experts(self) -> AbstractContextManager[None]:
        return nullcontext() if self._hot_experts is None else self._hot_experts.placed()

    def _divides_into_pieces(self) -> bool:
        from r1mega.parallel.overlap import divides_into_pieces

        return self.parallel.context == 1 and divides_into_pieces(self.stages[0].config)

    def _sharing_embedding(self) -> list[int]:
        """Numbers of the stages here whose gradients are not whole before others have ended theirs."""
        first, last = self.stages[0], self.stages[-1]
        held = (
            [self.here[0]] if first.part.first and (last.borrows_embedding or self._is_copied(first)) else []
        )
        return held + ([self.here[-1]] if last.copy_of_embedding else [])

    def _sum_copies(self) -> None:
        """Add the gradients of the embedding's two copies, before they are reduced over the data axis."""
        for stage in self.stages:
            if stage.copy_of_embedding:
                self._add_from(self.rank_of[0], stage.get_parameter(stage.copy_of_embedding))
            elif stage.part.first and self._is_copied(stage):
                self._add_from(self.rank_of[-1], stage.embedding.word_embeddings.weight)

    def _add_from(self, pipeline_rank: int, weight: Tensor) -> None:
        gradient: Tensor = weight.main_grad  # type: ignore[attr-defined]
        peer = dist.get_global_rank(self.mesh.pipeline_group, pipeline_rank)
        theirs = torch.empty_like(gradient)
        exchange = [
            dist.P2POp(dist.isend, gradient.clone(), peer, self.mesh.pipeline_group),
            dist.P2POp(dist.irecv, theirs, peer, self.mesh.pipeline_group),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        gradient.add_(theirs)

    def _is_copied(self, first: Trunk) -> bool:
        config = first.hf_config
        uses = config.get("tie_word_embeddings") or config.get("num_nextn_predict_layers")
        scalar = any(
            row.parameter == "score.weight" for row in first.all_weights
        )  # heads.py: no vocabulary head
        return bool(uses) and self.rank_of[0] != self.rank_of[-1] and not scalar

    def _join_embeddings(self) -> None:
        last = self.stages[-1]
        if not last.copy_of_embedding:
            return
        if self.stages[0].part.first:
            last.borrow_embedding(self.stages[0])
        else:  # one of the two counts in the gradient's norm
            last.get_parameter(last.copy_of_embedding).shared = True

    def _messages(self, schedule: Schedule, batches: Sequence[PackedBatch]) -> Messages:
        stage, group = self.stages[0], self.mesh.pipeline_group

        def buffer(micro_batch: int) -> Tensor:
            batch = batches[micro_batch]
            return torch.empty(
                stage.hidden_shape(batch), dtype=stage.config.params_dtype, device=batch.tokens_T.device
            )

        return Messages(
            schedule,
            self.mesh.pipeline_rank,
            self.mesh.channel,
            lambda rank: dist.get_global_rank(group, rank),
            buffer,
        )


@functools.cache
def schedule_for(parallel: ParallelConfig, micro_batches: int) -> Schedule:
    """The order of a step. Where there are too few micro-batches for parallel.schedule, the nearest that takes them."""
    ranks = parallel.pipeline
    if ranks == 1 or parallel.schedule == "1f1b":
        return dualpipe.one_f_one_b(ranks, micro_batches)
    if parallel.schedule == "zb1p":
        return dualpipe.zb1p(ranks, micro_batches)
    if parallel.schedule == "interleaved":
        return dualpipe.interleaved(ranks, micro_batches, parallel.virtual_pipeline)
    if parallel.schedule == "searched":
        for durations in ("deepseek-v3-early", "unit"):
            found = load_searched(ranks, micro_batches, ranks + 0.5, durations)
            if found:
                return found
    if parallel.schedule in ("dualpipev", "searched") and micro_batches >= 2 * ranks:
        return dualpipe.dualpipe_v(ranks, micro_batches)
    return dualpipe.zb_v(ranks, micro_batches)


def _hidden(states: Tensor | None, *, after_layers: bool = False) -> Hidden | None:
    from r1mega.models.trunk import Hidden

    return None if states is None else Hidden(states, after_layers)


def _first_layer(stage: Trunk) -> frozenset[int]:
    """Ids of the weights whose gradients a backward pass computes last."""
    return frozenset(id(weight) for weight in stage.decoder.layers[:1].parameters())
