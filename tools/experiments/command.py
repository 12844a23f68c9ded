"""What the two commands share: options, refusals of bad input, the folder, the cluster."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

from toy_steps import scorer_config

from r1mega import cluster
from r1mega.config import ConfigError, ModelConfig
from r1mega.data.bilingual import WORDS
from r1mega.stages.evaluation_sources import check_model
from r1mega.stages.reward_server import Reading
from r1mega.stages.run_directory import write_json
from r1mega.stages.tokenizer import load_tokenizer


def parser(doc: str | None) -> argparse.ArgumentParser:
    parsed = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsed.add_argument("model", metavar="MODEL", help="model directory of the toy policy, e.g. .../base/hf")
    parsed.add_argument("--out", required=True, type=Path, help="new folder for labels, scorer, result.json")
    parsed.add_argument("--operations", type=int, default=4, help="steps of a problem")
    parsed.add_argument("--train-questions", type=int, default=500, help="questions behind the labels")
    parsed.add_argument("--train-samples", type=int, default=8, help="responses of each that are labelled")
    parsed.add_argument("--questions", type=int, default=256, help="held-out questions")
    parsed.add_argument("--epochs", type=int, default=2)
    parsed.add_argument("--scorer", type=Path, help="a scorer trained before (OUT/scorer/hf); no labels then")
    parsed.add_argument("--seed", type=int, default=0)
    return parsed


def check_words(model: str) -> None:
    """Refuse a model that does not know the toy's words."""
    missing = set(WORDS) - set(load_tokenizer(ModelConfig(path=model)).get_vocab())
    if missing:
        raise ConfigError(
            f"{model}: no token for {min(missing)!r}; take a model of the toy world, such as base/hf of "
            "`r1mega pipeline configs/tiny`"
        )


def command(
    name: str, work: Callable[[argparse.Namespace], dict[str, Any]], options: argparse.Namespace
) -> int:
    """Runs an experiment into a folder of its own; 2 and one line where it was asked wrongly."""
    try:
        check_model(options.model)
        check_words(options.model)
        if options.scorer:
            Reading.read(options.scorer)
        counts = {key: value for key, value in vars(options).items() if isinstance(value, int)}
        for key, value in counts.items():
            least = 0 if key in ("seed", "rl_steps") else 1
            if value < least:
                raise ConfigError(f"--{key.replace('_', '-')} {value}: at least {least}")
        if options.out.exists() and any(options.out.iterdir()):
            raise ConfigError(f"--out {options.out} is not empty: name a new folder")
        options.out.mkdir(parents=True, exist_ok=True)
        result = work(options)
    except (ConfigError, FileNotFoundError, NotADirectoryError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    unused = ("train_questions", "train_samples", "epochs", "labels") if options.scorer else ()
    left_out = {"model", "out", "scorer", *unused}
    settings = {key: value for key, value in vars(options).items() if key not in left_out}
    write_json(options.out / "result.json", {"experiment": name, "settings": settings, **result})
    print(f"{name}: wrote {options.out / 'result.json'}")
    return 0


def on_cluster(
    options: argparse.Namespace, scorer: Path, work: Callable[[], Coroutine[Any, Any, Any]]
) -> Any:
    """Runs a coroutine while a Ray cluster is up, where reward models are served."""
    config = replace(scorer_config(str(scorer), options, scorer, 0), dir=str(options.out))
    with cluster.start(config):
        return asyncio.run(work())
