"""The gate as one operator trains like the same gate in plain torch."""

from __future__ import annotations

import pytest
import torch
from tiny_models import DEEPSEEK_V3, mesh_of, packed

from r1mega.config import ModelConfig, ParallelConfig


@pytest.fixture(scope="module", autouse=True)
def _process():
    with mesh_of(ParallelConfig()):
        yield


def plain_routing(router, logits, padding_mask=None):
    """V3's equations 12-16, differentiated by autograd."""
    config = router.config
    score_TE = logits.view(-1, config.num_moe_experts).sigmoid()
    biased_TGE = (score_TE + router.expert_bias).detach().unflatten(1, (config.moe_router_num_groups, -1))
    group_TG = biased_TGE.sort(dim=-1, descending=True).values[..., :2].sum(dim=-1)
    order_TG = group_TG.sort(dim=-1, descending=True, stable=True).indices
    dropped_TG = (
        torch.ones_like(group_TG).bool().scatter(1, order_TG[:, : config.moe_router_group_topk], False)
    )
    biased_TE = biased_TGE.masked_fill(dropped_TG[..., None], -torch.inf).flatten(1)
    best_TK = biased_TE.sort(dim=-1, descending=True, stable=True).indices[:, : router.topk]
    chosen_TE = torch.zeros_like(score_TE).bool().scatter(1, best_TK, True)
    weight_TE = score_TE * chosen_TE
    if config.norm_topk_prob:
        weight_TE = weight_TE / weight_TE.sum(dim=-1, keepdim=True)
    return weight_TE * config.moe_router_topk_scaling_factor, chosen_TE


def curve(normalise: bool, routing=None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of a few steps, and the last one's gradients."""
    from r1mega.models.experts import GroupLimitedRouter
    from r1mega.models.language_model import build_model

    config = {**DEEPSEEK_V3, "initializer_range": 0.3, "norm_topk_prob": normalise}
    options = ModelConfig(dtype="float32", init="random")
    model = build_model(config, options, ParallelConfig(), seed=5).train()
    routers = [module for module in model.modules() if isinstance(module, GroupLimitedRouter)]
    for number, router in enumerate(routers):
        router.expert_bias.copy_(0.1 * torch.randn(8, generator=torch.Generator().manual_seed(number)))
        if routing is not None:
            router.routing = routing.__get__(router)
    assert len(routers) == 2
    losses = []
    batch = packed([7, 12, 1, 20], config["vocab_size"], seed=3)
    for _ in range(3):
        model.zero_grad()
        loss = -(batch.token_weights_T * model(batch).logprobs_T).sum()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.05 * weight.grad
    return losses, {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("normalise", [True, False])
def test_training_with_the_operator_follows_the_curve_of_plain_torch(normalise):
    own, own_gradients = curve(normalise)
    plain, plain_gradients = curve(normalise, plain_routing)
    assert own == pytest.approx(plain, rel=1e-5)
    assert own[0] != pytest.approx(own[-1], rel=1e-3)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(
            own_gradients[name], gradient, rtol=1e-3, atol=1e-5 * (1 + float(gradient.abs().max()))
        )


def test_with_replicas_the_gate_moves_weights_and_choices_to_slots_and_loses_nothing():
    from r1mega.models.experts import GroupLimitedRouter
    from r1mega.models.language_model import build_model
    from r1mega_kernels.eplb import rebalance_experts
    from r1mega_kernels.grouped_topk import Replicas

    model = build_model(DEEPSEEK_V3, ModelConfig(dtype="float32", init="random"), ParallelConfig(), seed=5)
    router = next(module for module in model.modules() if isinstance(module, GroupLimitedRouter))
    logits_T1E = torch.randn(97, 1, 8)
    weight_TE, chosen_TE = router.routing(logits_T1E)
    expert_of_slot_LP, slots_LEX, replicas_LE = rebalance_experts(torch.rand(1, 8) ** 2, 12, 1, 1, 4)
    router.replicas, router.num_slots = Replicas(slots_LEX[0], replicas_LE[0]), 12
    weight_TP, chosen_TP = router.routing(logits_T1E)
    back = expert_of_slot_LP[0].expand(97, -1)
    assert torch.equal(torch.zeros(97, 8).scatter_add(1, back, weight_TP), weight_TE)
    assert torch.equal(torch.zeros(97, 8).scatter_add(1, back, chosen_TP.float()), chosen_TE.float())
    for expert in range(8):
        for token in chosen_TE[:, expert].nonzero().flatten().tolist():
            assert chosen_TP[token, slots_LEX[0, expert, token % replicas_LE[0, expert]]]
