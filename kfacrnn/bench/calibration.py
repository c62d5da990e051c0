"""From what `kfacrnn bench ranks` measured to the rates of the cost model, and how well it tells two processes' costs.

Rates come from one process, with a whole and with half a batch, and from primitives. Two processes are for the test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from kfacrnn.bench import cost_model, sharing
from kfacrnn.bench.cost_model import COMPUTE, TALK, Link, Machine, Pace
from kfacrnn.bench.request import BASELINE
from kfacrnn.bench.sharing import Settings, Sizes

Row = Mapping[str, Any]
MILLI = 1e-3


class Check(NamedTuple):
    """One row: milliseconds by item, computing and talking together, as the model says and as they were."""

    row: Row
    predicted: dict[str, float]
    measured: dict[str, float]

    def ratio(self, item: str) -> float:
        """Predicted by measured; NaN for what there is not."""
        return self.predicted[item] / self.measured[item] if self.measured[item] else float("nan")


def sizes_of(row: Row) -> Sizes:
    return Sizes(row["hidden"], row["layers"], row["vocabulary"], row["bptt"], row["batch_size"])


def settings_of(row: Row) -> Settings:
    names = (field.name for field in fields(Settings) if field.name != "approximation")
    return Settings(row["optimizer"].removeprefix("kfac_"), **{name: row[name] for name in names})


def machine(rows: Sequence[Row], primitives: Mapping[str, Any], optimizer: str) -> Machine:
    """The rates of one rank with `optimizer`; processes of one machine are joined by the link that was measured."""
    whole, half = _points(rows, BASELINE)
    kfac, kfac_of_half = _points(rows, optimizer)
    sizes, settings = sizes_of(kfac), settings_of(kfac)
    parts = sharing.shared(sizes, settings, 1)
    measured = primitives["link"]
    link = Link(measured["summed_bytes_per_second"], measured["sent_bytes_per_second"], measured["latency_seconds"])
    products = cost_model.product_operations(sizes, parts.blocks)
    known = primitives["decompose_seconds"]
    return Machine(
        node=2,
        inside=link,
        between=link,
        all_reduce=cost_model.ring_all_reduce,
        broadcast=cost_model.tree_broadcast,
        overlap=0.0,
        gather=measured["gather_seconds_per_rank"],
        train=_pace([_training(row) for row in (whole, half)]),
        statistics=_pace([_statistics(row, settings) for row in (kfac, kfac_of_half)]),
        decompose={name: {int(n): seconds for n, seconds in known[name].items()} for name in known},
        assemble=primitives["assemble_seconds_per_weight"],
        products=Pace(0.0, MILLI * kfac["split"]["products"] / products),
        update_sgd=MILLI * whole["split"]["update"] / sizes.parameters,
        update_kfac=MILLI * kfac["split"]["update"] / sizes.parameters,
    )


def checks(rows: Sequence[Row], primitives: Mapping[str, Any]) -> list[Check]:
    """Of every row, those that rates were taken from included."""
    kfacs = list(dict.fromkeys(row["optimizer"] for row in rows if row["optimizer"].startswith("kfac_")))
    machines = {optimizer: machine(rows, primitives, optimizer) for optimizer in kfacs}
    found = []
    for row in rows:
        sizes = sizes_of(row)
        if row["optimizer"] in machines:
            seconds = cost_model.kfac(sizes, settings_of(row), row["ranks"], machines[row["optimizer"]])
        elif row["optimizer"] == BASELINE:
            seconds = cost_model.sgd(sizes, row["ranks"], machines[kfacs[0]])
        else:
            continue
        items = {item: seconds.get(item, 0.0) + seconds.get(TALK.get(item, ""), 0.0) for item in COMPUTE}
        predicted = {item: value / MILLI for item, value in items.items()}
        found.append(Check(row, _with_total(predicted), _with_total(dict(row["split"]))))
    return found


def _with_total(items: dict[str, float]) -> dict[str, float]:
    return items | {"total": sum(items.values())}


def _points(rows: Sequence[Row], optimizer: str) -> tuple[Row, Row]:
    """One process with the whole batch, and with half of it."""
    alone = [row for row in rows if row["optimizer"] == optimizer and row["ranks"] == 1]
    whole, half = sorted(alone, key=lambda row: -row["batch_size"])
    return whole, half


def _training(row: Row) -> tuple[float, float, float]:
    """Time-steps of all layers, operations, seconds."""
    sizes = sizes_of(row)
    operations = cost_model.training_operations(sizes, sizes.steps * sizes.sequences)
    return sizes.steps * sizes.layers, operations, MILLI * row["split"]["train"]


def _statistics(row: Row, settings: Settings) -> tuple[float, float, float]:
    """The same of one statistics pass."""
    sizes = sizes_of(row)
    parts = sharing.shared(sizes, settings, 1)
    tokens = sizes.steps * cost_model.statistics_cases(sizes, settings, 1)
    seconds = MILLI * row["split"]["statistics"] * settings.statistics_every
    return sizes.steps * sizes.layers, cost_model.statistics_operations(sizes, parts, tokens), seconds


def _pace(points: Sequence[tuple[float, float, float]]) -> Pace:
    """Through both points; proportional to operations where a line through them would have a negative part."""
    (steps, more, longer), (_, fewer, shorter) = points
    operation = (longer - shorter) / (more - fewer) if more > fewer else 0.0
    piece = (longer - operation * more) / steps
    return Pace(piece, operation) if operation > 0 and piece >= 0 else Pace(0.0, longer / more)
