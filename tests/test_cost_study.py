"""What `scripts/cost_study.py` says of settings, from runs and costs of a test's choosing."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from kfacrnn import experiment, settings
from kfacrnn.plan import Plan
from tests import scripts, synthetic

SETTINGS = {  # the losses of two seeds, and an update's cost by SGD's
    "nothing spared": ((0.40, 0.42), 2.5),
    "as shipped": ((0.41, 0.43), 1.05),
    "rarely": ((0.42, 0.44), 1.02),
    "never": ((0.60, 0.62), 1.01),
    "as good": ((0.1, 0.1), None),
}
STEADY = {"ms_mean_cycle": 1.0, "kinds": {label: {"ms_median": 1.0} for label in ("plain", "statistics+refresh")}}


@pytest.fixture
def script() -> ModuleType:
    return scripts.script("cost_study")


@pytest.fixture
def results(tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with a study of all settings but one that was not measured."""
    methods = ", ".join(
        f"{line}: {{optimizer: kfac_option1, overrides: [optimizer.refresh_every={10 + i}]}}"
        for i, line in enumerate(SETTINGS)
    )
    name = synthetic.write_experiment(tmp_path / "study.yaml", f"{{{methods}}}", seeds="[0, 1]")
    monkeypatch.setattr(script, "STUDIES", (name,))
    results = tmp_path / "results"
    plan, rows = Plan(experiment.load(name), str(results)), []
    for line, (losses, cost) in SETTINGS.items():
        for run, loss in zip(plan.confirmation(line), losses, strict=True):
            synthetic.store(run, [loss], every=4)
        if cost is not None:
            measured = {"ratio_to_sgd": cost, "low": cost - 0.02, "high": cost + 0.02}
            own = settings.costly(plan.confirmation(line)[0].run.optimizer) | {"quadratic_fraction": None}  # as of old
            rows.append({"settings": own, **STEADY, **measured})
    (results / "bench").mkdir(parents=True)
    content = {"overrides": [], "machine": {"busy": False}, "rows": rows}
    (results / "bench" / "experiment-study-fp32-threads=1.json").write_text(json.dumps(content))
    return results


def test_the_study_says_what_is_cheaper_and_whether_noise_could_explain_it(
    script: ModuleType, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--results", str(results)]) == 0
    assert "as good: kfacrnn bench experiment" in capsys.readouterr().err
    page = (results / "cost_study.md").read_text()
    assert "| as shipped | 1.050 | 1.030–1.070 | 0.41 0.43 | +0.01 |" in page
    assert "seeds lie 0.02 apart" in page
    assert "rarely (cost -0.030, within the intervals of the shipped; loss +0.01, within that spread)" in page
    assert "never (cost -0.040, within the intervals of the shipped; loss +0.19, beyond that spread)" in page
    assert "nothing spared (" not in page  # dearer
    table = pd.read_csv(results / "cost_study.csv").set_index("line")
    assert list(table["cost"]) == [1.01, 1.02, 1.05, 2.5]
    assert table["finals"]["never"] == "0.6 0.62"
    for suffix in ("png", "svg"):
        assert (results / "figures" / f"cost_study.{suffix}").stat().st_size > 1000


def test_without_any_run_nothing_is_written(script: ModuleType, tmp_path: Path) -> None:
    assert script.main(["--results", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())


def test_costs_by_another_number_of_threads_do_where_there_are_none_by_the_runs(
    script: ModuleType, results: Path
) -> None:
    (path,) = (results / "bench").iterdir()
    path.rename(path.with_name(path.name.replace("threads=1", "threads=2")))
    assert script.main(["--results", str(results)]) == 0
    assert "| as shipped | 1.050 |" in (results / "cost_study.md").read_text()


def test_the_stored_benchmarks_are_found(script: ModuleType) -> None:
    stored = script.read("cost_word", Path(__file__).parents[1] / "results")
    assert len(stored.settings) == 3
    assert not stored.missing
