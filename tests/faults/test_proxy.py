"""The proxy itself: what it passes on is what came, and each fault is what it says."""

from __future__ import annotations

import contextlib
import random
import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import s3fs

from tests.conftest import Place
from tests.faults import proxy
from tests.s3_server import S3Server

BODY = random.Random(5).randbytes(1000)
PUT = b"PUT /b/key HTTP/1.1\r\nHost: store\r\nContent-Length: 1000\r\nConnection: close\r\n\r\n"
LARGE_PUT = PUT.replace(b"1000", b"8000000") + bytes(8_000_000)
EXPECTING_PUT = PUT.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
GET = b"GET /b/key HTTP/1.1\r\nHost: store\r\nRange: bytes=0-8388607\r\nConnection: close\r\n\r\n"
HEAD = GET.replace(b"GET", b"HEAD")
EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
PART = (
    b'HTTP/1.1 206 Partial Content\r\nETag: "a-1"\r\nx-amz-meta-n: v\r\n'
    b"Content-Range: bytes 0-999/5000\r\nContent-Length: 1000\r\n\r\n"
)


class Server(socketserver.ThreadingTCPServer):
    """Answers whatever it is sent with `answer`, and keeps what it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.answer = EMPTY
        self.continues = True
        self.seen: list[tuple[bytes, bytes]] = []
        self.ended = threading.Semaphore(0)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


class _Connection(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        head = b"".join(iter(self.rfile.readline, b"\r\n"))
        headers = dict(line.lower().split(b": ", 1) for line in head.splitlines()[1:])
        body = b""
        if b"expect" not in headers or self.server.continues:
            if b"expect" in headers:
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if headers.get(b"transfer-encoding") == b"chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size + 2)[:-2]
            body += self.rfile.read(int(headers.get(b"content-length", 0)))
        self.server.seen.append((head, body))
        self.server.ended.release()
        # A broken upload leaves nobody to answer.
        if len(body) == int(headers.get(b"content-length", len(body))) or not self.server.continues:
            self.wfile.write(self.server.answer)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def faulty(server: Server) -> Iterator[proxy.Proxy]:
    with proxy.serve(server.endpoint) as faulty:
        yield faulty


def connected(faulty: proxy.Proxy) -> socket.socket:
    place = urlsplit(faulty.endpoint)
    connection = socket.create_connection((place.hostname, place.port))
    connection.settimeout(10)
    return connection


def asked(faulty: proxy.Proxy, request: bytes) -> bytes:
    """Send a request that closes the connection, and read to its end."""
    with connected(faulty) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def received(connection: socket.socket) -> tuple[bytes, bool]:
    """Read until nothing comes for a moment; tells whether the connection has ended, too."""
    connection.settimeout(0.5)
    seen = b""
    with contextlib.suppress(TimeoutError):
        while piece := connection.recv(1 << 16):
            seen += piece
        return seen, True
    return seen, False


def parsed(answer: bytes) -> tuple[bytes, dict[bytes, bytes], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    return first, dict(line.split(b": ", 1) for line in lines), body


def all_of(faulty: proxy.Proxy, kind: str) -> None:
    faulty.kinds, faulty.rate = (kind,), 1.0


# ---------------------------------------------------------------------------------------------------------------------
# What is passed on
# ---------------------------------------------------------------------------------------------------------------------


def test_a_request_arrives_as_it_was_sent(faulty: proxy.Proxy, server: Server) -> None:
    lines = [
        b"PUT /b/a%2Fb//c/../d%20e+%C3%BC?x=%2B+%2b&uploads&y=&x=%41 HTTP/1.1",
        b"Host: 10.0.0.1:9000",
        b"x-amz-date: 20260101T000000Z",
        b"Authorization: AWS4-HMAC-SHA256 Credential=a/b, SignedHeaders=host, Signature=0",
        b"X-Amz-Meta-Name: one",
        b"X-Amz-Meta-Name: two",
        b"Content-Encoding: aws-chunked",
        b"Content-Length: 1000",
    ]
    asked(faulty, b"\r\n".join([*lines, b"Connection: close", b"", b""]) + BODY)
    [(head, body)] = server.seen
    first, *rest = head.splitlines()
    assert first == lines[0]
    assert sorted(rest) == sorted([*lines[1:], b"Connection: close"])
    assert body == BODY


def test_a_request_in_chunks_arrives_in_chunks(faulty: proxy.Proxy, server: Server) -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (BODY[:10], BODY[10:], b""))
    asked(faulty, PUT.replace(b"Content-Length: 1000", b"Transfer-Encoding: chunked") + chunks)
    [(head, body)] = server.seen
    assert b"content-length" not in head.lower()
    assert body == BODY


@pytest.mark.parametrize("method", [b"GET", b"PUT", b"POST", b"DELETE"])
def test_no_body_stays_no_body(faulty: proxy.Proxy, server: Server, method: bytes) -> None:
    length = b"" if method == b"GET" else b"Content-Length: 0\r\n"
    asked(faulty, method + b" /b HTTP/1.1\r\nHost: s\r\n" + length + b"Connection: close\r\n\r\n")
    [(head, body)] = server.seen
    assert sorted(head.splitlines()[1:]) == sorted([b"Host: s", b"Connection: close", *length.splitlines()])
    assert not body


def test_an_answer_arrives_as_it_was_given(faulty: proxy.Proxy, server: Server) -> None:
    server.answer = PART + BODY
    first, headers, body = parsed(asked(faulty, GET))
    assert first == b"HTTP/1.1 206 Partial Content"
    assert headers.items() >= parsed(PART)[1].items()
    assert body == BODY


def test_the_head_of_an_answer_keeps_its_length(faulty: proxy.Proxy, server: Server) -> None:
    server.answer = PART
    _, headers, body = parsed(asked(faulty, HEAD))
    assert headers.items() >= parsed(PART)[1].items()
    assert not body


def test_a_client_goes_on_when_the_server_says_so(faulty: proxy.Proxy, server: Server) -> None:
    with connected(faulty) as connection:
        connection.sendall(EXPECTING_PUT)
        assert connection.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
    assert [body for _, body in server.seen] == [BODY]


def test_a_client_does_not_go_on_when_the_server_refuses(faulty: proxy.Proxy, server: Server) -> None:
    server.continues, server.answer = False, b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
    with connected(faulty) as connection:
        connection.sendall(EXPECTING_PUT)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 403 Forbidden")
    assert len(server.seen) == 1


@pytest.mark.long
def test_thousands_of_requests_pass_without_a_fault(s3: Place, s3_server_running: S3Server) -> None:
    with proxy.serve(s3_server_running.endpoint) as faulty:

        def exchange(worker: int) -> None:
            generator = random.Random(worker)
            filesystem = s3fs.S3FileSystem(**{**s3.options, "endpoint_url": faulty.endpoint}, use_listings_cache=False)
            for number in range(100):
                key = f"{s3.root}/proxy/{worker} ü%+&={number % 7}"
                content = generator.randbytes(generator.choice([1, 100, 100_000]))
                filesystem.pipe_file(key, content)
                assert filesystem.cat_file(key) == content
                assert filesystem.cat_file(key, start=0, end=50) == content[:50]
                assert filesystem.info(key)["size"] == len(content)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(exchange, range(4)))
        assert faulty.requests >= 1500
        assert not faulty.faults


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------


def test_a_reset_keeps_the_request_from_the_server(faulty: proxy.Proxy, server: Server) -> None:
    all_of(faulty, "reset")
    with pytest.raises(ConnectionResetError):
        asked(faulty, PUT + BODY)
    assert not server.seen
    assert faulty.faults == {"reset": 1}


def test_a_reset_after_comes_when_the_server_has_done_the_work(faulty: proxy.Proxy, server: Server) -> None:
    all_of(faulty, "reset_after")
    with pytest.raises(ConnectionResetError):
        asked(faulty, PUT + BODY)
    assert [body for _, body in server.seen] == [BODY]
    assert faulty.faults == {"reset_after": 1}


@pytest.mark.parametrize(
    ("kind", "line", "code"),
    [
        ("error_500", b"HTTP/1.1 500 Internal Server Error", b"<Code>InternalError</Code>"),
        ("error_503", b"HTTP/1.1 503 Service Unavailable", b"<Code>SlowDown</Code>"),
    ],
)
@pytest.mark.parametrize("request_", [GET, LARGE_PUT, EXPECTING_PUT], ids=["GET", "PUT", "expecting"])
def test_errors_are_the_proxys_own(
    faulty: proxy.Proxy, server: Server, kind: str, line: bytes, code: bytes, request_: bytes
) -> None:
    all_of(faulty, kind)
    first, headers, body = parsed(asked(faulty, request_))
    assert first == line
    assert headers[b"Content-Type"].startswith(b"application/xml")
    assert code in body
    assert not server.seen


def test_a_timeout_never_answers(faulty: proxy.Proxy, server: Server) -> None:
    all_of(faulty, "timeout")
    with connected(faulty) as connection:
        connection.sendall(GET)
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    assert not server.seen


def test_a_trickle_never_ends(faulty: proxy.Proxy, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "TRICKLE_SECONDS", 0)
    all_of(faulty, "trickle")
    server.answer = PART + BODY
    with connected(faulty) as connection:
        connection.sendall(GET)
        seen, ended = received(connection)
    assert not ended
    _, headers, body = parsed(seen)
    assert headers[b"Content-Length"] == b"1000"
    assert body == BODY[: -proxy.TRICKLE_BYTES]


def test_a_truncated_answer_promises_more_than_it_holds(faulty: proxy.Proxy, server: Server) -> None:
    all_of(faulty, "truncated")
    server.answer = PART + BODY
    _, headers, body = parsed(asked(faulty, GET))
    assert headers[b"Content-Length"] == b"1000"
    assert body == BODY[:500]


def test_a_short_length_is_consistent_but_for_the_range(faulty: proxy.Proxy, server: Server) -> None:
    all_of(faulty, "short_length")
    server.answer = PART + BODY
    _, headers, body = parsed(asked(faulty, GET))
    assert (headers[b"Content-Length"], headers[b"Content-Range"]) == (b"500", b"bytes 0-999/5000")
    assert body == BODY[:500]


@pytest.mark.parametrize("expecting", [False, True])
def test_half_of_a_truncated_upload_reaches_the_server(faulty: proxy.Proxy, server: Server, expecting: bool) -> None:
    all_of(faulty, "truncated_upload")
    with connected(faulty) as connection:
        if expecting:
            connection.sendall(EXPECTING_PUT)
            assert connection.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(BODY)
        else:
            connection.sendall(PUT + BODY)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    # The server sees the end of its connection at about the same time.
    assert server.ended.acquire(timeout=10)
    [(head, body)] = server.seen
    assert b"Content-Length: 1000" in head
    assert body == BODY[:500]


@pytest.mark.parametrize(
    ("kind", "request_", "answer", "instead"),
    [
        ("truncated_upload", GET, PART + BODY, "reset"),
        ("truncated", PUT + BODY, EMPTY, "reset_after"),
        ("short_length", PUT + BODY, EMPTY, "reset_after"),
        ("short_length", HEAD, PART, "reset_after"),
        ("short_length", PUT + BODY, PART + BODY, "truncated"),
        ("trickle", HEAD, PART, "timeout"),
    ],
)
def test_a_fault_that_does_not_fit_is_replaced(
    faulty: proxy.Proxy, server: Server, kind: str, request_: bytes, answer: bytes, instead: str
) -> None:
    all_of(faulty, kind)
    server.answer = answer
    with connected(faulty) as connection:
        connection.sendall(request_)
        connection.settimeout(0.3)
        if instead == "truncated":
            assert parsed(connection.recv(1 << 16))[1][b"Content-Length"] == b"1000"
        else:
            with pytest.raises(TimeoutError if instead == "timeout" else ConnectionResetError):
                connection.recv(1)
    assert faulty.faults == {instead: 1}


def test_chance_is_seeded_and_keeps_to_the_rate() -> None:
    def drawn(seed: int) -> list[str | None]:
        never_started = proxy.Proxy("http://nowhere", 0.2, seed, proxy.KINDS)
        return [never_started.choose("GET", "/") for _ in range(9000)]

    assert drawn(1) == drawn(1) != drawn(2)
    counts = Counter(drawn(1))
    assert counts.keys() == {None, *proxy.KINDS}
    assert all(abs(counts[kind] - 200) < 50 for kind in proxy.KINDS)


def test_a_test_may_choose_the_requests(faulty: proxy.Proxy) -> None:
    faulty.choose = lambda method, target: "error_500" if (method, target) == ("GET", "/b/key") else None
    assert asked(faulty, GET).startswith(b"HTTP/1.1 500")
    assert asked(faulty, GET.replace(b"/key", b"/other")).startswith(b"HTTP/1.1 200")
    assert (faulty.requests, faulty.faults) == (2, {"error_500": 1})
