"""A W&B server of a few operations, for the real client: it keeps what is uploaded and serves it again, page by page.

It knows the operations that wandb 0.31 asks for, and fails at any other. What it does not prove: that W&B's own servers
answer so, how they page large histories (there: Parquet files), their limits and their speed.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "me"


@dataclass
class Bucket:
    """One run, as the server has it."""

    name: str
    project: str
    given: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    state: str = "running"
    sessions: int = 0


class Patient(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """A client that ends closes its connections as it likes."""


class Server:
    """`status` other than 200 is the answer to everything; `asked` has the names of all operations."""

    def __init__(self) -> None:
        self.runs: dict[tuple[str, str], Bucket] = {}
        self.projects: set[str] = set()
        self.asked: list[str] = []
        self.unknown: list[str] = []
        self.status = 200
        self.page = 50
        self.lock = threading.Lock()
        self.http = Patient(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with server.lock:
                    status, content = server.answer(self.path, body)
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = _answer

        return Handler

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.status != 200:
            return self.status, {"errors": [{"message": f"status {self.status}"}]}
        if path.startswith("/graphql"):
            request = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            operation = name[1] if name else request["query"].strip()[:40]
            self.asked.append(operation)
            answer = getattr(self, f"on_{operation}", None)
            if answer is None:
                self.unknown.append(operation)
                return 400, {"errors": [{"message": f"unknown operation {operation}"}]}
            return 200, {"data": answer(request.get("variables") or {})}
        stream = re.fullmatch(r"/files/[^/]+/([^/]+)/([^/]+)/file_stream", path)
        if stream:
            self._stream(self.runs[stream[1], stream[2]], json.loads(body))
            return 200, {}
        if path.startswith("/upload/"):
            return 200, {}
        self.unknown.append(path)
        return 404, {}

    def _stream(self, run: Bucket, sent: dict[str, Any]) -> None:
        for name, part in (sent.get("files") or {}).items():
            lines = part["content"]
            if name == "wandb-history.jsonl":
                run.history[part["offset"] :] = [json.loads(line) for line in lines]
            elif name == "wandb-summary.json":
                run.summary = json.loads(lines[-1])
        if sent.get("complete"):
            run.state = "finished" if sent.get("exitcode") == 0 else "failed"

    def on_ServerFeaturesQuery(self, _: Any) -> Any:
        return {"serverInfo": {"features": []}}

    def on_Viewer(self, _: Any) -> Any:
        viewer = {"id": "u1", "entity": ENTITY, "username": ENTITY, "email": "me@example.org", "flags": "{}"}
        return {"viewer": viewer | {"teams": {"edges": []}, "apiKeys": {"edges": []}, "name": ENTITY, "admin": False}}

    on_GetViewer = on_Viewer

    def on_GetDefaultEntity(self, _: Any) -> Any:
        return {"viewer": {"id": "u1", "entity": ENTITY}}

    def on_RunResumeStatus(self, asked: Any) -> Any:
        run = self.runs.get((asked["project"], asked["name"]))
        bucket = run and {
            **self._node(run),
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsTail": "[]",
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {"name": asked["project"], "entity": {"name": ENTITY}, "bucket": bucket}}

    def on_UpsertBucket(self, asked: Any) -> Any:
        name, project = asked["name"], asked["project"]
        self.projects.add(project)
        inserted = (project, name) not in self.runs
        run = self.runs.setdefault((project, name), Bucket(name, project))
        run.given |= {key: value for key, value in asked.items() if value is not None}
        if asked.get("config"):
            run.config = json.loads(asked["config"])
        if asked.get("host"):
            run.state, run.sessions = "running", run.sessions + 1
        there = {"id": "p1", "name": project, "entity": {"id": "e1", "name": ENTITY}}
        bucket = {**self._node(run), "project": there, "historyLineCount": len(run.history)}
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def on_CreateRunFiles(self, asked: Any) -> Any:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in asked["files"]]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    def on_MarkRunFilesUploaded(self, _: Any) -> Any:
        return {"markRunFilesUploaded": {"success": True}}

    def on_Runs(self, asked: Any) -> Any:
        if asked["project"] not in self.projects:
            return {"project": None}
        runs = [run for run in self.runs.values() if run.project == asked["project"]]
        begin = int(asked.get("cursor") or 0)
        shown = runs[begin : begin + min(self.page, asked["perPage"])]
        end = begin + len(shown)
        edges = [{"node": {**self._node(run), "projectId": 1}, "cursor": str(end)} for run in shown]
        pages = {"endCursor": str(end), "hasNextPage": end < len(runs)}
        project = {"internalId": 1, "runCount": len(runs), "readOnly": False}
        return {"project": {**project, "runs": {"edges": edges, "pageInfo": pages}}}

    def _run(self, asked: Any) -> Bucket:
        return self.runs[asked["project"], asked.get("run") or asked.get("name") or asked["runName"]]

    def on_RunHistoryKeys(self, asked: Any) -> Any:
        steps = [row["_step"] for row in self._run(asked).history]
        return {"project": {"run": {"historyKeys": {"lastStep": max(steps, default=-1), "keys": {}}}}}

    def on_RunParquetHistory(self, asked: Any) -> Any:
        history = {"parquetUrls": [], "liveData": self._run(asked).history}
        return {"project": {"run": {"parquetHistory": history}}}

    def on_HistoryPage(self, asked: Any) -> Any:
        rows = [row for row in self._run(asked).history if asked["minStep"] <= row["_step"] < asked["maxStep"]]
        return {"project": {"run": {"history": [json.dumps(row) for row in rows[: asked["pageSize"]]]}}}

    def _node(self, run: Bucket) -> dict[str, Any]:
        given = run.given
        fixed = dict.fromkeys(("sweepName", "commit", "description", "notes", "systemMetrics", "heartbeatAt"))
        return fixed | {
            "id": f"id-{run.name}",
            "name": run.name,
            "displayName": given.get("displayName"),
            "tags": given.get("tags") or [],
            "state": run.state,
            "config": json.dumps(run.config),
            "group": given.get("groupName"),
            "jobType": given.get("jobType"),
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00Z",
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.history),
            "user": {"name": ENTITY, "username": ENTITY},
            "historyKeys": {"lastStep": max((row["_step"] for row in run.history), default=-1), "keys": {}},
        }


@contextmanager
def serving() -> Iterator[Server]:
    """A server for as long as the block runs."""
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
