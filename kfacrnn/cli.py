"""The command line: argument parsing only. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from kfacrnn import __version__
from kfacrnn.bench import arguments as bench_arguments
from kfacrnn.errors import UserError

EXTRAS = {
    "experiments": {
        "hydra", "omegaconf", "pandas", "numpy", "matplotlib", "yaml", "rich", "filelock", "pooch", "jinja2",
        "markupsafe",
    },
    "wandb": {"wandb"},
    "torchtext": {"torchtext"},
    "modern": {"pytorch_optimizer", "opt_einsum"},
}  # fmt: skip

# How often torch's threads (GNU OpenMP) look for each other before they sleep. The default, some milliseconds of it,
# costs nothing on cores of one's own, and made a small model nearly ten times slower where other programs used them.
SPINS = "1000"

FIGURE_SOURCES = "results (default), csv, a folder with a store, offline:DIR or wandb:ENTITY/PROJECT"

TRAIN_EXAMPLES = """\
examples:
  kfacrnn train                                       the default: a few seconds of repeated copy
  kfacrnn train task=ptb_char optimizer=sgd           the paper's character model on the Penn Treebank
  kfacrnn train optimizer.lr=0.01 optimizer/schedule=cosine seed=1
  kfacrnn train -m optimizer.lr=0.01,0.1 seed=0,1     a Hydra multirun; every point is checked before the first starts
  kfacrnn train --cfg job                             the composed configuration

The same command continues a run that was stopped, and returns at once for one that is done."""

COMPARE_EXAMPLES = """\
examples:
  kfacrnn compare                                     the result store, by task and optimiser
  kfacrnn compare --where task.name=ptb_char --where 'optimizer.lr=1e-3..0.1' --group-by optimizer.name,optimizer.lr
  kfacrnn compare results offline:runs wandb:me/kfacrnn --where 'optimizer.name=kfac_*' --metric valid/metric --at best
  kfacrnn compare --baseline adam --target 1.5 --x time --plot comparison.pdf --out md
  kfacrnn compare 044f32e1269c 11f163f4bca6 --diff    two runs: settings, provenance, where their curves part
  kfacrnn compare results old/results --diff          two stores, runs of equal settings in pairs

sources: results (the store), a folder with a store, offline:DIR (the .wandb files below it), wandb:ENTITY/PROJECT;
for --diff also SOURCE@RUN, and RUN for one of the store. A run that several sources have is taken from the first.
conditions: any key of the configuration, run_id, state, source, commit or machine, each with globs, A..B and A,B."""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every terminal has every letter
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported, and by processes that are started
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"kfacrnn: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        for extra, packages in EXTRAS.items():
            if package in packages:
                print(f"kfacrnn: this needs {package}: pip install 'kfacrnn[{extra}]'", file=sys.stderr)
                return 2
        raise
    except BrokenPipeError:  # such as `kfacrnn list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["train"]:
        return _train(arguments[1:])
    options = _options(arguments)
    if "run" not in options:
        _parser().print_help()
        return 0
    return options.run(options) or 0


def _options(arguments: list[str]) -> argparse.Namespace:
    """Parses the arguments; unlike argparse itself, lets overrides stand between and after flags."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and ("overrides" not in options or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    options.arguments = arguments
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As argparse has it, in a line that can be read whatever it quotes."""
        super().error(str(UserError(message)))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kfacrnn", description="K-FAC for recurrent networks: train, compare, draw the paper's figures."
    )
    parser.add_argument("--version", action="version", version=f"kfacrnn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Any, help: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, epilog=f"example: kfacrnn {example}")
        sub.set_defaults(run=run)
        return sub

    command("train", None, "train one run, or continue it", "train task=ptb_char optimizer=adam")

    sweep = command("sweep", _sweep, "train every run of an experiment", "sweep smoke --jobs 2")
    sweep.add_argument("experiment", help="a name from experiments/, such as smoke; a bare 2 means figure2")
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    sweep.add_argument("--dry-run", action="store_true", help="check every run and say what would be done")
    sweep.add_argument("--only", action="append", default=[], metavar="NAME", help="these methods or lines only")
    sweep.add_argument("--retry-failed", action="store_true", help="run failed runs again")

    status = command("status", _status, "how far an experiment is", "status smoke")
    status.add_argument("experiment")

    figure = command("figure", _figure, "draw an experiment's figure", "figure smoke --from csv")
    figure.add_argument("experiment")
    figure.add_argument("--from", dest="source", default="results", metavar="SOURCE", help=FIGURE_SOURCES)
    figure.add_argument("--out", metavar="DIR", help="where to write (default RESULTS/figures)")

    report = command("report", _report, "one HTML page with every figure there is", "report")
    report.add_argument("--results", default="results", metavar="DIR", help="the result store (default results)")
    report.add_argument("--out", metavar="FILE", help="where to write (default RESULTS/report.html)")

    evaluate = command("evaluate", _evaluate, "a trained model on the test set", "evaluate 044f32e1269c --split test")
    evaluate.add_argument("runs", nargs="+", metavar="RUN", help="identities, or how they begin: kfacrnn list runs")
    evaluate.add_argument("--split", default="test", choices=["valid", "test"], help="default test")
    evaluate.add_argument("--final", action="store_true", help="the last parameters, not those of the best validation")
    evaluate.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:1 (default: the run's)")
    evaluate.add_argument("--root", metavar="DIR", help="folder of the corpus (default: the run's)")
    evaluate.add_argument("--results", default="results", metavar="DIR", help="the result store (default results)")

    _add_compare(command("compare", _compare, "runs of any source in one table", "compare"))

    sync = command("sync", _sync, "upload runs to Weights & Biases", "sync results --where tracker.group=figure2")
    sync.add_argument("sources", nargs="*", metavar="SOURCE", help="results (default), offline:DIR, a folder")
    sync.add_argument("--where", action="append", default=[], metavar="KEY=PATTERN", help="these runs only")
    sync.add_argument("--project", metavar="NAME", help="W&B project (default: the run's own tracker.project)")
    sync.add_argument("--entity", metavar="NAME", help="W&B user or team (default: the run's own, else yours)")
    sync.add_argument("--tag", action="append", default=[], metavar="TAG", help="added to the run's own tags")
    sync.add_argument("--dry-run", action="store_true", help="say what would be uploaded")
    sync.add_argument("--results", default="results", metavar="DIR", help="the result store (default results)")

    for sub in (sweep, status, figure):
        sub.add_argument("--results", default="results", metavar="DIR", help="the result store (default results)")
        sub.add_argument("overrides", nargs="*", help="Hydra overrides for every run, such as budget.updates=50")

    listing = command("list", _list, "what there is: tasks, optimisers, experiments, runs", "list runs")
    listing.add_argument("kind", nargs="?", help="tasks, optimizers, budgets, trackers, experiments or runs")
    listing.add_argument("--results", default="results", metavar="DIR", help="the result store (default results)")

    bench = command("bench", None, "what an update costs", "bench step-cost --task ptb_char")
    bench_arguments.add_to(bench)

    data = command("data", _data, "check or fetch the Penn Treebank", "data check")
    data.add_argument("action", choices=["check", "prepare"])
    data.add_argument("--root", metavar="DIR", help="folder of ptb.{train,valid,test}.txt (default KFACRNN_DATA)")
    return parser


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.epilog, compare.formatter_class = COMPARE_EXAMPLES, argparse.RawDescriptionHelpFormatter
    add = compare.add_argument
    add("sources", nargs="*", metavar="SOURCE", help="default: results")
    add("--where", action="append", default=[], metavar="KEY=PATTERN", help="these runs only; several must all hold")
    add("--group-by", metavar="KEY,KEY", help="a row for all runs with equal values (default task.name,optimizer.name)")
    add("--metric", default="train/metric", metavar="COLUMN", help="column of metrics.csv (default train/metric)")
    add("--x", default="update", metavar="update|time", help="axis of targets and of the plot (default update)")
    add("--at", default="end", metavar="end|best|update=N", help="where the value is taken (default end)")
    add("--last", type=int, default=50, metavar="N", help="updates that a value is the mean of (default 50)")
    add("--target", type=float, metavar="VALUE", help="what is to be reached (default: the baseline's final value)")
    add("--baseline", metavar="GROUP", help="a value of a group, or KEY=PATTERN: ratios to the best of these")
    add("--mix-hardware", action="store_true", help="compare seconds of different machines")
    add("--diff", action="store_true", help="two runs or two sources side by side")
    add("--plot", metavar="FILE", help="a picture, .png, .svg or .pdf")
    add("--out", default="text", metavar="csv|md|tex|json", help="print the table in this form")
    add("--refresh", action="store_true", help="read again what the cache has of W&B runs")
    add("--offline", action="store_true", help="ask no server: W&B projects as the cache has them")
    add("--results", default="results", metavar="DIR", help="the result store (default results)")


def _train(arguments: list[str]) -> int:
    if set(arguments) & {"-h", "--help"}:
        print(f"usage: kfacrnn train [KEY=VALUE ...] [-m] [--cfg job]\n\n{TRAIN_EXAMPLES}")
        return 0
    from kfacrnn import launch

    return launch.run(arguments, command="kfacrnn train " + shlex.join(arguments))


def _sweep(options: argparse.Namespace) -> int:
    from kfacrnn import sweep

    return sweep.sweep(
        options.experiment,
        results=options.results,
        overrides=options.overrides,
        jobs=options.jobs,
        dry_run=options.dry_run,
        only=options.only,
        retry_failed=options.retry_failed,
    )


def _status(options: argparse.Namespace) -> int:
    from kfacrnn import sweep

    return sweep.status(options.experiment, results=options.results, overrides=options.overrides)


def _figure(options: argparse.Namespace) -> int:
    from kfacrnn import figures

    written = figures.figure(
        options.experiment,
        results=options.results,
        source=options.source,
        out=options.out,
        overrides=options.overrides,
    )
    for path in written:
        print(path)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from kfacrnn.evaluate import evaluate

    how = {name: getattr(options, name) for name in ("split", "final", "results", "device", "root")}
    for run in options.runs:
        print(evaluate(run, **how))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from kfacrnn import compare_output

    compare_output.run(options)
    return 0


def _sync(options: argparse.Namespace) -> int:
    from kfacrnn import sync

    return sync.sync(
        options.sources or ["results"],
        options.where,
        results=options.results,
        project=options.project,
        entity=options.entity,
        tags=options.tag,
        dry_run=options.dry_run,
    )


def _report(options: argparse.Namespace) -> int:
    from kfacrnn import report

    print(report.report(results=options.results, out=options.out))
    return 0


def _list(options: argparse.Namespace) -> int:
    from kfacrnn import listing

    listing.show(options.kind, results=options.results)
    return 0


def _data(options: argparse.Namespace) -> int:
    from kfacrnn.data import ptb

    for line in getattr(ptb, options.action)(options.root):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
