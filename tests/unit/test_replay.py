"""Routing replay: the policy's gates take the experts that a batch brings, and nothing else does."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny_models import DEEPSEEK_V3, QWEN2, mesh_of, packed

from r1mega.config import ConfigError, GRPOConfig, ModelConfig, ParallelConfig, RunConfig
from r1mega.data.packing import pack
from r1mega.samples import PackedBatch, Prompt, Rollout, Sample

SHAPE = {**DEEPSEEK_V3, "initializer_range": 0.3, "num_nextn_predict_layers": 1}
LAYERS, EXPERTS, TOP_K = 2, 8, 3


@pytest.fixture(scope="module", autouse=True)
def _process():
    with mesh_of(ParallelConfig()):
        yield


def build(recompute="none"):
    from r1mega.models.language_model import build_model

    options = ModelConfig(dtype="float32", init="random", mtp_loss_weight=0.1, recompute=recompute)
    return build_model(SHAPE, options, ParallelConfig(), seed=5)


def replaying(recompute="none"):
    from r1mega.models.replay import replay_routing

    model = build(recompute)
    replay_routing([model])
    return model


def batch_with_experts(seed=3) -> PackedBatch:
    """Three sequences and two tokens of padding, with random experts."""
    rng = np.random.default_rng(seed)
    samples = []
    for n in (8, 13, 4):
        experts = rng.random((n - 1, LAYERS, EXPERTS)).argsort(-1)[..., :TOP_K].astype(np.uint8)
        mask = np.ones(n - 1, np.float32)
        samples.append(Sample(rng.integers(0, 96, n), mask, mask / 20, routed_experts=experts))
    ((batch,),) = pack(samples, 1, 64, align=8)
    assert batch.num_padding == 2
    return batch


@contextmanager
def choices_seen():
    """The experts of every call of the gate, in order."""
    from r1mega.models import experts

    seen, operator = [], experts.grouped_topk

    def watched(*args, **options):
        routing = operator(*args, **options)
        seen.append(routing.expert_TK)
        return routing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "grouped_topk", watched)
        yield seen


def test_every_layer_routes_as_the_batch_says_but_for_multi_token_prediction():
    model, batch = replaying(), batch_with_experts()
    with choices_seen() as seen, torch.no_grad():
        model(batch)
    with choices_seen() as own, torch.no_grad():
        build()(batch)
    assert len(seen) == len(own) == LAYERS + 1
    for layer in range(LAYERS):
        assert torch.equal(seen[layer], batch.experts_TLK[:, layer].long())
        assert not torch.equal(seen[layer], own[layer])
    assert not torch.equal(seen[LAYERS], batch.experts_TLK[:, -1].long())


def test_other_router_weights_leave_the_choice_and_change_the_weights():
    model, batch = replaying(), batch_with_experts()
    before = model(batch).logprobs_T
    with torch.no_grad():
        for layer in model.decoder.layers[1:]:
            layer.mlp.router.weight.mul_(-2.0)
    with choices_seen() as seen:
        after = model(batch).logprobs_T
    assert all(torch.equal(seen[layer], batch.experts_TLK[:, layer].long()) for layer in range(LAYERS))
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradients_are_those_of_the_same_choice_in_plain_torch(recompute):
    """Recomputation routes as the forward pass did."""
    batch = batch_with_experts()

    def gradients(model):
        outputs = model.train()(batch)
        loss = -(batch.token_weights_T * outputs.logprobs_T).sum() + 0.1 * outputs.mtp_loss_sum
        loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    own, plain = replaying(recompute), replaying()
    for layer in plain.decoder.layers[1:]:
        layer.mlp.router.routing = _plain_replay.__get__(layer.mlp.router)
    expected = gradients(plain)
    assert expected["decoder.layers.1.mlp.router.weight"].abs().max() > 1e-4
    for name, gradient in gradients(own).items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-3, atol=1e-5 * (1 + float(gradient.abs().max()))
        )


def _plain_replay(router, logits, padding_mask=None):
    """V3's equations 12, 13 and 16 with given experts, differentiated by autograd."""
    config = router.config
    logits_TE = logits.view(-1, config.num_moe_experts)
    chosen_TE = torch.zeros_like(logits_TE).bool()
    chosen_TE.scatter_(1, router.packed.batch.experts_TLK[:, router.replayed].long(), True)
    weight_TE = logits_TE.sigmoid() * chosen_TE
    weight_TE = weight_TE / weight_TE.sum(dim=-1, keepdim=True)
    return weight_TE * config.moe_router_topk_scaling_factor, chosen_TE


def test_the_load_counts_the_replayed_experts_of_real_tokens():
    model, batch = replaying().train(), batch_with_experts()
    model(batch)
    for number, layer in enumerate(model.decoder.layers[1:]):
        real = batch.experts_TLK[: -batch.num_padding, number].long()
        assert (
            layer.mlp.router.local_tokens_per_expert.tolist() == real.flatten().bincount(minlength=8).tolist()
        )


def test_a_batch_without_experts_is_refused():
    with pytest.raises(ValueError, match=r"grpo\.routing_replay=true: a packed batch came without"):
        replaying()(packed([5, 3], 96, seed=1))


def test_the_gate_stops_a_run_whose_rollouts_lack_their_experts():
    from r1mega.algorithms.credit import plan_samples
    from r1mega.stages.rl import LostRollouts, ReinforcementLearning

    prompt = Prompt("p1", "q", "a", "math", "q", (5, 6))
    config = RunConfig(grpo=GRPOConfig(group_size=2, routing_replay=True))
    job = object.__new__(ReinforcementLearning)
    job.config, job.step = config, 0
    experts = np.zeros((4, LAYERS, TOP_K), np.uint8)
    whole = [Rollout(prompt, i, (1, 2, 3), (-1.0,) * 3, "", "stop", 0, 8, experts) for i in range(2)]
    job._account(whole, plan_samples(whole, config, 0), [prompt])
    bare = [whole[0], dataclasses.replace(whole[1], routed_experts=None)]
    with pytest.raises(
        LostRollouts, match=r"gate routed-experts, step 0: 1 outputs .* output 1 of prompt p1"
    ):
        job._account(bare, plan_samples(whole, config, 0), [prompt])


def test_a_model_without_experts_is_refused(tmp_path):
    from r1mega.stages.preflight import check_model

    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    config = RunConfig(
        model=ModelConfig(path=str(tmp_path), init="random"), grpo=GRPOConfig(routing_replay=True)
    )
    with pytest.raises(ConfigError, match=r"grpo\.routing_replay=true: .* \(qwen2\) has no experts"):
        check_model(config)
