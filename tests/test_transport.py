"""Parties over gRPC with mutual TLS: who gets in, what crosses, what a kill leaves, and that nothing else differs."""

import copy
import os
import random
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.bench_faults import killed_training
from experiments.deployment import (
    Deployment,
    announced,
    client_learner,
    own_batches,
    parts_of,
    server_learners,
    share_of,
)
from experiments.joining import Joined, join
from experiments.serving import Served, Server
from privacy.he import CipherHolder, EncryptedLayer, Keys, he_encw
from splitlearn import Framed, Learner, Metered, serve
from splitlearn.federation import fedavg_round, in_turn_round, splitfed_v1_round, splitfed_v2_round
from splitlearn.frames import Kind, Message, decode, encode
from splitlearn.members import Member, RemoteMember
from splitlearn.remote import Remote
from splitlearn.service import Service
from splitlearn.train import Batches
from splitlearn.transport import (
    Connection,
    Credentials,
    Gate,
    GatedMember,
    Host,
    Journal,
    Journaled,
    LastingMember,
    issue,
    make_authority,
)
from splitlearn.transport.gate import round_tag

CLIENTS = ("a", "b")


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    make_authority(folder)
    issue(folder, "server", hosts=["localhost", "127.0.0.1"])
    for name in (*CLIENTS, "stranger"):
        issue(folder, name)
    return folder


def learner(name: str = "server", seed: int = 0, width: int = 4) -> Learner:
    torch.manual_seed(seed)
    stage = nn.Linear(width, 3)
    return Learner(name, stage, torch.optim.SGD(stage.parameters(), 0.1, momentum=0.9))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(5, 4, generator=draws), torch.randint(0, 3, (5,), generator=draws)


class Up:
    """A host and the ways to reach it; all is closed in the end."""

    def __init__(self, certs: Path):
        self.certs = certs
        self._open: list[Callable[[], None]] = []

    def host(self, carriers: dict[str, Any], **also: Any) -> Host:
        host = Host("localhost:0", Credentials.read(self.certs, "server"), carriers, **also)
        host.start()
        self._open.append(lambda: host.stop(0.5))
        return host

    def connection(self, host: Host, name: str = "a", **also: Any) -> Connection:
        also = {"patience": 10.0, **also}
        found = Connection(f"localhost:{host.port}", Credentials.read(self.certs, name), **also)
        self._open.append(found.close)
        return found

    def close(self) -> None:
        for one in reversed(self._open):
            one()


@pytest.fixture
def up(certs: Path) -> Iterator[Up]:
    found = Up(certs)
    yield found
    found.close()


# Certificates


def test_keys_are_for_their_owner_alone_and_an_authority_is_kept(tmp_path: Path) -> None:
    make_authority(tmp_path)
    issue(tmp_path, "a")
    before = (tmp_path / "authority.key").read_bytes()
    for name in ("authority", "a"):
        assert stat.S_IMODE((tmp_path / f"{name}.key").stat().st_mode) == 0o600
    make_authority(tmp_path)
    assert (tmp_path / "authority.key").read_bytes() == before
    assert "BEGIN" not in repr(Credentials.read(tmp_path, "a"))


@pytest.mark.parametrize("name", ["", "authority", "../a", "a b"])
def test_a_certificates_name_is_a_plain_one(tmp_path: Path, name: str) -> None:
    make_authority(tmp_path)
    with pytest.raises(ValueError, match="expected a name of letters"):
        issue(tmp_path, name)


def test_what_is_missing_is_named_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"authority\.crt, found none; make one: splitlearn certs"):
        Credentials.read(tmp_path, "a")


# Who gets in


def test_a_party_across_the_network_is_as_one_in_this_process(up: Up) -> None:
    near, far = learner(), learner()
    host = up.host({"a": serve(Service({"a": far}))})
    remote = Remote("server", Framed(up.connection(host).ask), "a")
    for number in range(4):
        (z, y), (again, _) = batch(number), batch(number)
        loss, g = near.learn(z.requires_grad_(), y)
        loss_far, g_far = remote.learn(again.requires_grad_(), y)
        assert torch.equal(loss, loss_far)
        assert g is not None
        assert g_far is not None
        assert torch.equal(g, g_far)
    assert all(torch.equal(near.weights()[name], far.weights()[name]) for name in near.weights())


def test_a_client_without_a_session_or_of_another_authority_is_not_let_in(up: Up, tmp_path: Path) -> None:
    host = up.host({"a": serve(Service({"a": learner()}))})
    stranger = Remote("server", Framed(up.connection(host, "stranger").ask), "a")
    with pytest.raises(PermissionError, match="ask the operator for another certificate"):
        stranger.predict(batch()[0])
    assert host.refused == 1
    make_authority(tmp_path)
    issue(tmp_path, "a")
    forged = Credentials(
        Credentials.read(up.certs, "a").authority, (tmp_path / "a.crt").read_bytes(), (tmp_path / "a.key").read_bytes()
    )
    connection = Connection(f"localhost:{host.port}", forged, patience=0.5)
    with pytest.raises(ConnectionError, match="expected a server at localhost"):
        connection.ask(encode(Message("predict", {Kind.INPUT: torch.zeros(1)}, "a", 1)))
    connection.close()


def test_a_client_does_not_talk_to_a_server_of_another_authority(up: Up, tmp_path: Path) -> None:
    make_authority(tmp_path)
    issue(tmp_path, "a")
    host = up.host({"a": serve(Service({"a": learner()}))})
    connection = Connection(f"localhost:{host.port}", Credentials.read(tmp_path, "a"), patience=0.5)
    with pytest.raises(ConnectionError, match="of our authority"):
        connection.ask(b"anything")
    connection.close()


def test_nobody_reaches_anothers_session_whatever_its_frames_say(up: Up) -> None:
    own, others = learner("own"), learner("others", seed=1)
    host = up.host({"a": serve(Service({"a": own})), "b": serve(Service({"b": others}))})
    thief = Remote("server", Framed(up.connection(host, "a").ask), "b")
    before = others.weights()
    for attempt in (thief.weights, lambda: thief.learn(*batch())):
        with pytest.raises(ValueError, match="expected a session among a; got 'b'"):
            attempt()
    assert all(torch.equal(before[name], others.weights()[name]) for name in before)


def test_a_frame_over_the_size_is_refused_and_others_are_served_on(up: Up) -> None:
    carriers = {name: serve(Service({name: learner(name)}), max_nbytes=10_000) for name in CLIENTS}
    host = up.host(carriers, max_nbytes=10_000)
    honest = Remote("server", Framed(up.connection(host, "b").ask), "b")
    honest.predict(batch()[0])
    large = up.connection(host, "a")
    with pytest.raises(ValueError, match="RESOURCE_EXHAUSTED"):
        large.ask(b"x" * 3_000_000)
    remote = Remote("server", Framed(large.ask), "a")
    with pytest.raises(ValueError, match="payload of at most 10000 bytes"):
        remote.predict(torch.zeros(1000, 4))
    assert remote.predict(batch()[0]).shape == (5, 3)
    assert honest.predict(batch()[0]).shape == (5, 3)


@pytest.mark.slow
def test_ten_thousand_hostile_frames_crash_nothing_and_disturb_nobody(up: Up) -> None:
    far, near = learner("b"), learner("b")
    carriers = {name: Metered(serve(Service({name: own}))) for name, own in (("a", learner("a")), ("b", far))}
    host = up.host(carriers, max_nbytes=1 << 20)
    hostile = up.connection(host, "a")
    honest = Remote("server", Framed(up.connection(host, "b").ask), "b")
    draw = random.Random(0)
    whole = encode(Message("learn", {Kind.ACTIVATION: batch()[0], Kind.LABEL: batch()[1]}, "a", 1))
    errors = 0
    for number in range(10_000):
        frame = bytearray(whole)
        kind = number % 4
        if kind == 0:
            frame = bytearray(draw.randbytes(draw.randrange(200)))
        elif kind == 1:
            del frame[draw.randrange(len(frame)) :]
        else:
            for _ in range(1 + 4 * (kind - 2)):
                frame[draw.randrange(len(frame))] = draw.randrange(256)
        reply = decode(hostile.ask(bytes(frame)))
        errors += Kind.ERROR in reply.tensors
        if number % 500 == 0:
            (z, y), (again, _) = batch(number), batch(number)
            assert torch.equal(honest.learn(z, y)[0], near.learn(again, y)[0])
    assert errors > 9_000
    assert all(torch.equal(near.weights()[name], far.weights()[name]) for name in near.weights())


# Requests that are lost, late or repeated


def test_a_request_whose_connection_broke_is_sent_again_and_done_once(up: Up) -> None:
    far = learner()
    host = up.host({"a": serve(Service({"a": far}))})
    connection = up.connection(host)
    remote = Remote("server", Framed(connection.ask), "a")
    remote.learn(*batch())
    for context in list(host._connections.values()):
        context.cancel()
    remote.learn(*batch(1))
    assert far.steps == 2


def test_a_server_that_is_away_is_waited_for_no_longer_than_the_patience(up: Up) -> None:
    host = up.host({"a": serve(Service({"a": learner()}))})
    remote = Remote("server", Framed(up.connection(host, patience=0.3).ask), "a")
    remote.predict(batch()[0])
    host.stop(0)
    with pytest.raises(ConnectionError, match=r"none within 0\.3 s"):
        remote.predict(batch()[0])


def test_a_reply_that_does_not_come_is_waited_for_until_the_deadline(up: Up) -> None:
    over = threading.Event()

    def never(frame: bytes) -> bytes:
        over.wait(10)
        return frame

    host = up.host({"a": never})
    with pytest.raises(TimeoutError, match=r"within 0\.2 s"):
        up.connection(host, deadline=0.2).ask(b"anything")
    over.set()


class Slow:
    """A member that takes its time, once."""

    def __init__(self, seconds: float):
        self.name, self.seconds, self.asked = "a", seconds, 0

    def round(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        self.asked += 1
        time.sleep(self.seconds)
        self.seconds = 0.0
        return {name: tensor + 1 for name, tensor in weights.items()}, 7


def answering(connection: Connection, service: Service) -> threading.Thread:
    thread = threading.Thread(target=connection.answer, args=(serve(service),), daemon=True)
    thread.start()
    return thread


def test_a_client_answers_what_the_server_asks_and_a_late_answer_counts_for_nothing(up: Up) -> None:
    host = up.host({"a": serve(Service({"a": learner()}))}, deadline=0.3)
    slow = Slow(1.0)
    answering(up.connection(host), Service({"a": slow}))
    assert host.line("a").wait(10)
    member = RemoteMember("a", Framed(host.line("a")), "a")
    with pytest.raises(TimeoutError, match="left out of this round"):
        member.round({"w": torch.zeros(2)})
    time.sleep(1.0)
    weights, count = member.round({"w": torch.full((2,), 5.0)})
    assert (weights["w"].tolist(), count, slow.asked) == ([6.0, 6.0], 7, 2)


def test_a_client_that_comes_back_is_asked_again_what_it_did_not_answer(up: Up) -> None:
    host = up.host({"a": serve(Service({"a": learner()}))}, deadline=20)
    slow = Slow(0.5)
    answering(up.connection(host), Service({"a": slow}))
    assert host.line("a").wait(10)
    threading.Timer(0.2, lambda: [context.cancel() for context in list(host._connections.values())]).start()
    weights, _ = RemoteMember("a", Framed(host.line("a")), "a").round({"w": torch.zeros(2)})
    assert weights["w"].tolist() == [1.0, 1.0]
    assert slow.asked == 1  # the repeat was answered from memory


def test_a_client_that_waited_long_comes_back_when_the_connection_breaks(up: Up) -> None:
    host = up.host({"a": serve(Service({"a": learner()}))}, deadline=20)
    answering(up.connection(host, patience=0.5), Service({"a": Slow(0.0)}))
    assert host.line("a").wait(10)
    time.sleep(1.0)  # longer than the patience, in peace
    for context in list(host._connections.values()):
        context.cancel()
    assert RemoteMember("a", Framed(host.line("a")), "a").round({"w": torch.zeros(2)})[1] == 7


def test_a_meter_counts_what_is_no_frame_as_framing() -> None:
    meter = Metered(serve(Service({"a": learner()})))
    assert Kind.ERROR in decode(meter(b"nonsense")).tensors
    assert meter.nbytes["up"] == {"framing": 8}


def test_a_gate_lets_through_the_open_rounds_requests_alone() -> None:
    far = learner()
    gate = Gate("a", Service({"a": far}))
    remote = Remote("server", gate, "a")
    for number, tag in enumerate(["x", "y"]):
        for session in ("a", f"a@{tag}", "a@"):
            remote.enter(session)
            if session == f"a@{tag}":
                continue  # which would wait for its round
            with pytest.raises(ValueError, match="expected a"):
                remote.learn(*batch())
        gate.open(tag)
        for session in ("a", "a@z"):
            remote.enter(session)
            with pytest.raises(ValueError, match="took longer than the deadline"):
                remote.learn(*batch())
        remote.enter(f"a@{tag}")
        remote.learn(*batch(number))
        gate.close()
    assert far.steps == 2


def test_a_round_is_known_by_all_of_its_weights() -> None:
    start = {"w": torch.zeros(2), "n": torch.tensor(1)}
    others = [
        {**start, "w": torch.tensor([0.0, 1e-30])}, {**start, "n": torch.tensor(2)}, {"w": start["w"]},
        {**start, "w": torch.zeros(2, 1)}, {**start, "w": torch.zeros(2, dtype=torch.float64)},
    ]  # fmt: skip
    assert round_tag(dict(reversed(start.items()))) == round_tag(start)
    assert round_tag(start) not in [round_tag(other) for other in others]


# What outlives a kill


def test_a_journal_reads_what_was_written_whole_and_nothing_of_a_torn_end(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j" / "0")
    for step in (1, 2, 3):
        journal.append(Message("learn", {Kind.ACTIVATION: torch.full((2,), float(step))}, "a", step))
    journal.close()
    path = tmp_path / "j" / "0"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(path.read_bytes()[:-3])
    again = Journal(path)
    assert [message.step for message in again] == [1, 2]
    again.append(Message("learn", {Kind.ACTIVATION: torch.zeros(2)}, "a", 9))
    assert [message.step for message in again] == [1, 2, 9]
    again.clear()
    assert list(again) == []
    again.close()


def test_a_service_that_replays_its_journal_is_as_before_and_answers_the_last_request_again(tmp_path: Path) -> None:
    far, service = learner(), Service({"a": (first := learner())}, memory=2)
    journal = Journal(tmp_path / "0")
    remote = Remote("server", Journaled(service, journal), "a")
    replies = [remote.learn(*batch(number))[0] for number in range(3)]
    with pytest.raises(ValueError, match="expected a session among"):
        Journaled(service, journal).request(Message("learn", {}, "nobody", 1))
    remote.predict(batch()[0])
    journal.close()
    reread = Journal(tmp_path / "0")
    again = Journaled(Service({"a": far}, memory=2), reread)
    assert again.replay() == 3  # not the one that was refused, nor a prediction, which moves nothing
    assert all(torch.equal(first.weights()[name], far.weights()[name]) for name in first.weights())
    z, y = batch(2)
    last = again.request(Message("learn", {Kind.INPUT: z, Kind.LABEL: y}, "a", 3))
    assert torch.equal(last.tensors[Kind.LOSS], replies[2])
    assert far.steps == 3
    reread.close()


def test_a_service_remembers_as_many_exchanges_as_it_is_told_and_keeps_them_in_its_state() -> None:
    party = learner()
    service = Service({"a": party}, memory=2)
    asked = [
        Message("learn", {Kind.INPUT: batch(step)[0], Kind.LABEL: batch(step)[1]}, "a", step) for step in (1, 2, 3)
    ]
    replies = [service.request(message) for message in asked]
    state = service.state_dict()
    other = Service({"a": party}, memory=2)
    other.load_state_dict(state)
    for one in (service, other):
        assert torch.equal(one.request(asked[1]).tensors[Kind.LOSS], replies[1].tensors[Kind.LOSS])
        with pytest.raises(ValueError, match="expected a step of a after 3, got 1"):
            one.request(asked[0])
        with pytest.raises(ValueError, match="repeat a step as it was"):
            one.request(Message("learn", asked[0].tensors, "a", 3))
    assert party.steps == 3
    with pytest.raises(ValueError, match="memory of 1 exchange or more"):
        Service({}, memory=0)


def lasting(
    path: Path, service: Service, *, broken_after: int = 1 << 30, error: type[Exception] = ConnectionError,
    run: str = "", dropout: float = 0.0,
) -> LastingMember:  # fmt: skip
    """Return a member whose line breaks once, after so many requests, when the server has done what it was asked."""
    count = 0

    class Breaking:
        def request(self, message: Message) -> Message:
            nonlocal count
            count += 1
            reply = replace(service.request(replace(message, session="a")), session=message.session)
            if count == broken_after + 1:
                raise error("killed")
            return reply

    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(3))
    y = torch.arange(20) % 3
    client = learner("client", seed=5, width=4)
    if dropout:
        stage = nn.Sequential(client.stage, nn.Dropout(dropout))
        client = Learner("client", stage, torch.optim.SGD(stage.parameters(), 0.1, momentum=0.9))
    batches = Batches(x, y, batch_size=4, seed=1)
    return LastingMember(client, Remote("server", Breaking(), "a"), batches, path, run=run)


def flat_top() -> Learner:
    stage = nn.Linear(3, 3)
    nn.init.eye_(stage.weight)
    nn.init.zeros_(stage.bias)
    return Learner("server", stage, torch.optim.SGD(stage.parameters(), 0.1, momentum=0.9))


@pytest.mark.parametrize("error", [ConnectionError, ValueError])
def test_a_member_that_is_refused_in_mid_round_is_as_before_randomness_and_all(
    tmp_path: Path, error: type[Exception]
) -> None:
    calm, rough = flat_top(), flat_top()
    whole = lasting(tmp_path / "calm", Service({"a": calm}), dropout=0.5)
    start = whole.learner.weights()
    wanted, _ = whole.round(start)
    member = lasting(tmp_path / "rough", Service({"a": rough}), broken_after=2, error=error, dropout=0.5)
    with pytest.raises(error, match="killed"):
        member.round(start)
    found, _ = member.round(start)
    assert rough.steps == calm.steps == 5
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert all(torch.equal(calm.weights()[name], rough.weights()[name]) for name in calm.weights())


def test_a_member_that_was_killed_and_left_out_takes_part_in_the_next_round(tmp_path: Path) -> None:
    top = flat_top()
    service = Service({"a": top})
    with pytest.raises(ConnectionError, match="killed"):
        lasting(tmp_path / "a", service, broken_after=2).round(learner("client", seed=6).weights())
    again = lasting(tmp_path / "a", service)
    _, count = again.round(learner("client", seed=7).weights())
    assert (count, top.steps) == (20, 3 + 5)


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    lasting(tmp_path / "a", Service({"a": flat_top()}), run="x").round(learner("client", seed=6).weights())
    with pytest.raises(ValueError, match="that of another one; give another folder"):
        lasting(tmp_path / "a", Service({"a": flat_top()}), run="y")


def test_a_journal_that_finds_no_space_keeps_what_it_has_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "0")
    journal.append(Message("learn", {}, "a", 1))
    write = os.write
    with monkeypatch.context() as patch:

        def full(file: int, data: bytes) -> int:
            patch.setattr(os, "write", no_more)
            return write(file, data[:10])

        def no_more(file: int, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "write", full)
        with pytest.raises(ValueError, match="No space left on device"):
            journal.append(Message("learn", {}, "a", 2))
    journal.append(Message("learn", {}, "a", 3))
    journal.close()
    again = Journal(tmp_path / "0")
    assert [message.step for message in again] == [1, 3]
    again.close()


class Answers:
    """A member that answers as it is told."""

    name = "a"

    def __init__(self, answer: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], int]]):
        self.answer = answer

    def round(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        return self.answer(weights)


def test_a_member_that_answers_with_an_error_or_half_an_answer_drops_out_and_that_is_all() -> None:
    def fails(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        raise ValueError("no space")

    gate, lines = Gate("a", Service({})), list[str]()
    start = {"w": torch.zeros(2), "v": torch.zeros(2)}
    for answer in (fails, lambda weights: ({"w": weights["w"]}, 3)):
        member = GatedMember(Answers(answer), gate, told=lines.append)  # type: ignore[arg-type]
        with pytest.raises(ConnectionError):
            member.round(start)
    assert ["no space" in lines[0], "2 entries" in lines[1]] == [True, True]
    assert GatedMember(Answers(lambda weights: (weights, 3)), gate).round(start)[1] == 3  # type: ignore[arg-type]


def test_a_request_that_is_early_waits_for_its_round_and_only_training_gets_through() -> None:
    far = learner()
    gate = Gate("a", Service({"a": far}))
    remote = Remote("server", gate, "a@early")
    for ask in (remote.weights, lambda: remote.forward(batch()[0]), lambda: remote.load_weights(far.weights())):
        with pytest.raises(ValueError, match="expected a verb among learn"):
            ask()
    early = threading.Thread(target=remote.learn, args=batch(), daemon=True)
    early.start()
    time.sleep(0.1)
    assert (early.is_alive(), far.steps) == (True, 0)
    gate.open("early")
    early.join(10)
    assert far.steps == 1
    gate.close()
    with pytest.raises(ValueError, match="took longer than the deadline"):
        remote.learn(*batch())  # over: it does not wait
    other = Remote("server", gate, "a@other")
    refused: list[str] = []

    def late() -> None:
        try:
            other.learn(*batch())
        except ValueError as error:
            refused.append(str(error))

    waiting = threading.Thread(target=late, daemon=True)
    waiting.start()
    gate.stop()
    waiting.join(10)
    assert len(refused) == 1


@pytest.mark.parametrize("broken_after", [0, 1, 3, 4])
def test_a_member_that_is_killed_goes_on_after_its_last_batch_and_no_step_is_made_twice(
    tmp_path: Path, broken_after: int
) -> None:
    start = learner("client", seed=6).weights()

    calm, rough = flat_top(), flat_top()
    whole = lasting(tmp_path / "calm", Service({"a": calm}))
    wanted = [whole.round(start), whole.round(learner("client", seed=7).weights())]
    service = Service({"a": rough})
    with pytest.raises(ConnectionError, match="killed"):  # after the server has made the step
        lasting(tmp_path / "rough", service, broken_after=broken_after).round(start)
    member = lasting(tmp_path / "rough", service)
    found = [member.round(start), member.round(learner("client", seed=7).weights())]
    assert rough.steps == calm.steps == 10
    for (weights, count), (own, own_count) in zip(wanted, found, strict=True):
        assert count == own_count == 20
        assert all(torch.equal(weights[name], own[name]) for name in weights)
    again = lasting(tmp_path / "rough", service)  # killed after its answer, which did not arrive
    repeated, _ = again.round(learner("client", seed=7).weights())
    assert all(torch.equal(found[1][0][name], repeated[name]) for name in repeated)
    assert rough.steps == 10


# A deployment


def deployed(
    up: Up, folder: Path, deployment: Deployment, *, deadline: float = 60.0,
    told: Callable[[str], None] = lambda line: None, clients: tuple[str, ...] = CLIENTS,
) -> tuple[Server, Served, dict[str, Joined]]:  # fmt: skip
    server = Server(
        deployment, "localhost:0", Credentials.read(up.certs, "server"), folder / "server", deadline=deadline, told=told
    )
    found: dict[str, Any] = {}

    def client(name: str) -> None:
        found[name] = join(
            name, f"localhost:{server.host.port}", Credentials.read(up.certs, name), folder / name, told=told
        )

    def serving() -> None:
        try:
            found["served"] = server.run()
        finally:
            server.close()

    running = threading.Thread(target=serving)
    running.start()
    threads = [threading.Thread(target=client, args=(name,)) for name in clients]
    for thread in threads:
        thread.start()
    for thread in [*threads, running]:
        thread.join(120)
    return server, found.pop("served"), found


ROUNDS: dict[str, Callable[..., Any]] = {
    "splitfed_v1": splitfed_v1_round,
    "splitfed_v2": lambda members, learners, bottom, top: splitfed_v2_round(members, bottom),
    "in_turn": lambda members, learners, bottom, top: in_turn_round(members, bottom),
    "fedavg": lambda members, learners, bottom, top: fedavg_round(members, bottom),
}


@pytest.mark.parametrize("protocol", list(ROUNDS))
def test_a_deployment_trains_as_one_process_does_to_the_bit(up: Up, tmp_path: Path, protocol: str) -> None:
    deployment = Deployment(CLIENTS, protocol=protocol, rounds=2, batch_size=128)
    lines: list[str] = []
    server, served, joined = deployed(up, tmp_path, deployment, told=lines.append)
    splits = parts_of(deployment, None)
    bottom, top, learners = server_learners(deployment, splits)
    members = [
        Member(
            client_learner(deployment, name, splits),
            learners.get(name),
            own_batches(deployment, name, share_of(deployment, name, splits.private)),
        )
        for name in CLIENTS
    ]
    for _ in range(2):
        ROUNDS[protocol](members, learners, bottom, top)
    for near, far in [(bottom, server.bottom), (top, server.top)]:
        if near is not None and far is not None:
            assert all(torch.equal(near.weights()[name], far.weights()[name]) for name in near.weights())
    assert len(served.accuracy) == 2
    assert {name: done.rounds for name, done in joined.items()} == {"a": 2, "b": 2}
    assert served.nbytes["up"]["weights"] > 0
    assert ("activation" in served.nbytes["up"]) is (protocol != "fedavg")
    assert all("tensor" not in line and "BEGIN" not in line for line in lines)
    for party in ("server", *CLIENTS):
        assert stat.S_IMODE((tmp_path / party / "state").stat().st_mode) == 0o700
    assert not list((tmp_path / "server" / "state").glob("journal*"))


def test_a_slow_client_is_left_out_of_the_round_and_told_so_and_the_others_go_on(
    up: Up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = Deployment(CLIENTS, rounds=2, batch_size=256)
    step, slept = Member.step, []

    def sleepy(self: Member, x: Tensor, y: Tensor) -> float:
        if self.name == "b" and not slept:
            slept.append(True)
            time.sleep(4.0)
        return step(self, x, y)

    monkeypatch.setattr(Member, "step", sleepy)
    refused: list[str] = []
    answer = Service.request

    def watched(self: Service, message: Message) -> Message:
        try:
            return answer(self, message)
        except ValueError as error:
            refused.append(str(error))
            raise

    monkeypatch.setattr(Service, "request", watched)
    _, served, joined = deployed(up, tmp_path, deployment, deadline=3.0)
    assert served.left_out[0] == ["b"]
    assert joined["a"].rounds == 2
    assert any("took longer than the deadline" in line for line in refused)


def test_a_folder_of_another_training_is_refused(up: Up, tmp_path: Path) -> None:
    deployed(up, tmp_path, Deployment(("a",), protocol="fedavg", rounds=1, batch_size=256), clients=("a",))
    with pytest.raises(ValueError, match="holds another one; give another --out"):
        Server(Deployment(("a",), rounds=2), "localhost:0", Credentials.read(up.certs, "server"), tmp_path / "server")


def test_a_folder_is_one_processes_at_a_time(up: Up, tmp_path: Path) -> None:
    server = Server(Deployment(("a",)), "localhost:0", Credentials.read(up.certs, "server"), tmp_path)
    with pytest.raises(ValueError, match="another one that runs uses it"):
        Server(Deployment(("a",)), "localhost:0", Credentials.read(up.certs, "server"), tmp_path)
    server.close()
    Server(Deployment(("a",)), "localhost:0", Credentials.read(up.certs, "server"), tmp_path).close()


def test_a_training_that_this_release_does_not_know_is_refused() -> None:
    told = Deployment(CLIENTS).told()
    whole = f'{{"run": "x", "training": {told}}}'
    assert announced(whole) == (Deployment(CLIENTS), "x")
    wrong = [whole.replace(*pair) for pair in (("splitfed_v1", "splitfed_v9"), ('"seed": 0', '"seed": "x"'))]
    more = f'{{"run": "x", "training": {told[:-1]}, "more": 1}}}}'
    for text in ("{}", "nonsense", "[" * 100_000, told, more, *wrong):
        with pytest.raises(ValueError, match="one that it does not"):
            announced(text)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["splitfed_v1", "splitfed_v2"])
def test_kills_do_not_show_in_the_model(protocol: str) -> None:
    found = killed_training(protocol, kills=4, rounds=10, seed=3)
    assert found["equal"]
    assert min(found[f"kills_{name}"] for name in ("server", "a", "b")) >= 1


def test_what_comes_from_a_socket_is_never_unpickled() -> None:
    root = Path(__file__).parents[1]
    files = [path for path in (root / "splitlearn").rglob("*.py") if path.parent.name != "data"]
    assert len(files) > 20
    for path in [*files, root / "experiments" / "serving.py"]:
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "torch.load(" not in text, path


def test_bytes_of_frames_are_metered_on_both_ends_alike(up: Up) -> None:
    near, far = Metered(lambda frame: b""), Metered(serve(Service({"a": learner()})))
    host = up.host({"a": far})
    near = Metered(up.connection(host).ask)
    Remote("server", Framed(near), "a").learn(*batch())
    assert near.nbytes == far.nbytes


def test_a_layer_on_ciphertexts_rides_the_stream_as_any_party_does(up: Up) -> None:
    torch.manual_seed(0)
    bottom, middle, head = nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, 4), nn.Linear(4, 3)
    twin = Learner("twin", copy.deepcopy(nn.Sequential(bottom, middle, head)))
    twin.optimizer = torch.optim.SGD(twin.stage.parameters(), 0.1)
    meter = Metered(serve(Service({"a": CipherHolder("server", copy.deepcopy(middle))})))
    host = up.host({"a": meter})
    remote = Remote("server", Framed(up.connection(host).ask), "a")
    layer = EncryptedLayer(Keys(), remote, update="encrypted", layer=middle, rows=8)
    stage = nn.Sequential(bottom, layer, head)
    client = Learner("client", stage, torch.optim.SGD(stage.parameters(), 0.1))
    x, y = torch.rand(8, 6), torch.arange(8) % 3
    for _ in range(2):
        assert he_encw(client, x, y).item() == pytest.approx(twin.learn(x, y)[0].item(), abs=1e-3)
    kinds = {kind for way in meter.nbytes.values() for kind, count in way.items() if count}
    assert kinds == {"ciphertext", "count", "parameters", "framing"}
