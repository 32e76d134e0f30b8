"""Ray: a connection to a cluster, and members of a federation in actors of it, which train at the same time.

fed server ── ActorMember ── Framed ── Hosted ══ actor ══ serve ── Service ── Member

The rounds of ``federation`` drive them as they are. Ray is an extra: nothing here imports it before it is used.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from splitlearn.frames import Codec
from splitlearn.members import RemoteMember
from splitlearn.service import Service
from splitlearn.wire import serve

__all__ = ["ActorMember", "Hosted", "connected", "hosted"]

OBJECT_STORE_NBYTES = 256 << 20  # of a Ray that is started here: frames and records are small
SECONDS_TO_ANSWER = 5.0  # for a cluster's address; Ray itself would try for minutes


@contextmanager
def connected(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[Any]:
    """Give the ``ray`` package, connected to the cluster at ``address`` (HOST:PORT, or auto for one on this machine).

    Without an address it uses the connection that this process has, or else starts a Ray of ``num_cpus`` that
    listens on this machine alone and ends with this context. Raises ``ValueError`` where Ray is not installed or
    no cluster answers.
    """
    ray = _ray()
    if ray.is_initialized():
        if address is not None:
            raise ValueError(
                f"expected no connection to Ray before that to {address}, got one in this process; end it with "
                "ray.shutdown(), or leave out the address to use it"
            )
        yield ray
        return
    try:
        with _no_noise():
            if address is None:
                _start(ray, num_cpus)
            else:
                _connect(ray, address)
            yield ray
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Hosted:
    """A carrier to what an actor serves. It can be sent to other actors, whose members then talk to this one.

    An actor that died is a ``ConnectionError``: its member drops out of the round.
    """

    name: str
    actor: Any

    def __call__(self, frame: bytes) -> bytes:
        """Return the reply's frame."""
        ray = _ray()
        try:
            return ray.get(self.actor.carry.remote(frame))
        except ray.exceptions.RayActorError as error:
            raise ConnectionError(f"{self.name}: its actor ended; start it anew with hosted(…)") from error


@contextmanager
def hosted(
    makes: Mapping[str, Callable[[], Mapping[str, Any]]], codec: Codec | None = None, *, threads: int = 1
) -> Iterator[dict[str, Hosted]]:
    """Give a carrier by name to an actor each, which serves what its callable makes: parties and members by session.

    The callable (a ``functools.partial`` of a top-level function) is called in the actor, so that data which it
    loads stays there. Actors are spread over the cluster's nodes, each on ``threads`` torch threads, and end with
    this context. Every node needs the same splitlearn, and what the callables read. Raises ``ValueError`` where
    there is no connection (see ``connected``) or a callable fails.

    SplitFed V1, a client and its copy of the top in one actor each::

        with connected(), hosted({name: partial(client, name) for name in names}) as carriers:
            members = [ActorMember(name, Framed(carrier), name) for name, carrier in carriers.items()]
            sessions = {name: Remote(name, Framed(carrier), "top") for name, carrier in carriers.items()}
            splitfed_v1_round(members, sessions, bottom, top)

    where ``client(name)`` returns ``{name: Member(learner, copy, batches), "top": copy}``.
    """
    ray = _ray()
    if not ray.is_initialized():
        raise ValueError("expected a connection to Ray, got none; open one with `with connected():`")
    host = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy="SPREAD")(_Host)
    carriers = {name: Hosted(name, host.remote()) for name in makes}
    try:
        begun = {name: carriers[name].actor.begin.remote(make, codec, threads) for name, make in makes.items()}
        for name, reference in begun.items():
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                why = " ".join(str(getattr(error, "cause", error)).split())
                raise ValueError(f"{name}: expected parties and members by session to serve, got: {why}") from error
        yield carriers
    finally:
        for carrier in carriers.values():
            ray.kill(carrier.actor)


class ActorMember(RemoteMember):
    """A member in an actor. Rounds in which members do not depend on each other ask all such members at once."""

    elsewhere = True


class _Host:
    """What runs in an actor."""

    def begin(self, make: Callable[[], Mapping[str, Any]], codec: Codec | None, threads: int) -> None:
        torch.set_num_threads(threads)
        self._carry = serve(Service(make()), codec)

    def carry(self, frame: bytes) -> bytes:
        return self._carry(frame)


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError(
            "expected the package ray, which is not installed; install it with: pip install 'splitlearn[ray]'"
        ) from error
    return ray


def _start(ray: Any, num_cpus: int | None) -> None:
    """Start a Ray on this machine. Who reaches its ports runs code: they are opened on the loopback device alone."""
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False  # listen on 127.0.0.1
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to Ray's makers
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_NBYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _connect(ray: Any, address: str) -> None:
    try:
        if address != "auto":
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), SECONDS_TO_ANSWER).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"expected a Ray cluster at {address}, got: {why}; give HOST:PORT of its head (`ray start --head` says "
            "which), or no address to start one here"
        ) from error


@contextmanager
def _no_noise() -> Iterator[None]:
    """Keep Ray from printing its nodes' messages to our standard output."""
    from ray._private import worker

    before, worker._worker_logs_enabled = worker._worker_logs_enabled, False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before
