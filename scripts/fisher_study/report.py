"""The tables and the reading of `results/fisher_distance.md`. Cells are medians over blocks and seeds."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from fisher_study.measures import INDEFINITE, Rows

STAGES = ("before", "during", "after")
USUAL = 1e-2  # damping where nothing else is said
COLUMNS = {
    "independent": "a ⟂ g (3.2.3)",
    "homogeneous": "+ homogeneity (3.2.2)",
    "one_divisor": "+ one divisor (3.5.4)",
    "lggm": "+ chain: LGGM (7)",
    "option1": "+ V1 symmetric: option 1 (8)",
    "option1_abs": "+ \\|ψ̂\\|",
    "option2": "LGGM + endless: option 2 (9)",
    "indep": "LGGM + no time: indep (6)",
}
METHODS = [name for name in COLUMNS if name not in INDEFINITE]
STORED = {  # experiments that say how the approximations train
    "char_defaults": "characters, LSTM 2×128, bits per character",
    "dnc_defaults": "repeated copy, DNC, nats per sequence",
    "figure3": "the same, each method tuned",
}
BAND = ("median", "low", "high")
UPDATES = (50, 100, 200, 300, 500)
SETTING = """\
Sticky, alternating and rotating are Markov chains of 4 symbols seen through noise, before an LSTM of 6 units;
characters are windows of the first 500,000 of the Penn Treebank, all 50 symbols, before an LSTM of 10 units; copy is
repeated copy (3 patterns of 2 bits, 1, 2 or 5 times over) with a DNC of 12 units, 6 slots, 1 read head. All are trained
with Adam. Language models start from the state that the 20 symbols before leave. The Fisher is enumerated in float64
from a root of the Fisher of each step's log-loss; no target is sampled. Inputs are `--batches` (4) times 64 sequences
(copy: all 64 there are); *noise* is the relative standard error of F that this leaves. F̂ of eqns 6, 8 and 9 is what
`kfacrnn.kfac.fisher_inverse` inverts. λ is in units of the mean eigenvalue of V0; F is damped by T·λ·I, the
approximations in factored form. Blocks: 4 gates, and of the DNC also 5 parts of its interface. T is the longest (35;
copy 21) and λ = 0.01 where nothing else is said.
"""
READING = """\
**Before training** options 1 and 2 take 31 to 46 % of indep's Frobenius error away on the LSTMs, more the longer T, and
67 to 72 % on the DNC; on the LSTMs they end near what the independence of a and g alone leaves. Part of it is the scale
of F̂: at the best scale it is 12 to 33 %. In KL(F̂⁻¹ ‖ F⁻¹) it is 2 to 6 % (DNC 19 to 21 %), in KL(F⁻¹ ‖ F̂⁻¹) 2 % at
most. **After training** nothing is left of it: the median error is within 3 % of indep's on every problem, on the LSTMs
at every T; option 1 is nearer than indep on 38 of 75 blocks, option 2 on 42. So it is at the best scale and for the
spectrum, and in KL(F̂⁻¹ ‖ F⁻¹) they gain 5 % at most at any λ; in KL(F⁻¹ ‖ F̂⁻¹) they lose 8 to 13 % on the DNC.

**Which assumption breaks where.** On the LSTMs it is the independence of a and g, which alone leaves 0.65 to 1.01 after
training; homogeneity moves F̂ by at most 0.01, the chain by 0.04, endless sequences by 0.01, a symmetric V1 by 0.09, no
correlation over time at all (indep) by 0.10 to 0.25, and the distance from F stays what it is. On the DNC independence
leaves 0.06, 0.24 and 0.44 before, during and after, and homogeneity takes that to 0.92: an episode has phases, and the
moments of g at single steps are 2.7 times their mean away from it (LSTMs: 0.09 to 0.24). The chain says little of g
beyond lag 1 (35 to 90 % off at lag 2), where little of g is left (3 to 14 %), and more of a (4 to 12 % off); it costs
little as V_d is the product of both. With |ψ̂| the error after training is larger than with ψ̂ on every problem, and
larger than indep's on 59 of 75 blocks.

**Damping** makes all alike: the spectrum's 95 % quantile is 102 to 3,902 times its 5 % quantile at λ = 1e-4, 5 to 10
times at λ = 1. On the trained characters λ = 1e-3 is 0.12 in these units (3e-4 is shipped), on the trained copy the
shipped λ is 0.001 to 0.002 (1e-5, indep 3e-5).

**Does the better approximation train better?** While it is better. In the first 100 updates of repeated copy options 1
and 2 are ahead of indep at equal settings, be they indep's own or theirs: at 24.4 to 26.5 nats against 30.3 and 30.5,
on 5 or 6 of 6 seeds. In the stored runs (8 and 5 seeds; there indep has settings of its own) not every option leads at
100 updates: they are at 25.4 to 31.7 nats, indep at 27.0 and 29.2. At 300 nearly all have solved the task: every median
is below 1 nat. On characters (3 seeds, equal settings) the medians of options 1 and 2 are within 2 % of indep's at all
updates below. That fits the distances, which are of much smaller models, of 3 seeds and of one way of training: it is
no proof. (The six seeds at equal settings were trained before K-FAC renewed its curvature more often at first, and with
the settings of that time.)
"""
LAGS = """\
Of the second moments of a and of g: ‖M_d‖/‖M_0‖; how far those of single steps are from their mean (homogeneity);
how far Ψ^d M_0 is from M_d (chain); the last two relative to ‖M_d‖.
"""
EQUAL = """\
Held-out nats per sequence (chance 33.3), the task and its DNC as in figure 3: median over seeds, least and greatest in
brackets; on how many seeds it is below indep's. Settings are those shipped for options 1 and 2, or those for indep.
"""
TRAINING = """\
Training losses of `results/figures/{char_defaults,dnc_defaults,figure3}.csv`: median, and in brackets the quartiles
over seeds; of three seeds the least and the greatest. On repeated copy indep has settings of its own.
"""


def lines(rows: Rows, lag_rows: Rows, runs: Rows, command: str, whole: bool) -> Iterator[str]:
    """The Markdown; the reading belongs to the whole study alone."""
    usual = [row for row in rows if row["damping"] == USUAL]
    problems = {row["problem"] for row in usual}
    greatest = {problem: max(row["T"] for row in usual if row["problem"] == problem) for problem in problems}
    longest = [row for row in usual if row["T"] == greatest[row["problem"]]]
    after = [row for row in longest if row["stage"] == "after"]
    of_damping = [row for row in rows if row["stage"] == "after" and row["T"] == greatest[row["problem"]]]
    yield from ("# How far is each approximation from the exact Fisher?", "")
    yield from (
        f"Made by `{command}`, with fisher_distance.csv (every block) and fisher_distance_lags.csv.",
        "",
        SETTING,
    )
    yield from (["![distances](figures/fisher_distance.png)", "", READING] if whole else [])
    yield from ("## What each assumption costs: ‖F̂ − F‖ / ‖F‖, and in brackets what it moves F̂ by", "")
    yield from table(longest, ("problem", "stage"), list(COLUMNS), costs, ("nats", "noise"))
    yield from ("## The same at the best scale, min over α of ‖αF̂ − F‖ / ‖F‖", "")
    yield from table(longest, ("problem", "stage"), list(COLUMNS), lambda rows, _: median(rows, "scaled"))
    for stage in ("before", "after"):
        yield from (f"## As a function of T, {stage} training; on how many blocks it is below indep's", "")
        yield from table([row for row in usual if row["stage"] == stage], ("problem", "T"), METHODS, error)
    yield from ("## KL(F̂⁻¹ ‖ F⁻¹) / KL(F⁻¹ ‖ F̂⁻¹), nats per weight: steps too long / too short", "")
    yield from table(longest, ("problem", "stage"), METHODS, both("kl_approximate_exact", "kl_exact_approximate"))
    yield from ("## The spectrum of F̂^{-1/2} F F̂^{-1/2} after training: least, 5 %, 50 %, 95 %, greatest", "")
    yield from table(after, ("problem",), METHODS, spectrum)
    yield from ("## As functions of λ, after training: ‖F̂ − F‖ / ‖F‖, KL(F̂⁻¹ ‖ F⁻¹), spread of the spectrum", "")
    yield from table(of_damping, ("problem", "damping"), METHODS, damping_cell, ("lambda",))
    yield from ("## By block: ‖F̂ − F‖ / ‖F‖ after training; on how many seeds it is below indep's", "")
    yield from table(after, ("problem", "block"), METHODS, error, ("psi",))
    yield from ("## Lag by lag, after training", "", LAGS)
    yield from lag_table([row for row in lag_rows if row["stage"] == "after"])
    if runs:
        yield from ("## The first updates of K-FAC on repeated copy, at equal settings", "", EQUAL)
        yield from equal_settings_table(runs)
    yield from ("## Stored runs", "", TRAINING)
    yield from training_table()


def median(rows: Iterable[dict[str, float]], column: str) -> str:
    value = statistics.median(row[column] for row in rows)
    return f"{value:.2f}" if abs(value) >= 0.01 or value == 0 else f"{value:.0e}"


def costs(rows: Rows, indep: Rows) -> str:
    return f"{median(rows, 'frobenius')} ({median(rows, 'step')})"


def error(rows: Rows, indep: Rows) -> str:
    wins = sum(row["frobenius"] < base["frobenius"] for row, base in zip(rows, indep, strict=True))
    return median(rows, "frobenius") + ("" if rows is indep else f" ({wins}/{len(rows)})")


def both(first: str, second: str) -> Callable[[Rows, Rows], str]:
    return lambda rows, indep: f"{median(rows, first)} / {median(rows, second)}"


def spectrum(rows: Rows, indep: Rows) -> str:
    return ", ".join(median(rows, name) for name in ("mu_min", "mu_05", "mu_50", "mu_95", "mu_max"))


def damping_cell(rows: Rows, indep: Rows) -> str:
    spread = statistics.median(row["mu_95"] / row["mu_05"] for row in rows)
    return f"{median(rows, 'frobenius')}, {median(rows, 'kl_approximate_exact')}, {spread:.0f}"


FACTS: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "nats": ("nats/step", lambda rows: median(rows, "nats")),
    "noise": ("noise", lambda rows: median(rows, "noise")),
    "psi": ("ψ̂", lambda rows: f"{median(rows, 'psi_min')} to {median(rows, 'psi_max')}"),
    "lambda": ("λ itself", lambda rows: f"{statistics.median(row['damping'] * row['unit'] for row in rows):.0e}"),
}


def table(
    rows: Rows,
    by: tuple[str, ...],
    names: Sequence[str],
    cell: Callable[[Rows, Rows], str],
    facts: tuple[str, ...] = (),
) -> Iterator[str]:
    """Markdown lines: a row for every value of `by`, a column for every approximation."""
    yield "| " + " | ".join([*by, *(FACTS[fact][0] for fact in facts), *(COLUMNS[name] for name in names)]) + " |"
    yield "|" + "---|" * (len(by) + len(facts) + len(names))
    for key in dict.fromkeys(tuple(row[name] for name in by) for row in rows):
        here = [row for row in rows if tuple(row[name] for name in by) == key]
        groups = {name: [row for row in here if row["approximation"] == name] for name in names}
        known = [*map(_plain, key), *(FACTS[fact][1](here) for fact in facts)]
        yield "| " + " | ".join([*known, *(cell(group, groups["indep"]) for group in groups.values())]) + " |"
    yield ""


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def lag_table(rows: Rows) -> Iterator[str]:
    shown = list(dict.fromkeys(row["lag"] for row in rows))
    yield "| problem | moment | " + " | ".join(f"d = {lag}" for lag in shown) + " |"
    yield "|" + "---|" * (2 + len(shown))
    for problem, side in dict.fromkeys((row["problem"], row["side"]) for row in rows):
        cells = []
        for lag in shown:
            here = [row for row in rows if (row["problem"], row["side"], row["lag"]) == (problem, side, lag)]
            cells.append(", ".join(median(here, name) for name in ("size", "homogeneity", "chain")) if here else "")
        yield f"| {problem} | {side} | " + " | ".join(cells) + " |"
    yield ""


def equal_settings_table(runs: Rows) -> Iterator[str]:
    names = list(dict.fromkeys(run["approximation"] for run in runs))
    yield "| settings | update | " + " | ".join(names) + " |"
    yield "|" + "---|" * (2 + len(names))
    for settings, update in dict.fromkeys((run["settings"], run["update"]) for run in runs):
        here = [run for run in runs if (run["settings"], run["update"]) == (settings, update)]
        nats = {name: [run["nats"] for run in here if run["approximation"] == name] for name in names}
        cells = []
        for name in names:
            below = sum(value < base for value, base in zip(nats[name], nats["indep"], strict=True))
            cell = f"{statistics.median(nats[name]):.1f} ({min(nats[name]):.1f}–{max(nats[name]):.1f})"
            cells.append(cell if name == "indep" else f"{cell}, {below}/{len(nats[name])}")
        yield f"| {settings} | {update} | " + " | ".join(cells) + " |"
    yield ""


def training_table(folder: Path = Path("results/figures")) -> Iterator[str]:
    yield "| experiment | approximation | seeds | " + " | ".join(f"update {u}" for u in UPDATES) + " |"
    yield "|" + "---|" * (3 + len(UPDATES))
    for name, what in STORED.items():
        path = folder / f"{name}.csv"
        stored = csv.DictReader(path.read_text().splitlines()) if path.exists() else ()
        curves: dict[str, dict[int, dict[str, str]]] = {}
        for row in stored:
            if row["panel"] == "updates" and row["line"].startswith("K-FAC"):
                curves.setdefault(row["line"].removeprefix("K-FAC "), {})[int(float(row["x"]))] = row
        for line, curve in curves.items():
            cells = ("{:.4g} ({:.4g}–{:.4g})".format(*(float(curve[u][k]) for k in BAND)) for u in UPDATES)
            yield "| " + " | ".join([what, line, curve[UPDATES[0]]["n"], *cells]) + " |"
    yield ""
