#!/usr/bin/env python3
"""Where K-FAC stops paying, and how widely its inverses are best shared out, on up to 512 ranks.

The cost model's rates are those of one core of the machine that was measured, for a cluster of such cores, and checked
against two processes there; of a GPU they are assumptions.

    kfacrnn bench ranks
    kfacrnn bench ranks --task ptb_word --precision bf16 --optimizers kfac_option1 task.batch_size=40
    python scripts/ranks_study.py       draws results/figures/scaling_ranks.{png,svg}, writes results/scaling_ranks.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from kfacrnn.bench import calibration, cost_model
from kfacrnn.bench.cost_model import COMPUTE, Link, Machine, Pace
from kfacrnn.bench.sharing import Settings, Sizes, shared
from kfacrnn.drawing import house_style, saved, write_files
from kfacrnn.errors import UserError
from kfacrnn.tables import markdown

FILES = {  # by task: what the benchmark's file is called besides, and the flags that make it
    "ptb_char": ("fp32-threads=1", ""),
    "ptb_word": (
        "bf16-threads=1-task.batch_size=40",
        " --task ptb_word --precision bf16 --optimizers kfac_option1 task.batch_size=40",
    ),
}
WORD = {"layers": 2, "vocabulary": 10_000, "steps": 35}
HIDDEN = (650, 1024)
RANKS = tuple(2**i for i in range(10))
SHOWN = (8, 64, 512)
WEAK, STRONG = 64, 512  # sequences of every rank; of all ranks together
PAYS = 1.8  # K-FAC is where SGD with the same batch ends after 0.51 to 0.58 of its updates: figure 2
AS_GOOD = 1.01  # of shares that cost at most that much more than the cheapest, the one that holds least is the best
REFRESHES = (5, 20, 100)
COLOURS = {650: "#332288", 1024: "#44AA99"}  # those of no method
LINES = {"1": "-", "best": "--", "1/ranks": ":"}

CLUSTER = "CPU cores"
CLUSTER_LINK = Link(0.31e9, 0.31e9, 50e-6)
GPU = "A100 GPUs"
A100 = Machine(
    node=8,
    inside=Link(230e9, 230e9, 20e-6),
    between=Link(20e9, 20e9, 30e-6),
    all_reduce=cost_model.tree_all_reduce,
    broadcast=cost_model.piped_broadcast,
    overlap=0.5,
    gather=50e-6,
    train=Pace(60e-6, 1 / 110e12),
    statistics=Pace(120e-6, 1 / 60e12),
    decompose={
        "indep": {128: 1e-3, 512: 2e-3, 1024: 4e-3, 2048: 10e-3},
        "option1": {128: 3e-3, 512: 12e-3, 1024: 35e-3, 2048: 130e-3},
    },
    assemble={"indep": 0.0, "option1": 2e-10},
    products=Pace(150e-6, 1 / 125e12),
    update_sgd=1.5e-11,
    update_kfac=2e-11,
)
ASSUMED = f"""\
- {CLUSTER}: a rank is one core, whose rates were measured on words with 650 units in bfloat16, in a gloo group. Eight
  of them share a node, joined by the link that was measured between two processes, and a network of 25 Gb/s. Each has
  an eighth of it, four fifths of that in practice ({CLUSTER_LINK.sent / 1e9:g} GB/s), at 50 µs a message. The network
  is an assumption.
- {GPU}: assumptions throughout, none was measured. Of the 312 TFLOP/s in bfloat16 of NVIDIA's data sheet training is
  given 35 %, statistics 20 %, products 40 %; of NVLink's 300 GB/s each way 230; of a port of HDR InfiniBand for each,
  25 GB/s, 20. Guessed from the number of kernels: 60 µs a layer and time-step in training, 120 µs in statistics passes,
  150 µs a block in products. Guessed, too: 35 ms to decompose a side of 1,024 rows, 130 ms for 2,048; half of the
  training pass hides gradients. NCCL's trees.
- Both: option 1 with the settings that ship (statistics every 10 updates on 1/8 of the sequences, inverses every 20),
  {WEAK} sequences for each rank (weak scaling) or {STRONG} for all (strong scaling), T = {WORD["steps"]}, two layers,
  {WORD["vocabulary"]:,} words. Processes make one decomposition after another; none is made in the background."""


class Cost(NamedTuple):
    members: int  # ranks that hold an inverse
    seconds: float
    ratio: float  # to SGD's update
    memory: int  # of the fullest rank, in bytes
    curvature: int  # factors and inverses among it


class Study(NamedTuple):
    """One machine, one model, one way to scale: `sequences(ranks)` of a batch."""

    machine: Machine
    hidden: int
    sequences: Callable[[int], int]
    refresh_every: int = 20

    def sizes(self, ranks: int) -> Sizes:
        return Sizes(self.hidden, **WORD, sequences=self.sequences(ranks))

    def cost(self, ranks: int, members: int) -> Cost:
        settings = Settings("option1", refresh_every=self.refresh_every, inverse_share=members / ranks)
        sizes = self.sizes(ranks)
        seconds = sum(cost_model.kfac(sizes, settings, ranks, self.machine).values())
        below = sum(cost_model.sgd(sizes, ranks, self.machine).values())
        parts = shared(sizes, settings, ranks)
        curvature = parts.factor_bytes() + max(map(parts.inverse_bytes, parts.placed.team.values()))
        return Cost(members, seconds, seconds / below, parts.memory(), curvature)

    def by_share(self, ranks: int) -> dict[str, Cost]:
        costs = [self.cost(ranks, members) for members in RANKS if members <= ranks]
        cheapest = min(cost.seconds for cost in costs)
        best = next(cost for cost in costs if cost.seconds <= AS_GOOD * cheapest)
        return {"1": costs[-1], "best": best, "1/ranks": costs[0]}


SCALINGS: dict[str, Callable[[int], int]] = {"weak": lambda ranks: WEAK * ranks, "strong": lambda ranks: STRONG}


def read(results: Path) -> dict[str, Any]:
    """The files of `kfacrnn bench ranks`. Raises `UserError`, with the command, for one that is missing."""
    found = {}
    for task, (name, flags) in FILES.items():
        path = results / "bench" / f"ranks-{task}-{name}.json"
        if not path.exists():
            raise UserError(f"{path} is missing: kfacrnn bench ranks{flags}")
        found[task] = json.loads(path.read_text())
    return found


def machines(files: dict[str, Any]) -> dict[str, Machine]:
    words = files["ptb_word"]
    core = calibration.machine(words["rows"], words["primitives"], "kfac_option1")
    return {CLUSTER: replace(core, node=8, between=CLUSTER_LINK), GPU: A100}


# -------------------------------------------------------------------------------------------------------------- tables


def best_sharding(known: dict[str, Machine]) -> str:
    lines = []
    for name, machine in known.items():
        for scaling, sequences in SCALINGS.items():
            for hidden in HIDDEN:
                cells = []
                for ranks in SHOWN:
                    costs = Study(machine, hidden, sequences).by_share(ranks)
                    cells.append(
                        f"{costs['best'].members}: {costs['best'].ratio:.2f}, {costs['best'].memory / 1e6:,.0f}"
                    )
                    cells.append(f"{costs['1'].ratio:.2f}, {costs['1/ranks'].ratio:.2f}")
                lines.append([f"{name}, {scaling}, {hidden} units", *cells])
    header = ["", *(title for ranks in SHOWN for title in (f"{ranks} ranks: best", "all, one"))]
    return markdown(header, lines)


def where_it_stops(known: dict[str, Machine]) -> str:
    lines = []
    for name, machine in known.items():
        for scaling, sequences in SCALINGS.items():
            for hidden in HIDDEN:
                by_ranks = {ranks: Study(machine, hidden, sequences).by_share(ranks) for ranks in RANKS}
                cells = []
                for share in LINES:
                    cells.append(runs([ranks for ranks in RANKS if by_ranks[ranks][share].ratio > PAYS]))
                lines.append([f"{name}, {scaling}, {hidden} units", *cells])
    return markdown(["does not pay on", "share 1", "best share", "share 1/ranks"], lines)


def runs(ranks: Sequence[int]) -> str:
    """Powers of two, those that follow one another as a range."""
    parts: list[list[int]] = []
    for number in ranks:
        if parts and number == 2 * parts[-1][-1]:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}–{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts) or "none"


def refresh_intervals(known: dict[str, Machine]) -> str:
    lines = []
    for name, machine in known.items():
        for scaling, sequences in SCALINGS.items():
            for every in REFRESHES:
                costs = [Study(machine, 650, sequences, every).by_share(ranks)["best"] for ranks in SHOWN]
                lines.append([f"{name}, {scaling}, every {every}", *(f"{c.members}: {c.ratio:.2f}" for c in costs)])
    return markdown(["", *(f"{ranks} ranks" for ranks in SHOWN)], lines)


def check(files: dict[str, Any]) -> str:
    items = (*COMPUTE, "total")
    lines = []
    for content in files.values():
        for one in calibration.checks(content["rows"], content["primitives"]):
            shown = [f"{one.ratio(item):.2f}" if one.measured[item] else "" for item in items]
            lines.append([f"{one.row['task']}: {one.row['line']}", f"{one.measured['total']:.1f}", *shown])
    return markdown(["processes × sequences", "ms", *items], lines)


def page(files: dict[str, Any], known: dict[str, Machine]) -> str:
    sources = ";\n".join(
        f"{task} on one core and two of {content['hardware']['cpu']}, {content['date'][:10]}"
        + (", while others used the machine: indicative only" if content["machine"]["busy"] else "")
        for task, content in files.items()
    )
    return f"""\
# K-FAC on many ranks

Made by `python scripts/ranks_study.py` from `bench/ranks-*.json`:
{sources}.

What the words mean and how to use it: [docs/data_parallel.md](../docs/data_parallel.md).

![ratio to SGD's update and memory against ranks](figures/scaling_ranks.png)

## The best share

Ranks that hold any one inverse: cost of an update by SGD's on as many ranks, MB that a rank holds beside activations.
Then the ratios where all ranks hold every inverse, and where one does. Best is the cheapest; of those within 1 %, what
holds least.

{best_sharding(known)}

## Where K-FAC stops paying

On characters it needs somewhat more than half of the updates that SGD with the same batch needs, so it pays while its
update costs less than {PAYS:g} of SGD's on the same ranks and batch. What it needs with larger ones is not shown.
Of 1, 2, 4, … {RANKS[-1]} ranks it does not pay on:

{where_it_stops(known)}

## By the interval between refreshes

Updates between inverses, 650 units: best number of holders, and the ratio to SGD's update.

{refresh_intervals(known)}

## Is the model right?

Predicted by measured time. Rates come from one process and from primitives alone; two processes are the test.

{check(files)}

Bytes that are sent and bytes of factors and inverses that are held agree exactly: the tests count them.

## What was assumed

{ASSUMED}
"""


# ------------------------------------------------------------------------------------------------------------- picture


def draw(known: dict[str, Machine]) -> dict[str, bytes]:
    """The files' contents by suffix."""
    from matplotlib.figure import Figure

    with house_style():
        figure = Figure(figsize=(9.2, 6.2))
        for line, (name, machine) in zip(figure.subplots(2, 3), known.items(), strict=True):
            for ax, (scaling, sequences) in zip(line, SCALINGS.items(), strict=False):
                _panel(ax, machine, sequences, lambda cost: cost.ratio)
                ax.axhline(PAYS, color="0.4", linewidth=0.9)
                ax.set_title(f"{name}, {scaling} scaling", fontsize=9)
                ax.set_ylabel("cost of an update by SGD's")
                ax.set_yscale("log")
                ax.set_ylim(1, None)
                ticks = [1, 1.5, 2, 3, 4, 5]
                ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
                ax.set_yticks([], minor=True)
            _panel(line[-1], machine, SCALINGS["strong"], lambda cost: cost.curvature / 1e6)
            line[-1].set_title(f"{name}, strong scaling", fontsize=9)
            line[-1].set_ylabel("MB of factors and inverses, fullest rank")
            line[-1].set_ylim(0, None)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return {suffix: saved(figure, suffix) for suffix in ("png", "svg")}


def _panel(ax: Any, machine: Machine, sequences: Callable[[int], int], value: Callable[[Cost], float]) -> None:
    for hidden in HIDDEN:
        by_ranks = [Study(machine, hidden, sequences).by_share(ranks) for ranks in RANKS]
        for share, style in LINES.items():
            label = f"{hidden} units, share {share}"
            ax.plot(RANKS, [value(costs[share]) for costs in by_ranks], style, color=COLOURS[hidden], label=label)
    ax.set_xscale("log", base=2)
    ax.set_xticks(RANKS[::3], [str(ranks) for ranks in RANKS[::3]])
    ax.set_xlabel("ranks")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default="results", metavar="DIR", help="the result store (default results)")
    results = Path(parser.parse_args(arguments).results)
    try:
        files = read(results)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    known = machines(files)
    pages = write_files({"md": page(files, known).encode()}, results / "scaling_ranks")
    print(*pages, *write_files(draw(known), results / "figures" / "scaling_ranks"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
