"""Config files and command-line overrides: what they resolve to, and what each mistake is told."""

import json
import shlex
from dataclasses import dataclass, field

import pytest

from r1mega.config import (
    PRESETS,
    ConfigError,
    DataConfig,
    GRPOConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)
from r1mega.overrides import changed, describe, format_value, from_dict, load, settings, to_dict, to_python


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.py"
    path.write_text(
        "from r1mega.config import GRPOConfig, RunConfig\n"
        "config = RunConfig(num_steps=8, grpo=GRPOConfig(group_size=4))\n"
    )
    return path


def mistake(base, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(base, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_config_file_without_overrides_is_what_it_binds(base):
    assert load(base) == RunConfig(num_steps=8, grpo=GRPOConfig(group_size=4))


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("grpo.group_size=8", "grpo.group_size", 8),
        ("optimizer.lr=1e-6", "optimizer.lr", 1e-6),
        ("optimizer.lr=2", "optimizer.lr", 2.0),
        ("checkpoint.background=no", "checkpoint.background", False),
        ("grpo.mask_truncated=True", "grpo.mask_truncated", True),
        ("ppo.enabled=1", "ppo.enabled", True),
        ("grpo.split=group", "grpo.split", "group"),
        ("model=/some/dir", "model.path", "/some/dir"),
        ("data=a=b.jsonl", "data.path", "a=b.jsonl"),
        ("model.tokenizer=", "model.tokenizer", ""),
        ("rollout.max_tokens=512", "rollout.max_tokens", ((0, 512),)),
        ("rollout.max_tokens=0:32768,8200:65536", "rollout.max_tokens", ((0, 32768), (8200, 65536))),
        ("num_steps=10_400", "num_steps", 10400),
        ("stage=sft", "stage", "sft"),
    ],
)
def test_an_override_takes_the_type_of_its_field(base, override, name, value):
    resolved = settings(load(base, [override]))[name]
    assert resolved == value
    assert type(resolved) is type(value)


def test_the_last_override_of_a_field_wins(base):
    assert load(base, ["seed=3", "seed=5"]).seed == 5


@pytest.mark.parametrize(
    ("override", "guess"),
    [
        ("grpo.groupsize=3", "unknown setting 'grpo.groupsize'; did you mean 'grpo.group_size'?"),
        ("group_size=3", "did you mean 'grpo.group_size'?"),
        ("rollout.groupsize=3", "did you mean 'grpo.group_size'?"),
        ("modl=x", "did you mean 'model'?"),
        ("nothing.like_it=3", "--show lists all settings"),
        ("__class__=3", "--show lists all settings"),
        ("dtype=float32", "did you mean 'model.dtype' or 'rollout.dtype'?"),
    ],
)
def test_an_unknown_setting_is_told_its_neighbour(base, override, guess):
    assert guess in mistake(base, override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("grpo.group_size=many", "a whole number, for example grpo.group_size=16"),
        ("grpo.group_size=1.5", "a whole number"),
        ("optimizer.lr=fast", "a number, for example optimizer.lr=1e-6"),
        ("optimizer.lr=nan", "a number"),
        ("checkpoint.background=maybe", "true or false, for example checkpoint.background=true"),
        ("rollout.max_tokens=0:1,2", "for example rollout.max_tokens=0:32768,8200:65536"),
        ("grpo.group_size", "is not NAME=VALUE"),
        ("grpo=3", "'grpo' is a section, not a setting; set one of its fields, as in grpo.group_size=..."),
    ],
)
def test_a_bad_value_is_told_the_type_and_an_example(base, override, words):
    assert words in mistake(base, override)


def test_a_missing_file_is_told_its_neighbour(base):
    with pytest.raises(FileNotFoundError, match=r"no config file .*bas\.py; did you mean .*base\.py\?"):
        load(base.with_name("bas.py"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", "binds no name `config`"),
        ("config = {'seed': 1}\n", "`config` is a dict, it must be a RunConfig"),
        ("x = 1\nconfig = RunConfg()\n", "broken.py:2: NameError: name 'RunConfg' is not defined"),
        ("x = 1\n\nconfig = (\n", "broken.py:3: SyntaxError: '(' was never closed"),
        ("from r1mega.config import GRPOConfig\nGRPOConfig(size=3)\n", "unexpected keyword argument 'size'"),
        ("import no_such_module\n", "broken.py:1: ModuleNotFoundError"),
        ("raise RuntimeError('first\\nsecond')\n", "RuntimeError: first"),
    ],
)
def test_a_broken_config_file_is_one_line_with_its_place(tmp_path, text, words):
    path = tmp_path / "broken.py"
    path.write_text(text)
    assert words in mistake(path)


CHANGED = RunConfig(
    seed=7,
    dir="runs/with space",
    model=ModelConfig(path="it's a 'path'"),
    data=DataConfig(path="$HOME/q.jsonl"),
    optimizer=OptimizerConfig(lr=1.25e-6),
    rollout=RolloutConfig(max_tokens=((0, 32), (10, 64)), seeded=False),
    rewards=RewardConfig(
        weights={"accuracy": 1.0, "language": 0.5},
        task_weights={"general": {"helpful": 1.0, "format": 0.25}, "code": {"accuracy": 1.0}},
    ),
)


def test_describe_prints_valid_overrides_that_rebuild_the_run(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("from r1mega.config import RunConfig\nconfig = RunConfig()\n")
    overrides = [word for line in describe(CHANGED).splitlines() for word in shlex.split(line, comments=True)]
    assert len(overrides) == len(settings(CHANGED))
    assert load(path, overrides) == CHANGED


def test_describe_marks_what_differs_from_the_defaults():
    marked = [line for line in describe(CHANGED).splitlines() if "  # default " in line]
    assert len(marked) == len(changed(CHANGED)) == 9
    assert any(
        line.startswith("rollout.max_tokens=0:32,10:64 ") and line.endswith("0:1024") for line in marked
    )
    assert len({line.index("  # default") for line in marked}) == 1
    assert "# default" not in describe(RunConfig())


def test_a_config_survives_json():
    assert from_dict(json.loads(json.dumps(to_dict(CHANGED)))) == CHANGED
    assert from_dict({}) == RunConfig()


def test_an_unknown_setting_in_json_is_refused():
    with pytest.raises(ConfigError, match=r"grpo\.groups_size"):
        from_dict({"grpo": {"groups_size": 3}})
    with pytest.raises(ConfigError, match="unknown setting 'grops'"):
        from_dict({"grops": 3})


def test_values_are_printed_as_the_command_line_takes_them():
    assert [format_value(value) for value in (True, 1e-6, ((0, 5), (3, 7)), "a", ())] == [
        "true",
        "1e-06",
        "0:5,3:7",
        "a",
        "",
    ]
    assert format_value({"accuracy": 1.0, "format": 0.5}) == "accuracy:1.0,format:0.5"
    assert format_value({"code": {"accuracy": 1.0}}) == '{"code": {"accuracy": 1.0}}'


def test_weights_are_read_as_a_list_a_preset_or_json(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("from r1mega.config import RunConfig\nconfig = RunConfig()\n")
    rewards = load(
        path, ["rewards.weights=accuracy:1,format:0.25", 'rewards.task_weights={"x": {"judge": 2}}']
    ).rewards
    assert rewards.weights == {"accuracy": 1.0, "format": 0.25}
    assert rewards.task_weights == {"x": {"judge": 2.0}}
    for name, weights in PRESETS.items():
        assert load(path, [f"rewards.weights={name}"]).rewards.weights == weights
    for wrong in ("accuracy", "accuracy:much", "accuracy:1:2"):
        with pytest.raises(ConfigError, match=r"accuracy:1,format:1"):
            load(path, [f"rewards.weights={wrong}"])
    for wrong in ("[1]", "{", '{"x": 3}', '{"x": {"judge": "much"}}'):
        with pytest.raises(ConfigError, match=r"a JSON object"):
            load(path, [f"rewards.task_weights={wrong}"])


def test_there_are_about_100_knobs():
    assert len(settings(RunConfig())) <= 110


@dataclass(frozen=True)
class Part:
    path: str = ""
    size: int = 1


@dataclass(frozen=True)
class Other:
    name: str
    part: Part = field(default_factory=Part)
    parts: tuple[Part, ...] = ()
    named: dict[str, str] = field(default_factory=dict)


def test_any_frozen_dataclass_is_a_config(tmp_path):
    path = tmp_path / "other.py"
    path.write_text("from test_overrides import Other\nconfig = Other('x')\n")
    assert load(path, ["part=here", "part.size=3", "named.a=b", "named.c=d:e"], Other) == Other(
        "x", Part("here", 3), named={"a": "b", "c": "d:e"}
    )
    assert load(path, ["named=a:b,c:d:e"], Other).named == {"a": "b", "c": "d:e"}
    with pytest.raises(ConfigError, match=r"unknown setting 'part\.sise'; did you mean 'part\.size'"):
        load(path, ["part.sise=3"], Other)
    with pytest.raises(ConfigError, match="`config` is a Other, it must be a RunConfig"):
        load(path)
    assert from_dict(to_dict(Other("x", Part("y"))), Other) == Other("x", Part("y"))
    assert changed(Other("x")) == {"name": ("x", "")}


@pytest.mark.parametrize(
    "config", [CHANGED, RunConfig(), Other("'\n", parts=(Part("a"), Part(size=2)))], ids=type
)
def test_a_config_written_as_python_binds_the_same_config(tmp_path, config):
    path = tmp_path / "written.py"
    path.write_text(to_python(config))
    assert load(path, (), type(config)) == config


def test_a_config_that_cannot_be_written_is_refused():
    with pytest.raises(ConfigError, match="cannot stand in a config"):
        to_python(Other(name=object()))
