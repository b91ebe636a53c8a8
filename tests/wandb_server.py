"""A stand-in for the W&B server on this machine: it keeps what wandb-core sends, and answers as little as that needs."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Stored:
    """One run as the server knows it.

    Args:
        id: of the run.
        upserts: the variables of each mutation that made or changed it.
        lines: by file of the stream, such as wandb-history.jsonl.
        summary: the last one.
        files: uploaded, by name.
        ends: exit codes.
        preempting: how often it was said to be preempted.
    """

    id: str
    upserts: list[dict[str, Any]] = field(default_factory=list)
    lines: dict[str, list[str]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    preempting: int = 0

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows, in the order of their arrival."""
        return [json.loads(line) for line in self.lines.get("wandb-history.jsonl", [])]

    def last(self, key: str) -> Any:
        """The last value of an upserted field that was not null."""
        return next((u[key] for u in reversed(self.upserts) if u.get(key) not in (None, "")), None)

    @property
    def config(self) -> dict[str, Any]:
        """The config that was sent last, without W&B's own key."""
        sent = json.loads(self.last("config") or "{}")
        return {key: entry["value"] for key, entry in sent.items() if key != "_wandb"}

    def points(self) -> list[tuple[int, str]]:
        """Each (step, key) that has arrived, in order."""
        rows = self.history
        assert all("trainer/global_step" in row for row in rows)
        keys = [sorted(key for key in row if not key.startswith("_") and key != "trainer/global_step") for row in rows]
        return [(row["trainer/global_step"], key) for row, names in zip(rows, keys, strict=True) for key in names]


@dataclass
class Server:
    """What has arrived.

    Args:
        url: to be told to clients as WANDB_BASE_URL.
        runs: by id.
        requests: (method and path, or the name of the GraphQL operation), in order.
        bodies: of all requests, to search.
        views: workspaces and reports, by id: what was sent of each last.
        gone: whether clients get no answer, as from a server that nobody can reach.
    """

    url: str = ""
    runs: dict[str, Stored] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    views: dict[str, dict[str, Any]] = field(default_factory=dict)
    gone: bool = False
    lock: Any = field(default_factory=threading.RLock)

    @property
    def asked(self) -> list[str]:
        """The requests, without what wandb-core tells of itself."""
        return [request for request in self.requests if "/otel/" not in request]

    def environment(self) -> dict[str, str]:
        """What a client needs to find the server and to be logged in."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online", "WANDB_SILENT": "true"}

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data that a GraphQL operation is answered with."""
        project = {
            "id": "p",
            "name": variables.get("project") or "denoiselab",
            "entity": {"id": "e", "name": "somebody"},
        }
        viewer = {
            "id": "u",
            "entity": "somebody",
            "username": "somebody",
            "email": "a@b",
            "flags": "{}",
            "admin": False,
        }
        viewer |= {"teams": {"edges": []}}
        if operation == "UpsertBucket":
            run = self.runs.setdefault(variables["name"], Stored(variables["name"]))
            first = not run.upserts
            run.upserts.append(variables)
            bucket = {"id": f"id-{run.id}", "name": run.id, "displayName": run.last("displayName") or run.id}
            bucket |= {"description": None, "config": None, "sweepName": None, "project": project}
            bucket |= {"historyLineCount": len(run.history), "notes": None}
            return {"upsertBucket": {"bucket": bucket, "inserted": first}}
        if operation == "RunResumeStatus":
            run = self.runs.get(variables["name"])
            return {"model": project | {"bucket": None if run is None else self._bucket(run)}}
        if operation == "Run":
            run = self.runs.get(variables["name"])
            return {"project": None if run is None else project | {"run": self._bucket(run)}}
        if operation == "CreateRunFiles":
            files = [{"name": n, "uploadUrl": f"{self.url}/storage/{variables['run']}/{n}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if operation in ("Viewer", "ViewerQuery", "GetViewer"):
            return {"viewer": viewer}
        if operation == "GetProjects":
            fields = {"entityName": "somebody", "createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}
            pages = {"endCursor": None, "hasNextPage": False}
            return {"models": {"pageInfo": pages, "edges": [{"node": project | fields}]}}
        if operation in ("UpsertView2", "upsertView"):
            known = variables.get("id") or f"view{len(self.views)}"
            self.views[known] = variables
            named = {"name": "denoiselab", "entityName": "somebody"}
            view = {"id": known, "name": variables["name"], "displayName": variables["displayName"], "spec": "{}"}
            return {"upsertView": {"view": view | {"description": "", "project": named}, "inserted": True}}
        return {"viewer": viewer, "serverInfo": {"features": []}, "model": project}

    def _bucket(self, run: Stored) -> dict[str, Any]:
        counts = {f"{name}LineCount": len(run.lines.get(f"wandb-{name}.jsonl", [])) for name in ("history", "events")}
        return counts | {
            "id": f"id-{run.id}",
            "name": run.id,
            "displayName": run.last("displayName"),
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": 0,
            "historyTail": json.dumps(run.lines.get("wandb-history.jsonl", [])[-1:]),
            "eventsTail": json.dumps(run.lines.get("wandb-events.jsonl", [])[-1:]),
            "config": run.last("config") or "{}",
            "tags": run.last("tags") or [],
            "notes": run.last("notes"),
            "wandbConfig": json.dumps({"t": {}}),
            "state": "running",
            "group": run.last("groupName"),
            "jobType": run.last("jobType"),
            "createdAt": "2026-01-01T00:00:00",
            "heartbeatAt": "2026-01-01T00:00:00",
            "user": {"name": "somebody", "username": "somebody"},
            "systemMetrics": "{}",
            "historyKeys": {},
        }

    def stream(self, id: str, body: dict[str, Any]) -> None:  # noqa: A002
        """Take what the file stream of a run carries; lines at an offset replace what stands there, as at W&B."""
        run = self.runs[id]
        for name, part in body.get("files", {}).items():
            if name == "wandb-summary.json":
                run.summary = json.loads(part["content"][-1])
                continue
            lines = run.lines.setdefault(name, [])
            lines[part["offset"] : part["offset"] + len(part["content"])] = part["content"]
        run.preempting += bool(body.get("preempting"))
        if body.get("complete"):
            run.ends.append(body["exitcode"])


@contextmanager
def wandb_server() -> Iterator[Server]:
    """A server on a free port of this machine."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def take(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if server.gone:
                self.close_connection = True
                return
            with server.lock:
                reply = self.reply(body)
            content = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = take  # noqa: N815

        def reply(self, body: bytes) -> dict[str, Any]:
            server.bodies.append(body)
            stored = re.fullmatch(r"/storage/([^/]+)/(.+)", self.path)
            streamed = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
            if stored:
                server.requests.append(f"{self.command} {self.path}")
                server.runs[stored[1]].files[stored[2]] = body
                return {}
            if streamed:
                server.requests.append(f"{self.command} {self.path}")
                server.stream(streamed[1], json.loads(body))
                return {"limits": {}, "exitcode": None}
            if self.path == "/graphql":
                asked = json.loads(body)
                name = (
                    asked.get("operationName") or (re.findall(r"(?:query|mutation)\s+(\w+)", asked["query"]) or [""])[0]
                )
                server.requests.append(name)
                return {"data": server.answer(name, asked.get("variables") or {})}
            server.requests.append(f"{self.command} {self.path}")
            return {}

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that has gone says no goodbye."""

    http = Quiet(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
