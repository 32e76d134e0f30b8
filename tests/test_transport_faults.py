"""What goes wrong at a transport's edges: files and addresses that are none, and clients that take what is others'."""

import queue
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from torch import Tensor, nn

from splitlearn import Framed, Learner, serve
from splitlearn.codecs import Float16
from splitlearn.federation import fedavg_round
from splitlearn.frames import LENGTH, MAGIC, PRELUDE, VERSION, Kind, Message, decode, encode, frame_nbytes
from splitlearn.remote import Remote
from splitlearn.service import Service
from splitlearn.transport import Connection, Credentials, Gate, GatedMember, Host, issue, make_authority
from splitlearn.transport.gate import BusyError
from splitlearn.transport.host import WORKERS
from splitlearn.transport.link import ASK, SERVICE, grpc_module, options

CLIENTS = ("a", "b")


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    make_authority(folder)
    issue(folder, "server", hosts=["localhost"])
    for name in CLIENTS:
        issue(folder, name)
    return folder


@pytest.fixture
def closing_all() -> Iterator[list[Callable[[], object]]]:
    found: list[Callable[[], object]] = []
    yield found
    for one in reversed(found):
        one()


def learner(name: str = "server", seed: int = 0) -> Learner:
    torch.manual_seed(seed)
    stage = nn.Linear(4, 3)
    return Learner(name, stage, torch.optim.SGD(stage.parameters(), 0.1, momentum=0.9))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(5, 4, generator=draws), torch.randint(0, 3, (5,), generator=draws)


def asked(connection: Connection) -> bytes:
    return connection.ask(encode(Message("predict", {Kind.INPUT: torch.zeros(1, 4)}, "a", 1)))


# Files and addresses


def short_lived(folder: Path, name: str, begin: datetime, end: datetime) -> None:
    """Write a certificate of the folder's authority that is valid between these times."""
    signer: Any = load_pem_private_key((folder / "authority.key").read_bytes(), None)
    issuer = x509.load_pem_x509_certificate((folder / "authority.crt").read_bytes()).subject
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateBuilder(issuer, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    signed = builder.not_valid_before(begin).not_valid_after(end).sign(signer, hashes.SHA256())
    (folder / f"{name}.crt").write_bytes(signed.public_bytes(Encoding.PEM))
    (folder / f"{name}.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def swapped_key(folder: Path) -> None:
    issue(folder, "other")
    (folder / "a.key").write_bytes((folder / "other.key").read_bytes())


def locked_key(folder: Path) -> None:
    key: Any = load_pem_private_key((folder / "a.key").read_bytes(), None)
    (folder / "a.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )


def no_file(folder: Path) -> None:
    (folder / "a.key").unlink()
    (folder / "a.key").mkdir()  # which not even root can read


def expired(folder: Path) -> None:
    now = datetime.now(UTC)
    short_lived(folder, "a", now - timedelta(days=9), now - timedelta(days=2))


def early(folder: Path) -> None:
    now = datetime.now(UTC)
    short_lived(folder, "a", now + timedelta(days=1), now + timedelta(days=2))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a key of another": (swapped_key, r"a in .*: expected the private key \(.key\) of this party's .*, got that of an"),
    "a certificate that is none": (
        lambda folder: (folder / "a.crt").write_bytes(b"hello"),
        r"a in .*: expected this party's certificate .* in PEM, .* got 5 bytes of something else; copy",
    ),
    "an authority that is none": (
        lambda folder: (folder / "authority.crt").write_bytes(b""),
        r"expected the authority's certificate .* in PEM, .* got 0 bytes",
    ),
    "a torn certificate": (
        lambda folder: (folder / "a.crt").write_bytes((folder / "a.crt").read_bytes()[:200]),
        "expected this party's certificate .* in PEM",
    ),
    "a key that is none": (
        lambda folder: (folder / "a.key").write_bytes((folder / "a.crt").read_bytes()),
        r"expected a private key \(.key\) in PEM, got",
    ),
    "a key with a password": (locked_key, "without a password, got one with; write it without"),
    "a file that cannot be read": (no_file, "a.key that this user can read, got Is a directory"),
    "an old certificate": (expired, "expected this party's certificate .* to be valid now, .* make a new one"),
    "a certificate of tomorrow": (early, "to be valid now, .* or set this machine's clock"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_files_that_no_connection_can_be_made_with_are_named_at_once(tmp_path: Path, what: str) -> None:
    make_authority(tmp_path)
    issue(tmp_path, "a")
    spoil, match = SPOILT[what]
    spoil(tmp_path)
    with pytest.raises(ValueError, match=match) as found:
        Credentials.read(tmp_path, "a")
    assert "\n" not in str(found.value)
    assert "PRIVATE" not in str(found.value)


def test_an_authority_may_have_an_old_certificate_beside_a_new_one(tmp_path: Path) -> None:
    make_authority(tmp_path)
    issue(tmp_path, "a")
    now = datetime.now(UTC)
    short_lived(tmp_path, "old", now - timedelta(days=9), now - timedelta(days=2))
    new = (tmp_path / "authority.crt").read_bytes()
    (tmp_path / "authority.crt").write_bytes((tmp_path / "old.crt").read_bytes() + new)
    Credentials.read(tmp_path, "a")
    (tmp_path / "authority.crt").write_bytes((tmp_path / "old.crt").read_bytes())
    with pytest.raises(ValueError, match=r"expected the authority's certificate .* to be valid now"):
        Credentials.read(tmp_path, "a")


NO_ADDRESSES = [
    "localhost", ":99999", ":50051", "foo:bar", "localhost:65536", "localhost:-1", "localhost:", "", "::1:50051",
    "http://localhost:50051", "local host:50051", "localhost:50051\n", "localhost:٣",
]  # fmt: skip


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_an_address_that_is_none_is_said_at_once_by_both_ends(certs: Path, address: str) -> None:
    with pytest.raises(ValueError, match=r"expected an address HOST:PORT, the port from 1 to 65535, got .*; such as"):
        Connection(address, Credentials.read(certs, "a"))
    with pytest.raises(ValueError, match="expected an address HOST:PORT, the port from 0 to 65535"):
        Host(address, Credentials.read(certs, "server"), {"a": serve(Service({}))})


def test_a_client_needs_the_servers_port_and_a_server_can_have_one_chosen(certs: Path) -> None:
    with pytest.raises(ValueError, match="the port from 1"):
        Connection("localhost:0", Credentials.read(certs, "a"))
    host = Host("[::1]:0", Credentials.read(certs, "server"), {"a": serve(Service({}))})
    with pytest.raises(ValueError, match="is its port taken, or its host another machine's"):
        Host(f"[::1]:{host.port}", Credentials.read(certs, "server"), {"a": serve(Service({}))})
    host.stop(0)


def test_a_server_that_is_not_believed_is_not_tried_until_the_patience_ends(
    certs: Path, tmp_path: Path, closing_all: list[Callable[[], object]]
) -> None:
    make_authority(tmp_path)
    issue(tmp_path, "a")
    host = Host("localhost:0", Credentials.read(certs, "server"), {"a": serve(Service({"a": learner()}))})
    host.start()
    closing_all.append(lambda: host.stop(0))
    for own, name in ((Credentials.read(tmp_path, "a"), None), (Credentials.read(certs, "a"), "example.org")):
        lines: list[str] = []
        connection = Connection(f"localhost:{host.port}", own, patience=60.0, server_name=name, told=lines.append)
        closing_all.append(connection.close)
        with pytest.raises(
            ConnectionError, match=r"valid, of our authority and for that name, got .*; ask the operator"
        ):
            asked(connection)
        assert lines == []


def test_a_client_whose_certificate_ends_while_it_tries_says_so(
    tmp_path: Path, closing_all: list[Callable[[], object]]
) -> None:
    make_authority(tmp_path)
    issue(tmp_path, "server", hosts=["localhost"])
    now = datetime.now(UTC)
    short_lived(tmp_path, "a", now - timedelta(days=1), now + timedelta(seconds=2))
    host = Host("localhost:0", Credentials.read(tmp_path, "server"), {"a": serve(Service({"a": learner()}))})
    connection = Connection(f"localhost:{host.port}", Credentials.read(tmp_path, "a"), patience=60.0)
    closing_all.append(connection.close)
    host.stop(0)
    with pytest.raises(ValueError, match=r"this party's certificate .* to be valid now"):
        asked(connection)


def test_a_certificate_that_was_replaced_is_let_in_no_longer_and_its_heir_is(
    tmp_path: Path, closing_all: list[Callable[[], object]]
) -> None:
    make_authority(tmp_path)
    issue(tmp_path, "server", hosts=["localhost"])
    issue(tmp_path, "a")
    stolen = Credentials.read(tmp_path, "a")
    for new in (False, True):
        if new:
            issue(tmp_path, "a")
        host = Host("localhost:0", Credentials.read(tmp_path, "server"), {"a": lambda frame: frame})
        host.start()
        closing_all.append(partial(host.stop, 0))
        address = f"localhost:{host.port}"
        old, own = Connection(address, stolen), Connection(address, Credentials.read(tmp_path, "a"))
        closing_all.extend([old.close, own.close])
        assert own.ask(b"heir") == b"heir"
        if not new:
            assert old.ask(b"thief") == b"thief"
            continue
        with pytest.raises(PermissionError, match="not good any longer; ask the operator for another certificate"):
            old.ask(b"thief")
        assert host.refused == 1


def test_serial_numbers_of_refused_certificates_are_read_as_openssl_prints_them(tmp_path: Path) -> None:
    make_authority(tmp_path)
    issue(tmp_path, "a")
    pem = (tmp_path / "a.crt").read_bytes()
    number = x509.load_pem_x509_certificate(pem).serial_number
    (tmp_path / "refused").write_text(f"1F\nserial={number:X}\n")
    own = Credentials.read(tmp_path, "a")
    assert own.refused == {31, number}
    assert own.refuses(pem)
    assert not own.refuses((tmp_path / "authority.crt").read_bytes())
    (tmp_path / "refused").write_text("hospital-a\n")
    with pytest.raises(ValueError, match=r"expected serial numbers in hex, one a line, in .*; mend that file"):
        Credentials.read(tmp_path, "a")


# Requests that do not end


class Hangs:
    """A transport that answers when it is let go."""

    def __init__(self) -> None:
        self.asked, self.go, self.count = threading.Event(), threading.Event(), 0

    def request(self, message: Message) -> Message:
        self.count += 1
        self.asked.set()
        self.go.wait(60)
        return message


def hanging(gate: Gate, hangs: Hangs, session: str = "a@x") -> tuple[threading.Thread, list[str]]:
    """Ask through the gate in a thread, and return it when the request is being answered."""
    errors: list[str] = []

    def ask() -> None:
        try:
            gate.request(Message("learn", {}, session, 1))
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    assert hangs.asked.wait(10)
    return thread, errors


def test_a_round_does_not_wait_for_a_request_that_never_ends_and_leaves_its_client_out() -> None:
    hangs = Hangs()
    gate = Gate("a", hangs, grace=0.05)
    gate.open("x")
    thread, _ = hanging(gate, hangs)
    assert gate.close() is False
    with pytest.raises(BusyError, match="a: expected its requests of before to be answered by now, but one is not"):
        gate.open("y")
    hangs.go.set()
    thread.join(10)
    gate.open("y")
    assert gate.close() is True


def test_a_request_that_waits_for_its_turn_when_the_round_ends_reaches_nothing() -> None:
    hangs = Hangs()
    gate = Gate("a", hangs, grace=0.05)
    gate.open("x")
    first, none = hanging(gate, hangs)
    second, refused = hanging(gate, hangs)
    assert gate.close() is False
    second.join(10)
    assert "took longer than the deadline" in refused[0]
    hangs.go.set()
    first.join(10)
    assert (hangs.count, none) == (1, [])


class Plain:
    """A member that adds one; ``first`` is called before it does."""

    def __init__(self, name: str, first: Callable[[], object] = lambda: None):
        self.name, self.first = name, first

    def round(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        self.first()
        return {name: tensor + 1 for name, tensor in weights.items()}, 1


def test_others_finish_their_round_while_one_clients_request_hangs_and_it_comes_back_after() -> None:
    hangs, lines, threads = Hangs(), list[str](), list[threading.Thread]()
    gates = {"a": Gate("a", hangs, grace=0.05), "b": Gate("b", Service({}), grace=0.05)}

    def asks() -> None:
        if not threads:
            threads.append(hanging(gates["a"], hangs, f"a@{gates['a']._tag}")[0])

    members = [
        GatedMember(Plain("a", asks), gates["a"], told=lines.append),  # type: ignore[arg-type]
        GatedMember(Plain("b"), gates["b"], told=lines.append),  # type: ignore[arg-type]
    ]
    model = learner()
    start = model.weights()
    dropped = [fedavg_round(members, model).dropped for _ in range(2)]
    hangs.go.set()
    threads[0].join(10)
    dropped.append(fedavg_round(members, model).dropped)
    assert dropped == [("a",), ("a",), ()]
    assert all(torch.equal(model.weights()[name], start[name] + 3) for name in start)
    assert [line.startswith("a is left out of this round") for line in lines] == [True, True]


# Clients that take more than their share


def flooding(host: Host, own: Credentials, over: threading.Event) -> threading.Thread:
    """Open stream after stream as one client, over several connections, and send a frame on each, until ``over``."""
    grpc = grpc_module()
    channels = [
        grpc.secure_channel(
            f"localhost:{host.port}",
            grpc.ssl_channel_credentials(own.authority, own.key, own.certificate),
            options=[*options(), ("grpc.use_local_subchannel_pool", 1)],
        )
        for _ in range(8)
    ]

    def opens() -> None:
        queues: list[queue.SimpleQueue[bytes | None]] = []
        while not over.wait(0.005) and len(queues) < 2000:
            queues.append(queue.SimpleQueue())
            queues[-1].put(b"x")
            channels[len(queues) % 8].stream_stream(f"/{SERVICE}/{ASK}")(iter(queues[-1].get, None))
        for channel in channels:
            channel.close()
        for one in queues:
            one.put(None)

    thread = threading.Thread(target=opens, daemon=True)
    thread.start()
    return thread


def threads_of_hosts() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("host")}


def test_a_client_that_opens_many_streams_has_a_few_threads_and_others_are_served_on(
    certs: Path, closing_all: list[Callable[[], object]]
) -> None:
    over, calls, before = threading.Event(), list[bytes](), threads_of_hosts()

    def slow(frame: bytes) -> bytes:
        calls.append(frame)
        over.wait(60)
        return frame

    near, far = learner("b"), learner("b")
    carriers = dict.fromkeys("acdefghij", slow) | {"b": serve(Service({"b": far}))}  # threads for ten clients
    host = Host("localhost:0", Credentials.read(certs, "server"), carriers)
    host.start()
    closing_all.append(lambda: host.stop(0))
    flood = flooding(host, Credentials.read(certs, "a"), over)
    closing_all.append(partial(flood.join, 10))
    closing_all.append(over.set)
    while not calls:
        time.sleep(0.01)
    most = 0
    for number in range(20):
        time.sleep(0.05)
        connection = Connection(f"localhost:{host.port}", Credentials.read(certs, "b"), deadline=3.0)
        (z, y), (again, _) = batch(number), batch(number)
        remote = Remote("server", Framed(connection.ask), "b")
        remote.steps = number
        assert torch.equal(remote.learn(z, y)[0], near.learn(again, y)[0])
        connection.close()
        most = max(most, host._workers["a", ASK])
    assert calls == [b"x"]  # all the others came while it was being answered
    assert most <= WORKERS + 4  # those that are being refused, too
    assert len(threads_of_hosts() - before) <= 2 * WORKERS + 4


def test_a_client_comes_back_while_its_old_request_is_being_answered(
    certs: Path, closing_all: list[Callable[[], object]]
) -> None:
    over, calls = threading.Event(), list[bytes]()

    def slow(frame: bytes) -> bytes:
        calls.append(frame)
        over.wait(0.5)
        return frame

    host = Host("localhost:0", Credentials.read(certs, "server"), {"a": slow})
    host.start()
    closing_all.append(lambda: host.stop(0))
    connections = [
        Connection(f"localhost:{host.port}", Credentials.read(certs, "a"), deadline=0.1 if number < 4 else 20.0)
        for number in range(5)
    ]
    for number, connection in enumerate(connections):
        closing_all.append(connection.close)
        if number < 4:
            with pytest.raises(TimeoutError):
                connection.ask(b"old")
    assert connections[-1].ask(b"new") == b"new"
    assert calls[-1] == b"new"


def half_a_hello() -> bytes:
    own, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(own, out, server_hostname="localhost").do_handshake()
    whole = out.read()
    return whole[: len(whole) // 2]


def test_sockets_that_say_nothing_or_half_a_hello_take_no_thread_and_are_dropped(
    certs: Path, closing_all: list[Callable[[], object]]
) -> None:
    far, near, before = learner("a"), learner("a"), threads_of_hosts()
    host = Host(
        "localhost:0", Credentials.read(certs, "server"), {"a": serve(Service({"a": far}))}, handshake=2.0
    )  # fmt: skip
    host.start()
    closing_all.append(lambda: host.stop(0))
    hello, sockets = half_a_hello(), []
    for number in range(100):
        one = socket.create_connection(("localhost", host.port), timeout=20)
        closing_all.append(one.close)
        sockets.append(one)
        if number % 2:
            one.sendall(hello)
    connection = Connection(f"localhost:{host.port}", Credentials.read(certs, "a"), deadline=5.0)
    closing_all.append(connection.close)
    remote = Remote("server", Framed(connection.ask), "a")

    def learns(number: int) -> None:
        (z, y), (again, _) = batch(number), batch(number)
        assert torch.equal(remote.learn(z, y)[0], near.learn(again, y)[0])

    learns(0)
    assert len(threads_of_hosts() - before) == 1  # that of the stream
    for one in sockets:
        with suppress(ConnectionResetError):
            while one.recv(1 << 16):  # TimeoutError where it is not dropped
                pass
    learns(1)


# Headers that come again, which are written and checked once


def test_frames_that_differ_in_their_step_alone_are_told_apart() -> None:
    for step in (0, 1, 7, 10**12 - 1):
        message = Message("learn", {Kind.LABEL: torch.full((2,), step)}, "a", step)
        again = decode(encode(message))
        assert (again.step, again.verb, again.session) == (step, "learn", "a")
        assert torch.equal(again.tensors[Kind.LABEL], message.tensors[Kind.LABEL])


@pytest.mark.parametrize("name", ['"step":"', 'x"step":"000000000007', "step", '\\"step":"', "é"])
def test_a_name_that_looks_like_a_step_is_not_taken_for_one(name: str) -> None:
    for step in (3, 4):
        message = Message(name, {f"{Kind.WEIGHTS}/{name}": torch.ones(2)}, name, step)
        again = decode(encode(message))
        assert (again.verb, again.session, again.step, list(again.tensors)) == (
            name, name, step, [f"{Kind.WEIGHTS}/{name}"],
        )  # fmt: skip
        assert frame_nbytes(encode(message))[Kind.WEIGHTS] == 8


def reheaded(frame: bytes, before: bytes, after: bytes) -> bytes:
    """Return the frame with a part of its header replaced, lengths and checksum right."""
    (length,) = LENGTH.unpack_from(frame, PRELUDE.size)
    start = PRELUDE.size + LENGTH.size
    text, payload = frame[start : start + length].replace(before, after), frame[start + length :]
    body = LENGTH.pack(len(text)) + text
    crc = zlib.crc32(body, zlib.crc32(PRELUDE.pack(MAGIC, VERSION, 0, 0, 0, len(payload))))
    return PRELUDE.pack(MAGIC, VERSION, 0, crc, 0, len(payload)) + body + payload


def test_a_header_that_is_almost_one_that_was_good_is_refused_for_what_it_says_itself() -> None:
    frame = encode(Message("learn", {Kind.LABEL: torch.zeros(4)}, "a", 41))
    step = b'"step":"000000000041"'
    for after, match in (
        (b'"step":"0000000000417"', "a step of 12 digits, got '0000000000417'"),
        (b'"step":"00000000004x"', "a step of 12 digits, got '00000000004x'"),
        (b'"step":41', "maps strings to strings"),
        (step + b"," + step, "a key stands twice"),
        (b'"stop":"000000000041"', "expected metadata verb, session and step"),
    ):
        for _ in range(2):
            assert decode(frame).step == 41
            with pytest.raises(ValueError, match=match):
                decode(reheaded(frame, step, after))
    assert decode(reheaded(frame, step, b'"step":"000000000042"')).step == 42
    assert decode(reheaded(frame, step, b'"step": "000000000043"')).step == 43


def test_a_header_that_was_good_once_is_checked_anew_where_its_payload_or_the_limit_differs() -> None:
    frame = encode(Message("learn", {Kind.LABEL: torch.zeros(4)}, "a", 1))
    for _ in range(2):
        assert decode(frame).tensors[Kind.LABEL].shape == (4,)
        with pytest.raises(ValueError, match="at most 15 bytes, got 16"):
            decode(frame, max_nbytes=15)
        with pytest.raises(ValueError, match="do not make up"):
            decode(frame[:-1])
        with pytest.raises(ValueError, match="packed by codec"):
            decode(encode(Message("learn", {Kind.LABEL: torch.zeros(4)}, "a", 1), Float16()))


def test_a_tensor_of_another_shape_or_place_in_memory_has_bytes_of_its_own() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    for tensor in (whole, whole.t(), whole[:, 1], whole.clone().requires_grad_(), whole.bfloat16(), whole[0, 0]):
        for _ in range(2):
            again = decode(encode(Message("v", {Kind.INPUT: tensor}, "a", 1))).tensors[Kind.INPUT]
            assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(again, tensor.detach())
