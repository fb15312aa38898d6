"""The S3 server that the tests run against: Ceph's RADOS Gateway where it is installed, moto's server elsewhere."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_PROGRAMS = ("monmaptool", "ceph-mon", "ceph", "ceph-osd", "radosgw", "radosgw-admin")
_START_SECONDS = 60.0
_STOP_SECONDS = 5.0

# The empty settings keep Ceph out of /var, where an ordinary user may not write, and an admin socket out of a folder
# whose path may exceed the 108 characters of a socket's address.
_CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{monitor_port}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr2 = false
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd pool default pg num = 8
osd pool default pg autoscale mode = off
# By default the monitor takes a second for every pool that the gateway makes.
paxos propose interval = 0.05
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = {capacity}
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
run dir = {folder}/run
crash dir = {folder}/crash
keyring = {folder}/keyring
admin socket =
log file =
log to stderr = true
mon cluster log to file = false

[client.rgw]
# Without tcp_nodelay every small read waits 40 ms.
rgw frontends = beast endpoint=127.0.0.1:{gateway_port} tcp_nodelay=1
# What is deleted or overwritten stays for two hours otherwise, and a full store hangs every write.
rgw gc obj min wait = 1
rgw gc processor period = 1
# A gateway that is stopped in its first 5 seconds waits for this thread's sleep to end.
rgw enable lc threads = false
"""


@dataclass(frozen=True)
class S3Server:
    """A running S3 server.

    Parameters
    ----------
    kind
        Its name and version.
    endpoint
        Its URL.
    key, secret
        The credentials of a user who may create buckets.
    configuration
        Ceph's configuration file; blank for another server.
    """

    kind: str
    endpoint: str
    key: str
    secret: str
    configuration: str = ""

    @property
    def has_quotas(self) -> bool:
        """Whether a user may be limited."""
        return bool(self.configuration)

    def limited_user(self, size: int) -> tuple[str, str]:
        """Make a user who may store so many bytes, and give the credentials."""
        credentials = _credentials()
        name = f"limited-{credentials[0]}"
        _create_user(self.configuration, name, *credentials)
        quota = (f"--uid={name}", "--quota-scope=user")
        _administer(self.configuration, "quota", "set", *quota, f"--max-size={size}")
        _administer(self.configuration, "quota", "enable", *quota)
        return credentials


def _administer(configuration: str, *arguments: str) -> None:
    command = ("radosgw-admin", f"--conf={configuration}", "--no-mon-config", "--name=client.rgw", *arguments)
    subprocess.run(command, check=True, capture_output=True, timeout=_START_SECONDS)


def _create_user(configuration: str, name: str, key: str, secret: str) -> None:
    keys = (f"--access-key={key}", f"--secret={secret}")
    _administer(configuration, "user", "create", f"--uid={name}", "--display-name=tests", *keys)


def available() -> str:
    """Say which server `serve` would start, without starting it."""
    return "Ceph RGW" if _ceph_is_installed() else "moto's server (Ceph's packages are not installed)"


def checks_credentials() -> bool:
    """Say whether the server that `serve` would start refuses strangers."""
    return _ceph_is_installed()


@contextlib.contextmanager
def serve(folder: Path, *, capacity: str = "4G") -> Iterator[S3Server]:
    """Run an S3 server on a free port of 127.0.0.1.

    Parameters
    ----------
    folder
        Where the server keeps its configuration, data and logs; made if it is missing.
    capacity
        What Ceph's gateway may hold, in memory as it is filled; a full one hangs.

    Yields
    ------
    S3Server
        Where it listens and whom it lets in.

    Raises
    ------
    RuntimeError
        Ceph is installed but does not start. The message ends with the log of the program that failed.

    Notes
    -----
    Linux ties Ceph's daemons to the thread that started them: call this from one that outlives the server.
    """
    with _ceph(folder.resolve(), capacity) if _ceph_is_installed() else _moto() as server:
        yield server


def _ceph_is_installed() -> bool:
    return all(map(shutil.which, _PROGRAMS))


@contextlib.contextmanager
def _moto() -> Iterator[S3Server]:
    from moto.server import ThreadedMotoServer  # a machine with Ceph needs no moto

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(f"moto {metadata.version('moto')}", f"http://{host}:{port}", *_credentials())
    finally:
        server.stop()


@contextlib.contextmanager
def _ceph(folder: Path, capacity: str) -> Iterator[S3Server]:
    for name in ("mon", "osd", "rgw", "run", "log"):
        (folder / name).mkdir(parents=True)
    fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
    configuration, monitor_map = folder / "ceph.conf", str(folder / "monmap")
    key, secret = _credentials()
    with (
        _reserved_port() as monitor_port,
        _reserved_port() as gateway_port,
        contextlib.closing(_Processes(folder / "log", configuration)) as ceph,
    ):
        configuration.write_text(
            _CONFIGURATION.format(
                folder=folder, fsid=fsid, monitor_port=monitor_port, gateway_port=gateway_port, capacity=capacity
            )
        )
        ceph.run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{monitor_port}]", monitor_map)
        ceph.run("ceph-mon", "--id=a", "--mkfs", "--monmap", monitor_map)
        ceph.start("ceph-mon", "--id=a", "-f")
        ceph.wait_for_port("ceph-mon", monitor_port)
        # It listens a moment before it can answer.
        ceph.run("ceph", "osd", "new", osd, attempts=20)
        ceph.run("ceph-osd", "--id=0", "--mkfs", "--osd-uuid", osd)
        ceph.start("ceph-osd", "--id=0", "-f")
        ceph.start("radosgw", "--name=client.rgw", "-f")
        ceph.wait_for_port("radosgw", gateway_port)

        _create_user(str(configuration), "tests", key, secret)
        version = subprocess.check_output(["radosgw", "--version"], text=True).split()[2]
        yield S3Server(f"Ceph RGW {version}", f"http://127.0.0.1:{gateway_port}", key, secret, str(configuration))


class _Processes:
    """Ceph's programs, which live no longer than this process and log to one file each."""

    def __init__(self, logs: Path, configuration: Path) -> None:
        self._logs = logs
        self._configuration = configuration
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, program: str, *arguments: str) -> None:
        self._daemons[program] = self._launch(program, *arguments)

    def run(self, program: str, *arguments: str, attempts: int = 1) -> None:
        for remaining in reversed(range(attempts)):
            process = self._launch(program, *arguments)
            try:
                self._wait(program, lambda process=process: process.poll() is not None)
            finally:
                process.kill()
                process.wait()
            if not process.returncode:
                return
            if remaining:
                time.sleep(0.5)
        raise RuntimeError(self._failure(program, f"exited with {process.returncode}"))

    def wait_for_port(self, program: str, port: int) -> None:
        def answers() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        self._wait(program, answers)

    def close(self) -> None:
        # The latest goes first: each hangs on its way out without those that it was started upon.
        for process in reversed(self._daemons.values()):
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _launch(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        # setpriv becomes the program, so the process stays ours to end, and the kernel kills it if we are killed first.
        leashed = ("setpriv", "--pdeathsig=KILL", program)
        # An OSD that asks the monitor for its settings forgets the fsid, and is sometimes refused for that.
        settings = (f"--conf={self._configuration}", "--no-mon-config")
        with self._log(program).open("ab") as log:
            # In a session of its own a daemon outlasts the Ctrl-C that ends the tests, until they have cleaned up.
            return subprocess.Popen(
                (*leashed, *settings, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait(self, program: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not done():
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise RuntimeError(self._failure(name, f"exited with {daemon.returncode}"))
            if time.monotonic() > deadline:
                raise RuntimeError(self._failure(program, f"did not answer within {_START_SECONDS:.0f} s"))
            time.sleep(0.02)

    def _failure(self, program: str, what: str) -> str:
        lines = filter(None, self._log(program).read_text(errors="replace").splitlines())
        return "\n".join([f"{program} {what}. Its log ends with:", *list(lines)[-30:]])

    def _log(self, program: str) -> Path:
        return self._logs / f"{program}.log"


def _credentials() -> tuple[str, str]:
    return secrets.token_hex(10), secrets.token_hex(20)


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    with socket.socket() as reservation:
        # Held for as long as the server runs: bound without listening, it keeps the port from everyone who asks for any
        # free one, and Ceph, which reuses addresses too, may listen there. Another run that got it would pass for ours.
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("127.0.0.1", 0))
        yield reservation.getsockname()[1]
