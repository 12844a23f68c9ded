"""The models against transformers' own, in float32, with the same weights: logits and every gradient."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from tiny_models import DEEPSEEK_V3, LLAMA, QWEN2, YARN, mesh_of, packed, scramble

from r1mega.config import ModelConfig, ParallelConfig

PARALLEL = ParallelConfig()
FP32 = ModelConfig(dtype="float32")
CASES = {
    "rope": DEEPSEEK_V3,
    "yarn": {**DEEPSEEK_V3, "rope_scaling": YARN},
    "no q_lora": {**DEEPSEEK_V3, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "no norm_topk_prob": {**DEEPSEEK_V3, "norm_topk_prob": False, "topk_group": 3, "n_shared_experts": 2},
    "one expert": {
        **DEEPSEEK_V3,
        "num_experts_per_tok": 1,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
    },
    "odd sizes": {
        **DEEPSEEK_V3,
        "moe_intermediate_size": 7,
        "n_routed_experts": 6,
        "n_group": 2,
        "v_head_dim": 5,
    },
    "qwen2 tied": QWEN2,
    "qwen2": {**QWEN2, "tie_word_embeddings": False, "num_key_value_heads": 4},
    "llama3 scaling": LLAMA,
    "llama tied": {
        **LLAMA,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
}


@pytest.fixture(scope="module", autouse=True)
def _process():
    with mesh_of(PARALLEL) as mesh:
        yield mesh


def transformers_model(config, directory, seed):
    """A random transformers model of this config, saved to `directory`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(directory), attn_implementation="eager"
    )
    if config["model_type"] == "deepseek_v3":
        model.set_experts_implementation("eager")  # its grouped product refuses odd sizes
    scramble(model, seed)
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))
    return model.eval()


def imported(config, directory, **model_options):
    from r1mega.models.hf_weights import import_hf
    from r1mega.models.language_model import build_model

    model = build_model(config, dataclasses.replace(FP32, **model_options), PARALLEL, seed=0)
    import_hf(model, directory)
    return model


def sequences(batch):
    bounds = batch.cu_seqlens_S.tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def transformers_logits(model, batch):
    return torch.cat([model(batch.tokens_T[span][None]).logits[0] for span in sequences(batch)])


def gradients_in_hf_names(model):
    from r1mega.models.hf_weights import named_hf_tensors

    gradients = {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return dict(named_hf_tensors(model, gradients))


def transformers_gradients(model):
    """transformers stacks experts; checkpoints do not."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            for expert, gradient in enumerate(parameter.grad):
                for part, half in zip(("gate_proj", "up_proj"), gradient.chunk(2), strict=True):
                    gradients[name.replace("gate_up_proj", f"{expert}.{part}.weight")] = half
        elif name.endswith("experts.down_proj"):
            for expert, gradient in enumerate(parameter.grad):
                gradients[name.replace("down_proj", f"{expert}.down_proj.weight")] = gradient
        else:
            gradients[name] = parameter.grad
    return gradients


@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_gradient_equal_transformers(case, tmp_path):
    config = CASES[case]
    reference = transformers_model(config, tmp_path, seed=3)
    model = imported(config, tmp_path)
    batch = packed([37, 5, 1, 64, 20], config["vocab_size"], seed=4)

    expected_TV = transformers_logits(reference, batch)
    head_VD = model._head()
    logits_TV = model.hidden_states(batch) @ head_VD.T
    assert expected_TV.abs().max() > 0.5
    assert (logits_TV - expected_TV).abs().max() < 5e-6 * max(1.0, expected_TV.abs().max().item())

    out = model(batch)
    logprobs_TV = expected_TV.log_softmax(-1)
    expected_T = logprobs_TV.gather(1, batch.targets_T[:, None])[:, 0]
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    torch.testing.assert_close(out.logprobs_T, expected_T, atol=2e-5, rtol=0)
    torch.testing.assert_close(out.entropy_T, entropy_T, atol=2e-5, rtol=0)

    (batch.token_weights_T * expected_T).sum().backward()
    (batch.token_weights_T * out.logprobs_T).sum().backward()
    gradients, expected = gradients_in_hf_names(model), transformers_gradients(reference)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (gradients[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-6)
        assert error < 2e-4, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("case", ["yarn", "qwen2 tied", "llama3 scaling"])
def test_packing_does_not_change_log_probs(case, tmp_path):
    config = CASES[case]
    transformers_model(config, tmp_path, seed=5)
    model = imported(config, tmp_path)
    lengths = [9, 70, 33, 34, 8, 1]
    together = packed(lengths, config["vocab_size"], seed=6)
    for span, length in zip(sequences(together), lengths, strict=True):
        alone = dataclasses.replace(
            together,
            tokens_T=together.tokens_T[span],
            targets_T=together.targets_T[span],
            positions_T=together.positions_T[span],
            cu_seqlens_S=torch.tensor([0, length], dtype=torch.int32),
        )
        torch.testing.assert_close(
            model(alone).logprobs_T, model(together).logprobs_T[span], atol=5e-6, rtol=0
        )


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_does_not_change_gradients(recompute):
    from r1mega.models.language_model import build_model

    config = {**DEEPSEEK_V3, "num_nextn_predict_layers": 1, "initializer_range": 0.15}
    batch = packed([20, 31], config["vocab_size"], seed=7)

    def gradients(recompute):
        options = ModelConfig(dtype="float32", init="random", mtp_loss_weight=0.3, recompute=recompute)
        model = build_model(config, options, PARALLEL, seed=1).train()
        out = model(batch)
        (0.3 * out.mtp_loss_sum - (batch.token_weights_T * out.logprobs_T).sum()).backward()
        return gradients_in_hf_names(model)

    plain, recomputed = gradients("none"), gradients(recompute)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-7, rtol=1e-4, msg=name)


def test_mtp_predicts_two_tokens_ahead_inside_each_sequence(tmp_path):
    """V3 eq. 21-25 written out per sequence with transformers' layers."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

    from r1mega.models.hf_weights import named_hf_tensors
    from r1mega.models.language_model import build_model

    config = {**DEEPSEEK_V3, "num_nextn_predict_layers": 1}
    options = ModelConfig(dtype="float32", init="random", mtp_loss_weight=0.3)
    model = build_model({**config, "initializer_range": 0.15}, options, PARALLEL, seed=2)
    tensors = {name: tensor.clone() for name, tensor in named_hf_tensors(model)}
    prefix = f"model.layers.{config['num_hidden_layers']}."
    mtp = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
    assert torch.equal(mtp["embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(mtp["shared_head.head.weight"], tensors["lm_head.weight"])

    reference = transformers_model({**config, "num_nextn_predict_layers": 0}, tmp_path / "main", seed=0)
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "main" / "model.safetensors")
    reference = type(reference).from_pretrained(tmp_path / "main", attn_implementation="eager").eval()
    layer = DeepseekV3DecoderLayer(reference.config, layer_idx=1).eval()  # a layer with experts
    state = {
        name: mtp[name] for name in mtp if name.split(".")[0] in ("self_attn", "mlp") or "layernorm" in name
    }
    experts = range(config["n_routed_experts"])
    gate_up = [
        torch.cat([state.pop(f"mlp.experts.{e}.{p}_proj.weight") for p in ("gate", "up")]) for e in experts
    ]
    state["mlp.experts.gate_up_proj"] = torch.stack(gate_up)
    state["mlp.experts.down_proj"] = torch.stack(
        [state.pop(f"mlp.experts.{e}.down_proj.weight") for e in experts]
    )
    layer.load_state_dict(state)

    def rms(x, weight):
        return weight * x * (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt()

    batch = packed([18, 1, 40, 2], config["vocab_size"], seed=8)
    expected = torch.zeros(())
    for span in sequences(batch):
        tokens, targets, weights = batch.tokens_T[span], batch.targets_T[span], batch.token_weights_T[span]
        hidden = reference.model(tokens[None]).last_hidden_state
        embedded = reference.model.embed_tokens(targets)[None]
        mixed = torch.cat([rms(embedded, mtp["enorm.weight"]), rms(hidden, mtp["hnorm.weight"])], -1)
        mixed = mixed @ mtp["eh_proj.weight"].T
        length = len(tokens)
        positions = torch.arange(length)[None]
        mask = torch.full((1, 1, length, length), float("-inf")).triu(1)
        rotation = reference.model.rotary_emb(mixed, positions)
        out = layer(mixed, attention_mask=mask, position_ids=positions, position_embeddings=rotation)
        out = out[0] if isinstance(out, tuple) else out
        logits = rms(out.view(length, -1), mtp["shared_head.norm.weight"]) @ tensors["lm_head.weight"].T
        logprobs = logits.log_softmax(-1)[: length - 1].gather(1, targets[1:, None])[:, 0]
        expected = expected - (weights[1:] * logprobs).sum()
    torch.testing.assert_close(model(batch).mtp_loss_sum, expected, atol=1e-6, rtol=1e-5)


def test_an_mtp_layer_without_loss_is_frozen_and_kept():
    from r1mega.models.language_model import build_model

    config = {**DEEPSEEK_V3, "num_nextn_predict_layers": 1}
    model = build_model(config, ModelConfig(dtype="float32", init="random"), PARALLEL, seed=2)
    assert model(packed([9], 96, seed=1)).mtp_loss_sum is None
    assert all(not parameter.requires_grad for parameter in model.mtp.parameters())


def test_random_weights_follow_the_seed_and_the_range():
    from r1mega.models.hf_weights import named_hf_tensors
    from r1mega.models.language_model import build_model

    def tensors(seed):
        model = build_model(DEEPSEEK_V3, ModelConfig(dtype="float32", init="random"), PARALLEL, seed=seed)
        return {name: tensor.clone() for name, tensor in named_hf_tensors(model)}

    first, again, other = tensors(1), tensors(1), tensors(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(first[embedding], other[embedding])
    assert 0.018 < first[embedding].std() < 0.022
    assert (first["model.norm.weight"] == 1).all()
    assert (first["model.layers.1.mlp.gate.e_score_correction_bias"] == 0).all()


def test_a_model_before_its_import_gives_nan():
    from r1mega.models.language_model import build_model

    assert build_model(QWEN2, FP32, PARALLEL, seed=1)(packed([4], 96, seed=1)).logprobs_T.isnan().all()


def test_bfloat16_stays_close_to_float32(tmp_path):
    transformers_model(DEEPSEEK_V3, tmp_path, seed=3)
    batch = packed([30, 41], 96, seed=9)
    exact, rounded = (imported(DEEPSEEK_V3, tmp_path, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert rounded.embedding.word_embeddings.weight.dtype is torch.bfloat16
    assert rounded.decoder.layers[1].mlp.router.expert_bias.dtype is torch.float32
    difference = (rounded(batch).logprobs_T - exact(batch).logprobs_T).abs()
    assert rounded(batch).logprobs_T.dtype is torch.float32
    assert difference.median() < 0.1


def test_a_cast_of_the_model_leaves_the_correction_bias_exact():
    from r1mega.models.language_model import build_model

    model = build_model(DEEPSEEK_V3, ModelConfig(dtype="bfloat16", init="random"), PARALLEL, seed=2)
    bias = model.decoder.layers[1].mlp.router.expert_bias
    bias.normal_()
    before = bias.clone()
    model.bfloat16()
    assert torch.equal(model.decoder.layers[1].mlp.router.expert_bias, before)
    assert "expert_bias" in dict(model.decoder.layers[1].mlp.router.named_buffers())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "gpt2"}, "deepseek_v3, qwen2, llama"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"kv_lora_rank": None}, "kv_lora_rank missing"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers=2"),
    ],
)
def test_what_no_released_model_uses_is_refused_by_name(change, match):
    from r1mega.models.language_model import build_model

    with pytest.raises(ValueError, match=match):
        build_model({**DEEPSEEK_V3, **change}, FP32, PARALLEL, seed=1)
