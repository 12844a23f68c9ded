"""Checkpoints in and out: bit-exact, loadable by transformers, and refused by name where they do not fit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import DEEPSEEK_V3, LLAMA, QWEN2, mesh_of, packed

from r1mega.config import ModelConfig, ParallelConfig

CONFIGS = {
    "deepseek_v3": {**DEEPSEEK_V3, "num_nextn_predict_layers": 1, "initializer_range": 0.15},
    "qwen2 tied": {**QWEN2, "initializer_range": 0.15},
    "llama": {**LLAMA, "initializer_range": 0.15},
}


@pytest.fixture(scope="module", autouse=True)
def _process():
    with mesh_of(ParallelConfig()) as mesh:
        yield mesh


def built(config, init="checkpoint", dtype="float32", seed=1):
    from r1mega.models.language_model import build_model

    return build_model(config, ModelConfig(dtype=dtype, init=init), ParallelConfig(), seed=seed)


def exported(config, directory, dtype="float32", **options):
    """A random model written to `directory`/model, with a tokenizer file beside its config."""
    from r1mega.models.hf_weights import export_hf

    source = directory / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    (source / "model-00001-of-00002.safetensors").write_bytes(b"old weights")
    (source / "model.safetensors.index.json").write_text("{}")
    model = built(config, init="random", dtype=dtype)
    if config["model_type"] == "deepseek_v3":
        model.decoder.layers[1].mlp.router.expert_bias.normal_()
    export_hf(model, directory / "model", source, **options)
    return model


def all_tensors(directory):
    return {
        name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_import_then_export_is_bit_exact(name, dtype, tmp_path):
    from r1mega.models.hf_weights import export_hf, import_hf

    config = CONFIGS[name]
    exported(config, tmp_path, dtype)
    model = built(config, dtype=dtype)
    import_hf(model, tmp_path / "model")
    export_hf(model, tmp_path / "again", tmp_path / "model", max_shard_bytes=10_000)
    first, again = all_tensors(tmp_path / "model"), all_tensors(tmp_path / "again")
    assert first.keys() == again.keys()
    for tensor_name, tensor in first.items():
        assert tensor.dtype == again[tensor_name].dtype
        assert torch.equal(tensor, again[tensor_name]), tensor_name


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_an_export_and_agrees(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = exported(CONFIGS[name], tmp_path, max_shard_bytes=40_000)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    batch = packed([25], 96, seed=3)
    expected_TV = reference(batch.tokens_T[None]).logits[0].log_softmax(-1)
    torch.testing.assert_close(
        model(batch).logprobs_T, expected_TV.gather(1, batch.targets_T[:, None])[:, 0], atol=2e-5, rtol=0
    )


def test_an_export_has_shards_an_index_the_config_and_the_tokenizer(tmp_path):
    config = CONFIGS["deepseek_v3"]
    exported(config, tmp_path, "bfloat16", max_shard_bytes=20_000)
    model = tmp_path / "model"
    index = json.loads((model / "model.safetensors.index.json").read_text())
    tensors = all_tensors(model)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    shards = sorted(model.glob("*.safetensors"))
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    assert len(shards) > 2
    for shard in shards:
        sizes = [t.numel() * t.element_size() for t in load_file(shard).values()]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    written = json.loads((model / "config.json").read_text())
    assert (written["topk_method"], written["scoring_func"]) == ("noaux_tc", "sigmoid")
    assert written["torch_dtype"] == "bfloat16"
    assert (model / "tokenizer.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "source"]


def test_mtp_tensors_have_the_released_names(tmp_path):
    exported(CONFIGS["deepseek_v3"], tmp_path)
    layer = "model.layers.3."
    names = {name.removeprefix(layer) for name in all_tensors(tmp_path / "model") if name.startswith(layer)}
    assert {
        "eh_proj.weight",
        "enorm.weight",
        "hnorm.weight",
        "embed_tokens.weight",
        "shared_head.head.weight",
        "shared_head.norm.weight",
        "input_layernorm.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        "mlp.gate.e_score_correction_bias",
        "mlp.experts.7.down_proj.weight",
        "mlp.shared_experts.up_proj.weight",
    } <= names


def test_an_export_replaces_an_older_one_whole(tmp_path):
    from r1mega.models.hf_weights import export_hf

    model = exported(CONFIGS["qwen2 tied"], tmp_path, max_shard_bytes=5_000)
    export_hf(model, tmp_path / "model", tmp_path / "source")
    assert [file.name for file in (tmp_path / "model").glob("*.safetensors")] == [
        "model-00001-of-00001.safetensors"
    ]


@pytest.mark.parametrize("config", [LLAMA, {**LLAMA, "attention_bias": False}], ids=["llama", "explicit"])
def test_a_single_file_from_another_dtype_is_read(config, tmp_path):
    from r1mega.models.hf_weights import import_hf, named_hf_tensors

    exported(config, tmp_path, "bfloat16")
    tensors = all_tensors(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "model").mkdir()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(
        8
    )  # old checkpoints hold this buffer
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    model = built(config)
    import_hf(model, tmp_path / "model")
    assert all(torch.equal(tensor, tensors[name].float()) for name, tensor in named_hf_tensors(model))


def broken(tmp_path, change, config=None):
    """Apply `change` to the tensors of an exported model, and import it."""
    from r1mega.models.hf_weights import import_hf

    config = config or CONFIGS["deepseek_v3"]
    exported(config, tmp_path)
    tensors = all_tensors(tmp_path / "model")
    change(tensors)
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    import_hf(built(config), tmp_path / "model")


def drop(*names):
    def change(tensors):
        for name in names:
            del tensors[name]

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop("model.norm.weight", "lm_head.weight"), "2 missing tensors, first lm_head.weight"),
        (
            drop("model.layers.2.mlp.experts.5.up_proj.weight"),
            "1 missing tensors, first model.layers.2.mlp.experts.5",
        ),
        (drop("model.layers.3.eh_proj.weight"), "num_nextn_predict_layers 0"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), "1 unexpected tensors, first model.extra"),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(95, 32)}),
            r"1 misshaped tensors, first lm_head.weight is \[95, 32\], not \[96, 32\]",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)}), "has dtype I32"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}),
            "model.norm.weight is F8_E4M3, and its scales model.norm.weight_scale_inv are missing",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(change, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        broken(tmp_path, change)


FP8_CONFIG = {
    **CONFIGS["deepseek_v3"],
    "hidden_size": 160,  # one block of 128 and a part of one, as are 144 and 3 x 56
    "intermediate_size": 144,
    "moe_intermediate_size": 56,
    "n_shared_experts": 3,
}
SHARED = "model.layers.1.mlp.shared_experts.gate_proj.weight"


def in_fp8(tensors):
    """Quantise what DeepSeek-V3's checkpoints have in fp8, and return what it stands for, by plain arithmetic."""
    from r1mega_kernels.fp8_block import quantize_weight

    numbers = dict(tensors)
    for name, weight in list(tensors.items()):
        if name.endswith("_proj.weight") and not name.endswith("eh_proj.weight"):
            values, scale = quantize_weight(weight.float())
            rows, columns = weight.shape
            numbers[name] = torch.empty(rows, columns)
            for i in range(0, rows, 128):
                for j in range(0, columns, 128):
                    block = values[i : i + 128, j : j + 128].float() * scale[i // 128, j // 128]
                    numbers[name][i : i + 128, j : j + 128] = block
            tensors[name], tensors[name + "_scale_inv"] = values, scale
    assert SHARED + "_scale_inv" in tensors
    assert tensors[SHARED].shape == (168, 160)
    return numbers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_in_fp8_is_read_as_the_numbers_it_stands_for(dtype, tmp_path):
    from r1mega.models.hf_weights import export_hf, import_hf

    exported(FP8_CONFIG, tmp_path, dtype=dtype)
    tensors = all_tensors(tmp_path / "model")
    numbers = in_fp8(tensors)
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "fp8").mkdir()
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    model = built(FP8_CONFIG | {"quantization_config": quantization}, dtype=dtype)
    import_hf(model, tmp_path / "fp8")
    export_hf(model, tmp_path / "model", tmp_path / "source")
    written = all_tensors(tmp_path / "model")
    assert written.keys() == numbers.keys()
    for name, tensor in written.items():
        assert tensor.dtype != torch.float8_e4m3fn
        assert torch.equal(tensor, numbers[name].to(tensor.dtype)), name
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())


def test_a_part_of_a_fp8_tensor_may_start_inside_a_block(tmp_path):
    """As tensor ranks of a layer whose rows are not a multiple of 128 read it."""
    from safetensors import safe_open

    from r1mega.models.hf_files import dequantized
    from r1mega_kernels.fp8_block import dequantize_weight, quantize_weight

    values, scale = quantize_weight(torch.randn(300, 290))
    save_file({"w": values, "w_scale_inv": scale}, tmp_path / "file")
    whole = dequantize_weight(values, scale, torch.float32)
    with safe_open(tmp_path / "file", framework="pt") as file:
        for dim, start, length in ((0, 100, 100), (0, 200, 100), (1, 0, 145), (1, 145, 145), (0, 128, 128)):
            slices = file.get_slice("w"), file.get_slice("w_scale_inv")
            where = (dim, start, length, torch.device("cpu"), torch.float32)
            part = dequantized(tmp_path, "w", *slices, *where)
            assert torch.equal(part, whole.narrow(dim, start, length))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop(SHARED + "_scale_inv"), "gate_proj.weight is F8_E4M3, and its scales .*scale_inv are missing"),
        (
            lambda t: t.update({SHARED + "_scale_inv": torch.ones(1, 2)}),
            r"scale_inv is F32 \[1, 2\]; blocks of 128 x 128 of \[168, 160\] need F32 \[2, 2\]",
        ),
        (
            lambda t: t.update({SHARED + "_scale_inv": torch.ones(2, 2).half()}),
            r"is F16 \[2, 2\]; .* need F32",
        ),
        (
            lambda t: t.update({SHARED + "_scale_inv": torch.full((2, 2), torch.nan)}),
            "scale_inv has values that are negative, infinite or NaN",
        ),
        (
            lambda t: t.update({SHARED: t[SHARED].float()}),
            "has scales, .*_scale_inv, and is F32, not F8_E4M3",
        ),
        (
            lambda t: t.update({"model.extra_scale_inv": torch.ones(1)}),
            "1 unexpected tensors, first model.extra",
        ),
        (
            lambda t: t.update(
                {
                    "model.norm.weight": torch.ones(160).to(torch.float8_e4m3fn),
                    "model.norm.weight_scale_inv": torch.ones(2),
                }
            ),
            r"model.norm.weight is F8_E4M3 and \[160\]; only matrices",
        ),
    ],
)
def test_a_fp8_checkpoint_without_fitting_scales_is_refused_by_name(change, match, tmp_path):
    def to_fp8(tensors):
        in_fp8(tensors)
        change(tensors)

    with pytest.raises(ValueError, match=match):
        broken(tmp_path, to_fp8, FP8_CONFIG)


def test_copies_of_tied_tensors_need_not_be_there(tmp_path):
    broken(tmp_path, drop("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"))
    (tmp_path / "tied").mkdir()
    head = torch.zeros(96, 32)
    broken(tmp_path / "tied", lambda tensors: tensors.update({"lm_head.weight": head}), CONFIGS["qwen2 tied"])


def test_missing_files_are_named(tmp_path):
    from r1mega.models.hf_weights import import_hf, load_hf_config

    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_hf_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        import_hf(built(QWEN2), tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_hf_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="deepseek_v3, qwen2, llama"):
        load_hf_config(tmp_path)


def test_gradients_travel_under_the_same_names(tmp_path):
    """What the parameters are split by, their gradients are too."""
    from r1mega.models.hf_weights import named_hf_tensors

    model = built(CONFIGS["llama"], init="random")
    numbered = {name: torch.arange(p.numel()).view(p.shape).float() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data.copy_(numbered[name])
    by_value = dict(named_hf_tensors(model))
    assert all(torch.equal(tensor, by_value[name]) for name, tensor in named_hf_tensors(model, numbered))
