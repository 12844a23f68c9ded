"""Sorting tokens by r1mega_kernels.moe_permute gives what Megatron's own permutation gives, to the bit in float32."""

from __future__ import annotations

import pytest
import torch
from tiny_models import DEEPSEEK_V3, float8_by_rounding_first, mesh_of, packed

from r1mega.config import ModelConfig, ParallelConfig

CONFIG = {**DEEPSEEK_V3, "initializer_range": 0.3}


@pytest.fixture(scope="module", autouse=True)
def _process():
    with mesh_of(ParallelConfig()):
        yield


def built(dispatcher: str, of_megatron: bool = False, dtype: str = "float32") -> torch.nn.Module:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from r1mega.models.dispatch import DISPATCHERS
    from r1mega.models.language_model import build_model

    options = ModelConfig(dtype=dtype, init="random", balance_loss=0.1)
    model = build_model(CONFIG, options, ParallelConfig(dispatcher=dispatcher), seed=5).train()
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_dispatch_is_alltoall_of_rounded_tokens_bit_for_bit(dtype: str) -> None:
    from r1mega.models import dispatch

    own = results_and_gradients(built("alltoall_fp8", dtype=dtype))
    with float8_by_rounding_first(dispatch):
        expected = results_and_gradients(built("alltoall_fp8", dtype=dtype))
    unrounded = results_and_gradients(built("alltoall", dtype=dtype))
    assert own.keys() == expected.keys() == unrounded.keys()
    assert not [name for name in own if not torch.equal(own[name], expected[name])]
    assert not torch.equal(own["logprobs"], unrounded["logprobs"])


def test_fp8_rows_and_scales_are_kept_for_the_stream_that_sends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlapped, that is another stream than made them, and they are dropped while it may still read them."""
    from r1mega import platforms
    from r1mega.models import dispatch
    from r1mega_kernels.fp8_block import quantize_rows

    events: list[tuple[int, str]] = []
    monkeypatch.setattr(platforms, "has_streams", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "kept for this stream")
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda x, stream: events.append((x.data_ptr(), stream))
    )

    def send(group, x, *splits):
        events.append((x.data_ptr(), "sent"))
        return x

    monkeypatch.setattr(dispatch, "all_to_all", send)
    rows_ND, scale_NQ = quantize_rows(torch.randn(5, 300))
    dispatch._Dispatched.apply(torch.zeros(5, 300), rows_ND, scale_NQ, None, None, None)
    both = rows_ND.data_ptr(), scale_NQ.data_ptr()
    assert events == [(x, what) for what in ("kept for this stream", "sent") for x in both]


@pytest.mark.parametrize("weighted", [False, True])
def test_each_operation_is_megatrons_bit_for_bit(weighted: bool) -> None:
    from megatron.core.transformer.moe import moe_utils

    from r1mega_kernels.moe_permute import indices_of, permute, permute_values, sort_by_expert, unpermute

    num_tokens, num_per_token, num_experts = 61, 4, 16
    map_TE = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    map_TE.scatter_(1, torch.rand(num_tokens, num_experts).argsort(dim=1)[:, :num_per_token], True)
    tokens_TD, probs_TE = torch.randn(num_tokens, 9), torch.rand(num_tokens, num_experts) * map_TE
    seed_TD, scale_N = torch.randn(num_tokens, 9), torch.randn(num_tokens * num_per_token, 1)

    def of_megatron(tokens_TD, probs_TE):
        rows_ND, probs_N, order_N = moe_utils.permute(tokens_TD, map_TE, probs_TE, num_tokens * num_per_token)
        probs = {"probs": probs_TE, "routing_map": map_TE} if weighted else {}
        return rows_ND, probs_N, moe_utils.unpermute(rows_ND * scale_N, order_N, tokens_TD.shape, **probs)

    def own(tokens_TD, probs_TE):
        indices_TK = indices_of(map_TE, num_per_token)
        permutation = sort_by_expert(indices_TK, num_experts)
        probs_TK = probs_TE.gather(1, indices_TK.long())
        rows_ND = permute(tokens_TD, permutation)
        weights_TK = probs_TK if weighted else None
        return (
            rows_ND,
            permute_values(probs_TK, permutation),
            unpermute(rows_ND * scale_N, permutation, weights_TK),
        )

    found = []
    for op in (of_megatron, own):
        inputs = tokens_TD.clone().requires_grad_(), probs_TE.clone().requires_grad_()
        results = op(*inputs)
        (
            (seed_TD * results[2]).sum() + results[0].square().sum() + (scale_N[:, 0] * results[1]).sum()
        ).backward()
        found.append((*(x.detach() for x in results), inputs[0].grad, inputs[1].grad))
    for name, a, b in zip(("rows", "probs", "tokens", "d_tokens"), *found, strict=False):
        assert torch.equal(a, b), name
    if weighted:  # sums of products over D: another order
        torch.testing.assert_close(found[0][4], found[1][4], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found[0][4], found[1][4])
