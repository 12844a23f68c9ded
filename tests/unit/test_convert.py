"""`r1mega convert`: fp8 as DeepSeek-V3's checkpoints have it, there and back, whole or not at all."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hf_weights import FP8_CONFIG, all_tensors, built, exported
from tiny_models import mesh_of

from r1mega import cli
from r1mega.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    SFTConfig,
)
from r1mega.stages import convert
from r1mega.stages.console import Console
from r1mega_kernels.fp8_block import dequantize_reference, quantize_reference

ROOT = Path(__file__).parents[2]
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", autouse=True)
def _process():
    with mesh_of(ParallelConfig()) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny DeepSeek-V3 with MTP in bfloat16, in shards; no size a multiple of 128."""
    directory = tmp_path_factory.mktemp("published")
    exported(FP8_CONFIG, directory, "bfloat16", max_shard_bytes=200_000)
    return directory / "model"


def converted(source, target, dtype, **options):
    convert.run(source, target, dtype, Console(io.StringIO()), **options)
    return all_tensors(target)


def directory_of(path, tensors, **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "torch_dtype": "x", **config}))
    save_file(tensors, path / "model.safetensors")
    return path


def same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        other = second[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), name
    return True


def quantised_names():
    """What the released checkpoint has in fp8, written out."""
    names = set()
    for layer in range(4):  # the last is the MTP layer's
        prefix = f"model.layers.{layer}."
        mlps = ["mlp."] if layer == 0 else [f"mlp.experts.{e}." for e in range(8)] + ["mlp.shared_experts."]
        names |= {f"{prefix}self_attn.{name}.weight" for name in ATTENTION}
        names |= {f"{prefix}{mlp}{name}.weight" for mlp in mlps for name in MLP}
    return names


def test_float8_is_the_released_checkpoints_convention_to_the_bit(published, tmp_path):
    before, after = all_tensors(published), converted(published, tmp_path / "fp8", "float8")
    expected = dict(before)
    for name in quantised_names():
        values, scale = quantize_reference(before[name], 128)
        expected |= {name: values, name + "_scale_inv": scale}
    assert same(after, expected)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert (after[bias].dtype, after["lm_head.weight"].dtype) == (torch.float32, torch.bfloat16)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }  # fmt: skip
    assert config["torch_dtype"] == "bfloat16"


def test_files_beside_the_weights_and_the_index_are_complete(published, tmp_path):
    limit = 50_000
    after = converted(published, tmp_path / "fp8", "float8", max_shard_bytes=limit)
    index = json.loads((tmp_path / "fp8" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    shards = sorted((tmp_path / "fp8").glob("*.safetensors"))
    assert len(shards) > 3
    for number, shard in enumerate(shards):
        held = load_file(shard)
        assert shard.name == f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        assert {
            name: file for name, file in index["weight_map"].items() if file == shard.name
        }.keys() == held.keys()
        assert sum(t.nbytes for t in held.values()) <= limit or len(held) == 1
    assert (tmp_path / "fp8" / "tokenizer.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8"]
    assert not [path for path in (tmp_path / "fp8").iterdir() if path.name.startswith(".")]


def test_fp8_made_from_bfloat16_is_a_fixed_point(published, tmp_path):
    """The largest value of a block comes back exactly, so its scale does; every value is nearer to itself."""
    first = converted(published, tmp_path / "first", "float8")
    numbers = converted(tmp_path / "first", tmp_path / "numbers", "bfloat16", max_shard_bytes=100_000)
    for name in quantised_names():
        expected = dequantize_reference(first[name], first[name + "_scale_inv"], 128)
        assert torch.equal(numbers[name], expected), name
    assert "quantization_config" not in json.loads((tmp_path / "numbers" / "config.json").read_text())
    assert same(first, converted(tmp_path / "numbers", tmp_path / "again", "float8"))


def rounds_of_fp8(tmp_path, dtype):
    """fp8 of random float32, and what it becomes by `dtype` and back, twice. Blocks from below the floor of 1e-4 to 1e3."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(40 * 128 - 57, 300, generator=generator)
    weight *= torch.logspace(-6, 3, 40).repeat_interleave(128)[: len(weight), None]
    directory_of(tmp_path / "0", {O_PROJ: weight})
    yield converted(tmp_path / "0", tmp_path / "fp8 0", "float8")
    for number in (1, 2):
        converted(tmp_path / f"fp8 {number - 1}", tmp_path / f"numbers {number}", dtype)
        yield converted(tmp_path / f"numbers {number}", tmp_path / f"fp8 {number}", "float8")


def test_fp8_by_float32_is_a_fixed_point(tmp_path):
    first, second, _ = rounds_of_fp8(tmp_path, "float32")
    assert same(first, second)


def test_fp8_by_bfloat16_keeps_its_values_and_after_one_round_its_scales(tmp_path):
    """Where it was not made from bfloat16: the largest value of a block is rounded once, and the scale with it."""
    first, second, third = rounds_of_fp8(tmp_path, "bfloat16")
    assert torch.equal(first[O_PROJ].view(torch.uint8), second[O_PROJ].view(torch.uint8))
    before, after = first[O_PROJ + "_scale_inv"], second[O_PROJ + "_scale_inv"]
    assert not torch.equal(before, after)  # the claim could not be a stronger one
    assert ((before - after).abs() <= before * 2.0**-8).all()
    assert same(second, third)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_import_reads_the_same_weights_from_every_directory(dtype, published, tmp_path):
    from r1mega.models.hf_weights import import_hf

    def imported(path):
        config = json.loads((path / "config.json").read_text())
        model = built(config, dtype=dtype)
        import_hf(model, path)
        return dict(model.named_parameters()) | dict(model.named_buffers())

    converted(published, tmp_path / "fp8", "float8", max_shard_bytes=100_000)
    converted(tmp_path / "fp8", tmp_path / "numbers", dtype)
    quantised, numbers, original = (
        imported(path) for path in (tmp_path / "fp8", tmp_path / "numbers", published)
    )
    assert all(torch.equal(quantised[name], numbers[name]) for name in quantised)
    assert not all(torch.equal(quantised[name], original[name]) for name in quantised)


def test_bfloat16_becomes_float32_and_comes_back_as_it_was(published, tmp_path):
    wide = converted(published, tmp_path / "wide", "float32")
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    assert same(converted(tmp_path / "wide", tmp_path / "back", "bfloat16"), all_tensors(published))


def test_scales_may_lie_in_another_file(tmp_path):
    values, scale = quantize_reference(torch.randn(200, 130), 128)
    source = directory_of(tmp_path / "one", {"model.norm.weight": torch.ones(130)})
    (source / "model.safetensors").unlink()
    parts = {
        "b": {O_PROJ: values},
        "a": {O_PROJ + "_scale_inv": scale, "x.rotary_emb.inv_freq": torch.ones(3)},
    }
    for file, tensors in parts.items():
        save_file(tensors, source / f"{file}.safetensors")
    weight_map = {name: f"{file}.safetensors" for file, tensors in parts.items() for name in tensors}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    expected = {O_PROJ: dequantize_reference(values, scale, 128), "x.rotary_emb.inv_freq": torch.ones(3)}
    assert same(converted(source, tmp_path / "out", "bfloat16"), expected)


# ---------------------------------------------------------------- ends that are none

PAUSING = """
import signal, sys
from pathlib import Path
from r1mega.stages import convert
from r1mega.stages.console import Console

class Pausing(Console):
    def phase(self, text):
        print(text, flush=True)
        signal.pause()

convert.run(Path(sys.argv[1]), Path(sys.argv[2]), "float8", Pausing(), max_shard_bytes=50_000)
"""


def test_a_killed_conversion_leaves_nothing_that_looks_whole_and_begins_again(published, tmp_path, capsys):
    target = tmp_path / "fp8"
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSING, published, target], stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert b"model-00001-of-" in process.stdout.readline()
        assert cli.main(["convert", str(published), str(target), "--dtype=float8"]) == 2
        assert "another conversion writes there" in capsys.readouterr().err
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.communicate()
    (left,) = tmp_path.iterdir()
    assert left.name == ".writing-fp8"
    assert len(list(left.glob("*.safetensors"))) == 1
    assert not (left / "config.json").exists()
    assert cli.main(["convert", str(published), str(target), "--dtype=float8"]) == 0
    assert "GB/s" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]
    assert same(all_tensors(target), converted(published, tmp_path / "whole", "float8"))


def test_an_interrupted_conversion_leaves_nothing(published, tmp_path, monkeypatch, capsys):
    class Interrupted(Console):
        def phase(self, text):
            raise KeyboardInterrupt

    monkeypatch.setattr("r1mega.stages.console.Console", Interrupted)
    assert cli.main(["convert", str(published), str(tmp_path / "out"), "--dtype=float8"]) == 130
    assert list(tmp_path.iterdir()) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert "the same command begins anew" in line


# ---------------------------------------------------------------- mistakes


def fp8(rows=200, columns=130):
    values, scale = quantize_reference(torch.randn(rows, columns), 128)
    return {O_PROJ: values, O_PROJ + "_scale_inv": scale}


def with_scale(scale):
    return lambda path: directory_of(path, fp8() | {O_PROJ + "_scale_inv": scale})


def cut(path):
    file = directory_of(path, fp8()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def misled(path):
    directory_of(path, fp8())
    names = dict.fromkeys([*fp8(), "model.norm.weight"], "model.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def without_weights(path):
    (directory_of(path, fp8()) / "model.safetensors").unlink()


def a_run(path):
    path.mkdir()
    directory_of(path / "hf", fp8())


@pytest.mark.parametrize(
    ("make", "dtype", "line"),
    [
        (lambda path: None, "bfloat16", "no model directory .*source: name a Hugging Face directory"),
        (lambda path: path.mkdir(), "bfloat16", "source is no model directory: config.json is missing"),
        (without_weights, "bfloat16", "source: neither model.safetensors.index.json nor model.safetensors"),
        (a_run, "bfloat16", "source is a run's directory: its model is .*source/hf"),
        (lambda path: directory_of(path, fp8()), "float8", "has that dtype already"),
        (
            lambda path: directory_of(path, fp8() | {"model.norm.weight": torch.ones(3, dtype=torch.int32)}),
            "bfloat16",
            "model.norm.weight has dtype I32; only F64, F32, BF16, F16, F8_E4M3 can be read",
        ),
        (
            lambda path: directory_of(path, {O_PROJ: fp8()[O_PROJ]}),
            "bfloat16",
            "o_proj.weight is F8_E4M3, and its scales .*o_proj.weight_scale_inv are missing",
        ),
        (with_scale(torch.ones(1, 2)), "bfloat16", r"scale_inv is F32 \[1, 2\]; .* need F32 \[2, 2\]"),
        (with_scale(torch.full((2, 2), torch.inf)), "bfloat16", "values that are negative, infinite or NaN"),
        (
            lambda path: directory_of(path, {"model.x_scale_inv": torch.ones(1)}),
            "bfloat16",
            "1 scales without a tensor, first model.x_scale_inv",
        ),
        (
            lambda path: directory_of(path, {O_PROJ: torch.full((2, 2), torch.nan)}),
            "float8",
            "o_proj.weight: 4 of 4 values are NaN or infinite",
        ),
        (
            lambda path: directory_of(path, fp8(), quantization_config={"quant_method": "gptq"}),
            "bfloat16",
            "quant_method is 'gptq' in config.json; only 'fp8' can be read",
        ),
        (
            lambda path: directory_of(path, fp8(), quantization_config={"weight_block_size": [64, 64]}),
            "bfloat16",
            r"weight_block_size is \[64, 64\] in config.json; only \[128, 128\] is supported",
        ),
        (cut, "bfloat16", "model.safetensors: not a whole safetensors file"),
        (misled, "bfloat16", "says that model.norm.weight is in model.safetensors, and it is not"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(make, dtype, line, tmp_path, capsys):
    make(tmp_path / "source")
    assert cli.main(["convert", str(tmp_path / "source"), str(tmp_path / "out"), f"--dtype={dtype}"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(line, said), said
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


def test_an_existing_target_is_left_alone(published, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert cli.main(["convert", str(published), str(tmp_path / "out"), "--dtype=float8"]) == 2
    assert "out exists: name another TARGET, or remove it" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_model_that_does_not_fit_on_the_disk_is_refused_before_it_is_read(
    published, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    assert cli.main(["convert", str(published), str(tmp_path / "out"), "--dtype=float32"]) == 2
    assert re.search(r"out needs 0\.\d\d GB, and 0.00 GB are free there", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(published, tmp_path, monkeypatch, capsys):
    class Full(Console):
        def phase(self, text):
            with open("/dev/full", "w") as file:
                file.write(text)

    monkeypatch.setattr("r1mega.stages.console.Console", Full)
    assert cli.main(["convert", str(published), str(tmp_path / "out"), "--dtype=float32"]) == 2
    assert "out: no space is left there" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- runs on fp8


def rl_on(path):
    return RunConfig(
        model=ModelConfig(path=str(path)),
        data=DataConfig(max_prompt_tokens=100),
        rollout=RolloutConfig(max_tokens=((0, 100),)),
        sft=SFTConfig(max_length=100),
    )


def test_engines_that_take_weights_refuse_fp8_and_name_the_cure(published, tmp_path):
    from r1mega.stages import rl
    from r1mega.stages.preflight import check_model
    from r1mega.stages.run_directory import RunDirectory

    converted(published, tmp_path / "fp8", "float8")
    config = rl_on(tmp_path / "fp8")
    directory = RunDirectory(tmp_path / "run", config)
    cure = f"r1mega convert {tmp_path / 'fp8'} TARGET"
    with pytest.raises(ConfigError, match=re.escape(cure)):
        rl.run(config, directory, Console(io.StringIO()))
    check_model(config)  # data generation
    check_model(replace(config, stage="sft"))


def test_an_engine_on_fp8_may_evaluate_and_may_not_be_synced(published, tmp_path):
    """vLLM is given such a model as it is; only joining a trainer is refused."""
    from r1mega.platforms import CPU
    from r1mega.rollout.engine import RolloutEngine
    from r1mega.rollout.vllm_engine import engine_options

    converted(published, tmp_path / "fp8", "float8")
    config = rl_on(tmp_path / "fp8")
    assert engine_options(config, CPU, config.model.path, seed=1)["model"] == config.model.path
    engine = object.__new__(RolloutEngine)
    engine.config, engine._llm = (
        config,
        SimpleNamespace(model_config=SimpleNamespace(model=config.model.path)),
    )
    with pytest.raises(ConfigError, match="is quantised"):
        asyncio.run(engine.init_sync("127.0.0.1", 1, 1, 2))


def test_a_tensor_that_lies_in_two_files_is_read_where_the_index_says(published, tmp_path):
    converted(published, tmp_path / "wanted", "float32")
    twice = tmp_path / "twice"
    shutil.copytree(published, twice)
    index = json.loads((twice / "model.safetensors.index.json").read_text())
    name, file = next(iter(index["weight_map"].items()))
    other = next(other for other in sorted(set(index["weight_map"].values())) if other != file)
    tensors = load_file(twice / other)
    save_file({**tensors, name: load_file(twice / file)[name] * 0}, twice / other, metadata={"format": "pt"})
    converted(twice, tmp_path / "found", "float32")
    wanted, found = all_tensors(tmp_path / "wanted"), all_tensors(tmp_path / "found")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
