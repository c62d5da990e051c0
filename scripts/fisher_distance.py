#!/usr/bin/env python3
"""How far is each approximation from the exact Fisher? Measured on an LSTM so small that the Fisher can be enumerated.

Given its inputs x, a language model draws the targets of different steps independently. With the scaled score of symbol
k at step u, g_t^q = √p_u(k) ∂log p_u(k)/∂s_t with q = (u, k), every expectation over targets is a sum over q:

    F    = E_x Σ_q vec(DW^q) vec(DW^q)ᵀ,  DW^q = Σ_t g_t^q a_tᵀ        [n·m, n·m], column-stacking vec
    G_ts = E_x Σ_q g_t^q g_s^qᵀ,          A_ts = E_x a_t a_sᵀ          [T, m, T, m] and [T, n, T, n]

and A0, A1, G0, G1 are the lag-0 and lag-1 sums of A_ts and G_ts over T. E_x is the mean over a fixed set of sequences.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfacrnn.kfac import fisher_inverse
from kfacrnn.kfac.capture import Recorder
from kfacrnn.kfac.factors import with_homogeneous_coordinate
from kfacrnn.kfac.fisher import FisherInverse
from kfacrnn.kfac.maths import damped, pi
from kfacrnn.nn import LSTM

Rows = list[dict[str, Any]]

VOCABULARY, EMBEDDING, HIDDEN = 4, 3, 6
NOISE = 0.2  # probability that a symbol is drawn anew, at random: what came before is then worth remembering
SOURCES = {  # transition probabilities of the chain behind the symbols
    "sticky": [[0.85 if j == i else 0.05 for j in range(4)] for i in range(4)],
    "alternating": [[0.05 if i // 2 == j // 2 else 0.45 for j in range(4)] for i in range(4)],
    "rotating": [[0.85 if j == (i + 1) % 4 else 0.05 for j in range(4)] for i in range(4)],
}
COLUMNS = {
    "indep": "indep (eqn 6)",
    "option1": "option 1 (8)",
    "option1_abs": "option 1 with \\|ψ̂\\|",
    "option2": "option 2 (9)",
    "lggm": "LGGM (7)",
    "a_g_independent": "only a ⟂ g (3.2.3)",
}
SETTING = f"""\
The model is an LSTM of {HIDDEN} units on {EMBEDDING}-dimensional embeddings of {VOCABULARY} symbols, before and
after training. The source is a Markov chain that stays where it is (sticky), changes sides (alternating) or goes round
(rotating), seen through noise: {NOISE:.0%} of the symbols are drawn at random. F and all factors are enumerated in
float64, nothing is sampled. F̂ of eqns 6, 8 and 9 is the inverse of what `kfacrnn.kfac.fisher_inverse` multiplies by;
eqn 7 is the paper's graphical model before V1 is made symmetric (option 1) or T infinite (option 2); 3.2.3 is
Σ_ts A_ts ⊗ G_ts, which takes a and g to be independent and assumes nothing else. λ is in units of the mean eigenvalue
of V0; F is damped by T·λ·I, the approximations in factored form. Cells are medians over gates and seeds; ψ̂ is the range
of its eigenvalues in option 1.
"""
READING = """\
**What it shows.** Before training, options 1 and 2 remove 30 to 47 % of indep's Frobenius error and end near what the
independence of a and g alone leaves: the correlation over time is then modelled about as well as it can be. After
training they are no better: 2 to 5 % closer than indep on the sticky source, 2 to 14 % further away on the others. The
last column does no better either, so what is missing is not a richer model of time but the dependence between a and g,
which no member of this family has. Option 2 is as near to F as eqn 7, so an endless T costs nothing even at T = 12;
making V1 symmetric costs option 1 up to 0.07. With |ψ̂| this error is nowhere smaller than with ψ̂ in the median; on the
trained alternating source it is above 1, that of F̂ = 0, and above indep's on every block. In KL(F̂⁻¹ ‖ F⁻¹), which
grows with steps that are too long, options 1 and 2 are ahead of indep, by 14 to 29 % before training without damping,
but by 6 % at most with λ = 0.01. In KL(F⁻¹ ‖ F̂⁻¹), which grows with steps that are too short, indep is as near or
nearer without damping. So on this model there is no reason to expect much from options 1 and 2 once
it has learned something. It is one tiny model and three seeds; it says nothing about the speed of training.
"""


class LanguageModel(nn.Module):
    """Log-probabilities `[T, B, vocabulary]` of the next symbol."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, EMBEDDING)
        self.lstm = LSTM(EMBEDDING, HIDDEN)
        self.softmax = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.softmax(self.lstm(self.embedding(tokens))[0]).log_softmax(-1)


def sequences(source: str, steps: int, cases: int, generator: torch.Generator) -> Tensor:
    """Symbols `[steps, cases]`."""
    transition, state = torch.tensor(SOURCES[source]), torch.randint(VOCABULARY, (cases,), generator=generator)
    symbols = []
    for _ in range(steps):
        noisy = torch.rand(cases, generator=generator) < NOISE
        symbols.append(torch.where(noisy, torch.randint(VOCABULARY, (cases,), generator=generator), state))
        state = torch.multinomial(transition[state], 1, generator=generator).squeeze(-1)
    return torch.stack(symbols)


def log_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Nats per step."""
    return F.nll_loss(model(tokens[:-1]).flatten(0, 1), tokens[1:].flatten())


# ----------------------------------------------------------------------------------------------- the Fisher, enumerated


class Block(NamedTuple):
    """One gate: the exact Fisher `[n·m, n·m]`, and A_ts `[T, n, T, n]`, G_ts `[T, m, T, m]`."""

    fisher: Tensor
    A: Tensor
    G: Tensor


def enumerate_scores(model: LanguageModel, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """a `[T, B, n]` and g `[Q, T, B, 4·hidden]` of the LSTM, the gates i, f, g, o side by side."""
    with Recorder(model).recording() as tape:
        log_p = model(inputs)
    (tap,) = (tap for tap in tape if tap.map in model.lstm.maps())
    scores = []
    for u in range(len(inputs)):
        for k in range(VOCABULARY):
            (gradient,) = torch.autograd.grad(log_p[u, :, k].sum(), tap.s, retain_graph=True)
            scores.append(gradient * (log_p[u, :, k].detach() / 2).exp().unsqueeze(-1))
    return with_homogeneous_coordinate(tap.a), torch.stack(scores)


def second_moments(x: Tensor) -> Tensor:
    """E_x Σ_q x_t x_sᵀ for all pairs of steps, `[T, n, T, n]`, from `[Q, T, B, n]`."""
    return torch.einsum("qtbi,qsbj->tisj", x, x) / x.shape[2]


def enumerated_block(a: Tensor, g: Tensor) -> Block:
    gradients = torch.einsum("qtbm,tbn->qbnm", g, a).flatten(2).flatten(0, 1)
    return Block(gradients.mT @ gradients / a.shape[1], second_moments(a.unsqueeze(0)), second_moments(g))


def factor(M: Tensor, lag: int) -> Tensor:
    """(1/T) Σ_t M_{t+lag,t}: A0, A1, G0, G1, all with one divisor (section 3.5.4)."""
    return M.diagonal(-lag, 0, 2).sum(-1) / len(M)


# --------------------------------------------------------------------------------------------------- the approximations


def library_inverse(approximation: str, block: Block, damping: float) -> FisherInverse:
    A0, A1, G0, G1 = (factor(M, lag) for M in (block.A, block.G) for lag in (0, 1))
    return fisher_inverse(approximation, A0, A1, G0, G1, lengths=len(block.A), damping=damping)


def of_library(approximation: str, block: Block, damping: float) -> Tensor:
    """F̂ as the library has it: the inverse of `multiply`, written out column by column."""
    inverse, size = library_inverse(approximation, block, damping), len(block.fisher)
    basis = torch.eye(size).to(block.fisher).view(size, block.A.shape[1], block.G.shape[1]).mT  # [n·m, m, n]
    return torch.linalg.inv(torch.stack([inverse.multiply(Z).mT.flatten() for Z in basis], 1))


def lggm(block: Block, damping: float) -> Tensor:
    """Eqn 7 as it stands, dense."""
    steps, amounts = len(block.A), damping_amounts(block, damping)
    A0, G0 = (damped(factor(M, 0), amount) for M, amount in zip((block.A, block.G), amounts, strict=True))
    L = torch.linalg.cholesky(torch.kron(A0, G0))
    Psi = torch.linalg.solve_triangular(L, torch.kron(factor(block.A, 1), factor(block.G, 1)), upper=False)
    Psi = torch.linalg.solve_triangular(L.mT, Psi, upper=True, left=False)
    total, power = steps * torch.eye(len(L)).to(L), torch.eye(len(L)).to(L)
    for d in range(1, steps):
        power = power @ Psi
        total = total + (steps - d) * (power + power.mT)
    return L @ total @ L.mT


def a_g_independent(block: Block, damping: float) -> Tensor:
    """Σ_ts A_ts ⊗ G_ts: what remains wrong if a and g are independent and nothing else is assumed."""
    A, G = (
        damped(M.flatten(2).flatten(0, 1), amount).view_as(M)
        for M, amount in zip((block.A, block.G), damping_amounts(block, damping), strict=True)
    )
    return torch.einsum("tisj,tksl->ikjl", A, G).reshape(block.fisher.shape)


def damping_amounts(block: Block, damping: float) -> tuple[float, float]:
    """π√λ and √λ/π."""
    balance = pi(factor(block.A, 0), factor(block.G, 0))
    return balance * math.sqrt(damping), math.sqrt(damping) / balance


# ------------------------------------------------------------------------------------------------------------ the study


def kl(F0: Tensor, F1: Tensor) -> float:
    """KL(N(0, F0⁻¹) ‖ N(0, F1⁻¹)) in nats per weight."""
    ratio = torch.linalg.solve(F0, F1)
    return (ratio.trace() - len(F0) - torch.linalg.slogdet(ratio).logabsdet).item() / (2 * len(F0))


def distances(block: Block, damping: float) -> Rows:
    """One row per approximation; `damping` in units of V0's mean eigenvalue. F gets T times what V0 gets."""
    scale = (factor(block.A, 0).diagonal().mean() * factor(block.G, 0).diagonal().mean()).item()
    exact = damped(block.fisher, len(block.A) * damping * scale)
    approximate = {name: of_library(name, block, damping * scale) for name in list(COLUMNS)[:4]}
    approximate |= {"lggm": lggm(block, damping * scale), "a_g_independent": a_g_independent(block, damping * scale)}
    psi = library_inverse("option1", block, damping * scale).diagnostics
    return [
        {
            "damping": damping,
            "psi_min": psi.psi_min,
            "psi_max": psi.psi_max,
            "approximation": name,
            "frobenius": ((fisher - exact).norm() / exact.norm()).item(),
            "kl_approximate_exact": kl(fisher, exact),
            "kl_exact_approximate": kl(exact, fisher),
        }
        for name, fisher in approximate.items()
    ]


def train(model: nn.Module, source: str, arguments: argparse.Namespace, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(arguments.updates):
        optimizer.zero_grad()
        log_loss(model, sequences(source, max(arguments.steps) + 1, 32, generator)).backward()
        optimizer.step()


def measure(source: str, seed: int, arguments: argparse.Namespace) -> Rows:
    torch.manual_seed(seed)
    model, generator, rows = LanguageModel().double(), torch.Generator().manual_seed(seed), []
    tokens = sequences(source, max(arguments.steps) + 1, arguments.sequences, generator)
    for state in ("init", "trained"):
        if state == "trained":
            train(model, source, arguments, generator)
        for steps in arguments.steps:
            part = tokens[: steps + 1]
            setting = {"source": source, "model": state, "T": steps, "seed": seed, "nats": log_loss(model, part).item()}
            a, g = enumerate_scores(model, part[:-1])
            for gate, scores in zip("ifgo", g.split(HIDDEN, -1), strict=True):
                block = enumerated_block(a, scores)
                for damping in arguments.dampings:
                    rows += [{**setting, "gate": gate, **row} for row in distances(block, damping)]
    return rows


# ----------------------------------------------------------------------------------------------------------- the report


def median(rows: Rows, column: str) -> str:
    return f"{statistics.median(row[column] for row in rows):.2f}"


def error(rows: Rows, indep: Rows) -> str:
    wins = sum(row["frobenius"] < base["frobenius"] for row, base in zip(rows, indep, strict=True))
    return median(rows, "frobenius") + ("" if rows is indep else f" ({wins}/{len(rows)})")


def both_kl(rows: Rows, indep: Rows) -> str:
    return f"{median(rows, 'kl_approximate_exact')} / {median(rows, 'kl_exact_approximate')}"


def table(rows: Rows, by: tuple[str, ...], cell: Callable[[Rows, Rows], str]) -> Iterator[str]:
    """Markdown lines: a row for every value of `by`, a column for every approximation."""
    yield "| " + " | ".join([*by, "nats/step", "ψ̂", *COLUMNS.values()]) + " |"
    yield "|" + "---|" * (len(by) + 2 + len(COLUMNS))
    for key in dict.fromkeys(tuple(row[name] for name in by) for row in rows):
        here = [row for row in rows if tuple(row[name] for name in by) == key]
        groups = {name: [row for row in here if row["approximation"] == name] for name in COLUMNS}
        facts = [*map(str, key), median(here, "nats"), f"{median(here, 'psi_min')} to {median(here, 'psi_max')}"]
        yield "| " + " | ".join([*facts, *(cell(group, groups["indep"]) for group in groups.values())]) + " |"
    yield ""


def report(rows: Rows, arguments: argparse.Namespace, argv: list[str]) -> Iterator[str]:
    """The lines of the Markdown file; the reading is of the default settings only."""
    command = " ".join(["python scripts/fisher_distance.py", *argv])
    least, by = arguments.dampings[0], ("source", "model", "T")
    at = {damping: [row for row in rows if row["damping"] == damping] for damping in arguments.dampings}
    yield from ("# How far is each approximation from the exact Fisher?", "")
    yield from (f"Made by `{command}`, with {arguments.out.name}.csv, which has every block.", "", SETTING)
    yield from ([] if argv else [READING])
    yield from (f"## ‖F̂ − F‖ / ‖F‖ (Frobenius), λ = {least:g}; on how many blocks it is below indep's", "")
    yield from table(at[least], by, error)
    for damping in arguments.dampings:
        yield from (f"## KL(F̂⁻¹ ‖ F⁻¹) / KL(F⁻¹ ‖ F̂⁻¹) of zero-mean Gaussians, nats per weight, λ = {damping:g}", "")
        yield from table(at[damping], by, both_kl)
    shown = [row for row in at[least] if row["T"] == arguments.steps[0]]
    yield from (f"## ‖F̂ − F‖ / ‖F‖ by gate, T = {arguments.steps[0]}, λ = {least:g}", "")
    yield from table(shown, ("source", "model", "gate"), error)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Distance of the Fisher approximations from the exact Fisher.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, nargs="+", default=[12, 35], help="lengths T (default: 12 35)")
    parser.add_argument("--dampings", type=float, nargs="+", default=[0.0, 0.01], help="in V0's mean eigenvalues")
    parser.add_argument("--sequences", type=int, default=64, help="in the fixed set that x runs over (default: 64)")
    parser.add_argument("--updates", type=int, default=300, help="of Adam, between init and trained (default: 300)")
    parser.add_argument("--out", type=Path, default=Path("results/fisher_distance"), help="without .md and .csv")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [row for source in SOURCES for seed in arguments.seeds for row in measure(source, seed, arguments)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text("\n".join(report(rows, arguments, argv)), encoding="utf-8")
    with arguments.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)


if __name__ == "__main__":
    main(sys.argv[1:])
