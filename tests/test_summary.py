"""The numbers of a figure's table against tables computed by hand, and what they may not depend on."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

import pytest

from kfacrnn import benched, config
from kfacrnn.benched import Cost
from kfacrnn.curves import Curve
from kfacrnn.summary import Entry, Line, Run, interval, smoothed, summarise


def curve(nats: Sequence[float], *, diverged: bool = False, pace: float = 2.0) -> Curve:
    """A row after every ten updates, each of which takes `pace` seconds."""
    updates = tuple(range(10, 10 * len(nats) + 1, 10))
    return Curve(updates, tuple(pace * update for update in updates), tuple(nats), diverged)


def line(name: str, *runs: Curve, timed: bool = True, first_seed: int = 1, **more: object) -> Line:
    paces = (2.0,) if timed else ()
    seeds = enumerate(runs, start=first_seed)
    return Line(name, name, "sgd", name, tuple(Run(seed, run, paces) for seed, run in seeds), **more)  # type: ignore[arg-type]


def entries(*lines: Line, baselines: Sequence[str] = ("SGD",), solved: float = -math.inf) -> dict[str, Entry]:
    return {entry.line.name: entry for entry in summarise(lines, baselines, lambda nats: nats, solved)}


def test_a_smoothed_curve_is_the_mean_over_the_updates_before_and_begins_where_it_has_all_of_them() -> None:
    smooth = smoothed(curve([8.0, 6.0, 4.0, 3.0]), last=20)
    assert smooth.updates == (20, 30, 40)
    assert smooth.seconds == (40.0, 60.0, 80.0)
    assert smooth.nats == (7.0, 5.0, 3.5)


def test_a_run_shorter_than_the_window_has_one_mean_over_all_of_it() -> None:
    smooth = smoothed(curve([3.0, 2.0, 1.0]), last=50)
    assert (smooth.updates, smooth.nats) == ((30,), (2.0,))


def test_the_best_baseline_sets_the_target_and_most_of_its_runs_reach_it() -> None:
    """Finals of SGD: 2, 3, 5, so the target is 3, which its runs reach after 40, after 30, and never."""
    sgd = line("SGD", curve([9, 8, 5, 2]), curve([9, 5, 3, 3]), curve([9, 8, 7, 5]))
    worse = line("Adam", curve([9, 8, 7, 4]), curve([9, 8, 7, 4]), curve([9, 8, 7, 4]))
    kfac = line("K-FAC", curve([6, 3, 2, 1]), curve([3, 2, 2, 1]), curve([6, 4, 2, 1]))
    table = entries(sgd, worse, kfac, baselines=["SGD", "Adam"])
    assert {(entry.target, entry.baseline) for entry in table.values()} == {(3.0, "SGD")}
    assert (table["SGD"].reached, table["SGD"].updates, table["SGD"].seconds) == (2, 40.0, 80.0)
    assert (table["Adam"].reached, table["Adam"].updates) == (0, math.inf)
    assert (table["K-FAC"].reached, table["K-FAC"].updates, table["K-FAC"].seconds) == (3, 20.0, 40.0)
    ratios = {name: entry.updates_ratio and entry.updates_ratio.value for name, entry in table.items()}
    assert ratios == {"SGD": 1.0, "Adam": math.inf, "K-FAC": 0.5}
    assert (table["SGD"].final, table["SGD"].final_low, table["SGD"].final_high) == (3.0, 2.0, 5.0)


def test_of_two_middle_runs_of_a_baseline_the_higher_sets_the_target() -> None:
    sgd = line("SGD", curve([5, 1]), curve([5, 2]), curve([5, 3]), curve([5, 4]))
    assert entries(sgd)["SGD"].target == 3.0
    assert entries(sgd)["SGD"].updates == 20.0


def test_a_miss_of_half_the_runs_is_infinite_and_a_diverged_run_is_a_miss_wherever_it_has_been() -> None:
    sgd = line("SGD", curve([9, 3]), curve([9, 3]))
    kfac = line("K-FAC", curve([3, 2]), curve([1, 1], diverged=True))
    entry = entries(sgd, kfac)["K-FAC"]
    assert (entry.reached, entry.updates, entry.final, entry.final_low) == (1, math.inf, math.inf, 2.0)


def test_without_a_baseline_that_ends_anywhere_there_is_no_target() -> None:
    sgd = line("SGD", curve([3, 2], diverged=True), curve([3, 2], diverged=True), curve([3, 2]))
    kfac = line("K-FAC", curve([3, 2]))
    assert {(entry.target, entry.updates, entry.reached) for entry in entries(sgd, kfac).values()} == {(None,) * 3}
    assert entries(line("SGD"), kfac)["K-FAC"].target is None


def test_a_target_is_not_below_where_the_task_counts_as_solved_and_the_first_to_solve_it_is_the_best() -> None:
    late, early = line("SGD", curve([9, 8, 0.001])), line("Adam", curve([9, 0.5, 0.002]))
    kfac = line("K-FAC", curve([0.9, 0.5, 0.1]))
    table = entries(late, early, kfac, baselines=["SGD", "Adam"], solved=1.0)
    assert (table["K-FAC"].target, table["K-FAC"].baseline, table["K-FAC"].solved) == (1.0, "Adam", True)
    assert {name: entry.updates for name, entry in table.items()} == {"SGD": 30.0, "Adam": 20.0, "K-FAC": 10.0}
    unsolved = entries(late, kfac, solved=0.0001)["K-FAC"]
    assert (unsolved.target, unsolved.solved) == (0.001, False)


def test_seconds_are_those_of_runs_that_had_the_machine_else_benched_else_none() -> None:
    sgd = line("SGD", curve([9, 3]))
    runs = Run(1, curve([3, 2]), (1.0, 3.0)), Run(2, curve([9, 2], pace=99.0))
    alone = entries(sgd, Line("K-FAC", "K-FAC", "sgd", "K-FAC", runs))["K-FAC"]
    assert (alone.updates, alone.seconds, alone.seconds_per_update) == (15.0, 20.0, 2.0)
    benched = entries(
        sgd, line("K-FAC", curve([9, 2], pace=99.0), timed=False, benched=Cost(0.5, "", "", {}, p95=0.7))
    )["K-FAC"]
    assert (benched.seconds, benched.seconds_per_update, benched.seconds_per_update_p95) == (10.0, 0.5, 0.7)
    assert benched.seconds_ratio is not None
    assert benched.seconds_ratio.value == 10.0 / 40.0
    unknown = entries(sgd, line("K-FAC", curve([9, 2]), timed=False))["K-FAC"]
    assert (unknown.updates, unknown.seconds, unknown.seconds_ratio, unknown.seconds_per_update) == (20.0, *[None] * 3)


def test_benched_seconds_count_the_first_updates_which_renew_curvature_more_often() -> None:
    kinds = {"plain": 1.0, "statistics": 10.0, "refresh": 100.0, "statistics+refresh": 1000.0}
    cost = Cost(2.0, "", "", {}, kinds, (2, 4, 0.25))
    # due before 0, 1, …, 8 at first; then statistics before every second update, inverses before every fourth
    assert [cost.after(updates) for updates in (0, 1, 2, 3)] == [0.0, 1000.0, 2000.0, 3000.0]
    steady = 8 * 4  # updates
    assert cost.after(steady + 10) - cost.after(steady) == 10 * 2.0
    assert cost.after(math.inf) == math.inf
    assert Cost(2.0, "", "", {}, kinds).after(7) == 14.0
    seen = {"plain": 1.0, "statistics": 10.0, "statistics+refresh": 1000.0}  # in the steady state of these intervals
    rare = Cost(2.0, "", "", {}, seen, (2, 4, 0.25))
    full = Cost(2.0, "", "", {}, seen | {"refresh": 1.0 + 1000.0 - 10.0}, (2, 4, 0.25))
    assert [rare.after(updates) for updates in range(40)] == [full.after(updates) for updates in range(40)]
    assert Cost(2.0, "", "", {}, {"statistics+refresh": 5.0}, (1, 3, 0.25)).after(1) == 5.0


def test_what_a_run_costs_on_average_counts_its_first_updates() -> None:
    settings = ["statistics_every=4", "refresh_every=4", "early_interval=0.25"]
    overrides = ["optimizer=kfac_option1", *(f"optimizer.{setting}" for setting in settings), "budget.updates=400"]
    run = config.compose(["task=repeat_copy", *overrides])
    row = {"ms_mean_cycle": 2.0, "kinds": {"plain": {"ms_median": 1.0}, "statistics+refresh": {"ms_median": 5.0}}}
    # due before 0, 1, …, 8, 10, 12, 15, and every fourth from 16 on: eight more than at every fourth, 4 ms dearer each
    assert benched.first_updates(row, run) == pytest.approx((400 * 2.0 + 8 * 4.0) / (400 * 2.0))


def test_lines_are_measured_against_the_baselines_of_their_own_model() -> None:
    lines = [
        line("SGD small", curve([9, 3]), model="small"),
        line("SGD large", curve([9, 1]), model="large"),
        line("K-FAC large", curve([3, 1]), model="large"),
    ]
    lines = [Line(each.name, each.name.split()[0], "sgd", each.name, each.runs, each.model) for each in lines]
    table = entries(*lines)
    assert list(table) == ["SGD small", "SGD large", "K-FAC large"]
    assert [entry.target for entry in table.values()] == [3.0, 1.0, 1.0]


# ---- intervals ---------------------------------------------------------------------------------------------------

SGD = [[9, 9, 8, 2], [9, 8, 3, 3], [9, 9, 9, 4], [9, 9, 4, 4]]
KFAC = [[9, 4, 2, 1], [3, 2, 1, 1], [9, 9, 3, 1], [4, 3, 2, 1]]


def ratio(seeds: Sequence[int], others: Sequence[int]) -> float:
    """Of one draw, computed from scratch: the target of that draw, and when its runs get there."""
    target = sorted(SGD[seed][-1] for seed in seeds)[len(seeds) // 2]

    def median(runs: Sequence[Sequence[float]]) -> float:
        return statistics.median(next((i for i, nats in enumerate(run, 1) if nats <= target), math.inf) for run in runs)

    return median([KFAC[seed] for seed in others]) / median([SGD[seed] for seed in seeds])


def test_an_interval_is_that_of_all_draws_of_seeds_with_the_target_taken_anew() -> None:
    paired = sorted(ratio(seeds, seeds) for seeds in itertools.product(range(4), repeat=4))
    low, high = paired[math.floor(0.025 * 256)], paired[math.ceil(0.975 * 256) - 1]
    found = interval(line("K-FAC", *map(curve, KFAC)), line("SGD", *map(curve, SGD)), "updates")
    assert found == pytest.approx((low, high))
    assert 0 < low < high < 1


def test_lines_with_other_seeds_are_drawn_independently() -> None:
    every = itertools.product(itertools.product(range(4), repeat=4), repeat=2)
    ratios = sorted(ratio(seeds, others) for seeds, others in every)
    low, high = ratios[math.floor(0.025 * len(ratios))], ratios[math.ceil(0.975 * len(ratios)) - 1]
    found = interval(line("K-FAC", *map(curve, KFAC), first_seed=7), line("SGD", *map(curve, SGD)), "updates")
    assert found == pytest.approx((low, high))


def test_an_interval_does_not_depend_on_the_order_of_runs_and_is_the_same_every_time() -> None:
    kfac, sgd = line("K-FAC", *map(curve, KFAC)), line("SGD", *map(curve, SGD))
    turned = Line("K-FAC", "K-FAC", "sgd", "K-FAC", kfac.runs[::-1])
    assert interval(kfac, sgd, "updates") == interval(turned, sgd, "updates") == interval(kfac, sgd, "updates")


def test_an_interval_may_end_at_infinity_and_one_seed_has_none() -> None:
    sgd = line("SGD", curve([9, 3]), curve([9, 3]), curve([9, 3]))
    kfac = line("K-FAC", curve([3, 3]), curve([3, 3]), curve([9, 9]))
    assert interval(kfac, sgd, "updates") == (0.5, math.inf)
    assert interval(line("K-FAC", curve([3, 3])), sgd, "updates") is None


def test_draws_of_a_baseline_most_of_whose_runs_diverged_do_not_count() -> None:
    sgd = line("SGD", curve([9, 3]), curve([9, 3]), curve([9, 3], diverged=True))
    kfac = line("K-FAC", curve([3, 3]), curve([3, 3]), curve([3, 3]))
    assert interval(kfac, sgd, "updates") == (0.5, 0.5)
