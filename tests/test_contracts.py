"""What every task and every optimiser does, whoever wrote it. Nothing is listed here: a new module is found and tested,
on a model made small by whichever of the settings `SMALL` it has."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kfacrnn import config, discovery
from kfacrnn.run import Run
from kfacrnn.session import Session
from kfacrnn.train import train
from tests.runs import curve

TASKS = discovery.modules("tasks")
OPTIMIZERS = discovery.modules("optimizers")
MODULES = [("task", name) for name in TASKS] + [("optimizer", name) for name in OPTIMIZERS]
PAIRS = [("repeat_copy", name) for name in OPTIMIZERS] + [(name, "sgd") for name in TASKS if name != "repeat_copy"]

SMALL = {"hidden": 6, "batch_size": 4, "bptt": 5, "eval_batch_size": 2, "slots": 4, "word_size": 3}
SMALL |= {"eval_sequences": 5}
UPDATES, CHECKPOINT, KILLED = 4, 2, 3

each_task = pytest.mark.parametrize("name", TASKS)
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
each_module = pytest.mark.parametrize(("group", "name"), MODULES)


@pytest.fixture(autouse=True)
def corpus(tiny_ptb: Path) -> None:
    """Tasks on the Penn Treebank read a tiny one."""


@pytest.fixture
def compose(tmp_path: Path) -> Any:
    def small(task: str, optimizer: str = "sgd", *overrides: str) -> Run:
        needed = discovery.missing("optimizers", optimizer)
        if needed:
            pytest.skip(f"{optimizer} needs {needed}, which is not installed")
        shrunk = [f"task.{key}={value}" for key, value in SMALL.items() if has_setting(task, key)]
        budget = [f"budget.updates={UPDATES}", "budget.log_every=1", "budget.eval_every=2"]
        budget += [f"budget.checkpoint_every={CHECKPOINT}"]
        there = [f"results={tmp_path / 'results'}", f"data.root={tmp_path}", "threads=1"]
        return config.compose([f"task={task}", f"optimizer={optimizer}", *shrunk, *budget, *there, *overrides])

    return small


def has_setting(task: str, name: str) -> bool:
    return name in [field.name for field in dataclasses.fields(discovery.load("tasks", task).Config)]


def leaves(value: Any) -> Iterator[Any]:
    """Tensors and plain values inside dataclasses and containers, in order."""
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def same(first: Any, second: Any) -> bool:
    """Bitwise; a NaN is the same as a NaN."""
    pairs = zip(leaves(first), leaves(second), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else repr(a) == repr(b) for a, b in pairs)


def saved(state: Any) -> Any:
    """The state as a checkpoint gives it back."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["task", "optimizer"])
def test_every_module_has_a_yaml_of_its_name_and_every_yaml_a_module(group: str) -> None:
    assert discovery.modules(f"{group}s") == discovery.yaml_names(discovery.resource("configs") / group)


@each_module
def test_the_yaml_opens_with_a_line_that_says_what_it_is(group: str, name: str) -> None:
    assert discovery.summary(discovery.resource("configs") / group / f"{name}.yaml")


@each_module
def test_the_yaml_gives_every_setting_a_value_and_the_dataclass_every_value_a_meaning(group: str, name: str) -> None:
    chosen = getattr(config.compose([f"{group}={name}"]), group)
    assert type(chosen) is discovery.load(f"{group}s", name).Config
    assert chosen.name == name
    nested = [chosen, *(value for value in vars(chosen).values() if dataclasses.is_dataclass(value))]
    assert all(field.metadata.get("doc") for settings in nested for field in dataclasses.fields(settings))


# ---- tasks -------------------------------------------------------------------------------------------------------


@each_task
def test_the_sequences_of_two_processes_together_are_the_batch_of_one(
    name: str, compose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = compose(name)

    def second_batch() -> Any:
        task = discovery.load("tasks", name).build(run.task, seed=1, device=torch.device("cpu"), data=run.data)
        task.next_batch()
        return task.next_batch()

    whole, parts = second_batch(), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        parts.append(second_batch())
    for rank, part in enumerate(parts):
        assert torch.equal(part.targets, whole.targets[:, rank::2])
    for number in ("cases", "units", "tokens"):
        assert sum(getattr(part, number) for part in parts) == getattr(whole, number)


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "optimizer"), PAIRS)
def test_a_run_ends_with_finite_losses_and_every_parameter_trained(task: str, optimizer: str, compose: Any) -> None:
    run = compose(task, optimizer)
    initial = Session(run).model.state_dict()
    folder = train(run, "test")
    assert folder.state() == "done"
    rows = folder.metrics.rows()
    assert [row["update"] for row in rows] == ["1", "2", "3", "4"]
    assert all(math.isfinite(float(row["train/nats"])) for row in rows)
    assert all(math.isfinite(float(row["valid/nats"])) for row in rows[1::2])
    final = torch.load(folder.path / "model.pt", weights_only=True)
    assert [name for name in initial if torch.equal(initial[name], final[name])] == []


@pytest.mark.parametrize(("task", "optimizer"), PAIRS)
def test_a_killed_run_ends_where_an_undisturbed_one_ends(
    task: str, optimizer: str, compose: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = ["task.dropout=0.3"] if has_setting(task, "dropout") else []  # draws from torch's own generator
    undisturbed = train(compose(task, optimizer, f"results={tmp_path / 'undisturbed'}", *noise), "test")
    run = compose(task, optimizer, *noise)
    killed(run, monkeypatch)
    resumed = train(run, "test")
    assert resumed.meta()["sessions"][-1]["from_update"] == CHECKPOINT
    assert same(*(torch.load(folder.path / "model.pt", weights_only=True) for folder in (undisturbed, resumed)))
    assert curve(undisturbed) == curve(resumed)


def killed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains past the checkpoint and then ends like a process that is killed: without another word."""

    class Killed(BaseException):
        pass

    step = Session.step

    def step_or_die(session: Session) -> Any:
        if session.update == KILLED:
            raise Killed
        return step(session)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", step_or_die)
        with pytest.raises(Killed):
            train(run, "test")


@each_optimizer
def test_the_optimizer_changes_neither_initial_weights_nor_batches(name: str, compose: Any) -> None:
    ours, reference = Session(compose("repeat_copy", name)), Session(compose("repeat_copy", "sgd"))
    assert same(ours.model.state_dict(), reference.model.state_dict())
    assert all(same(ours.step(), reference.step()) for _ in range(3))


@each_optimizer
def test_the_optimizer_continues_from_its_state_as_if_never_stopped(name: str, compose: Any) -> None:
    first, second = Session(compose("repeat_copy", name)), Session(compose("repeat_copy", name))
    for _ in range(2):
        first.step()
    second.load_state_dict(saved(first.state_dict()))
    for session in (first, second):
        session.step()
    assert same(first.model.state_dict(), second.model.state_dict())
    assert same(first.optimizer.state_dict(), second.optimizer.state_dict())


# ---- tasks -------------------------------------------------------------------------------------------------------


@each_task
def test_the_task_says_what_it_measures(name: str, compose: Any) -> None:
    task = Session(compose(name)).task
    assert task.unit
    assert task.chance > 0
    assert task.loss_scale > 0
    assert task.updates_per_epoch is None or task.updates_per_epoch >= 1
    assert task.metric == "perplexity" or task.metric.startswith(("bits ", "nats "))
    assert all(len(checksum) == 64 for checksum in task.checksums.values())


@each_task
def test_same_seed_same_weights_and_batches(name: str, compose: Any) -> None:
    first, second = Session(compose(name)), Session(compose(name))
    assert same(first.model.state_dict(), second.model.state_dict())
    assert all(same(first.step(), second.step()) for _ in range(3))


@each_task
def test_another_seed_other_weights_and_other_fresh_data(name: str, compose: Any) -> None:
    first, second = Session(compose(name, "sgd", "seed=1")), Session(compose(name, "sgd", "seed=2"))
    assert not same(first.model.state_dict(), second.model.state_dict())
    if first.task.updates_per_epoch is None:
        assert not same(first.task.next_batch(), second.task.next_batch())


@each_task
def test_the_loss_is_that_of_the_predictive_distribution_per_unit(name: str, compose: Any) -> None:
    session = Session(compose(name))
    session.step()  # so that there is a carried state, if ever
    batch = session.task.next_batch()
    losses = session.task.predict(session.model, batch, slice(None)).log_loss(batch.targets)
    loss = session.task.loss(session.model, batch)
    assert losses.shape == (batch.cases,)
    assert loss.item() == pytest.approx(losses.double().sum().item() / batch.units, rel=1e-5)
    assert session.task.loss_scale * loss.item() == pytest.approx(losses.double().mean().item(), rel=1e-5)


@each_task
def test_some_sequences_are_predicted_as_among_all(name: str, compose: Any) -> None:
    session = Session(compose(name))
    session.step()
    batch = session.task.next_batch()
    everything = session.task.predict(session.model, batch, slice(None))
    for cases in (slice(1, 3), torch.tensor([3, 0])):
        some = session.task.predict(session.model, batch, cases)
        torch.testing.assert_close(some.logits, everything.logits[:, cases], rtol=1e-4, atol=1e-6)
        if some.mask is not None and everything.mask is not None:
            assert torch.equal(some.mask, everything.mask[:, cases])


@each_task
def test_predicting_and_evaluating_change_nothing(name: str, compose: Any) -> None:
    session = Session(compose(name))
    session.step()
    batch = session.task.next_batch()
    before = saved(session.state_dict())
    session.task.predict(session.model, batch, slice(0, 2))
    for split in ("valid", "test"):
        score = session.task.evaluate(session.model, split)
        assert math.isfinite(score)
        assert score == session.task.evaluate(session.model, split)
    after = session.state_dict()
    for part in ("model", "task", "rng"):
        assert same(before[part], after[part])
    assert session.model.training


@each_task
def test_the_task_goes_on_from_its_state_with_the_same_batches(name: str, compose: Any) -> None:
    first, second = Session(compose(name)), Session(compose(name))
    for _ in range(2):
        first.step()
    second.task.load_state_dict(saved(first.task.state_dict()))
    assert all(same(first.task.next_batch(), second.task.next_batch()) for _ in range(3))
