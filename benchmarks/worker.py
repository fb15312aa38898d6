"""The measured process: it gets ready, waits for a line, does one thing, and tells what that took.

python worker.py PEER ACTION URI SOURCE
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from peers import PEERS, Peer

FEW_BYTES = 100
REPETITIONS = 200


def main(name: str, action: str, uri: str, source: Path) -> None:
    # Only answers go to the real standard output: packages print and log to the other one.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer = PEERS[name]()
    temporary = Path(tempfile.gettempdir())
    if action == "few bytes":
        print("ready", file=answers)
        sys.stdin.readline()
        print(json.dumps(measure_few_bytes(peer, uri)), file=answers)
        return
    warm_up(peer, uri, temporary)
    work = prepare(peer, action, uri, source)
    read_through(source if action != "load" else Path(uri))
    # A save to S3 writes nothing to the disk; everything else is flushed as a part of what is measured. All of the
    # file system is, once and before the clock starts too: nobody waits for what others have written.
    flushed = None if uri.startswith("s3://") and action != "load" else temporary
    flush(temporary)
    gc.collect()
    print("ready", file=answers)
    sys.stdin.readline()

    is_exact = reset_peak()
    memory, cpu, started = status("VmRSS"), cpu_seconds(), time.perf_counter()
    loaded = work()
    if flushed is not None:
        flush(flushed)
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    peak = status("VmHWM") - memory if is_exact else None
    answer = {"seconds": seconds, "cpu": cpu, "memory": peak, "memory_before": memory, "loaded": loaded and str(loaded)}
    print(json.dumps(answer), file=answers)
    # What was loaded is looked at before this process ends, and nothing is taken away then.
    sys.stdin.readline()
    os._exit(0)


def prepare(peer: Peer, action: str, uri: str, source: Path) -> Callable[[], Path | None]:
    """Do what comes before the measured action, and return that."""
    if action == "save":
        return lambda: peer.save(uri, source)
    if action == "load":
        return lambda: peer.load(uri)
    save = peer.saver(uri)
    save(source / "state")
    if action == "save again":
        from data import change  # numpy starts threads that spin for a while

        change(source / "state")
        return lambda: save(source / "state")
    if action == "add a part":
        return lambda: save(source / "part")
    raise ValueError(action)


def warm_up(peer: Peer, uri: str, temporary: Path) -> None:
    """Save and load next to nothing: packages import late, and connect to S3 at the first request."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "file").write_text("warm")
        place = f"{uri}-{uuid.uuid4().hex}" if uri.startswith("s3://") else str(temporary / "warm" / "checkpoint")
        peer.save(place, Path(folder))
        if not (peer.load(place) / "file").is_file():
            message = "the package does not load what it saved"
            raise RuntimeError(message)


def read_through(path: Path) -> None:
    """Bring what will be read into the page cache, for everyone alike."""
    for file in (path, *path.rglob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as reader:
                while reader.read(1 << 20):
                    pass


def measure_few_bytes(peer: Peer, uri: str) -> dict[str, float]:
    """Write and read a few bytes many times; the first repetitions warm up, the median of the others counts."""
    write = peer.writer(uri)
    seconds: dict[str, list[float]] = {"write": [], "read": []}
    for number in range(REPETITIONS + 20):
        content = str(number).encode().ljust(FEW_BYTES)
        started = time.perf_counter()
        write(content)
        written = time.perf_counter()
        answer = peer.read(uri)
        seconds["read"].append(time.perf_counter() - written)
        seconds["write"].append(written - started)
        if answer != content:
            message = f"read {answer!r} in place of {content!r}"
            raise RuntimeError(message)
    return {action: statistics.median(times[20:]) for action, times in seconds.items()}


def flush(path: Path) -> None:
    """Write everything that waits for the disk on a path's file system: a loaded folder may have 10,000 files."""
    syncfs = getattr(ctypes.CDLL(None), "syncfs", None)
    if syncfs is None:
        os.sync()
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if syncfs(descriptor):
            message = "syncfs failed"
            raise OSError(message)
    finally:
        os.close(descriptor)


def reset_peak() -> bool:
    """Let Linux count this process's peak memory from now on; `False` if it does not."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def status(field: str) -> int:
    """Give bytes of memory that Linux states of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def cpu_seconds() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
