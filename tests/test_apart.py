"""Main and fed server in two hands: equal to one process, what reaches whom, and what a kill of either leaves."""

import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from experiments import remote_commands
from experiments.deployment import (
    FED_SERVER,
    Deployment,
    client_learner,
    own_batches,
    own_stages,
    parts_of,
    server_learners,
    share_of,
)
from experiments.fed_server import FedServer, ToMain
from experiments.greeting import MAIN, Offer, greeting_of, read_greeting
from experiments.joining import Joined, join
from experiments.main_server import MainServer
from experiments.served import keep_half
from experiments.serving import Served, Server
from experiments.sessions import Sessions
from splitlearn import Framed
from splitlearn.federation import in_turn_round, splitfed_v1_round, splitfed_v2_round
from splitlearn.frames import Kind, Message
from splitlearn.members import Member, RemoteMember
from splitlearn.remote import Asked
from splitlearn.transport import Connection, Credentials, Journal, Journaled, issue, make_authority
from splitlearn.transport.gate import round_tag

CLIENTS = ("a", "b")
ROUNDS: dict[str, Callable[..., Any]] = {
    "splitfed_v1": splitfed_v1_round,
    "splitfed_v2": lambda members, learners, bottom, top: splitfed_v2_round(members, bottom),
    "in_turn": lambda members, learners, bottom, top: in_turn_round(members, bottom),
}
PRIVATE = {Kind.ACTIVATION, Kind.LABEL, Kind.GRADIENT, Kind.LOSS, Kind.PREDICTION, Kind.INPUT}


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    make_authority(folder)
    issue(folder, "server", hosts=["localhost"])
    issue(folder, FED_SERVER, hosts=["localhost"], asks=True)
    for name in CLIENTS:
        issue(folder, name)
    return folder


class CrashError(RuntimeError):
    """A server that ends where it stands: what it has not written is lost."""


class Apart:
    """A main server, a fed server and clients, a thread each; what they returned, or raised, is in ``found``."""

    def __init__(self, certs: Path, folder: Path, deployment: Deployment, **also: Any):
        self.certs, self.folder, self.deployment, self.also = certs, folder, deployment, also
        self.found: dict[str, Any] = {}
        self.lines: list[str] = []
        self.crashes = 0
        self.main = self.main_server()
        self._threads: dict[str, threading.Thread] = {}

    def main_server(self, port: int = 0) -> MainServer:
        return MainServer(
            self.deployment, f"localhost:{port}", Credentials.read(self.certs, "server"), self.folder / "server",
            own_seed=self.deployment.seed, told=self.lines.append,
        )  # fmt: skip

    def fed_server(self, port: int = 0) -> FedServer:
        return FedServer(
            f"localhost:{self.main.host.port}", f"localhost:{port}", Credentials.read(self.certs, FED_SERVER),
            self.folder / FED_SERVER, own_seed=self.deployment.seed, told=self.lines.append,
            **{"patience": 20.0, **self.also},
        )  # fmt: skip

    def fed_server_start(self) -> dict[str, torch.Tensor]:
        return server_learners(self.deployment, parts_of(self.deployment, None))[0].weights()

    def serve(self, name: str, server: MainServer | FedServer) -> None:
        """Run a server; where it crashes, another one over the same folder and port takes its place."""

        def run() -> Served:
            one = server
            while True:
                try:
                    return one.run()
                except CrashError:
                    self.crashes += 1
                    one.host.stop(0)  # without a word to anybody
                finally:
                    one.close()
                if isinstance(one, MainServer):
                    one = self.main = self.main_server(one.host.port)
                else:
                    one = self.fed = self.fed_server(one.host.port)

        self.start(name, run)

    def join(self, name: str) -> None:
        main, fed = (f"localhost:{server.host.port}" for server in (self.main, self.fed))
        credentials = Credentials.read(self.certs, name)
        self.start(name, lambda: join(name, main, credentials, self.folder / name, fed_server=fed, patience=20.0))

    def start(self, name: str, run: Callable[[], Any]) -> None:
        def kept() -> None:
            try:
                self.found[name] = run()
            except Exception as error:
                self.found[name] = error

        self._threads[name] = threading.Thread(target=kept, daemon=True)
        self._threads[name].start()

    def finish(self) -> None:
        """Train to the end."""
        self.serve("main", self.main)
        self.fed = self.fed_server()
        self.serve("fed", self.fed)
        for name in self.deployment.clients:
            self.join(name)
        self.wait()

    def wait(self) -> None:
        for thread in self._threads.values():
            thread.join(120)


def deployment(protocol: str = "splitfed_v1", **also: Any) -> Deployment:
    return replace(Deployment(CLIENTS, protocol=protocol, rounds=2, batch_size=128, apart=True), **also)


def in_process(
    deployment: Deployment, *, taking_part: tuple[str, ...] = CLIENTS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the weights of bottom and top that the same round functions come to in one process."""
    splits = parts_of(deployment, None)
    bottom, top, learners = server_learners(deployment, splits)
    assert top is not None
    members = [
        Member(
            client_learner(deployment, name, splits),
            learners.get(name),
            own_batches(deployment, name, share_of(deployment, name, splits.private)),
        )
        for name in taking_part
    ]
    for _ in range(deployment.rounds):
        ROUNDS[deployment.protocol](members, learners, bottom, top)
    return bottom.weights(), top.weights()


def example(server: MainServer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return activations that fit the server's top, and labels."""
    splits = parts_of(server.deployment, None)
    bottom = server_learners(server.deployment, splits)[0]
    return bottom.predict(splits.private.x[:5]), splits.private.y[:5]


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("protocol", list(ROUNDS))
def test_two_servers_apart_train_as_one_process_does_to_the_bit_and_see_their_own_half(
    certs: Path, tmp_path: Path, protocol: str
) -> None:
    training = Apart(certs, tmp_path, deployment(protocol))
    training.finish()
    bottom, top = in_process(training.deployment)
    assert equal(bottom, training.fed.bottom.weights())
    assert equal(top, training.main.top.weights())
    main, fed = training.found["main"], training.found["fed"]
    assert (main.rounds, fed.rounds, main.accuracy, fed.accuracy) == (2, 2, [], [])
    assert {name: training.found[name].rounds for name in CLIENTS} == {"a": 2, "b": 2}
    at_main = {kind for way in main.nbytes.values() for kind in way}
    at_fed = {kind for way in fed.nbytes.values() for kind in way}
    assert at_main == {"activation", "label", "gradient", "loss", "parameters", "count", "framing"}  # no weights
    assert at_fed == {"weights", "parameters", "count", "framing"}
    assert {kind for way in training.main.meters[FED_SERVER].nbytes.values() for kind in way}.isdisjoint(PRIVATE)
    assert not list(tmp_path.glob("*/state/journal*"))


def test_each_operator_writes_a_half_and_together_they_are_the_model(certs: Path, tmp_path: Path) -> None:
    training = Apart(certs, tmp_path, deployment(rounds=1))
    training.finish()
    halves = {"top": training.main.top, "bottom": training.fed.bottom}
    found: dict[str, Any] = {}
    for half, learner in halves.items():
        served = training.found["main" if half == "top" else "fed"]
        found |= load_file(keep_half(half, learner, training.deployment, served, tmp_path / half))
        (record,) = (tmp_path / half).glob("trials/*/record.json")
        assert '"utility":{}' in record.read_text().replace(" ", "").replace("\n", "")
    bottom, top = in_process(training.deployment)
    assert equal(found, {**bottom, **top})


def test_a_rounds_tag_on_the_main_server_is_no_use_for_trying_guesses_of_the_bottom(
    certs: Path, tmp_path: Path
) -> None:
    training = Apart(certs, tmp_path, deployment(rounds=1))
    start = training.fed_server_start()
    training.finish()
    salt = training.fed._offer.salt
    assert len(salt) == 32
    assert training.main.gates["a"]._over == {"", round_tag(start, salt)}
    assert round_tag(start, salt) != round_tag(start)
    told = greeting_of(Offer(training.deployment, "x", MAIN))
    assert "salt" not in told
    assert read_greeting(greeting_of(training.fed._offer)).salt == salt


def test_what_a_half_starts_from_nobody_can_guess_by_the_seed() -> None:
    training = deployment()
    splits = parts_of(training, None)
    usual, one, other = (own_stages(training, splits, seed) for seed in (training.seed, None, None))
    for stages in zip(usual, one, other, strict=True):
        by_seed, first, second = (stage.state_dict() for stage in stages)
        for name, tensor in by_seed.items():
            assert first[name].shape == tensor.shape
            if tensor.numel() > 50:  # all begin alike in distribution, and in no entry
                assert first[name].std().item() == pytest.approx(tensor.std().item(), rel=0.3)
                for pair in ((first, by_seed), (second, by_seed), (first, second)):
                    assert not (pair[0][name] == pair[1][name]).any()


def everywhere() -> list[Any]:
    """Return each call in which a server may crash, before and after it, by protocol; two of them for every day.

    Not the fed server's first checkpoint: it is written before there is anything to lose.
    """
    calls = [
        (Sessions, "keep", 1), (Sessions, "keep", 2), (MainServer, "turn", 1), (MainServer, "turn", 4),
        (Journaled, "request", 3), (Journal, "append", 6), (FedServer, "_keep", 2), (FedServer, "_settle", 2),
        (FedServer, "_settle", 3), (ToMain, "turn", 1), (ToMain, "turn", 3), (ToMain, "end", 1),
        (RemoteMember, "round", 2),
    ]  # fmt: skip
    quick = {("splitfed_v1", "keep", 1, True), ("splitfed_v2", "round", 2, False)}
    return [
        pytest.param(
            protocol, owner, method, number, after,
            marks=() if (protocol, method, number, after) in quick else pytest.mark.slow,
            id=f"{protocol}-{owner.__name__}.{method}-{number}-{'after' if after else 'before'}",
        )
        for protocol in ROUNDS for owner, method, number in calls for after in (False, True)
    ]  # fmt: skip


@pytest.mark.parametrize(("protocol", "owner", "method", "number", "after"), everywhere())
def test_a_crash_of_either_server_anywhere_does_not_show_in_the_model(
    certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str, owner: type, method: str, number: int,
    after: bool,
) -> None:  # fmt: skip
    training = Apart(certs, tmp_path, deployment(protocol, batch_size=256))
    whole, lock = getattr(owner, method), threading.Lock()
    calls = 0

    def crashing(*given: Any, **also: Any) -> Any:
        nonlocal calls
        with lock:
            calls += 1
            mine = calls == number
        if mine and not after:
            crash()
        found = whole(*given, **also)
        if mine and after:
            crash()
        return found

    def crash() -> None:
        error = CrashError()
        if owner in (Sessions, MainServer, Journaled, Journal):
            training.main.fail(error)
        raise error

    monkeypatch.setattr("experiments.main_server.LEAVE", 3.0)
    monkeypatch.setattr(owner, method, crashing)
    training.finish()
    assert training.crashes == 1
    assert all(isinstance(training.found[name], Joined) for name in CLIENTS), training.found
    bottom, top = in_process(training.deployment)
    assert equal(bottom, training.fed.bottom.weights())
    assert equal(top, training.main.top.weights())


def test_who_drops_out_is_in_neither_average(certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, failed = Member.step, []

    def failing(self: Member, x: Any, y: Any) -> float:
        loss = step(self, x, y)
        if self.name == "b" and not failed:
            failed.append(self)
            raise ValueError("no space")
        return loss

    training = Apart(certs, tmp_path, deployment(rounds=1))
    with monkeypatch.context() as patch:
        patch.setattr(Member, "step", failing)
        training.finish()
    assert len(failed) == 1
    assert training.found["main"].left_out == training.found["fed"].left_out == [["b"]]
    bottom, top = in_process(training.deployment, taking_part=("a",))
    assert equal(bottom, training.fed.bottom.weights())
    assert equal(top, training.main.top.weights())


# What is refused


def test_a_deployment_apart_has_a_main_server_and_no_client_of_its_fed_servers_name() -> None:
    with pytest.raises(ValueError, match="fedavg, which has a fed server alone; leave --apart"):
        deployment("fedavg")
    with pytest.raises(ValueError, match="names other than fed-server"):
        deployment(clients=("a", FED_SERVER))


def test_a_fed_servers_certificate_is_made_by_its_hosts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got fed-server, which is a server's; give --fed-hosts for that one"):
        remote_commands.certs(tmp_path, [FED_SERVER])
    assert not list(tmp_path.iterdir())


def test_clients_and_servers_say_which_address_is_whose(certs: Path, tmp_path: Path) -> None:
    training = Apart(certs, tmp_path, deployment())
    training.main.host.start()
    fed = training.fed_server()
    fed.host.start()
    main, own = (f"localhost:{server.host.port}" for server in (training.main, fed))
    both = Server(
        Deployment(CLIENTS), "localhost:0", Credentials.read(certs, "server"), tmp_path / "both"
    )  # fmt: skip
    both.host.start()
    whole = f"localhost:{both.host.port}"
    told = {"credentials": Credentials.read(certs, "a"), "folder": tmp_path / "a", "patience": 5.0}
    with pytest.raises(ValueError, match="says it is the main server; give --fed-server too"):
        join("a", main, **told)
    with pytest.raises(ValueError, match=r"expected the main server at .* says it is the fed server; look at"):
        join("a", own, fed_server=main, **told)
    with pytest.raises(ValueError, match=r"expected the fed server at .* says it is the main server"):
        join("a", main, fed_server=main, **told)
    with pytest.raises(ValueError, match=r"expected the main server at .* says it is the server"):
        join("a", whole, fed_server=own, **told)
    with pytest.raises(PermissionError, match="or start that server with --apart"):
        FedServer(whole, "localhost:0", Credentials.read(certs, FED_SERVER), tmp_path / "other")
    for server in (fed, training.main, both):
        server.close()


def test_servers_of_two_trainings_do_not_go_on_together(certs: Path, tmp_path: Path) -> None:
    first = Apart(certs, tmp_path, deployment(rounds=1))
    first.finish()
    (tmp_path / FED_SERVER / "state" / "fed-server.safetensors").unlink()
    first.main = first.main_server()
    first.main.host.start()
    with pytest.raises(ValueError, match="has tried 0 rounds, got one that has tried 1; give both servers the folders"):
        first.fed_server()
    first.main.close()
    second = Apart(certs, tmp_path / "second", deployment(rounds=2))
    second.main.host.start()
    fed = second.fed_server()
    fed._keep()
    fed.close()
    second.main.close()
    third = Apart(certs, tmp_path / "third", deployment(rounds=2))
    third.main.host.start()
    (tmp_path / "second" / FED_SERVER).rename(tmp_path / "third" / FED_SERVER)
    with pytest.raises(ValueError, match=r"got that of another one in .*; give both servers the folders"):
        third.fed_server()
    third.main.close()


def test_the_desk_does_each_thing_once_and_nothing_late_or_of_another_round(certs: Path, tmp_path: Path) -> None:
    server = Apart(certs, tmp_path, deployment()).main
    before = server.top.weights()

    def ask(verb: str, step: int, attempt: int, session: str = FED_SERVER, **counts: int) -> bool:
        tensors = {f"count/{name}": torch.tensor(count) for name, count in counts.items()}
        tensors[Kind.COUNT] = torch.tensor(attempt)
        return bool(server.desk.request(Message(verb, tensors, session, step)).tensors[Kind.COUNT])

    for attempt in (0, 2):
        with pytest.raises(ValueError, match=f"round after 0 that were tried, got number {attempt}"):
            ask("open", 1, attempt, "a@x")
    with pytest.raises(ValueError, match="expected a gate of a client, got 'c'"):
        ask("open", 2, 1, "c@x")
    with pytest.raises(ValueError, match="expected samples of clients, got some of 'c'"):
        ask("end", 3, 1, c=3)
    with pytest.raises(ValueError, match="expected some samples"):
        ask("end", 3, 1, a=0)
    with pytest.raises(ValueError, match="expected a whole number from 0 on"):
        ask("end", 3, 1, a=-1)
    with pytest.raises(ValueError, match="expected a verb among standing, open, close, end, leave; got 'weights'"):
        ask("weights", 3, 1)
    assert ask("open", 4, 1, "a@x")
    server.learners["a"].learn(*example(server))
    assert ask("end", 6, 1, a=5)
    once = server.top.weights()
    assert not equal(before, once)
    assert ask("end", 7, 1, b=5)  # again, and it is what it was
    assert equal(once, server.top.weights())
    with pytest.raises(ValueError, match="expected a step of 7 or more, got 5; it comes too late"):
        ask("open", 5, 2, "a@x")
    assert server.served.rounds == 1
    server.close()


def test_a_round_that_nobody_finished_leaves_the_top_as_it_was(certs: Path, tmp_path: Path) -> None:
    server = Apart(certs, tmp_path, deployment()).main
    before = server.top.weights()
    server.learners["a"].learn(*example(server))
    assert server.end(1, {})
    assert equal(before, server.top.weights())
    assert equal(before, server.learners["a"].weights())
    assert (server.attempts, server.served.rounds) == (1, 0)
    server.close()


def test_a_round_ends_when_the_last_request_of_who_was_left_out_is_answered(
    certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Apart(certs, tmp_path, deployment()).main
    inside, over = threading.Event(), threading.Event()
    learn = server.learners["a"].learn

    def slow(z: torch.Tensor, y: torch.Tensor) -> Any:
        inside.set()
        over.wait(20)
        return learn(z, y)

    monkeypatch.setattr(server.learners["a"], "learn", slow)
    monkeypatch.setattr(server.gates["a"], "_grace", 0.1)
    z, y = example(server)
    server.turn(Message("open", {}, "a@x"))
    request = Message("learn", {Kind.INPUT: z, Kind.LABEL: y}, "a@x", 1)
    asking = threading.Thread(target=server.gates["a"].request, args=(request,), daemon=True)
    asking.start()
    assert inside.wait(20)
    close = Message("close", {Kind.COUNT: torch.tensor(1)}, "a@", 1)
    assert not int(server.desk.request(close).tensors[Kind.COUNT])
    assert not server.end(1, {"b": 5})
    assert server.attempts == 0
    over.set()
    asking.join(20)
    assert server.end(1, {"b": 5})
    assert server.learners["a"].steps == 1
    server.close()


def test_the_fed_servers_certificate_reaches_no_session_and_a_clients_no_gate(certs: Path, tmp_path: Path) -> None:
    training = Apart(certs, tmp_path, deployment())
    training.main.host.start()
    for name, session, verb in ((FED_SERVER, "a", "learn"), (FED_SERVER, "a", "weights"), ("a", "a@x", "open")):
        connection = Connection(f"localhost:{training.main.host.port}", Credentials.read(certs, name), patience=5.0)
        with pytest.raises(ValueError, match="expected a verb among"):
            Asked("server", Framed(connection.ask), session).ask(verb, {Kind.COUNT: torch.tensor(1)})
        connection.close()
    training.main.close()


def test_a_main_server_that_is_away_ends_the_fed_server_and_no_client_drops_out(certs: Path, tmp_path: Path) -> None:
    training = Apart(certs, tmp_path, deployment(), patience=0.5)
    training.main.host.start()
    training.fed = training.fed_server()
    training.main.host.stop(0)
    training.main.close()
    with pytest.raises(OSError, match="the main server: expected a server at localhost") as raised:
        training.fed.members[0].round(training.fed.bottom.weights())
    assert not isinstance(raised.value, ConnectionError | TimeoutError)
    training.fed.close()


# As commands


class Commands:
    """The processes of the page's commands, over a folder."""

    def __init__(self, commands: dict[str, str], folder: Path):
        self.folder, self._commands = folder, commands
        self.processes = {name: self._start(name) for name in commands}

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        words = self._commands[name].split()
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [str(Path(sys.executable).parent / words[0]), *words[1:]], cwd=self.folder, stdout=log, stderr=log
            )

    def get_on(self, since: float) -> None:
        """Wait until a client has made a step after ``since``."""
        end = time.monotonic() + 90
        while True:
            steps = [0.0]
            for path in self.folder.glob("runs/hospital-*/state/hospital-*.safetensors"):
                with suppress(OSError):  # it is being replaced
                    steps.append(path.stat().st_mtime)
            if max(steps) > since:
                return
            assert time.monotonic() < end, self.logs()
            assert all(process.poll() is None for process in self.processes.values()), self.logs()
            time.sleep(0.02)

    def kill(self, name: str, *, gently: bool) -> None:
        """End one, and start it again at once."""
        (self.processes[name].terminate if gently else self.processes[name].kill)()
        self.processes[name].wait()
        self.processes[name] = self._start(name)

    def logs(self) -> str:
        return "\n".join(f"{name}: {(self.folder / f'{name}.log').read_text()[-2000:]}" for name in self._commands)

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


@pytest.mark.slow
def test_the_page_works_as_four_operators_would_type_it_and_kills_of_any_do_not_show(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text()
    for address in ("localhost:50051", "localhost:50052"):
        page = page.replace(address, f"localhost:{free_port()}")
    rounds = 40
    blocks = re.findall(r"```sh\n(.*?)```", page.replace("--rounds 15", f"--rounds {rounds}"), re.DOTALL)
    certs, *others = (block.strip() for block in blocks)
    commands = dict(zip(("main", "fed", "a", "b"), others, strict=True))
    for name in ("main", "fed"):
        commands[name] += " --own-seed 0"
    subprocess.run([str(Path(sys.executable).parent / certs.split()[0]), *certs.split()[1:]], cwd=tmp_path, check=True)
    running, draw, since = Commands(commands, tmp_path), random.Random(5), 0.0
    try:
        for victim, gently in (
            ("main", False),
            ("fed", False),
            ("a", False),
            ("fed", True),
            ("main", True),
            ("fed", False),
        ):
            running.get_on(since)
            time.sleep(draw.uniform(0, 0.5))
            running.kill(victim, gently=gently)
            since = time.time()
        for process in running.processes.values():
            assert process.wait(200) == 0, running.logs()
    finally:
        running.end()
    names = ("hospital-a", "hospital-b")
    bottom, top = in_process(Deployment(names, rounds=rounds, apart=True), taking_part=names)
    runs = tmp_path / "runs"
    assert equal(bottom, load_file(runs / "fed-server" / "bottom.safetensors"))
    assert equal(top, load_file(runs / "main-server" / "top.safetensors"))
    for log in ("main", "fed", "a", "b"):
        text = (tmp_path / f"{log}.log").read_text()
        assert "Traceback" not in text
        assert "BEGIN" not in text
    for server in ("main", "fed"):
        (record,) = (runs / f"{server}-server").glob("trials/*/record.json")
        kinds = {kind for way in json.loads(record.read_text())["nbytes"].values() for kind in way}
        assert ("weights" in kinds, "activation" in kinds) == (server == "fed", server == "main")
        assert not list((runs / f"{server}-server" / "state").glob("journal*"))
