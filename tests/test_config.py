"""From overrides to a run: what is refused, with which words, and what makes two runs the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kfacrnn import config, discovery
from kfacrnn.errors import UserError
from kfacrnn.run import Run

MISTAKES: list[tuple[list[str], list[str]]] = [
    # the overrides, and what the line has to name
    (["results=2025_07_01"], ["results=2025_07_01: ", "a number", """results="'2025_07_01'\""""]),
    (["++data.root=1e3"], ["++data.root=1e3: ", "a number", """data.root="'1e3'\""""]),
    (["results=true"], ["results=true: ", "true or false", """results="'true'\""""]),
    (["optimizer.lr=fast"], ["optimizer.lr=fast", "Float", "configs/optimizer/adam.yaml"]),
    (["optimizer.lr=-1"], ["optimizer.lr=-1", "above 0"]),
    (["optimizer.lr=0"], ["optimizer.lr=0", "above 0"]),
    (["optimizer.lr=nan"], ["optimizer.lr=nan", "finite"]),
    (["optimizer.lr=inf"], ["optimizer.lr=inf", "finite"]),
    (["optimizer.lr=null"], ["optimizer.lr=null", "float"]),
    (["optimizer.lr="], ["optimizer.lr=:", "Float"]),
    (["optimizer.lr='???'"], ["optimizer.lr has no value"]),
    (["optimizer.lr=${nope}"], ["optimizer.lr=${nope}", "'nope'"]),
    (["optimizer.lr=[1,2]"], ["optimizer.lr=[1, 2]", "Float"]),
    (["optimizer.lr=½"], ["optimizer.lr=½", "key=value"]),
    (["optimizer.lr=a\nb"], ["optimizer.lr=a b", "key=value"]),
    (["optimizer.lr=0.1,0.2"], ["optimizer.lr=0.1,0.2", "-m"]),
    (["optimizer.lr=" + "9" * 400], ["optimizer", "too large"]),
    (["~optimizer.lr"], ["optimizer.lr has no value"]),
    (["+optimizer.lr=1"], ["+optimizer.lr=1", "there already"]),
    (["optimizer.lrr=1"], ["optimizer.lrr=1", "did you mean 'optimizer.lr'"]),
    (["++optimizer.lrr=1"], ["optimizer.lrr", "did you mean 'lr'"]),
    (["lrr=1"], ["lrr=1", "did you mean 'optimizer.lr'"]),
    (["updates=1"], ["updates=1", "did you mean 'budget.updates'"]),
    (["sed=1"], ["sed=1", "did you mean 'seed'"]),
    (["größe=1"], ["größe=1", "key=value"]),
    (["foo"], ["'foo'", "key=value"]),
    (["+foo=1"], ["'foo'", "there are", "seed"]),
    (["optimizer=adamm"], ["optimizer", "'adamm'", "did you mean 'adam'"]),
    (["optimizer=3"], ["optimizer", "'3'", "adam"]),
    (["optimizer=null"], ["optimizer", "'None'", "adam"]),
    (["optimizer="], ["optimizer", "''", "adam"]),
    (["optimizer=_kfac"], ["optimizer", "'_kfac'", "kfac_indep"]),
    (["optimizer=../task/ptb_char"], ["optimizer", "../task/ptb_char", "adam"]),
    (["optimizer=adam,sgd"], ["optimizer=adam,sgd", "-m"]),
    (["~optimizer"], ["~optimizer", "adam"]),
    (["~optimizer.name"], ["optimizer.name", "adam"]),
    (["optimizer.name=sdg"], ["optimizer.name=sdg", "did you mean 'sgd'"]),
    (["task.name=null"], ["task.name=None", "repeat_copy"]),
    (["optimizer/schedule=cosin"], ["optimizer/schedule", "did you mean 'cosine'"]),
    (["optimizer.schedule=cosine"], ["optimizer.schedule=cosine", "Schedule"]),
    (["optimizer.schedule.kind=cos"], ["optimizer.schedule.kind=cos", "cosine"]),
    (["optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=true"], ["optimizer.nesterov=true", "momentum"]),
    (["tuned=nope"], ["tuned", "'nope'", "repeat_copy/kfac_indep"]),
    (["budget=3"], ["budget", "'3'", "smoke"]),
    (["budget.updates=0"], ["budget.updates=0", "at least 1"]),
    (["budget.updates=1e3"], ["budget.updates=1000.0", "Integer"]),
    (["task=ptb_char", "task.bptt=0"], ["task.bptt=0", "at least 1"]),
    (["task.hidden=true"], ["task.hidden=true", "Integer"]),
    (["seed=${seed}"], ["seed=${seed}", "interpolation"]),
    (["seed=-1"], ["seed=-1", "at least 0"]),
    (["seed=1.5"], ["seed=1.5", "Integer"]),
    (["seed=" + "9" * 400], ["seed=999", "2147483647"]),
    (["seed=" + "9" * 5000], ["4300"]),
    (["seed=" + "a" * 100_000], ["seed=aaa", "…", "Integer"]),
    (["~seed"], ["seed has no value"]),
    (["threads=0"], ["threads=0", "at least 1"]),
    (["precision=fp16"], ["precision=fp16", "bf16"]),
    (["device=tpu"], ["device=tpu", "cuda"]),
    (["device="], ["device=", "cpu"]),
    (["device=cuda:x"], ["device=cuda:x", "cuda:1"]),
    (["results="], ["results=", "folder"]),
    (["results=null"], ["results=null", "str"]),
    (["data.source=http"], ["data.source=http", "torchtext"]),
    (["data=null"], ["data=null", "group"]),
    (["~data"], ["data=null", "group"]),
    (["tracker=wand"], ["tracker", "did you mean 'wandb'"]),
    (["tracker.tags=3"], ["tracker.tags=3", "list"]),
    (["tracker.tags={a:1}"], ["tracker.tags={a:1}", "ListConfig"]),
    (["tracker.mode=maybe"], ["tracker.mode=maybe", "offline, online"]),
]


MANY = config.Composer()


@pytest.mark.parametrize(("overrides", "named"), MISTAKES, ids=lambda value: " ".join(value)[:40].replace("\n", "⏎"))
def test_a_mistake_is_one_line_with_key_value_and_remedy(overrides: list[str], named: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        MANY.compose(overrides)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1500
    assert [part for part in named if part not in line] == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.lr=${budget.log_every}"],
        ["optimizer={lr: 0.5}"],
        ["seed=${oc.decode:'3'}"],
        ["results='/tmp/größe und mehr'"],
        ["tracker.tags=[a,b]", "tracker=wandb", "tracker.mode=online"],
        ["optimizer=sgd", "optimizer.clip=null"],
        ["device=cuda:1"],
        ["~tuned"],
        ["optimizer=kfac_option2", "tuned=repeat_copy/kfac_indep"],
        ["optimizer.schedule.kind=constant", "optimizer.lr=0.5", "optimizer=sgd", "optimizer.lr=2", "task=ptb_char"],
        ["optimizer.lr=2", "++optimizer.lr=3", "optimizer={clip: 1}", "optimizer/schedule=step"],
        ["task=ptb_word", "optimizer=kfac_option1", "optimizer.adapt_damping_every=5", "optimizer.clip=1", "seed=3"],
        ["task.name=repeat_copy", "budget.updates=7", "tracker.job_type=tune", "tracker.tags=[b]"],
    ],
    ids=lambda overrides: overrides[-1],
)
def test_what_is_unusual_but_right_passes_and_is_the_same_among_many(overrides: list[str]) -> None:
    alone = config.compose(overrides)
    assert isinstance(alone, Run)
    assert MANY.compose(overrides) == alone
    assert MANY.compose([]) == config.compose([])


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("lr: 1.0", "lr: fast", "optimizer.lr=fast"),
        ("lr: 1.0", "speed: 1.0", "optimizer.speed"),
        ("sgd", "sdg", "'sgd'"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str, named: str
) -> None:
    shutil.copytree(discovery.resource("configs"), tmp_path / "configs")
    path = tmp_path / "configs" / "optimizer" / "sgd.yaml"
    path.write_text(path.read_text().replace(right, wrong))
    monkeypatch.setattr(discovery, "resource", lambda folder: tmp_path / folder)
    for compose in (config.compose, config.Composer().compose):
        with pytest.raises(UserError) as caught:
            compose(["optimizer=sgd", "seed=1"])
        assert named in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_bad_composition_does_not_spoil_the_next() -> None:
    with pytest.raises(UserError):
        config.compose(["optimizer=adamm"])
    assert config.compose([]).optimizer.name == "adam"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["seed=1", "optimizer.lr=0.5"], ["optimizer.lr=0.5", "seed=1"]),
        (["optimizer.lr=1"], ["optimizer.lr=1.0"]),
        (["optimizer.lr=1e-2"], ["optimizer.lr=0.01"]),
        (["optimizer=adam", "task=repeat_copy"], []),
        (["optimizer={lr: 0.5}"], ["optimizer.lr=0.5"]),
        (["seed=${threads}", "threads=1"], ["seed=1", "threads=1"]),
        (["results=/x", "device=cuda", "tracker=wandb", "data.root=/y"], []),
    ],
    ids=str,
)
def test_two_ways_to_write_a_run_are_one_run(one: list[str], other: list[str]) -> None:
    assert config.compose(one).run_id == config.compose(other).run_id
