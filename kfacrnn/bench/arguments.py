"""The command line of `kfacrnn bench`: argument parsing only."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

EXAMPLES = """\
examples:
  kfacrnn bench step-cost --task ptb_char             every optimiser on the character model, step by step in turn
  kfacrnn bench step-cost --task ptb_word --precision bf16 --rounds 5 --optimizers adam,kfac_option2 task.hidden=1024
  kfacrnn bench step-cost optimizer.refresh_every=50  an optimiser's setting is for those that have it
  kfacrnn bench lstm                                  the layers against torch.nn.LSTM
  kfacrnn bench dnc --reference-python ref/bin/python against the package dnc of PyPI, from an environment that has it
  kfacrnn bench scaling                               sizes of model and batch: about an hour, and a picture
  kfacrnn bench ranks --task ptb_word --precision bf16 --optimizers kfac_option1 task.batch_size=40   on two processes
  kfacrnn bench memory                                bytes of state, and the peak of a process that trains
  kfacrnn bench experiment cost_char                  every line of an experiment, such as a study of settings

Milliseconds are the mean over a whole cycle of updates, those with statistics and refreshes included. A machine that
does something else as well gets a warning: its numbers are indicative only."""


def add_to(bench: argparse.ArgumentParser) -> None:
    """Gives the parser of `kfacrnn bench` a command for every benchmark."""
    bench.epilog, bench.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    bench.set_defaults(run=lambda _: bench.print_help())
    kinds = bench.add_subparsers(title="benchmarks", metavar="BENCHMARK")
    language_models = ("ptb_char", "ptb_word")
    every_task = ("repeat_copy", *language_models)

    def kind(name: str, help: str, tasks: Sequence[str]) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=help, description=help, epilog=f"more examples: {bench.prog} --help")
        sub.set_defaults(run=_run, module=name.replace("-", "_"), default_tasks=tasks, precision="fp32", threads=2)
        if tasks:
            sub.add_argument("--precision", default="fp32", metavar="fp32|bf16", help="of forward and backward passes")
            sub.add_argument("--threads", type=int, default=2, metavar="N", help="of the process (default 2)")
        else:
            sub.add_argument("experiment", help="a name from experiments/, such as cost_char")
        sub.add_argument("--rounds", type=int, metavar="N", help="at least 3; default: what fits into a minute or two")
        sub.add_argument("--out", default="results/bench", metavar="DIR", help="where to write (default results/bench)")
        sub.add_argument("--json", metavar="FILE", help="write all rows to this file instead")
        sub.add_argument("overrides", nargs="*", help="Hydra overrides for every run, such as task.hidden=1024")
        if len(tasks) > 1:
            sub.add_argument("--task", action="append", metavar="TASK", help=f"default: {', '.join(tasks)}")
        if tasks and name != "lstm":
            sub.add_argument("--optimizers", default="", metavar="A,B", help="these, and the one they are compared to")
        return sub

    kind("step-cost", "every optimiser, interleaved step by step in one process", every_task)
    kind("lstm", "the recurrent layers against torch.nn.LSTM, forward and backward", language_models)
    dnc = kind("dnc", "the DNC's update, against that of the package dnc from PyPI", ("repeat_copy",))
    dnc.add_argument("--reference-python", metavar="PATH", help="a Python that can import torch and dnc")
    scaling = kind("scaling", "one size at a time, from the paper's models", language_models)
    scaling.add_argument("--seconds", type=float, default=5.0, help="points with a longer step are skipped (default 5)")
    scaling.add_argument("--gigabytes", type=float, default=12.0, help="points that take more are skipped (default 12)")
    ranks = kind(
        "ranks", "one process and two, with the messages between them, and a machine's rates", language_models[:1]
    )
    ranks.add_argument("--task", action="append", metavar="TASK", help="default: ptb_char")
    ranks.set_defaults(threads=1)
    kind("memory", "bytes of an optimiser's state, and the peak of a process", every_task)
    kind("experiment", "every line of an experiment, by SGD on the same model", ())


def _run(options: argparse.Namespace) -> int:
    from kfacrnn.bench.request import Request
    from kfacrnn.discovery import load

    given = vars(options)
    shared = ("precision", "threads", "rounds", "out", "json")
    request = Request(
        command=f"kfacrnn {shlex.join(options.arguments)}",
        tasks=tuple(given.get("task") or options.default_tasks),
        optimizers=tuple(name for name in given.get("optimizers", "").split(",") if name),
        overrides=tuple(options.overrides),
        **{name: given[name] for name in shared},
    )
    own = {name: given[name] for name in ("reference_python", "seconds", "gigabytes", "experiment") if name in given}
    load("bench", options.module).bench(request, **own)
    return 0
