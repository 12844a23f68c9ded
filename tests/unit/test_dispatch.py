"""Sorting tokens by r1mega_kernels.moe_permute gives what Megatron's own permutation gives, to the bit in float32."""

from __future__ import annotations

import pytest
import torch
from tiny_models import DEEPSEEK_V3, mesh_of, packed

from r1mega.config import ModelConfig, ParallelConfig

CONFIG = {**DEEPSEEK_V3, "initializer_range": 0.3}


@pytest.fixture(scope="module", autouse=True)
def _process():
    with mesh_of(ParallelConfig()):
        yield


def built(dispatcher: str, of_megatron: bool) -> torch.nn.Module:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from r1mega.models.dispatch import DISPATCHERS
    from r1mega.models.language_model import build_model

    options = ModelConfig(dtype="float32", init="random", balance_loss=0.1)
    model = build_model(CONFIG, options, ParallelConfig(), seed=5, dispatcher=dispatcher).train()
    layers = [layer for layer in model.modules() if isinstance(layer, MoELayer)]
    assert layers
    for layer in layers:
        assert type(layer.token_dispatcher) is DISPATCHERS[dispatcher]
        if of_megatron:
            layer.token_dispatcher.__class__ = DISPATCHERS[dispatcher].__base__
    return model


def results_and_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    batch = packed([7, 12, 1, 20], CONFIG["vocab_size"], seed=3)
    out = model(batch)
    (batch.token_weights_T * out.logprobs_T).sum().backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("experts" in name for name in named)
    assert any("router" in name for name in named)
    return {"logprobs": out.logprobs_T.detach(), **named}


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_float32_results_and_gradients_are_megatrons_bit_for_bit(dispatcher: str) -> None:
    own = results_and_gradients(built(dispatcher, of_megatron=False))
    megatrons = results_and_gradients(built(dispatcher, of_megatron=True))
    assert own.keys() == megatrons.keys()
    different = [name for name in own if not torch.equal(own[name], megatrons[name])]
    assert not different
