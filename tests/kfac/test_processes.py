"""KFAC on several ranks: the same as on one, to rounding, whoever decomposes, holds and sends what."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kfacrnn import KFAC
from kfacrnn.kfac import LevenbergMarquardt, fisher
from kfacrnn.kfac.block import Block, Curvature
from kfacrnn.kfac.capture import Recorder
from kfacrnn.kfac.maths import DecompositionError
from kfacrnn.kfac.partition import partition
from kfacrnn.kfac.placement import longest_first, members, placement
from kfacrnn.nn import LSTM, LayerNormLSTM
from kfacrnn.predictive import Categorical
from tests.ranks import together

THREE = ("indep", "option1", "option2")
T, B, V, H = 5, 12, 6, 4
UPDATES = 7
SETTINGS = {"damping": 1e-3, "statistics_every": 2, "statistics_fraction": 0.4, "refresh_every": 3}
BACKGROUND = {"refresh_delay": 2}
IDLE = {"statistics_fraction": 1 / 6}  # two sequences a pass: of four ranks, two have none
ADAPTIVE = {"adaptive_damping": LevenbergMarquardt(every=2)}


class Model(nn.Module):
    """Every kind of block: diagonal and dense factors, with and without lags, gates, gains and shifts, T = 1."""

    def __init__(self, layer: type = LSTM, is_tied: bool = False):
        super().__init__()
        self.embedding, self.start = nn.Embedding(V, H), nn.Linear(2, H)
        self.lstm, self.norm, self.softmax = layer(H, H), nn.LayerNorm(H), nn.Linear(H, V)
        if is_tied:
            self.softmax.weight = self.embedding.weight

    def forward(self, tokens: Tensor, about: Tensor) -> Tensor:
        h = self.start(about).unsqueeze(0)
        return self.softmax(self.norm(self.lstm(self.embedding(tokens), (h, torch.zeros_like(h)))[0]))


class Trainer:
    """One process alone, or a rank with its part of every batch; sequences in statistics passes vary in length."""

    def __init__(self, approximation: str, settings: dict[str, Any], **model: Any):
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        torch.manual_seed(0)
        self.model = Model(**model).double()
        group = dist.group.WORLD if self.ranks > 1 else None
        settings = {**SETTINGS, **settings}
        self.optimizer = KFAC(self.model, approximation, loss_scale=T, process_group=group, **settings)
        self.trained = DistributedDataParallel(self.model) if self.ranks > 1 else self.model

    def data(self, update: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `[T + 1, B]`, something about every sequence `[B, 2]`, and lengths `[B]`."""
        generator = torch.Generator().manual_seed(update)
        tokens = torch.randint(V, (T + 1, B), generator=generator)
        about = torch.randn(B, 2, generator=generator, dtype=torch.float64)
        lengths = torch.randint(1, T + 1, (B,), generator=generator)
        mine = slice(self.rank, None, self.ranks)
        return tokens[:, mine], about[mine], lengths[mine]

    def loss(self, update: int) -> Tensor:
        tokens, about, _ = self.data(update)
        return F.cross_entropy(self.trained(tokens[:-1], about).flatten(0, 1), tokens[1:].flatten())

    def statistics(self, update: int, spoil: float = 1.0) -> None:
        tokens, about, lengths = self.data(update)
        c = self.optimizer.statistics_cases(len(lengths))
        self.optimizer.update_statistics(
            lambda: Categorical(spoil * self.model(tokens[:-1, c], about[c]), lengths=lengths[c])
        )

    def step(self, update: int, spoil: float = 1.0) -> None:
        if self.optimizer.statistics_due:
            self.statistics(update)
        self.optimizer.zero_grad()
        loss = spoil * self.loss(update)
        loss.backward()
        self.optimizer.step()
        if self.optimizer.reduction_due:
            with torch.no_grad():
                self.optimizer.adapt_damping(loss, self.loss(update))

    @property
    def blocks(self) -> dict[str, Block]:
        return self.optimizer._estimator.blocks

    def seen(self) -> dict[str, Any]:
        held = [name for name, block in self.blocks.items() if isinstance(block.inverse, fisher.FisherInverse)]
        parameters = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return {"parameters": parameters, "stats": self.optimizer.stats(), "held": held}


def trained(approximation: str, *runs: dict[str, Any], **model: Any) -> list[dict[str, Any]]:
    """What every one of `runs`, settings each, leads to."""
    found = []
    for settings in runs:
        trainer = Trainer(approximation, settings, **model)
        for update in range(UPDATES):
            trainer.step(update)
        found.append(trainer.seen())
    return found


def layer_normalised(approximation: str, *runs: dict[str, Any]) -> list[dict[str, Any]]:
    return trained(approximation, *runs, layer=LayerNormLSTM)


def tied(approximation: str, *runs: dict[str, Any]) -> list[dict[str, Any]]:
    return trained(approximation, *runs, is_tied=True)


def assert_same(one: dict[str, Any], many: list[dict[str, Any]]) -> None:
    for each in many:
        torch.testing.assert_close(each["parameters"], one["parameters"], rtol=1e-9, atol=1e-12)
        assert each["stats"] == pytest.approx(one["stats"], rel=1e-6, abs=1e-12, nan_ok=True)


def assert_ranks_are_one_process(ranks: int, run: Callable[..., Any], approximation: str, *settings: Any) -> list[Any]:
    alone = run(approximation, *settings)
    by_run = list(zip(*together(ranks, run, approximation, *settings), strict=True))
    for one, many in zip(alone, by_run, strict=True):
        assert_same(one, many)
    return by_run


# --------------------------------------------------------------------------------------------------------- equivalence


@pytest.mark.parametrize("approximation", THREE)
def test_two_ranks_are_one_process_whoever_holds_the_inverses_and_whenever_they_are_made(approximation: str) -> None:
    once, few = {"inverse_share": 0.5}, {"lag_tolerance": 0.05}
    assert_ranks_are_one_process(
        2, trained, approximation, {}, once, BACKGROUND, {**once, **BACKGROUND}, IDLE, ADAPTIVE, few, {**once, **few}
    )


def test_two_ranks_with_a_tied_weight_are_one_process() -> None:
    assert_ranks_are_one_process(2, tied, "option1", {}, {"inverse_share": 0.5, **BACKGROUND}, IDLE)


def test_four_ranks_in_two_teams_are_one_process_and_each_inverse_is_held_by_a_team() -> None:
    shares = {1.0: 4, 0.5: 2, 0.25: 1}
    settings = [{"inverse_share": share, **IDLE, **BACKGROUND, "damping": 1e-2} for share in shares]
    by_run = assert_ranks_are_one_process(4, layer_normalised, "option2", *settings)
    for many, holders in zip(by_run, shares.values(), strict=True):
        names = sorted(name for each in many for name in each["held"])
        assert {name: names.count(name) for name in names} == dict.fromkeys(names, holders)
        assert {"embedding", "start", "softmax"} < set(names)


def resumed(state: bytes | None, share: float) -> tuple[bytes, dict[str, Any]]:
    """Trains half of the updates, or goes on from there; the state of rank 0, and what it has led to."""
    trainer = Trainer("option1", {**BACKGROUND, "inverse_share": share})
    first = 0
    if state is not None:
        model, optimizer = torch.load(io.BytesIO(state), weights_only=True)
        trainer.model.load_state_dict(model)
        trainer.optimizer.load_state_dict(optimizer)
        first = 5
    for update in range(first, first + 5):  # the state after 5 has work under way
        trainer.step(update)
    buffer = io.BytesIO()
    torch.save((trainer.model.state_dict(), trainer.optimizer.state_dict()), buffer)
    return buffer.getvalue(), trainer.seen()


def test_a_state_goes_on_with_another_number_of_ranks() -> None:
    half, _ = resumed(None, 1.0)
    _, alone = resumed(half, 1.0)
    (half_of_two, _), _ = together(2, resumed, None, 0.5)
    assert_same(alone, [resumed(half_of_two, 1.0)[1]])
    assert_same(alone, [seen for _, seen in together(2, resumed, half, 0.5)])
    assert_same(alone, [seen for _, seen in together(3, resumed, half_of_two, 1 / 3)])


# ------------------------------------------------------------------------------------------------ when one rank fails


def spoilt_on_the_last() -> dict[str, Any]:
    """One rank's statistics are not finite, then its loss, then its decompositions fail; each is met by all ranks."""
    spoil = math.nan if dist.get_rank() == dist.get_world_size() - 1 else 1.0
    complaints = []
    trainer = Trainer("option1", {"statistics_fraction": 1.0})
    try:
        trainer.statistics(0, spoil)
    except ValueError as error:
        complaints.append(str(error))
    decompose = fisher.safe_eigh

    def fail(*arguments: Any) -> Any:
        raise DecompositionError("no luck")

    trainer.statistics(0)
    fisher.safe_eigh = decompose if spoil == 1 else fail
    try:
        trainer.step(0)
    except ValueError as error:
        complaints.append(str(error))
    fisher.safe_eigh = decompose
    trainer.step(0)
    trainer.step(1, spoil)
    trainer.statistics(2, spoil)
    fisher.safe_eigh = decompose if spoil == 1 else fail
    trainer.step(2)
    fisher.safe_eigh = decompose
    trainer.step(3)
    return {**trainer.seen(), "complaints": complaints}


def test_what_goes_wrong_on_one_rank_all_ranks_meet_alike() -> None:
    first, second = together(2, spoilt_on_the_last)
    assert first["complaints"] == second["complaints"]
    not_finite, no_luck = first["complaints"]
    assert "not finite in the first statistics pass" in not_finite
    assert no_luck.endswith("lstm.l0: no luck")
    assert first["stats"] == pytest.approx(second["stats"], nan_ok=True)
    counted = ("skipped_statistics", "skipped_updates", "failed_inversions")
    assert [first["stats"][name] for name in counted] == [1, 1, 2]  # two blocks have a side there
    torch.testing.assert_close(first["parameters"], second["parameters"], rtol=0, atol=0)
    assert all(p.isfinite().all() for p in first["parameters"].values())


def with_other_sequences() -> str:
    trainer = Trainer("indep", {})
    tokens, about, _ = trainer.data(0)
    trainer.optimizer.statistics_cases(6)
    with pytest.raises(ValueError) as caught:
        trainer.optimizer.update_statistics(lambda: Categorical(trainer.model(tokens[:-1], about)))
    return str(caught.value)


def test_a_pass_on_other_sequences_than_were_asked_for_is_refused() -> None:
    assert together(2, with_other_sequences) == [
        "the pass was to be on the 3 sequences of statistics_cases, got 6",
        "the pass was to be on the 2 sequences of statistics_cases, got 6",
    ]


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"inverse_share must be in \(0, 1\]"):
        Trainer("indep", {"inverse_share": share})


# ------------------------------------------------------------------------------------------------------ who does what


def costs_of_word_model(hidden: int, vocabulary: int = 10_000) -> dict[str, list[int]]:
    """Of the blocks of the paper's word-level model, in cubed rows."""

    class Word(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.lstm = nn.Embedding(vocabulary, hidden), LSTM(hidden, hidden, 2)
            self.softmax = nn.Linear(hidden, vocabulary)

    with torch.device("meta"):
        model = Word()
    curvature = Curvature("option1", 4096, 1e10)
    blocks, _ = partition(model, Recorder(model), set(model.parameters()), curvature)
    return {name: block.costs for name, block in blocks.items()}


def loads(costs: dict[str, list[int]], ranks: int, holders: int) -> list[int]:
    found = placement(costs, ranks, holders)
    work = [0] * ranks
    for (name, side), rank in found.worker.items():
        work[rank] += costs[name][side]
    return work


@pytest.mark.parametrize("hidden", [650, 1024])
def test_decomposition_work_per_rank_falls_with_the_ranks_until_the_largest_side_is_all_there_is(hidden: int) -> None:
    costs = costs_of_word_model(hidden)
    total, largest = sum(map(sum, costs.values())), (2 * hidden + 1) ** 3
    assert max(map(max, costs.values())) == largest
    for ranks in (1, 2, 3, 4, 8, 64):
        work = loads(costs, ranks, ranks)
        assert sum(work) == total
        assert max(work) <= max(1.05 * total / ranks, largest)
    for ranks in (1, 2, 3, 4):  # at least 80 % of the speed-up that there could be
        assert total / max(loads(costs, ranks, ranks)) >= 0.8 * ranks
    assert max(loads(costs, 64, 64)) == largest


@pytest.mark.parametrize("ranks", range(1, 9))
def test_a_team_holds_all_of_a_block_and_shares_its_work(ranks: int) -> None:
    costs = costs_of_word_model(650)
    for holders in (size for size in range(1, ranks + 1) if ranks % size == 0):
        found = placement(costs, ranks, holders)
        assert set(found.worker) == {(name, side) for name in costs for side in range(len(costs[name]))}
        assert all(rank // holders == found.team[name] for (name, _), rank in found.worker.items())


def test_a_share_is_never_more_than_was_asked_for_but_for_one_holder() -> None:
    assert [members(6, share) for share in (1.0, 0.99, 0.5, 0.34, 1 / 3, 0.3, 1 / 6, 0.01)] == [6, 3, 3, 2, 2, 1, 1, 1]
    assert [members(7, share) for share in (1.0, 0.99)] == [7, 1]


def test_the_dearest_come_first_and_go_where_there_is_least_to_do() -> None:
    assert longest_first({"a": 3, "b": 5, "c": 4, "d": 3}, 2) == {"b": 0, "c": 1, "a": 1, "d": 0}


def counted_work() -> tuple[dict[int, int], dict[str, list[int]]]:
    """Rows of the matrices that this rank has decomposed, and the costs of all."""
    rows: dict[int, int] = {}
    cholesky = torch.linalg.cholesky

    def counting(M: Tensor) -> Tensor:
        rows[len(M)] = rows.get(len(M), 0) + 1
        return cholesky(M)

    torch.linalg.cholesky = counting
    trainer = Trainer("option1", {})
    trainer.step(0)
    return rows, {name: block.costs for name, block in trainer.blocks.items()}


def groups_to_choose() -> tuple[str, bool]:
    try:
        KFAC(nn.Linear(2, 3), loss_scale=1)
    except ValueError as error:
        alone, _ = dist.new_subgroups(1)
        return str(error), KFAC(nn.Linear(2, 3), loss_scale=1, process_group=alone)._processes.ranks == 1
    return "", False


def test_several_processes_have_to_say_which_belong_together() -> None:
    for said, may_be_alone in together(2, groups_to_choose):
        assert said.startswith("this is one of 2 processes: KFAC needs process_group=torch.distributed.group.WORLD")
        assert may_be_alone


def test_a_rank_decomposes_what_is_its_own_and_nothing_else() -> None:
    found = together(3, counted_work)
    costs = {name: sides for name, sides in found[0][1].items() if sides}
    counted = [sum(count * size**3 for size, count in rows.items()) for rows, _ in found]
    assert sum(counted) == sum(cost for sides in costs.values() for cost in sides) - V  # the embedding's A is diagonal
    assert sorted(counted) == pytest.approx(sorted(loads(costs, 3, 3)), abs=V)


def with_other_numbers_of_steps() -> str:
    trainer = Trainer("indep", {})
    tokens, about, _ = trainer.data(0)
    c = trainer.optimizer.statistics_cases(3)
    with pytest.raises(ValueError) as caught:
        trainer.optimizer.update_statistics(lambda: Categorical(trainer.model(tokens[: 3 + trainer.rank, c], about[c])))
    return str(caught.value)


def test_passes_with_other_numbers_of_steps_are_refused_on_all_ranks() -> None:
    assert (
        together(2, with_other_numbers_of_steps)
        == ["the processes have sequences of [3, 4] steps: pad all to as many, as by total_length"] * 2
    )
