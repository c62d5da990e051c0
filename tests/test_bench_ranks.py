"""`kfacrnn bench ranks`, the volumes that it counts, and the cost model. No timing is asserted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kfacrnn import KFAC, cli
from kfacrnn.bench import calibration, cost_model, sharing
from kfacrnn.bench import ranks as bench_ranks
from kfacrnn.bench.cost_model import Link, Machine, Pace, kfac, sgd
from kfacrnn.bench.sharing import Settings, Sizes, blocks, shared
from kfacrnn.kfac.block import Curvature
from kfacrnn.kfac.capture import Recorder
from kfacrnn.kfac.partition import partition
from kfacrnn.nn import LSTM
from kfacrnn.predictive import Categorical
from tests import scripts
from tests.ranks import together

APPROXIMATIONS = ("indep", "option1", "option2")
TINY = Sizes(hidden=5, layers=2, vocabulary=7, steps=4, sequences=8)
WORD = Sizes(hidden=650, layers=2, vocabulary=10_000, steps=35, sequences=64)
CUBES = {n: n**3 * 1e-10 for n in (10, 100, 1000)}
CORE = Machine(
    node=8,
    inside=Link(1e9, 2e9, 1e-4),
    between=Link(3e8, 3e8, 2e-4),
    all_reduce=cost_model.ring_all_reduce,
    broadcast=cost_model.tree_broadcast,
    overlap=0.0,
    gather=5e-4,
    train=Pace(1e-5, 1e-10),
    statistics=Pace(2e-5, 2e-10),
    decompose=dict.fromkeys(APPROXIMATIONS, CUBES),
    assemble={"indep": 0.0, "option1": 1e-8, "option2": 1e-8},
    products=Pace(0.0, 1e-11),
    update_sgd=1e-9,
    update_kfac=2e-9,
)


class Model(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.lstm = LSTM(sizes.hidden, sizes.hidden, sizes.layers)
        self.softmax = nn.Linear(sizes.hidden, sizes.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.softmax(self.lstm(self.embedding(tokens))[0])


# ------------------------------------------------------------------------------------------------------------- volumes


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("sizes", [TINY, WORD], ids=["tiny", "word"])
def test_the_blocks_are_those_of_the_real_model(sizes: Sizes, approximation: str) -> None:
    with torch.device("meta"):
        model = Model(sizes)
    curvature = Curvature(approximation, 4096, 1e10)
    real, _ = partition(model, Recorder(model), set(model.parameters()), curvature)
    real["softmax"].is_logits = True
    counted = {block.name: block for block in blocks(sizes, Settings(approximation))}
    assert set(counted) == set(real)
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    for name, block in real.items():
        assert counted[name].costs == block.costs
        assert counted[name].factor_bytes == 4 * sum(math.prod(shape) for shape in block._shapes())


def seen_by_real_ranks(approximation: str, share: float) -> dict[str, Any]:
    """Bytes that this rank gives to every collective, by what the update does, and that it holds; in float32."""
    torch.manual_seed(0)
    model = Model(TINY)
    optimizer = KFAC(
        model, approximation, loss_scale=4, statistics_every=2, statistics_fraction=0.5, refresh_every=3,
        early_interval=0.25, process_group=dist.group.WORLD, inverse_share=share,
    )  # fmt: skip
    parallel = DistributedDataParallel(model)
    tally: Counter[str] = Counter()

    def reduced(bucket: dist.GradBucket) -> Any:
        tally["gradients"] += bucket.buffer().numel() * bucket.buffer().element_size()
        return allreduce_hook(dist.group.WORLD, bucket)

    def counting(name: str) -> Any:
        call = getattr(dist, name)

        def counted(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
            tally[name] += len(tensor.detach().numpy().tobytes())
            return call(tensor, *arguments, **named)

        return mock.patch.object(dist, name, counted)

    parallel.register_comm_hook(None, lambda state, bucket: reduced(bucket))  # annotations, it would check
    by_update = []
    for _ in range(10):  # statistics and a refresh nine times, as they are frequent at first; then neither
        tally.clear()
        tokens = torch.randint(TINY.vocabulary, (5, 8 // dist.get_world_size()))
        with counting("all_reduce"), counting("broadcast"):
            if optimizer.statistics_due:
                cases = optimizer.statistics_cases(tokens.shape[1])
                optimizer.update_statistics(lambda t=tokens, c=cases: Categorical(model(t[:-1, c])))
        optimizer.zero_grad()
        F.cross_entropy(parallel(tokens[:-1]).flatten(0, 1), tokens[1:].flatten()).backward()
        with counting("all_reduce"), counting("broadcast"):
            optimizer.step()
        by_update.append(dict(tally))
    held = factors = 0
    for block in optimizer._estimator.blocks.values():
        factors += sum(total.nbytes for total in block.average.sums)
        for field in dataclasses.fields(block.inverse):
            value = getattr(block.inverse, field.name)
            held += sum(t.nbytes for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor))
    return {"updates": by_update, "held": held, "factors": factors}


@pytest.mark.parametrize(("ranks", "share"), [(2, 1.0), (2, 0.5), (4, 0.5)])
def test_what_travels_and_what_is_held_is_what_the_model_says_byte_for_byte(ranks: int, share: float) -> None:
    for approximation in APPROXIMATIONS if ranks == 2 else ("option2",):
        parts = shared(TINY, Settings(approximation, inverse_share=share), ranks)
        for rank, real in enumerate(together(ranks, seen_by_real_ranks, approximation, share)):
            team = rank // parts.placed.members
            both, plain = real["updates"][8], real["updates"][9]
            assert plain["gradients"] == 4 * TINY.parameters
            assert plain["all_reduce"] == sharing.DIVIDEND
            assert plain["all_reduce"] + plain.get("broadcast", 0) == parts.direction_bytes()
            assert both["all_reduce"] - plain["all_reduce"] == parts.moment_bytes()
            assert both.get("broadcast", 0) - plain.get("broadcast", 0) == parts.side_bytes(team)
            assert real["factors"] == parts.factor_bytes()
            assert real["held"] == parts.inverse_bytes(team)


def test_a_process_alone_sends_nothing() -> None:
    parts = shared(WORD, Settings("option1"), 1)
    assert (parts.side_bytes(0), parts.direction_bytes()) == (0, 0)
    seconds = kfac(WORD, Settings("option1"), 1, CORE)
    assert [seconds[item] for item in cost_model.TALK.values()] == [0, 0, 0, 0]


@pytest.mark.parametrize("ranks", [2, 8, 64, 512])
def test_a_smaller_share_never_holds_more_and_sends_directions_instead_of_sides(ranks: int) -> None:
    shares = [members / ranks for members in (2**i for i in range(10)) if members <= ranks]
    found = [shared(WORD, Settings("option1", inverse_share=share), ranks) for share in shares]
    memory = [parts.memory() for parts in found]
    assert memory == sorted(memory)
    assert sum(found[0].side_bytes(team) for team in range(found[0].teams)) == 0
    assert [parts.direction_bytes() > sharing.DIVIDEND for parts in found] == [True] * (len(found) - 1) + [False]


def test_different_tokens_are_counted_as_by_enumeration() -> None:
    sizes = Sizes(hidden=1, layers=1, vocabulary=3, steps=2, sequences=2)
    weight = [1 / (r + 2.7) for r in range(3)]
    expected = sum(
        len(set(batch)) * math.prod(weight[token] for token in batch) for batch in itertools.product(range(3), repeat=4)
    )
    assert sizes.seen() == pytest.approx(expected / sum(weight) ** 4)


# ------------------------------------------------------------------------------------------------------------- seconds


def test_collectives_take_what_their_steps_take() -> None:
    link = Link(summed=100.0, sent=50.0, latency=3.0)
    assert cost_model.ring_all_reduce(400, 2, link) == 2 * (3 + 2)  # a half there, a half back
    assert cost_model.ring_all_reduce(400, 4, link) == 6 * (3 + 1)
    assert cost_model.tree_all_reduce(400, 4, link) == 2 * (2 * 3 + 3)
    assert cost_model.tree_broadcast(400, 5, link) == 3 * (3 + 8)
    assert cost_model.piped_broadcast(400, 5, link) == 3 * 3 + 8
    for collective in (cost_model.ring_all_reduce, cost_model.tree_all_reduce, cost_model.tree_broadcast):
        assert collective(400, 1, link) == 0


def test_decompositions_fall_with_the_ranks_to_the_dearest_side_and_products_to_the_dearest_block() -> None:
    settings = [Settings("option1", inverse_share=1.0), Settings("option1", inverse_share=1e-9)]
    refresh, products = (
        [kfac(WORD, one, ranks, CORE)[item] for ranks in (1, 2, 4, 8, 64)]
        for one, item in zip(settings, ("refresh", "products"), strict=True)
    )
    assert refresh == sorted(refresh, reverse=True)
    assert products == sorted(products, reverse=True)
    assert products[-1] == products[-2]  # four blocks
    largest = (2 * 650 + 1) ** 3 * 1e-10
    assembled = sum(1e-8 * block.weights for block in blocks(WORD, settings[0]) if block.approximation == "option1")
    assert refresh[-1] * 20 == pytest.approx(largest + assembled)


def test_a_faster_link_and_rarer_refreshes_never_cost_more() -> None:
    fast = dataclasses.replace(CORE, between=Link(3e9, 3e9, 1e-5))
    for share in (1.0, 1 / 8, 1 / 64):
        settings = Settings("option2", inverse_share=share)
        slow_cost, fast_cost = (sum(kfac(WORD, settings, 64, machine).values()) for machine in (CORE, fast))
        assert fast_cost < slow_cost
        costs = [
            sum(kfac(WORD, dataclasses.replace(settings, refresh_every=every), 64, CORE).values())
            for every in (10, 20, 100)
        ]
        assert costs == sorted(costs, reverse=True)


def test_gradients_hide_behind_no_more_than_the_training_pass() -> None:
    hidden = dataclasses.replace(CORE, overlap=0.5)
    exposed, seen = sgd(WORD, 64, CORE), sgd(WORD, 64, hidden)
    assert seen["gradients"] == pytest.approx(max(exposed["gradients"] - 0.5 * exposed["train"], 0))


def test_between_measured_sizes_seconds_lie_on_a_power_and_beyond_on_a_cube() -> None:
    known = {10: 1.0, 100: 100.0}
    assert cost_model.interpolated(known, 30) == pytest.approx(9)
    assert cost_model.interpolated(known, 200) == pytest.approx(800)
    assert cost_model.interpolated(known, 3) == pytest.approx(1)


# --------------------------------------------------------------------------------------------------------- calibration


def written(machine: Machine, approximation: str = "option1") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the bench would have measured on a machine with these rates: rows and primitives."""
    rows = []
    model = Sizes(hidden=300, layers=2, vocabulary=1000, steps=35, sequences=64)
    for ranks, sequences, share in ((1, 64, 1.0), (1, 32, 1.0), (2, 64, 1.0), (2, 64, 0.5)):
        sizes = dataclasses.replace(model, sequences=sequences)
        settings = Settings(approximation, inverse_share=share)
        names = [field.name for field in dataclasses.fields(Settings) if field.name != "approximation"]
        for optimizer, seconds in (
            ("sgd", sgd(sizes, ranks, machine)),
            (f"kfac_{approximation}", kfac(sizes, settings, ranks, machine)),
        ):
            split = dict.fromkeys(cost_model.COMPUTE, 0.0)
            for item, value in seconds.items():
                split[{talk: part for part, talk in cost_model.TALK.items()}.get(item, item)] += 1000 * value
            row = {"task": "ptb_word", "line": f"{optimizer} {ranks}", "optimizer": optimizer, "ranks": ranks}
            row |= {"hidden": 300, "layers": 2, "vocabulary": 1000, "bptt": 35, "batch_size": sequences, "split": split}
            rows.append(row | ({name: getattr(settings, name) for name in names} if optimizer != "sgd" else {}))
    link = machine.inside
    primitives = {
        "decompose_seconds": {name: {str(n): t for n, t in known.items()} for name, known in machine.decompose.items()},
        "assemble_seconds_per_weight": machine.assemble,
        "link": {
            "summed_bytes_per_second": link.summed,
            "sent_bytes_per_second": link.sent,
            "latency_seconds": link.latency,
            "gather_seconds_per_rank": machine.gather,
        },
    }
    return rows, primitives


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_the_rates_of_a_machine_are_found_again_from_what_it_would_measure(approximation: str) -> None:
    rows, primitives = written(CORE, approximation)
    found = calibration.machine(rows, primitives, f"kfac_{approximation}")
    for name in ("train", "statistics", "products"):
        assert getattr(found, name) == pytest.approx(getattr(CORE, name))
    assert (found.update_sgd, found.update_kfac) == pytest.approx((CORE.update_sgd, CORE.update_kfac))
    for check in calibration.checks(rows, primitives):
        for item, value in check.measured.items():
            assert check.predicted[item] == pytest.approx(value, abs=1e-9)


def test_rates_are_never_negative_however_noisy_the_two_batches_were() -> None:
    rows, primitives = written(CORE)
    for row in rows:
        if row["batch_size"] == 32:
            row["split"]["train"] *= 3  # half the batch took longer than all of it
    assert calibration.machine(rows, primitives, "kfac_option1").train.piece == 0


# ------------------------------------------------------------------------------------------------------------ commands


SMALL = ["task.hidden=4", "task.layers=1", "task.bptt=3", "task.batch_size=8", "optimizer.statistics_fraction=0.5"]


def check_file(path: Path) -> None:
    rows = json.loads(path.read_text())["rows"]
    lines = ["sgd, 1×8", "kfac_option1, 1×8", "sgd, 1×4", "kfac_option1, 1×4"]
    lines += ["sgd, 2×4", "kfac_option1, share 1, 2×4", "kfac_option1, share 0.5, 2×4"]
    assert [row["line"] for row in rows] == lines
    for row in rows:
        sizes = calibration.sizes_of(row)
        assert sum(row["split"].values()) == pytest.approx(row["ms_mean_cycle"], rel=1e-3)
        if row["optimizer"] == "sgd":
            assert row["bytes_per_update"] == (row["ranks"] > 1) * 4 * sizes.parameters
            continue
        parts = shared(sizes, calibration.settings_of(row), row["ranks"])
        sent = row["bytes"]["plain"]
        assert sent.get("all_reduce", 0) + sent.get("broadcast", 0) == parts.direction_bytes()
        assert row["inverse_bytes"] == max(parts.inverse_bytes(team) for team in range(parts.teams))
    assert len(calibration.checks(rows, json.loads(path.read_text())["primitives"])) == len(rows)


@pytest.mark.slow
def test_ranks_measures_one_process_and_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench_ranks, "launched", lambda n, function, *a: together(n, function, *a) if n > 1 else [function(*a)]
    )
    flags = ["--rounds", "3", "--optimizers", "kfac_option1", "--out", str(tmp_path)]
    assert cli.main(["bench", "ranks", *flags, *SMALL]) == 0
    check_file(next(tmp_path.glob("ranks-ptb_char-fp32-threads=1-*.json")))


@pytest.mark.slow
def test_ranks_starts_processes_as_torchrun_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    flags = ["--rounds", "3", "--optimizers", "kfac_option1", "--out", str(tmp_path)]
    assert cli.main(["bench", "ranks", *flags, *SMALL]) == 0
    check_file(next(tmp_path.glob("ranks-ptb_char-fp32-threads=1-*.json")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "repeat_copy"], "--task repeat_copy: ranks has sizes for ptb_char and ptb_word only"),
        (["task.batch_size=3"], "task.batch_size=3: must be even, for two processes"),
    ],
)
def test_what_two_processes_cannot_do_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["bench", "ranks", "--out", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err == f"kfacrnn: {message}\n"


def study() -> Any:
    return scripts.script("ranks_study")


def test_the_study_is_made_from_the_files_of_the_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = study()
    assert script.main(["--results", str(tmp_path)]) == 2
    assert "ranks-ptb_char-fp32-threads=1.json is missing: kfacrnn bench ranks\n" in capsys.readouterr().err
    rows, primitives = written(CORE)
    content = {"rows": rows, "primitives": primitives, "hardware": {"cpu": "A core"}, "date": "2020-01-02T03:04"}
    (tmp_path / "bench").mkdir()
    for name, busy in (("ptb_char-fp32-threads=1", True), ("ptb_word-bf16-threads=1-task.batch_size=40", False)):
        path = tmp_path / "bench" / f"ranks-{name}.json"
        path.write_text(json.dumps(content | {"machine": {"busy": busy}}))
    assert script.main(["--results", str(tmp_path)]) == 0
    page = (tmp_path / "scaling_ranks.md").read_text()
    assert "two of A core, 2020-01-02, while others used the machine: indicative only;\nptb_word on" in page
    assert "| ptb_word: kfac_option1 2 |" in page
    for suffix in ("png", "svg"):
        assert (tmp_path / "figures" / f"scaling_ranks.{suffix}").stat().st_size > 1000


def test_the_best_share_is_the_cheapest_or_holds_less_for_a_hundredth_more() -> None:
    script = study()
    for machine in (CORE, script.A100):
        for ranks in (1, 8, 64):
            one = script.Study(machine, 650, script.SCALINGS["weak"])
            costs = [one.cost(ranks, 2**i) for i in range(int(math.log2(ranks)) + 1)]
            best = one.by_share(ranks)["best"]
            assert best.seconds <= 1.01 * min(cost.seconds for cost in costs)
            assert best.memory == min(c.memory for c in costs if c.seconds <= 1.01 * min(d.seconds for d in costs))


def test_ranks_that_follow_one_another_are_a_range() -> None:
    assert study().runs([1, 2, 4, 32, 128, 256]) == "1–4, 32, 128–256"
    assert study().runs([]) == "none"


def test_a_sweep_under_torchrun_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["sweep", "smoke"]) == 2
    assert (
        capsys.readouterr().err == "kfacrnn: sweep: under torchrun there is only kfacrnn train; start a sweep alone\n"
    )
