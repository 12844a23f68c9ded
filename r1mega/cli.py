"""The command line: `r1mega run | data | eval | convert | command | pipeline | lineage | report | bench`.

Exit codes: 0 done; 2 the user's mistake (one line on stderr: what, where, how to mend it); 1 a fault of
ours or the machine's (one line, and the traceback in the run directory); 130 interrupted by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1mega import checks, overrides
from r1mega.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from r1mega.data.recipes import GenerateData

USERS_MISTAKES = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)
LONGEST_LINE = 600


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _as_keyboard_interrupt)
    try:
        return options.command(options)
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("r1mega: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except USERS_MISTAKES as error:
        print(f"r1mega: {_one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"r1mega: {_one_line(error)}", file=sys.stderr)
        return 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand among the overrides, which argparse alone would refuse."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    takes_overrides = hasattr(options, "overrides")
    unknown = [text for text in rest if text.startswith("-")] if takes_overrides else rest
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if takes_overrides:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="r1mega", description="The DeepSeek-R1 training system.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="one stage: reinforcement learning, fine-tuning, a reward model or preference pairs",
        description="Run the stage that CONFIG describes; the same command again continues an interrupted run.",
        epilog="example: r1mega run configs/gsm8k/r1_zero.py model=PATH data=PATH grpo.group_size=8",
    )
    _add_config(run, "a RunConfig")
    run.set_defaults(command=_run)

    command = commands.add_parser("command", help="one stage that runs any program")
    command.add_argument(
        "config", metavar="CONFIG", help="a Python file that binds `config` to a CommandStage"
    )
    command.add_argument("overrides", nargs="*", metavar="field=value")
    command.set_defaults(command=_command)

    pipeline = commands.add_parser(
        "pipeline",
        help="a graph of stages, each from what the ones before it left",
        description="Run what is not finished or has changed; the same command again continues a stopped pipeline.",
        epilog="example: r1mega pipeline configs/tiny dir=runs/two seed=2 dev2.num_steps=5",
    )
    pipeline.add_argument("pipeline", metavar="PIPELINE", help="a folder with pipeline.py, or such a file")
    pipeline.add_argument("overrides", nargs="*", metavar="dir=, seed=, STAGE.section.field=value")
    pipeline.add_argument(
        "--from", dest="start", default="", metavar="STAGE", help="it and what depends on it, anew"
    )
    pipeline.add_argument("--only", default="", metavar="STAGE", help="no other stage")
    pipeline.add_argument(
        "--ignore-code", action="store_true", help="a change of the code makes nothing run again"
    )
    pipeline.add_argument("--dry-run", action="store_true", help="say what would run, and why")
    pipeline.add_argument("--show", action="store_true", help="draw the stages and stop")
    pipeline.add_argument("--svg", metavar="FILE", help="draw them there and stop")
    pipeline.set_defaults(command=_pipeline)

    lineage = commands.add_parser("lineage", help="where a checkpoint, a file or a data row comes from")
    lineage.add_argument("path", metavar="PATH", help="a folder, a file, or FILE.jsonl:ROW (line or id)")
    lineage.add_argument("--json", action="store_true")
    lineage.set_defaults(command=_lineage)

    _add_eval(commands)

    data = commands.add_parser(
        "data",
        help="make training data: the cold start's, or by rejection sampling",
        description="Make the data that CONFIG describes; the same command again continues an interrupted run.",
        epilog="example: r1mega data rejection.py model=runs/dev2/hf data=train.jsonl samples=16",
    )
    _add_config(data, "a ColdStart or RejectionSampling")
    data.set_defaults(command=_data)

    convert = commands.add_parser(
        "convert",
        help="a model directory in another dtype: from fp8, or to it",
        description="Write SOURCE's weights in another dtype to TARGET, tensor by tensor, with all other files.",
        epilog="example: r1mega convert DeepSeek-R1 DeepSeek-R1-bf16",
    )
    convert.add_argument("source", metavar="SOURCE", help="a Hugging Face directory, a run's hf/ too")
    convert.add_argument("target", metavar="TARGET", help="the new directory; it must not exist")
    convert.add_argument(
        "--dtype",
        choices=["bfloat16", "float8", "float32"],
        default="bfloat16",
        help="float8: matrices in e4m3 with a scale for each 128 x 128, as DeepSeek-V3's checkpoints (bfloat16)",
    )
    convert.set_defaults(command=_convert)

    report = commands.add_parser("report", help="one self-contained HTML page about a run or a pipeline")
    report.add_argument("dir", metavar="DIR", help="the directory of a run, or of a pipeline (pipeline.json)")
    report.set_defaults(command=_report)

    bench = commands.add_parser("bench", help="measure the system on this machine")
    bench.add_argument(
        "what",
        choices=[
            "step",
            "rewards",
            "schedule",
            "layouts",
            "kernels",
            "packing",
            "linear_logprob",
            "grpo_loss",
            "grouped_topk",
            "moe_permute",
            "fp8_block",
            "eplb",
            "all",
        ],
    )
    bench.add_argument(
        "--json",
        metavar="FILE",
        help="write the numbers there (of kernels, else to docs/benchmarks/kernels_DEVICE.json)",
    )
    bench.add_argument(
        "--tune",
        action="store_true",
        help="kernels, or one of them: find this GPU's parameters and keep them",
    )
    bench.add_argument(
        "--responses",
        choices=["varying", "uniform", "both"],
        default="both",
        help="step: lengths of the responses",
    )
    bench.add_argument(
        "--parts",
        default="",
        metavar="A,B",
        help="rewards: only these (math, jail, code, text, judge, suites, training, overlap)",
    )
    bench.add_argument("--shared", metavar="DIR", help="rewards: folder whose data/ has the labelled sets")
    bench.add_argument(
        "--order", default="dualpipev", metavar="NAME", help="schedule: the order to draw or to print"
    )
    bench.add_argument(
        "--ranks", type=int, default=8, metavar="P", help="schedule: pipeline ranks of that order"
    )
    bench.add_argument("--micro-batches", type=int, default=16, metavar="M", help="schedule: of that order")
    bench.add_argument("--svg", metavar="FILE", help="schedule: draw the order instead of the tables")
    bench.add_argument("--trace", metavar="FILE", help="schedule: write the order as a Chrome trace")
    bench.add_argument("--print", dest="show", action="store_true", help="schedule: print the order")
    bench.set_defaults(command=_bench)
    return parser


def _add_eval(commands: argparse._SubParsersAction) -> None:
    evaluation = commands.add_parser(
        "eval",
        help="benchmarks on a model, an endpoint or a file of generations",
        description="Sample, grade and count; the same command again continues, and k may be raised.",
        epilog="example: r1mega eval MODEL --suite aime2024,math500 --data DIR rollout.engines=2",
    )
    evaluation.add_argument("model", nargs="?", default="", metavar="MODEL", help="a Hugging Face directory")
    evaluation.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="rollout.*, judge.*, ..."
    )
    text, whole, number = {"metavar": "TEXT"}, {"metavar": "N", "type": int}, {"metavar": "X", "type": float}
    for name, kind, words in (
        ("suite", text, "names, NAME=FILE or files of questions, separated by commas; may be repeated"),
        ("data", text, "folder of the suites' files (data)"),
        ("dir", text, "folder of the results (runs/eval/<model>)"),
        ("generations", text, "a file of existing generations; no model runs"),
        ("contests", text, "a file of contest results, for a rating"),
        ("endpoint", text, "address of an OpenAI-compatible server, for example http://127.0.0.1:8000/v1"),
        ("endpoint-model", text, "the model's name there"),
        ("template", text, "a template's name, or chat: the model's own"),
        ("k", whole, "samples of each question (the suite's)"),
        ("temperature", number, "0.6"),
        ("top-p", number, "0.95"),
        ("max-tokens", whole, "of a response (32768)"),
        ("limit", whole, "only the first N questions of each suite"),
        ("seed", whole, "of the sampling (1)"),
        ("since", text, "livecodebench: first contest date, as 2024-08-01"),
        ("until", text, "livecodebench: last contest date"),
    ):
        repeated = {"action": "append"} if name == "suite" else {}
        evaluation.add_argument(f"--{name}", help=words, **kind, **repeated)  # type: ignore[arg-type]
    evaluation.add_argument(
        "--decoding-check",
        action="store_true",
        default=None,
        help="also decode greedily and compare repetition",
    )
    evaluation.set_defaults(command=_eval)


def _add_config(command: argparse.ArgumentParser, kind: str) -> None:
    command.add_argument("config", metavar="CONFIG", help=f"a Python file that binds `config` to {kind}")
    command.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="settings that replace the file's"
    )
    command.add_argument("--show", action="store_true", help="print the resolved run, check it and stop")


def _run(options: argparse.Namespace) -> int:
    config = overrides.load(options.config, options.overrides)
    if options.show:
        print(overrides.describe(config))
    checks.check(config)
    if options.show:
        return 0
    return _run_stage(config, run_directory(config, options.config))


def _data(options: argparse.Namespace) -> int:
    from r1mega.data.recipes import GenerateData

    config = overrides.load(options.config, options.overrides, GenerateData)
    if options.show:
        print(overrides.describe(config))
    config.check()
    return 0 if options.show else _run_stage(config, run_directory(config, options.config))


def run_directory(config: Any, config_file: str) -> Path:
    """`config.dir`, or runs/<folder of the config file>/<its name>."""
    file = Path(config_file).resolve()
    return Path(config.dir) if config.dir else Path("runs") / file.parent.name / file.stem


def _run_stage(config: RunConfig | GenerateData, path: Path) -> int:
    from r1mega.stages import generate_data, preference_pairs, reward_model, rl, sft

    stages: dict[str, Any] = {
        "data": generate_data.run,
        "rl": rl.run,
        "sft": sft.run,
        "reward_model": reward_model.run,
        "preference_pairs": preference_pairs.run,
    }
    kind = config.stage if isinstance(config, RunConfig) else config.command
    return _in_directory(stages[kind], config, path)


def _in_directory(stage: Callable[..., None], config: Any, path: Path) -> int:
    """Run a stage in its directory, unless it is finished there; the exit code."""
    from r1mega.rewards.endpoint import EndpointFault
    from r1mega.stages.console import Console
    from r1mega.stages.run_directory import RunDirectory

    console = Console()
    with RunDirectory(path, config) as directory:
        results = directory.results()
        if results.get("finished") and results.get("steps", 0) >= getattr(config, "num_steps", 0):
            extents = [f" ({results[unit]} {unit})" for unit in ("steps", "rows") if unit in results]
            console.note(
                f"{path} is finished{''.join(extents)}; to run it again, remove it or choose dir=PATH"
            )
            return 0
        console.note(f"run directory {path}")
        (path / "error.log").unlink(missing_ok=True)
        try:
            stage(config, directory, console)
        except EndpointFault as fault:
            raise ConfigError(
                f"{fault}; start the server or correct its url, and the same command goes on"
            ) from None
        except Exception as error:
            if isinstance(error, ConfigError) or (not directory.begun and isinstance(error, USERS_MISTAKES)):
                raise
            _say_fault(error, path / "error.log")
            return 2 if isinstance(error, ValueError) else 1
    return 0


def _say_fault(error: BaseException, file: Path) -> None:
    """One line; the traceback goes to the file."""
    details = _write_traceback(file)
    print(f"r1mega: {type(error).__name__}: {_one_line(error)} ({details})", file=sys.stderr)


def _write_traceback(file: Path) -> str:
    """Where the exception in flight can be read in full."""
    try:
        file.write_text(traceback.format_exc())
    except OSError as error:  # the disk may be what failed
        file.unlink(missing_ok=True)
        return f"no details: {error}"
    return f"details: {file}"


def _command(options: argparse.Namespace) -> int:
    from r1mega.stages import command

    config = overrides.load(options.config, options.overrides, command.CommandStage)
    return _in_directory(command.run, config, run_directory(config, options.config))


def _pipeline(options: argparse.Namespace) -> int:
    from r1mega.stages import graph, graph_drawing, pipeline_run, pipeline_state
    from r1mega.stages.console import Console

    pipeline = graph.load(options.pipeline, options.overrides)
    if options.show or options.svg:
        notes = {name: record.status for name, record in pipeline_state.read(pipeline.dir).items()}
        if options.svg:
            Path(options.svg).write_text(graph_drawing.svg(pipeline, notes), encoding="utf-8")
        if options.show:
            print(graph_drawing.text(pipeline, notes))
        return 0
    console = Console()
    choice = pipeline_run.Choice(options.start, options.only, options.dry_run, options.ignore_code)
    try:
        pipeline_run.run(pipeline, graph.identity(options.pipeline), choice, console)
    except pipeline_run.StageFailed as error:
        print(f"r1mega: {_one_line(error)}", file=sys.stderr)
        return error.code
    if not options.dry_run:
        from r1mega.pipeline_report import write_pipeline_report

        console.result("report", write_pipeline_report(pipeline.dir))
    return 0


def _lineage(options: argparse.Namespace) -> int:
    from r1mega.stages import lineage

    origin = lineage.trace(options.path)
    print(
        json.dumps(origin.as_dict(), indent=1, ensure_ascii=False) if options.json else lineage.tree(origin)
    )
    return 0


def _eval(options: argparse.Namespace) -> int:
    from r1mega.stages import evaluation, evaluation_config
    from r1mega.stages.console import Console

    given = {
        name: getattr(options, name)
        for name in (
            "data", "dir", "generations", "contests", "template", "k", "temperature", "top_p", "max_tokens", "limit",
            "seed", "since", "until", "decoding_check",
        )
    }  # fmt: skip
    model, settings = options.model, list(options.overrides)
    if "=" in model and not Path(model).exists():
        model, settings = "", [model, *settings]
    if options.suite:
        given["suites"] = tuple(name for names in options.suite for name in names.split(",") if name)
    endpoint = {"url": options.endpoint, "model": options.endpoint_model}
    settings = [f"endpoint.{name}={value}" for name, value in endpoint.items() if value] + settings
    config = evaluation_config.load(model, settings, **given)
    try:
        evaluation.run(config, Console())
    except USERS_MISTAKES:
        raise
    except Exception as error:
        _say_fault(error, config.folder / "error.log")
        return 1
    return 0


def _convert(options: argparse.Namespace) -> int:
    from r1mega.stages import convert
    from r1mega.stages.console import Console

    try:
        convert.run(Path(options.source), Path(options.target), options.dtype, Console())
    except KeyboardInterrupt:
        print("r1mega: interrupted; nothing is left of it, the same command begins anew", file=sys.stderr)
        return 130
    except (*USERS_MISTAKES, OSError):
        raise
    except Exception as error:
        _say_fault(error, Path(f"{options.target}-error.log"))
        return 1
    return 0


def _report(options: argparse.Namespace) -> int:
    from r1mega.pipeline_report import is_pipeline, write_pipeline_report
    from r1mega.report import write_report

    write = write_pipeline_report if is_pipeline(options.dir) else write_report
    print(write(options.dir))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from r1mega import bench

    parts = [part for part in options.parts.split(",") if part]
    drawing = ("order", "ranks", "micro_batches", "svg", "trace", "show")
    bench.run(
        options.what,
        options.json,
        options.responses,
        parts=parts,
        shared=options.shared,
        drawing={name: getattr(options, name) for name in drawing},
        tune=options.tune,
    )
    return 0


def _one_line(error: BaseException) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."


def _as_keyboard_interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
