"""Runs mirrored by the real W&B client, offline and to a local server, read back: equal to what the store has.

One server for the file, since the client's service keeps the address it was started with; nothing leaves this machine.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfacrnn import cli, experiment, figures, track
from kfacrnn.errors import UserError
from kfacrnn.files import write_json
from kfacrnn.frames import load
from kfacrnn.plan import Plan
from kfacrnn.selection import read_config, select
from kfacrnn.sources import offline, online, open_source
from kfacrnn.store import RunFolder, Store
from tests import synthetic
from tests.runs import stored

wandb = pytest.importorskip("wandb")

from tests.wandb_server import Server, serving  # noqa: E402

PROJECT = "wandb:me/kfacrnn"
LONG = [4.0 - 0.02 * step for step in range(90)]  # more than a block of 32 KiB in a .wandb file


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    private = tmp_path_factory.mktemp("private")
    with serving() as running, pytest.MonkeyPatch.context() as patch:
        wandb.teardown()
        environment = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true", "WANDB_API_KEY": "0" * 40}
        folders = {f"WANDB_{kind}_DIR": str(private) for kind in ("CONFIG", "CACHE", "DATA")}
        for name, value in (environment | folders | {"WANDB_BASE_URL": running.url}).items():
            patch.setenv(name, value)
        yield running
        wandb.teardown()


@pytest.fixture(autouse=True)
def fresh(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server.runs.clear()
    server.projects.clear()
    server.asked.clear()
    server.status, server.page = 200, 50
    yield
    assert server.unknown == []


def mirror(folder: RunFolder, place: Path, rows: int | None = None, *, ended: bool = True) -> Path:
    """Writes a stored run to an offline file with the real client, or only its first rows, as of a killed writer."""
    place.mkdir(parents=True, exist_ok=True)
    session = track.Session(read_config(folder), folder, mode="offline", place=place)
    for row in folder.metrics.rows()[:rows]:
        session.log({name: float(value) for name, value in row.items() if value})
    session.finish(folder.status()["state"])
    wandb.teardown()  # the client's service may still be writing
    (file,) = (place / "wandb").glob(f"offline-run-*{folder.run_id}/*.wandb")
    if not ended:  # what a writer says when it ends is in the last records
        file.write_bytes(file.read_bytes()[:-700])
    return file


def resumed(folder: RunFolder, from_update: int, sessions: int = 2) -> None:
    """Makes the store say that the run went on from a checkpoint."""
    meta = folder.meta()
    meta["sessions"] = [{**meta["sessions"][0], "from_update": 0}] * (sessions - 1)
    meta["sessions"].append({**meta["sessions"][0], "from_update": from_update})
    write_json(folder.path / "meta.json", meta)


def notes(name: str, **reading: bool) -> list[str]:
    return list(open_source(name, **reading).notes)


@pytest.fixture
def experiment_file(tmp_path: Path) -> str:
    """Two methods, two seeds each; all runs stored, one of them diverged."""
    methods = "{SGD: {optimizer: sgd}, Adam: {optimizer: adam}}"
    path = synthetic.write_experiment(tmp_path / "tiny.yaml", methods, seeds="[1, 2]", common=["budget.updates=91"])
    plan = Plan(experiment.load(path), str(tmp_path / "store"))
    for method, last in (("SGD", 1.0), ("Adam", 0.1 + 0.2)):
        first, second = plan.confirmation(method)
        synthetic.store(first, [*LONG, last], seconds=[0.1 * step for step in range(1, 92)])
        synthetic.store(second, [3.0, 1 / 3], state="diverged" if method == "SGD" else "done")
    return path


def test_three_sources_give_equal_frames_and_equal_figures(
    tmp_path: Path, experiment_file: str, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    import pandas as pd

    store = tmp_path / "store"
    files = [mirror(folder, tmp_path / "offline" / folder.run_id) for folder in Store(store)]
    assert max(file.stat().st_size for file in files) > 32768  # so a record lies across the border of two blocks
    server.page = 2
    assert cli.main(["sync", str(store), "--entity", "me"]) == 0
    config = ("tracker.group", "optimizer.lr", "task.hidden", "commit", "machine", "budget.updates")
    sources = [str(store), f"offline:{tmp_path / 'offline'}", PROJECT]
    frames = [load(source, config=[*config]) for source in sources]
    assert len(frames[0]) == 3 * 91 + 2
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(frames[0], frame, check_exact=True)
    assert server.asked.count("Runs") == 3  # once for a project that was new, then two pages of two
    drawn = [
        figures.figure(experiment_file, results=str(store), source=source, out=str(tmp_path / "out" / str(place)))
        for place, source in enumerate(["results", *sources[1:]])
    ]
    for name in ("tiny.csv", "tiny.table.csv", "tiny.svg"):
        contents = {(files[0].parent / name).read_bytes() for files in drawn}
        assert len(contents) == 1, name
    provenance = [json.loads((files[0].parent / "tiny.json").read_text()) for files in drawn]
    assert [about.pop("source") for about in provenance] == ["results", *sources[1:]]
    assert provenance[0] == provenance[1] == provenance[2]
    tables = []
    for source in sources:
        capsys.readouterr()
        assert cli.main(["compare", source, "--baseline", "sgd", "--out", "csv"]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] == tables[2]


def test_a_killed_writer_leaves_a_run_that_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = stored(tmp_path / "store", LONG, "optimizer=sgd")
    file = mirror(folder, tmp_path / "offline", ended=False)
    source = f"offline:{tmp_path}"
    (said,) = notes(source)
    assert said == f"{folder.run_id}: the file has no end: its writer was killed, or still writes ({file})"
    (run,) = select([source], ["state=interrupted"]).runs
    updates = run.folder.metrics.columns(["update"])["update"]
    assert 80 < len(updates) <= 90
    assert updates == [float(number) for number in range(1, len(updates) + 1)]


def test_a_damaged_block_is_reported_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = stored(tmp_path / "store", LONG, "optimizer=sgd")
    file = mirror(folder, tmp_path / "offline")
    content = bytearray(file.read_bytes())
    content[40_000:40_020] = b"x" * 20
    file.write_bytes(content)
    source = f"offline:{tmp_path}"
    assert any("corrupt" in note and str(file) in note for note in notes(source))
    (run,) = select([source], ["state=*"]).runs
    assert 10 < len(run.folder.metrics.columns(["update"])["update"]) < 90


def test_a_resumed_run_is_one_run_without_the_rows_that_were_made_again(tmp_path: Path) -> None:
    more = ("optimizer=sgd", "budget.updates=9")
    folder = stored(tmp_path / "store", [9.0, 8.0, 7.0, 6.5, 6.25], *more, state="interrupted")
    mirror(folder, tmp_path / "one", ended=False)
    shutil.rmtree(folder.path)
    stored(tmp_path / "store", [9.0, 8.0, 7.5, 7.0], *more, state="interrupted")
    resumed(folder, from_update=2)
    mirror(folder, tmp_path / "two")
    (run,) = select([f"offline:{tmp_path}"], ["state=*"]).runs
    assert run.folder.metrics.columns(["update", "train/nats"]) == {
        "update": [1, 2, 3, 4],
        "train/nats": [9.0, 8.0, 7.5, 7.0],
    }


def test_of_two_files_of_the_same_run_the_one_that_got_further_counts_and_the_other_is_named(tmp_path: Path) -> None:
    folder = stored(tmp_path / "store", [3.0, 2.0, 1.0], "optimizer=sgd")
    whole = mirror(folder, tmp_path / "a")
    part = mirror(folder, tmp_path / "b", rows=1)
    assert notes(f"offline:{tmp_path}") == [
        f"{folder.run_id}: skipped {part}: {whole} has the same run, as far or further"
    ]
    (run,) = select([f"offline:{tmp_path}"]).runs
    assert run.folder.metrics.columns(["update"])["update"] == [1, 2, 3]


def test_files_that_have_not_changed_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = f"offline:{tmp_path / 'offline'}", offline._session
    asked: list[Path] = []
    monkeypatch.setattr(offline, "_session", lambda file: asked.append(file) or read(file))
    first = mirror(stored(tmp_path / "store", [2.0], "optimizer=sgd"), tmp_path / "offline")
    notes(source)
    second = mirror(stored(tmp_path / "store", [2.0], "optimizer=adam"), tmp_path / "offline")
    notes(source)
    assert asked == [first, second]
    notes(source, refresh=True)
    assert sorted(asked[2:]) == sorted([first, second])
    shutil.rmtree(first.parent)
    assert [run.folder.path.parent.name for run in select([source]).runs] == ["adam"]


def test_files_that_are_no_runs_of_kfacrnn_are_named(tmp_path: Path) -> None:
    run = wandb.init(mode="offline", dir=tmp_path, project="other", config={"lr": 1})
    run.log({"loss": 1.0})
    run.finish()
    (note,) = notes(f"offline:{tmp_path}")
    assert "its configuration has no run_id: not a run of kfacrnn" in note
    with pytest.raises(UserError, match=r"there is no run; .*not a run of kfacrnn"):
        select([f"offline:{tmp_path}"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no \.wandb file below"):
        open_source(f"offline:{tmp_path / 'empty'}")


def test_names_from_outside_do_not_lead_out_of_the_cache(server: Server) -> None:
    from tests.wandb_server import Bucket

    config = {"task": {"name": "../../x"}, "optimizer": {"name": "sgd"}, "run_id": "r", "meta": {"task": {}}}
    server.projects.add("kfacrnn")
    wrapped = {key: {"value": value} for key, value in config.items()}
    server.runs["kfacrnn", "r"] = Bucket("r", "kfacrnn", config=wrapped, state="finished")
    assert notes(PROJECT) == ["r: skipped: '../../x' cannot be a run, a task or an optimizer"]


def test_a_finished_run_is_asked_for_once_and_one_that_goes_on_again(tmp_path: Path, server: Server) -> None:
    folder = stored(tmp_path / "store", [2.0, 1.0], "optimizer=sgd")
    assert cli.main(["sync", str(tmp_path / "store"), "--entity", "me"]) == 0
    (bucket,) = server.runs.values()
    for _ in range(2):
        select([PROJECT])
    assert server.asked.count("RunHistoryKeys") == 1
    bucket.state = "running"
    bucket.history.append(bucket.history[-1] | {"_step": 3, "update": 3})
    bucket.summary |= {"_step": 3, "update": 3}
    (run,) = select([PROJECT], ["state=running"]).runs
    assert run.folder.metrics.columns(["update"])["update"] == [1, 2, 3]
    assert run.run_id == folder.run_id
    server.asked.clear()
    assert len(select([PROJECT], ["state=*"], offline=True).runs) == 1
    assert server.asked == []
    select([PROJECT], ["state=*"], refresh=True)
    assert server.asked.count("RunHistoryKeys") == 1


def test_what_w_and_b_refuses_or_lacks_is_one_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(online, "TIMEOUT", 2)

    def said(*arguments: str) -> str:
        assert cli.main(["compare", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "W&B knows no such project" in said(PROJECT)
    server.projects.add("kfacrnn")
    assert f"{PROJECT}: there is no run" in said(PROJECT)
    assert "the cache has nothing of it" in said(PROJECT, "--offline")
    assert "write wandb:ENTITY/PROJECT" in said("wandb:kfacrnn")
    server.status = 500
    assert "; --offline takes what the cache has" in said(PROJECT)
    server.status = 401
    assert "wandb login, or set WANDB_API_KEY" in said(PROJECT)


def test_an_upload_has_identity_group_job_type_and_tags_and_goes_on_where_it_was(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (
        "optimizer=sgd",
        "tracker.group=figure9",
        "tracker.job_type=tune",
        "tracker.tags=[a]",
        "seed=3",
        "budget.updates=4",
    )
    folder = stored(tmp_path / "store", [3.0, 2.0], *more, state="interrupted")
    command = ["sync", str(tmp_path / "store"), "--project", "p", "--tag", "b"]
    assert cli.main([*command, "--dry-run"]) == 0
    assert server.runs == {}
    assert cli.main(command) == 0
    (bucket,) = server.runs.values()
    assert (bucket.name, bucket.project, bucket.sessions) == (folder.run_id, "p", 1)
    given = [bucket.given[key] for key in ("groupName", "jobType", "tags")]
    assert given == ["figure9", "tune", ["a", "b"]]
    assert bucket.summary["state"] == "interrupted"
    shutil.rmtree(folder.path)
    stored(tmp_path / "store", [3.0, 2.0, 1.0, 0.5], *more)
    assert cli.main(command) == 0
    (bucket,) = server.runs.values()
    assert bucket.sessions == 2
    assert [row["update"] for row in bucket.history] == [1, 2, 3, 4]
    assert [row["train/nats"] for row in bucket.history] == [3.0, 2.0, 1.0, 0.5]
    assert bucket.summary["state"] == "done"
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "is in your entity/p already" in capsys.readouterr().out
    assert bucket.sessions == 2


def test_offline_runs_are_uploaded_as_stored_ones_are(tmp_path: Path, server: Server) -> None:
    mirror(stored(tmp_path / "store", [3.0, 2.0], "optimizer=sgd"), tmp_path / "offline")
    assert cli.main(["sync", f"offline:{tmp_path / 'offline'}"]) == 0
    (bucket,) = server.runs.values()
    assert [row["train/nats"] for row in bucket.history] == [3.0, 2.0]


def test_without_wandb_its_commands_say_how_to_get_it_and_the_others_work(tmp_path: Path) -> None:
    stored(tmp_path / "store", [3.0, 2.0], "optimizer=sgd")
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline" / "run-x.wandb").write_bytes(b"")
    code = (
        "import sys; sys.modules['wandb'] = None; from kfacrnn import cli\n"
        "for line in sys.stdin: print(cli.main(line.split()), file=sys.stderr)"
    )
    commands = [f"compare {PROJECT}", f"compare offline:{tmp_path / 'offline'}", f"sync {tmp_path / 'store'}"]
    commands.append(f"compare {tmp_path / 'store'}")
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(commands), capture_output=True, text=True, timeout=120
    )
    lines = done.stderr.splitlines()
    assert lines[:6:2] == ["kfacrnn: wandb is not installed; pip install 'kfacrnn[wandb]'"] * 3
    assert lines[1:6:2] == ["2"] * 3
    assert lines[-1] == "0"


def test_an_operation_that_the_server_does_not_know_fails(server: Server) -> None:
    status, answer = server.answer("/graphql", json.dumps({"query": "query Surprise { x }"}).encode())
    assert (status, server.unknown) == (400, ["Surprise"])
    assert "unknown operation" in answer["errors"][0]["message"]
    server.unknown.clear()
