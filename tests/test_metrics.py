"""metrics.csv when lines are torn, cells are garbage and somebody else writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kfacrnn.errors import UserError
from kfacrnn.metrics import COLUMNS, Metrics


@pytest.fixture
def metrics(tmp_path: Path) -> Metrics:
    return Metrics(tmp_path)


def row(update: int, **values: Any) -> dict[str, Any]:
    return {"update": update, "train/nats": 0.1 * update, "memory_mb": 12.5, **values}


def test_rows_read_back_exactly(metrics: Metrics) -> None:
    value = 0.1 + 0.2
    metrics.append(row(1, **{"train/nats": value, "valid/nats": float("nan")}))
    (read,) = metrics.rows()
    assert tuple(read) == COLUMNS
    assert float(read["train/nats"]) == value
    assert read["valid/nats"] == "nan"
    assert read["lr"] == ""  # not known is not zero


@pytest.mark.parametrize("cut", [1, 2, 4, 10, 10_000])
def test_a_torn_last_line_is_dropped_wherever_it_is_torn(metrics: Metrics, cut: int) -> None:
    for update in (1, 2, 3):
        metrics.append(row(update))
    lines = metrics.path.read_text().splitlines(keepends=True)
    torn = lines[-1][: -min(cut, len(lines[-1]) - 1)]  # cut=1: all commas are there, `12.5` is, the line end is not
    metrics.path.write_text("".join(lines[:-1]) + torn)
    assert [read["update"] for read in metrics.rows()] == ["1", "2"]
    metrics.truncate(99)
    metrics.append(row(3))
    assert [read["update"] for read in metrics.rows()] == ["1", "2", "3"]


def test_a_line_that_lacks_columns_is_no_row(metrics: Metrics) -> None:
    metrics.append(row(1))
    with metrics.path.open("a") as file:
        file.write("2,,5\n")
    assert [read["update"] for read in metrics.rows()] == ["1"]


@pytest.mark.parametrize("garbage", [b"", b"\xff\x00,", b"x" * 9000, b"x" + b"," * (len(COLUMNS) - 1) + b"\n"])
def test_the_last_row_is_the_last_of_the_rows_whatever_stands_behind_it(metrics: Metrics, garbage: bytes) -> None:
    assert metrics.last_row() is None
    for update in range(1, 200):
        metrics.append(row(update))
    with metrics.path.open("ab") as file:
        file.write(garbage)
    assert metrics.rows()[-1]["update"] == "199"
    assert metrics.last_row() == [*metrics.numbers()][-1]


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_file_that_somebody_else_has_changed_is_not_written_on(
    metrics: Metrics, change: Callable[[Path], None]
) -> None:
    metrics.truncate(0)
    metrics.append(row(1))
    metrics.append(row(2))
    change(metrics.path)
    with pytest.raises(UserError, match=r"metrics\.csv was changed by somebody else"):
        metrics.append(row(3))


def test_columns_are_numbers_and_what_is_none_is_named(metrics: Metrics) -> None:
    metrics.append(row(1, lr=0.5))
    metrics.append(row(2))
    columns = metrics.columns(["memory_mb", "lr", "update"])
    assert [*columns] == ["memory_mb", "lr", "update"]
    assert (columns["memory_mb"], columns["update"], columns["lr"][0]) == ([12.5, 12.5], [1.0, 2.0], 0.5)
    assert math.isnan(columns["lr"][1])
    metrics.path.write_bytes(metrics.path.read_bytes().replace(b"0.2", b"0.\xff") + b"3,torn")
    problem = rf"{metrics.path}, update 2: train/nats is no number: '0\.�'"
    message = f"^{problem}; delete {metrics.path.parent} to have it made again$"
    for read in (lambda: metrics.columns(["lr", "train/nats"]), metrics.last_row, lambda: list(metrics.numbers())):
        with pytest.raises(UserError, match=message):
            read()
    assert metrics.columns(["update"]) == {"update": [1.0, 2.0]}


def test_truncating_drops_what_comes_after_the_update_and_keeps_the_rest_to_the_byte(metrics: Metrics) -> None:
    metrics.append(row(1))
    metrics.append(row(2))
    before = metrics.path.read_bytes()
    metrics.append(row(3))
    metrics.truncate(2)
    assert metrics.path.read_bytes() == before
    metrics.truncate(0)
    assert metrics.rows() == []
    assert metrics.path.read_text() == ",".join(COLUMNS) + "\n"
