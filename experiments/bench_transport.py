"""Benches of the transport: what gRPC with mutual TLS costs over bare gRPC, over one process, and with many clients."""

import multiprocessing
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.timing import median_ratio, paired_seconds
from splitlearn.cut import cut
from splitlearn.frames import Message, encode
from splitlearn.models import model_for
from splitlearn.party import Learner
from splitlearn.protocols import vanilla
from splitlearn.remote import Remote
from splitlearn.service import Service
from splitlearn.transport import Connection, Credentials, Host, issue, make_authority
from splitlearn.transport.link import grpc_module, options
from splitlearn.wire import Framed, Metered, serve

__all__ = ["many_clients", "transport_overhead"]

RAW = "raw.Echo"
SHAPE, BATCH = (1, 28, 28), 64  # a batch of Fashion-MNIST
CLIENTS = (1, 2, 4, 8, 16, 32, 64)
SMALL = [f"small{number}" for number in range(CLIENTS[-1])]
FEW = 8  # clients from whom the time of the most is predicted


class Echo:
    """A party that sends back what it is sent."""

    name = "echo"

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x


def transport_overhead(*, rounds: int = 300, batches: int = 120) -> dict[str, Any]:
    """Return what a round trip and a training step cost over gRPC with mutual TLS, paired in one run on loopback.

    ``rtt_ratio_64k`` and ``rtt_ratio_1m``: a round trip of an activation, encoded, framed, answered by a service in
    another process and decoded, over one of the same bytes by bare gRPC with the same certificates. ``…_insecure``: the
    same over bare gRPC without TLS. ``epoch_ratio``: steps of a client with the server in another process over steps of
    both in this one, batch 64 of the size of Fashion-MNIST (random samples), cut after the second block. One thread.
    """
    torch.set_num_threads(1)
    with _Far() as far:
        found: dict[str, Any] = {}
        remote = Remote("echo", Framed(far.connection("echo").ask), "echo")
        for name, numbers in (("64k", 1 << 14), ("1m", 1 << 18)):
            found |= {f"{key}_{name}": value for key, value in _round_trips(far, remote, numbers, rounds).items()}
        found |= _epoch(far, batches)
    return found


def many_clients(*, steps: int = 40) -> dict[str, Any]:
    """Return seconds and bytes of a step against the number of clients at once, 1 to 64, each in its own session.

    All clients are threads of this process, the server is another; each makes ``steps`` training steps of a small
    model. ``predicted_64``: the line through the times of 1 and 8 clients, at 64, over the time measured. ``fair_32``:
    the time of the last of 32 clients to be done over that of the first.
    """
    torch.set_num_threads(1)
    seconds, fair, nbytes = {}, {}, {}
    with _Far() as far:
        lines = [(meter := Metered(far.connection(name).ask), Remote("server", Framed(meter), name)) for name in SMALL]
        for count in CLIENTS:
            seconds[count], fair[count], nbytes[count] = _at_once(lines[:count], steps)
    slope = (seconds[FEW] - seconds[1]) / (FEW - 1)
    predicted = seconds[1] + slope * (CLIENTS[-1] - 1)
    return {
        **{f"seconds_{count}": round(value, 3) for count, value in seconds.items()},
        **{f"nbytes_per_step_{count}": value for count, value in nbytes.items()},
        **{f"fair_{count}": round(value, 2) for count, value in fair.items() if count > 1},
        "predicted_64": round(predicted / seconds[CLIENTS[-1]], 3),
        "steps": steps,
    }


def _round_trips(far: "_Far", remote: Remote, numbers: int, rounds: int) -> dict[str, float]:
    z = torch.randn(numbers)
    frame = encode(Message("forward", {"input": z}, "echo", 1))
    with far.raw(secure=True) as secure, far.raw(secure=False) as bare:
        steps = {"ours": lambda: remote.forward(z), "raw": lambda: secure(frame), "bare": lambda: bare(frame)}
        seconds = paired_seconds(steps, rounds)
    return {
        "rtt_ratio": round(median_ratio(seconds["ours"], seconds["raw"]), 3),
        "rtt_ratio_insecure": round(median_ratio(seconds["ours"], seconds["bare"]), 3),
        "rtt_ms": round(1000 * statistics.median(seconds["ours"]), 3),
        "raw_ms": round(1000 * statistics.median(seconds["raw"]), 3),
    }


def _epoch(far: "_Far", batches: int) -> dict[str, float]:
    x, y = torch.rand(BATCH, *SHAPE), torch.randint(0, 10, (BATCH,))
    near = [_learner(name, stage) for name, stage in zip(("client", "server"), _stages(), strict=True)]
    client = _learner("client", _stages()[0])
    meter = Metered(far.connection("top").ask)
    remote = Remote("server", Framed(meter), "top")
    steps = {"grpc": lambda: vanilla(client, remote, x, y), "here": lambda: vanilla(near[0], near[1], x, y)}
    seconds = paired_seconds(steps, batches)
    return {
        "epoch_ratio": round(sum(seconds["grpc"]) / sum(seconds["here"]), 3),
        "step_ms_grpc": round(1000 * statistics.median(seconds["grpc"]), 2),
        "step_ms_here": round(1000 * statistics.median(seconds["here"]), 2),
        "step_nbytes": meter.total_nbytes // (batches + 2),
    }


def _at_once(lines: Sequence[tuple[Metered, Remote]], steps: int) -> tuple[float, float, int]:
    """Return the seconds until all are done, the last one's over the first one's, and the bytes of a step."""
    done: dict[int, float] = {}
    failed: list[BaseException] = []
    start, before = threading.Barrier(len(lines) + 1), [meter.total_nbytes for meter, _ in lines]

    def client(number: int) -> None:
        try:
            remote = lines[number][1]
            z, y = torch.rand(32, 256), torch.randint(0, 10, (32,))
            remote.learn(z.requires_grad_(), y)  # connected
            start.wait()
            begun = time.perf_counter()
            for _ in range(steps):
                remote.learn(z.detach().requires_grad_(), y)
            done[number] = time.perf_counter() - begun
        except BaseException as error:
            failed.append(error)
            start.abort()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(lines))]
    for thread in threads:
        thread.start()
    with suppress(threading.BrokenBarrierError):
        start.wait()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    crossed = (lines[0][0].total_nbytes - before[0]) // (steps + 1)
    return max(done.values()), max(done.values()) / min(done.values()), crossed


def _stages() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    below, above = cut(model_for(SHAPE, 10, "image", None), "block2")
    return below, above


def _learner(name: str, stage: nn.Module) -> Learner:
    return Learner(name, stage, torch.optim.SGD(stage.parameters(), 0.01, momentum=0.9))


class _Far:
    """The other process, and the ways to it."""

    def __enter__(self) -> "_Far":
        self._folder = tempfile.TemporaryDirectory()
        self.certs = Path(self._folder.name)
        make_authority(self.certs)
        issue(self.certs, "server", hosts=["localhost"])
        self._sessions = ["echo", "top", *SMALL]
        for name in self._sessions:
            issue(self.certs, name)
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, str(self.certs), self._sessions), daemon=True)
        self._process.start()
        far.close()  # so that a process that dies is an EOFError here
        self._ports: dict[str, int] = self._pipe.recv()
        self._connections: list[Connection] = []
        self._lock = threading.Lock()
        return self

    def __exit__(self, *error: object) -> None:
        for connection in self._connections:
            connection.close()
        self._pipe.close()
        self._process.join(10)
        self._process.kill()
        self._folder.cleanup()

    def connection(self, session: str) -> Connection:
        found = Connection(f"localhost:{self._ports['host']}", Credentials.read(self.certs, session))
        with self._lock:
            self._connections.append(found)
        return found

    @contextmanager
    def raw(self, *, secure: bool) -> Iterator[Any]:
        """Yield what sends bytes and returns those that come back, by gRPC and nothing else."""
        grpc, own = grpc_module(), Credentials.read(self.certs, "echo")
        address, settings = f"localhost:{self._ports['secure' if secure else 'bare']}", options()
        channel = (
            grpc.secure_channel(
                address, grpc.ssl_channel_credentials(own.authority, own.key, own.certificate), options=settings
            )
            if secure
            else grpc.insecure_channel(address, options=settings)
        )
        frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        replies = channel.stream_stream(f"/{RAW}/Echo")(iter(frames.get, None))

        def exchange(frame: bytes) -> bytes:
            frames.put(frame)
            return bytes(next(replies))

        try:
            yield exchange
        finally:
            frames.put(None)
            channel.close()


def _serve(pipe: Pipe, folder: str, sessions: list[str]) -> None:
    """Be the other process until the pipe closes."""
    torch.set_num_threads(1)
    grpc, own = grpc_module(), Credentials.read(Path(folder), "server")
    parties: dict[str, Any] = {"echo": Echo(), "top": _learner("top", _stages()[1])}
    for name in sessions:
        if name not in parties:
            parties[name] = _learner(name, nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)))
    host = Host("localhost:0", own, {name: serve(Service({name: party})) for name, party in parties.items()})
    handler = grpc.stream_stream_rpc_method_handler(lambda frames, context: frames)
    ports, servers = {"host": host.start()}, []
    for name in ("secure", "bare"):
        server = grpc.server(ThreadPoolExecutor(4), options=options())
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(RAW, {"Echo": handler}),))
        secure = grpc.ssl_server_credentials([(own.key, own.certificate)], own.authority, require_client_auth=True)
        address = "localhost:0"
        ports[name] = server.add_secure_port(address, secure) if name == "secure" else server.add_insecure_port(address)
        server.start()
        servers.append(server)
    pipe.send(ports)
    with suppress(EOFError):
        pipe.recv()
    host.stop(0)
    for server in servers:
        server.stop(0).wait()
