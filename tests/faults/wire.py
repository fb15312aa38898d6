"""A wire to a server, on which something happens once enough has come through it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from urllib.parse import urlsplit


class Wire:
    """Forwards connections to a server, byte for byte.

    Parameters
    ----------
    endpoint : str
        URL of the server.
    after : int
        Bytes of answers that are passed on before the event.
    event : callable
        Called once, while the answer that reaches the number waits.
    """

    def __init__(self, endpoint: str, after: int, event: Callable[[], object]) -> None:
        parts = urlsplit(endpoint)
        self._server = (parts.hostname, parts.port)
        self._left, self._event = after, event
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        # What waits in accept() is not woken by close() alone.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    @property
    def happened(self) -> bool:
        return self._left <= 0

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                threading.Thread(target=self._forward, args=(client, server, lambda _: None), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, client, self._count), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, seen: Callable[[int], None]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                seen(len(data))
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _count(self, size: int) -> None:
        with self._lock:
            before, self._left = self._left, self._left - size
            if before > 0 >= self._left:
                self._event()
