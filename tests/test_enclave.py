"""Enclaves: frames are really sealed, no nonce comes twice, a host sees sizes alone, and overhead is what it says."""

import copy
import pickle
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from splitlearn import (
    Ans,
    Framed,
    Grants,
    Int8,
    Kind,
    Learner,
    Message,
    Palette,
    Remote,
    Service,
    Threat,
    TopK,
    Uniform,
    View,
    Zstd,
    cut,
    decode,
    encode,
    observe,
    serve,
    vanilla,
    wire,
)
from splitlearn.codecs import Padded, RandomK, through
from splitlearn.cost import compute_seconds, count
from splitlearn.devices import DEVICES
from splitlearn.enclave import (
    ENCLAVES,
    LEFT_OUT,
    SEALING_NBYTES,
    Attested,
    Enclave,
    Host,
    Sealed,
    Session,
    enclosed,
    in_enclave,
    opened,
)
from splitlearn.frames import Codec
from splitlearn.network import VirtualClock
from splitlearn.threat import granted, observe_host
from splitlearn.wire import Carrier

ATTESTED = Attested(runs="an echo", vouched="this test")
HOST = Threat("host", sees=frozenset())


def echo(frame: bytes) -> bytes:
    return frame[::-1]


class Tap:
    """A carrier that keeps what passes, and may pass on something else."""

    def __init__(self, carrier: Carrier):
        self.carrier, self.passed = carrier, list[bytes]()

    def __call__(self, frame: bytes) -> bytes:
        reply = self.carrier(frame)
        self.passed += [frame, reply]
        return reply


def line(carrier: Carrier = echo) -> tuple[Sealed, Tap]:
    session = Session(ATTESTED)
    tap = Tap(opened(carrier, session))
    return Sealed(tap, session), tap


def test_what_is_sealed_comes_back_and_no_byte_of_it_passes_in_the_clear() -> None:
    sealed, tap = line()
    for frame in (b"", b"x", bytes(range(256)) * 40):
        assert sealed(frame) == frame[::-1]
        for passed in tap.passed[-2:]:
            assert len(passed) == len(frame) + SEALING_NBYTES == len(frame) + 28
            assert all(frame[at : at + 8] not in passed for at in range(0, len(frame) - 8, 8))
    again, other = line()
    again(b"twice")
    sealed(b"twice")
    assert other.passed[0] != tap.passed[-2]  # each session has a key of its own


def refused(call: object, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [0, 3, 11, 12, 20, -1])
def test_a_bit_that_is_changed_is_refused_on_either_side(place: int) -> None:
    def spoilt(frame: bytes) -> bytes:
        changed = bytearray(frame)
        changed[place] ^= 1
        return bytes(changed)

    session = Session(ATTESTED)
    inside = opened(echo, session)
    refused(lambda: Sealed(lambda frame: inside(spoilt(frame)), session)(b"some frame"), "as the other end sealed it")
    refused(lambda: Sealed(lambda frame: spoilt(inside(frame)), session)(b"some frame"), "as the other end sealed it")


@pytest.mark.parametrize("short", [0, 11, 12, 27])
def test_a_frame_that_is_cut_short_is_refused(short: int) -> None:
    session = Session(ATTESTED)
    inside = opened(echo, session)
    refused(lambda: Sealed(lambda frame: inside(frame[:short]), session)(b"frame"), "changed, cut short")
    refused(lambda: Sealed(lambda frame: inside(frame)[:short], session)(b"frame"), "changed, cut short")


def test_a_host_can_neither_replay_nor_reorder_nor_reflect_nor_join_sessions() -> None:
    session = Session(ATTESTED)
    inside, calls = opened(echo, session), list[bytes]()
    first = session.ask(b"first")[1]
    second = session.ask(b"second")[1]
    old = inside(first)
    refused(lambda: inside(first), "again or too late")
    assert session.read(2, inside(second)) == b"dnoces"
    refused(lambda: inside(first), "again or too late")
    refused(lambda: Sealed(lambda frame: old, session)(b"third"), "the reply to request 3, got that to 1")
    refused(lambda: Sealed(lambda frame: frame, session)(b"fourth"), "of this end's own back")
    refused(lambda: inside(old), "of this end's own back")
    refused(lambda: opened(calls.append, Session(ATTESTED))(first), "another session")  # type: ignore[arg-type]
    assert not calls  # nothing reached the stage


def test_no_nonce_comes_twice_whoever_asks() -> None:
    session, lock = Session(ATTESTED), threading.Lock()
    tap = Tap(opened(echo, session))

    def ask() -> None:
        for number in range(50):
            with lock:  # one exchange at a time
                Sealed(tap, session)(b"%d" % number)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    nonces = [frame[:12] for frame in tap.passed]
    assert len(nonces) == len(set(nonces)) == 400
    for spare in (copy.copy, copy.deepcopy, pickle.dumps):
        refused(lambda spare=spare: spare(session), "same nonces")


def test_numbers_are_given_out_once_to_threads_that_ask_at_once() -> None:
    session, found = Session(ATTESTED), list[int]()
    ask = [threading.Thread(target=lambda: found.extend(session.ask(b"")[0] for _ in range(200))) for _ in range(4)]
    for one in ask:
        one.start()
    for one in ask:
        one.join()
    assert sorted(found) == list(range(1, 801))


def test_what_is_assumed_must_be_said() -> None:
    words = ATTESTED.in_words()
    assert any("assumed: the enclave runs an echo; vouched for by this test" in line for line in words)
    assert any(line.startswith("modelled") for line in words)
    assert LEFT_OUT in words
    refused(lambda: Attested(runs=" ", vouched="nobody"), "in words")
    refused(lambda: Session("trust me"), "Attested")  # type: ignore[arg-type]


def test_without_cryptography_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(ImportError, match=r"pip install 'splitlearn\[net\]'"):
        Session(ATTESTED)


def test_a_host_writes_down_bytes_and_its_own_seconds() -> None:
    clock = VirtualClock()

    def slow(frame: bytes) -> bytes:
        clock.sleep(0.1 * len(frame))
        return b"reply" * len(frame)

    carrier, host = enclosed(slow, ATTESTED, clock=clock)
    for number in range(1, 4):
        carrier(b"x" * number)
    host.silent()
    rows = [[28 + n, 28 + 5 * n, 0.1 * n] for n in range(1, 4)]
    assert host.sizes.dtype == torch.float64
    assert torch.equal(host.sizes[:, :2], torch.tensor([*rows, [0, 0, 0]], dtype=torch.float64)[:, :2])
    assert host.sizes[:, 2].tolist() == [0.1, 0.2, 0.3, 0.0]  # to the nanosecond, whatever the clock has added up
    assert host.nbytes == {"up": {"ciphertext": 90}, "down": {"ciphertext": 114}}
    down, other = enclosed(slow, ATTESTED, clock=clock, requests="down")
    down(b"xx")
    assert other.sizes[0, :2].tolist() == [38, 30]
    assert Host(echo).sizes.shape == (0, 3)
    refused(lambda: Host(echo, requests="sideways"), "'up' or 'down'")


def test_an_exchange_that_fails_is_seen_too() -> None:
    def broken(frame: bytes) -> bytes:
        raise ConnectionError("gone")

    carrier, host = enclosed(broken, ATTESTED, clock=VirtualClock())
    with pytest.raises(ConnectionError):
        carrier(b"frame")
    assert host.sizes.tolist() == [[33, 0, 0]]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)).double()


@pytest.mark.parametrize(
    "codec", [None, Ans(Uniform(4)), Padded(Zstd(Int8()), 64)], ids=lambda one: getattr(one, "name", "")
)
def test_training_in_an_enclave_is_plain_training_to_the_bit(codec: Codec | None) -> None:
    def trained(sealed: bool) -> tuple[list[Tensor], list[float]]:
        bottom, top = cut(model(), 3)
        client = Learner("client", bottom, torch.optim.Adam(bottom.parameters()))
        server = Learner("server", top, torch.optim.Adam(top.parameters()), seed=3)
        party = wire(server, codec).party
        if sealed:
            carrier, _ = enclosed(serve(Service({"server": server}), codec), ATTESTED)
            party = Remote("server", Framed(carrier, codec), "server")
        draws = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(6):
            x, y = torch.randn(7, 6, generator=draws).double(), torch.randint(0, 3, (7,), generator=draws)
            losses.append(vanilla(client, party, x, y).item())
        return [*bottom.state_dict().values(), *top.state_dict().values()], losses

    (plain, plain_losses), (inside, inside_losses) = trained(False), trained(True)
    assert plain_losses == inside_losses
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def predicted(x: Tensor, codec: Codec | None = None) -> tuple[Host, Tap]:
    """The host after samples have crossed one by one, and what passed it."""
    server, session, clock = Learner("server", nn.Linear(4, 2)), Session(ATTESTED), VirtualClock()
    tap = Tap(opened(serve(Service({"server": server}), codec), session))
    host = Host(tap, clock=clock)
    party = Remote("server", Framed(Sealed(host, session), codec), "server")
    for sample in x.split(1):
        party.predict(sample)
    return host, tap


def test_private_values_are_nowhere_on_the_host() -> None:
    x = torch.randn(5, 4)
    host, tap = predicted(x)
    for number, sample in enumerate(x):
        frame = b"".join(tap.passed[2 * number : 2 * number + 2])
        assert b"activation" not in frame
        assert all(value.numpy().tobytes() not in frame for value in sample)
    assert vars(host).keys() == {"rows", "_carrier", "_requests", "_clock"}
    assert all(type(one) is float for row in host.rows for one in row)


def test_a_hosts_view_holds_sizes_and_nothing_else() -> None:
    host, _ = predicted(torch.randn(5, 4))
    grants = Grants(auxiliary_x=torch.zeros(1), sizes_of=lambda x: torch.full((len(x), 3), 7.0))
    view = observe_host(host, threat=HOST, grants=grants)
    assert torch.equal(view.sizes, host.sizes)
    assert view.exchanges == ()
    for kind in Kind:
        with pytest.raises(LookupError, match="grant them with"):
            view.tensors(kind)
    asks = {
        "grant them with": view.activations,
        "queries=True": lambda: view.query_sizes(torch.zeros(2)),
        "white_box=True": lambda: view.encoder,
        r"auxiliary=True\)": lambda: view.auxiliary_x,
    }
    for grant, ask in asks.items():
        with pytest.raises(LookupError, match=grant):
            ask()
    asking = observe_host(host, threat=replace(HOST, queries=True), grants=grants)
    assert asking.query_sizes(torch.zeros(2, 4)).shape == (2, 3)
    with pytest.raises(LookupError, match="sizes_of"):
        observe_host(host, threat=replace(HOST, queries=True)).query_sizes(torch.zeros(2))
    view.sizes.zero_()
    assert torch.equal(view.sizes, host.sizes)  # what one attack does to them does not reach the next


def test_who_reads_tensors_is_no_host_and_a_wire_is_no_host() -> None:
    host, _ = predicted(torch.randn(2, 4))
    refused(lambda: observe_host(host, threat=Threat()), "reads no tensor")
    with pytest.raises(LookupError, match="no host, no view"):
        observe_host(threat=HOST)
    with pytest.raises(LookupError, match="got Recorded"):
        observe_host(wire(Learner("server", nn.Linear(4, 2))).record, threat=HOST)  # type: ignore[arg-type]
    with pytest.raises(LookupError, match="observe_host"):
        granted(HOST).sizes  # noqa: B018
    recorded = wire(Learner("server", nn.Linear(4, 2)))
    recorded.party.predict(torch.zeros(1, 4))
    with pytest.raises(LookupError, match="observe_host"):
        observe(recorded.record, threat=Threat()).sizes  # noqa: B018
    assert HOST.in_words()[0] == "on its wire: no tensor, but how many bytes pass, and when"


def test_sizes_are_averaged_over_releases() -> None:
    host = Host(echo, clock=VirtualClock())
    host.rows = [(1.0, 0.0, 0.0), (2.0, 0.0, 0.0), (3.0, 0.0, 0.0), (6.0, 0.0, 0.0)]
    view: View = observe_host(host, threat=replace(HOST, releases=2))
    assert view.sizes[:, 0].tolist() == [2.0, 4.0]
    with pytest.raises(LookupError, match="4 exchanges passed"):
        observe_host(host, threat=replace(HOST, releases=3)).sizes  # noqa: B018


CODECS = [Int8(), Uniform(3), Ans(Uniform(4)), Ans(Palette(2)), Zstd(), Zstd(TopK(0.2)), TopK(0.3), RandomK(0.5)]


@pytest.mark.parametrize("multiple", [1, 64, 1024])
@pytest.mark.parametrize("codec", CODECS, ids=lambda one: one.name)
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 7), (5,), (2, 0)])
def test_padding_changes_nothing_but_the_length(codec: Codec, multiple: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    z = torch.randint(0, 4, shape).double() if "palette" in codec.name else torch.randn(shape).double()
    padded = Padded(copy.deepcopy(codec), multiple)
    message = Message("predict", {Kind.ACTIVATION: z, Kind.LABEL: torch.tensor([1])})
    frame = encode(message, padded)
    plain = decode(encode(message, codec), codec)
    came = decode(frame, padded)
    assert torch.equal(came.tensors[Kind.ACTIVATION], plain.tensors[Kind.ACTIVATION])
    assert torch.equal(came.tensors[Kind.LABEL], message.tensors[Kind.LABEL])
    parts = padded.pack(Kind.ACTIVATION, z)
    assert parts.keys() == {"padded"}
    assert len(parts["padded"]) % multiple == 0
    if multiple == 1024:
        assert len(parts["padded"]) == 1024
    with pytest.raises(ValueError, match="codec"):
        decode(frame, codec)  # both ends must hold the same


def test_frames_of_one_multiple_are_of_one_length() -> None:
    torch.manual_seed(0)
    bare, padded = Ans(Uniform(4)), Padded(Ans(Uniform(4)), 1024)
    samples = [torch.randn(1, 256) ** power for power in (1, 3, 5, 9)]  # less and less entropy
    lengths = {
        one.name: [len(encode(Message("predict", {Kind.ACTIVATION: z}), one)) for z in samples]
        for one in (bare, padded)
    }
    assert len(set(lengths[bare.name])) == 4
    assert len(set(lengths[padded.name])) == 1
    assert through(padded, samples[0]).equal(through(bare, samples[0]))
    assert padded.name == "padded1024(ans(int4))"
    assert padded.kinds == bare.kinds


def test_the_state_of_what_is_padded_goes_with_it() -> None:
    padded = Padded(RandomK(0.5), 64)
    padded.pack(Kind.ACTIVATION, torch.randn(2, 8))
    again = Padded(RandomK(0.5), 64)
    again.load_state_dict(padded.state_dict())
    z = torch.randn(2, 8)
    assert torch.equal(again.pack(Kind.ACTIVATION, z)["padded"], padded.pack(Kind.ACTIVATION, z)["padded"])
    assert Padded(Int8(), 64).state_dict() == {}


def reason(padded: Padded, part: Tensor, shape: tuple[int, ...]) -> str:
    """Why the part is refused; empty where it is not, as a level may be any byte."""
    try:
        padded.unpack({"padded": part}, torch.float32, shape)
    except ValueError as error:
        return str(error)
    return ""


def test_padding_that_is_malformed_is_refused_in_one_line() -> None:
    padded, shape = Padded(Int8(), 64), (2, 5)
    good = padded.pack(Kind.ACTIVATION, torch.randn(shape))["padded"]
    draws = torch.Generator().manual_seed(0)
    for at in range(len(good)):
        bad = good.clone()
        bad[at] = int(torch.randint(0, 256, (), generator=draws))
        why = reason(padded, bad, shape)
        assert not why or why.startswith("malformed frame")
        assert "\n" not in why
    tail = good.clone()
    tail[-1] = 1
    for bad in (tail, good[:-1], good[:0], torch.cat([good, torch.zeros(64, dtype=torch.uint8)]), good.long()):
        refused(lambda bad=bad: padded.unpack({"padded": bad}, torch.float32, shape), "malformed frame")
    refused(lambda: padded.unpack({}, torch.float32, shape), "malformed frame")
    refused(lambda: Padded(Int8(), 0), "whole bytes of 1 or more")
    refused(lambda: Padded(None, 8), "a codec to pad")  # type: ignore[arg-type]


def test_overhead_by_hand() -> None:
    plain, half = DEVICES["laptop"], Enclave(name="half", slowdown=2.0, memory=1000, paging=5.0, source="this test")
    assert [half.factor(nbytes) for nbytes in (0, 500, 1000)] == [2.0, 2.0, 2.0]
    assert half.factor(2000) == pytest.approx(2 * (1 + 4 * 0.5))  # half of it does not fit
    assert half.factor(4000) == pytest.approx(2 * (1 + 4 * 0.75))
    inside = in_enclave(plain, half, 2000)
    for rate in ("convolution", "linear", "moved"):
        assert getattr(inside, rate) == pytest.approx(getattr(plain, rate) / 6)
    assert inside.overhead == pytest.approx(6 * plain.overhead)
    assert (inside.modelled, inside.memory, inside.watts) == (True, 1000, plain.watts)
    assert inside.name == "laptop in half"
    assert plain.source in inside.source
    assert "this test" in inside.source
    layers = count(nn.Sequential(nn.Linear(10, 10), nn.ReLU()), torch.zeros(1, 10))
    assert compute_seconds(layers, inside) == pytest.approx(6 * compute_seconds(layers, plain))


def test_every_enclave_is_no_faster_than_its_device_and_says_where_its_figures_are_from() -> None:
    assert {"sgx", "tdx", "confidential_gpu"} <= ENCLAVES.keys()
    for name, one in ENCLAVES.items():
        assert one.name == name
        assert one.slowdown > 1
        assert one.sealing == SEALING_NBYTES
        assert "20" in one.source
        assert "assumed" in one.source
    refused(lambda: Enclave(name="fast", slowdown=0.5, source=""), "slowdown of 1 or more")
    refused(lambda: Enclave(name="none", slowdown=1.0, memory=0, source=""), "memory > 0")
    refused(lambda: ENCLAVES["sgx"].factor(-1), "bytes ≥ 0")
