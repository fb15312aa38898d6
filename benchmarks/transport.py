"""What reaches S3 at what cost: the Rust client obstore, botocore in threads, s3fs, this package and flyte.

    python benchmarks/transport.py

Needs the extra `test`. All take turns in one process, on the S3 server of the tests. The large object is
incompressible, and moved in parts of 8 MiB, eight at a time; flyte moves it from and to a file. What http.client sends
is signed by botocore, and nothing else: no client in Python is faster. An import is that of a process of its own, above
one that imports nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import click

HERE = Path(__file__).parent
PART = 8 << 20
THREADS = 8
FEW = bytes(100)

Job = Callable[[], Any]


class Client(NamedTuple):
    """How one of them puts and gets a few bytes, and many; what it imports."""

    put_few: Job
    get_few: Job
    put: Job | None
    get: Job | None
    statement: str


@click.command(help=__doc__)
@click.option("--rounds", default=7, show_default=True, help="Transfers of the large object by each.")
@click.option("--count", default=300, show_default=True, help="Transfers of a few bytes by each.")
@click.option("--size", default=215, show_default=True, help="MB of the large object.")
def main(rounds: int, count: int, size: int) -> None:
    sys.path.insert(0, str(HERE.parent))
    import s3fs

    from tests import s3_server

    with tempfile.TemporaryDirectory() as folder, s3_server.serve(Path(folder) / "server") as server:
        for name, value in (
            ("ENDPOINT", server.endpoint),
            ("ACCESS_KEY_ID", server.key),
            ("SECRET_ACCESS_KEY", server.secret),
        ):
            os.environ[f"FLYTE_AWS_{name}"] = value
        options = {"endpoint_url": server.endpoint, "key": server.key, "secret": server.secret}
        filesystem = s3fs.S3FileSystem(**options, use_listings_cache=False)
        filesystem.call_s3("create_bucket", Bucket="bucket")
        content = os.urandom(size * 1_000_000)
        (Path(folder) / "content").write_bytes(content)
        clients = {
            "obstore": of_obstore(options, content),
            "http.client": of_http(options),
            "botocore in threads": of_botocore(options, content),
            "s3fs": of_s3fs(filesystem, content),
            "flytekit_ckpt, an object": of_objects(options, content),
            "flytekit_ckpt, a checkpoint": of_checkpoints(options),
            "flyte, a checkpoint": of_flyte(Path(folder)),
        }
        few = taken({f"{name} {way}": job for name, client in clients.items() for way, job in ways(client)[:2]}, count)
        large = taken(
            {f"{name} {way}": job for name, client in clients.items() for way, job in ways(client)[2:] if job}, rounds
        )
    heads = ("", "put 100 bytes", "get 100 bytes", *(f"{way} {size} MB (CPU, server's)" for way in ("put", "get")))
    print(f"| {' | '.join((*heads, 'import'))} |\n{'|---' * 6}|")
    nothing = imported("pass", rounds)
    for name, client in clients.items():
        cells = [f"{few[f'{name} {way}'][0] * 1000:.2f} ms" for way, _ in ways(client)[:2]]
        for way, job in ways(client)[2:]:
            seconds, cpu, servers = large.get(f"{name} {way}", (0, 0, 0))
            cells.append(f"{seconds:.2f} s ({cpu:.2f} s, {servers:.2f} s)" if job else "-")
        cells.append(f"{(imported(client.statement, rounds) - nothing) * 1000:.0f} ms")
        print(f"| {name} | {' | '.join(cells)} |")


def ways(client: Client) -> list[tuple[str, Job | None]]:
    return list(zip(("put few", "get few", "put", "get"), client[:4], strict=True))


def taken(jobs: dict[str, Any], count: int) -> dict[str, tuple[float, ...]]:
    """Give the medians of seconds, of CPU seconds and of the server's, of jobs that take turns."""
    measured: dict[str, list[tuple[float, ...]]] = {name: [] for name in jobs}
    for number in range(count + 1):
        for name, job in jobs.items():
            servers, before = servers_cpu(), (time.perf_counter(), time.process_time())
            job()
            # The first one connects.
            if number:
                after = (time.perf_counter(), time.process_time(), servers_cpu())
                measured[name].append(tuple(map(operator.sub, after, (*before, servers))))
    return {name: tuple(map(statistics.median, zip(*found, strict=True))) for name, found in measured.items()}


def servers_cpu() -> float:
    """Give the CPU seconds of the processes that this one has started."""
    ticks = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        # Others may end meanwhile.
        with contextlib.suppress(OSError):
            _, parent, *fields = status.read_text().rpartition(")")[2].split()
            if int(parent) == os.getpid():
                ticks += int(fields[9]) + int(fields[10])
    return ticks / os.sysconf("SC_CLK_TCK")


def imported(statement: str, count: int) -> float:
    """Give the seconds of a process that does nothing else."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def of_obstore(options: dict[str, str], content: bytes) -> Client:
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        "bucket",
        endpoint=options["endpoint_url"],
        access_key_id=options["key"],
        secret_access_key=options["secret"],
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    pool = ThreadPoolExecutor(THREADS)

    def get() -> None:
        starts = range(0, len(content), PART)
        list(pool.map(lambda start: obstore.get(store, "o", options={"range": (start, start + PART)}).bytes(), starts))

    return Client(
        lambda: obstore.put(store, "o-few", FEW),
        lambda: obstore.get(store, "o-few", options={"range": (0, PART)}).bytes(),
        lambda: obstore.put(store, "o", content, chunk_size=PART, max_concurrency=THREADS),
        get,
        "import obstore",
    )


def of_http(options: dict[str, str]) -> Client:
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    url = f"{options['endpoint_url']}/bucket/h-few"
    signer = S3SigV4Auth(Credentials(options["key"], options["secret"]), "s3", "us-east-1")
    connection = http.client.HTTPConnection(options["endpoint_url"].rpartition("/")[2])

    def send(method: str, body: bytes | None = None) -> bytes:
        request = AWSRequest(method, url, data=body)
        signer.add_auth(request)
        connection.request(method, url, body, dict(request.prepare().headers))
        answer = connection.getresponse()
        assert answer.status < 300
        return answer.read()

    return Client(lambda: send("PUT", FEW), lambda: send("GET"), None, None, "import botocore.auth, http.client")


def of_botocore(options: dict[str, str], content: bytes) -> Client:
    import botocore.session

    client = botocore.session.Session().create_client(
        "s3",
        endpoint_url=options["endpoint_url"],
        aws_access_key_id=options["key"],
        aws_secret_access_key=options["secret"],
        region_name="us-east-1",
    )
    pool, few, many = (
        ThreadPoolExecutor(THREADS),
        {"Bucket": "bucket", "Key": "b-few"},
        {"Bucket": "bucket", "Key": "b"},
    )

    def get_few() -> bytes:
        return bytes(client.get_object(Range=f"bytes=0-{PART - 1}", **few)["Body"].read())

    def read(start: int) -> None:
        body = client.get_object(Range=f"bytes={start}-{start + PART - 1}", **many)["Body"]
        while body.read(1 << 18):
            pass

    def put() -> None:
        upload = {"UploadId": client.create_multipart_upload(**many)["UploadId"], **many}

        def send(number: int) -> dict[str, Any]:
            body = content[(number - 1) * PART : number * PART]
            return {"PartNumber": number, "ETag": client.upload_part(PartNumber=number, Body=body, **upload)["ETag"]}

        sent = list(pool.map(send, range(1, 1 + -(-len(content) // PART))))
        client.complete_multipart_upload(MultipartUpload={"Parts": sent}, **upload)

    return Client(
        lambda: client.put_object(Body=FEW, **few),
        get_few,
        put,
        lambda: list(pool.map(read, range(0, len(content), PART))),
        "import botocore.session",
    )


def of_s3fs(filesystem: Any, content: bytes) -> Client:
    return Client(
        lambda: filesystem.pipe_file("bucket/s-few", FEW),
        lambda: filesystem.cat_file("bucket/s-few"),
        lambda: filesystem.pipe_file("bucket/s", content, chunksize=PART),
        lambda: filesystem.cat_file("bucket/s"),
        "import s3fs",
    )


def of_objects(options: dict[str, str], content: bytes) -> Client:
    from flytekit_ckpt import storage

    settings = storage.Settings(options)
    few, many = (storage.at(f"s3://bucket/{name}", settings) for name in ("c-few", "c"))

    def get(item: storage.StoredObject) -> None:
        found = item.get()
        assert found is not None
        for _ in found.chunks:
            pass

    def put() -> None:
        pieces = (content[start : start + (1 << 20)] for start in range(0, len(content), 1 << 20))
        many.put(pieces, size=lambda: len(content))

    return Client(
        lambda: few.put([FEW]), lambda: get(few), put, lambda: get(many), "import flytekit_ckpt.storage, s3fs"
    )


def of_checkpoints(options: dict[str, Any]) -> Client:
    from flytekit_ckpt import SyncCheckpoint

    uri = "s3://bucket/checkpoint"
    saver = SyncCheckpoint(uri, storage_options=options)
    return Client(
        lambda: saver.write(FEW),
        lambda: SyncCheckpoint("", uri, storage_options=options).read(),
        None,
        None,
        "import flytekit_ckpt, s3fs",
    )


def of_flyte(folder: Path) -> Client:
    from flyte import Checkpoint, storage

    saver, uri = Checkpoint("s3://bucket/flyte"), "s3://bucket/f"

    def get_few() -> None:
        # Its folder is removed with it.
        loader = Checkpoint("unused", "s3://bucket/flyte")
        Path(loader.load_sync() or "nothing").read_bytes()

    return Client(
        lambda: saver.save_sync(FEW),
        get_few,
        lambda: asyncio.run(storage.put(str(folder / "content"), uri)),
        lambda: asyncio.run(storage.get(uri, str(folder / "loaded"))),
        "from flyte import Checkpoint, storage",
    )


if __name__ == "__main__":
    main()
