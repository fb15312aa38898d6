"""A reverse proxy that stands between a client and a real S3 server, and does to some requests what networks do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import stat
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import NoReturn

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

QUICK = (
    "reset",
    "reset_after",
    "error_500",
    "error_503",
    "truncated",
    "short_length",
    "truncated_upload",
)
"""Faults that the client is told of at once, one way or another."""

SLOW = ("timeout", "trickle")
"""Faults that only the client's own patience ends."""

KINDS = QUICK + SLOW

TRICKLE_BYTES = 4
TRICKLE_SECONDS = 0.1

# They belong to one connection; each of the two has its own.
_HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}

_ERRORS = {
    "error_500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "error_503": (503, "SlowDown", "Please reduce your request rate."),
}


class Proxy:
    """A running proxy.

    Parameters
    ----------
    upstream
        URL of the server.
    rate
        Share of the requests that get a fault; may be set at any time.
    seed
        Of the generator that decides. It is asked in the order in which requests arrive, which concurrent ones vary.
    kinds
        The faults to choose from; may be set at any time.

    Attributes
    ----------
    endpoint : str
        URL to give to clients.
    requests : int
        How many have arrived.
    history : list of (str, str, str)
        Method, target and kind of each fault, in order.
    choose : callable
        Takes a request's method and target, gives the kind of fault for it, or `None`. May be set, where chance is not
        wanted.

    Notes
    -----
    A fault that does not fit a request becomes its nearest relative: without a body to cut, `truncated_upload` is
    `reset`, `truncated` and `short_length` are `reset_after`, `trickle` is a `timeout` after the server did the work;
    `short_length` of anything but a GET is `truncated`.
    """

    def __init__(self, upstream: str, rate: float, seed: int, kinds: Sequence[str]) -> None:
        self.endpoint = ""
        self.rate = rate
        self.kinds = kinds
        self.requests = 0
        self.history: list[tuple[str, str, str]] = []
        self.choose: Callable[[str, str], str | None] = self._by_chance
        self._upstream = upstream.rstrip("/")
        self._random = random.Random(seed)

    @property
    def faults(self) -> Counter[str]:
        """How many requests got which fault."""
        return Counter(kind for _, _, kind in self.history)

    def _by_chance(self, method: str, target: str) -> str | None:
        # Both are drawn every time, so that a rate that is changed leaves the later draws as they are.
        chance, place = self._random.random(), self._random.random()
        return self.kinds[int(place * len(self.kinds))] if chance < self.rate else None

    async def run(self, started: Callable[[], None], stopped: asyncio.Event) -> None:
        """Answer requests until told to stop."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        # A connection for each request: it can be broken without breaking another one.
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
        ) as self._session:
            server = web.Server(
                self._answer, handler_cancellation=True, auto_decompress=False, access_log=None, lingering_time=0
            )
            runner = web.ServerRunner(server, shutdown_timeout=0.1)
            await runner.setup()
            try:
                await web.TCPSite(runner, "127.0.0.1", 0).start()
                self.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
                started()
                await stopped.wait()
            finally:
                await runner.cleanup()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests += 1
        kind = self.choose(request.method, request.raw_path)
        if kind == "truncated_upload" and not request.content_length:
            kind = "reset"
        if kind is None:
            return await self._pass_on(request)
        if kind in ("truncated", "short_length", "trickle"):
            return await self._spoil_answer(request, kind)
        self.history.append((request.method, request.raw_path, kind))
        if kind in _ERRORS:
            return await _error(request, kind)
        if kind == "truncated_upload":
            await self._spoil_upload(request)
        if kind == "reset_after":
            async with self._asked(request) as answer:
                await answer.read()
        if kind == "timeout":
            await _hang()
        return await _reset(request)

    async def _pass_on(self, request: web.BaseRequest) -> web.StreamResponse:
        async with self._asked(request) as answer:
            response = web.StreamResponse(
                status=answer.status, reason=answer.reason, headers=_passed(answer.raw_headers)
            )
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    async def _spoil_answer(self, request: web.BaseRequest, kind: str) -> web.StreamResponse:
        async with self._asked(request) as answer:
            content = await answer.read()
        if kind == "short_length" and request.method != "GET":
            kind = "truncated"
        if not content:
            kind = "timeout" if kind == "trickle" else "reset_after"
        self.history.append((request.method, request.raw_path, kind))
        if kind == "timeout":
            await _hang()
        if kind == "reset_after":
            await _reset(request)
        half = content[: len(content) // 2]
        response = _begun(answer)
        response.content_length = len(half) if kind == "short_length" else len(content)
        await response.prepare(request)
        if kind == "trickle":
            # All but the last bytes, so that not even a short one ever ends.
            for start in range(0, len(content) - TRICKLE_BYTES, TRICKLE_BYTES):
                await response.write(content[start : start + TRICKLE_BYTES])
                await asyncio.sleep(TRICKLE_SECONDS)
            await _hang()
        await response.write(half)
        if kind == "truncated":
            assert request.transport is not None
            request.transport.close()
            await _hang()
        await response.write_eof()
        return response

    async def _spoil_upload(self, request: web.BaseRequest) -> None:
        assert request.content_length
        # The server is told of the whole, gets a half and then the end of the connection.
        with contextlib.suppress(aiohttp.ClientError, _CutError):
            async with self._asked(request, cut=request.content_length // 2):
                pass

    @contextlib.asynccontextmanager
    async def _asked(self, request: web.BaseRequest, cut: int | None = None) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request on as it came, its body while it comes."""
        async with self._session.request(
            request.method,
            # The signature is over the path and the query as they were written.
            URL(self._upstream + request.raw_path, encoded=True),
            headers=_passed(request.raw_headers),
            data=_body(request, cut) if request.body_exists else None,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            allow_redirects=False,
        ) as answer:
            yield answer


class _CutError(Exception):
    """Ends a body before its end."""


async def _body(request: web.BaseRequest, cut: int | None) -> AsyncIterator[bytes]:
    # Asked for its first bytes when the server wants them: then, and only then, the client is told to go on.
    if request.headers.get("Expect", "").lower() == "100-continue":
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    sent = 0
    async for chunk in request.content.iter_any():
        if cut is not None and sent + len(chunk) >= cut:
            yield chunk[: cut - sent]
            raise _CutError
        sent += len(chunk)
        yield chunk


def _passed(headers: Iterable[tuple[bytes, bytes]]) -> CIMultiDict[str]:
    named = ((name.decode("latin-1"), value.decode("utf-8", "surrogateescape")) for name, value in headers)
    return CIMultiDict((name, value) for name, value in named if name.lower() not in _HOP_BY_HOP)


def _begun(answer: aiohttp.ClientResponse) -> web.StreamResponse:
    return web.StreamResponse(status=answer.status, reason=answer.reason, headers=_passed(answer.raw_headers))


async def _error(request: web.BaseRequest, kind: str) -> web.Response:
    # Whoever did not ask before sending is heard out: an answer in the middle of a body may get lost.
    if "Expect" not in request.headers:
        async for _ in request.content.iter_any():
            pass
    status, code, message = _ERRORS[kind]
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    response = web.Response(status=status, text=text, content_type="application/xml")
    response.force_close()
    return response


async def _reset(request: web.BaseRequest) -> NoReturn:
    """Break the client's connection with a reset, not an orderly end."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    await _hang()


async def _hang() -> NoReturn:
    """Wait until the request is cancelled, because its connection is gone or the proxy ends."""
    while True:
        await asyncio.sleep(3600)


@contextlib.contextmanager
def serve(endpoint: str, *, rate: float = 0.0, seed: int = 0, kinds: Sequence[str] = KINDS) -> Iterator[Proxy]:
    """Run a proxy to a server, in a thread, on a free port of 127.0.0.1; see `Proxy`."""
    proxy = Proxy(endpoint, rate, seed, kinds)
    started = threading.Event()
    stopped = asyncio.Event()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(
        target=lambda: loop.run_until_complete(proxy.run(started.set, stopped)), name="proxy", daemon=True
    )
    thread.start()
    ports = None
    try:
        if not started.wait(10):
            message = "the proxy did not start"
            raise RuntimeError(message)
        ports = URL(proxy.endpoint).port, URL(endpoint).port
        _running.append(ports)
        yield proxy
    finally:
        if ports is not None:
            _running.remove(ports)
        loop.call_soon_threadsafe(stopped.set)
        thread.join()
        loop.close()


# The port of each that runs in this process, and that of its server.
_running: list[tuple[int | None, int | None]] = []


def _leave_to_parent() -> None:
    """Close a forked process's copies of the proxies' connections: none ends while somebody has it open."""
    for name in os.listdir("/proc/self/fd") if _running else ():
        number = int(name)
        # The one that lists them is closed by now.
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            connection = socket.socket(fileno=number)
            try:
                is_proxys = connection.family == socket.AF_INET and any(
                    connection.getsockname()[1] == ours or connection.getpeername()[1] == servers
                    for ours, servers in _running
                )
            finally:
                connection.detach()
            if is_proxys:
                os.close(number)


os.register_at_fork(after_in_child=_leave_to_parent)
