"""A stand-in of the Hub on loopback: enough of its interface to push and pull models, with a log of all requests."""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response


USER = "someone"
Files = dict[str, bytes]


@dataclass
class Hub:
    """What it holds: the files of every commit, and the commit of every branch, by repository."""

    url: str = ""
    commits: dict[str, dict[str, Files]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # method and path, in order

    def files(self, repo: str, revision: str = "main") -> Files:
        """Name and content of all files; KeyError with the code of the Hub if there is no such revision."""
        if repo not in self.commits:
            raise KeyError("RepoNotFound")
        commit = self.branches[repo].get(revision, revision)
        if commit not in self.commits[repo]:
            raise KeyError("RevisionNotFound")
        return self.commits[repo][commit]

    def commit(self, repo: str, branch: str, files: Files) -> str:
        oid = hashlib.sha1(f"{repo} {len(self.commits[repo])}".encode()).hexdigest()
        self.commits[repo][oid], self.branches[repo][branch] = files, oid
        return oid

    def info(self, repo: str, revision: str) -> dict[str, Any]:
        names = [{"rfilename": name} for name in self.files(repo, revision)]
        return {"id": repo, "sha": self.branches[repo].get(revision, revision), "siblings": names, "tags": []}


def make_app(hub: Hub) -> FastAPI:
    app, models = FastAPI(), "/api/models/{user}/{name}"

    @app.middleware("http")
    async def log(request: Request, answer: Any) -> Response:
        hub.requests.append(f"{request.method} {request.url.path}")
        try:
            return await answer(request)
        except KeyError as error:
            return Response(status_code=404, headers={"X-Error-Code": error.args[0], "X-Error-Message": error.args[0]})

    @app.get("/api/whoami-v2")
    def whoami() -> dict:
        return {"type": "user", "name": USER, "orgs": []}

    @app.post("/api/validate-yaml")
    def validate() -> dict:
        return {"errors": [], "warnings": []}

    @app.post("/api/repos/create")
    async def create(request: Request) -> JSONResponse:
        asked = await request.json()
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        is_new = repo not in hub.commits
        if is_new:
            hub.commits[repo], hub.branches[repo] = {}, {}
            hub.commit(repo, "main", {".gitattributes": b""})
        return JSONResponse({"url": f"{hub.url}/{repo}", "name": repo}, 200 if is_new else 409)

    @app.post(models + "/branch/{branch:path}")
    def branch(user: str, name: str, branch: str) -> JSONResponse:
        repo = f"{user}/{name}"
        is_new = branch not in hub.branches[repo]
        if is_new:
            hub.commit(repo, branch, dict(hub.files(repo)))
        return JSONResponse({}, 200 if is_new else 409)

    @app.post(models + "/preupload/{revision:path}")
    async def preupload(user: str, name: str, revision: str, request: Request) -> dict:
        hub.files(f"{user}/{name}", revision)
        files = (await request.json())["files"]
        return {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]}

    @app.post(models + "/commit/{revision:path}")
    async def commit(user: str, name: str, revision: str, request: Request) -> dict:
        repo, lines = f"{user}/{name}", (await request.body()).splitlines()
        files = dict(hub.files(repo, revision))
        for line in map(json.loads, lines):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hub.commit(repo, revision, files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{repo}/commit/{oid}", "hookOutput": ""}

    @app.get(models + "/tree/{revision}")
    @app.get(models + "/tree/{revision}/{path:path}")
    def tree(user: str, name: str, revision: str, path: str = "") -> list[dict]:
        files, start = hub.files(f"{user}/{name}", revision), path and f"{path}/"
        if not any(name.startswith(start) for name in files):
            raise KeyError("EntryNotFound")
        return [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
            if name.startswith(start)
        ]

    @app.get(models)
    @app.get(models + "/revision/{revision:path}")
    def info(user: str, name: str, revision: str = "main") -> dict:
        return hub.info(f"{user}/{name}", revision)

    @app.api_route("/{user}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    def resolve(user: str, name: str, revision: str, path: str) -> Response:
        repo = f"{user}/{name}"
        files = hub.files(repo, revision)
        if path not in files:
            raise KeyError("EntryNotFound")
        etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        return Response(files[path], headers={"ETag": etag, "X-Repo-Commit": hub.info(repo, revision)["sha"]})

    return app


@contextmanager
def running_hub() -> Iterator[Hub]:
    """The server in a thread of this process, on a free port."""
    hub = Hub()
    settings = uvicorn.Config(make_app(hub), host="127.0.0.1", port=0, log_level="error", ws="none", lifespan="off")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join()
