"""What each party of a protocol on shares has received and drawn: nothing that it is not to know."""

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from privacy.mpc import (
    LEARNS,
    JoinedOnShares,
    SecureMean,
    SecureMember,
    Servers,
    SharedStage,
    mpc_2pc,
    mpc_inference,
    mpc_u_shaped,
    mpc_vertical,
    protocols,
)
from privacy.mpc.sharing import encoded, held
from splitlearn import Features, Kind, Learner, Recorded, Service, decode, fedavg_round, vanilla, wire
from splitlearn.frames import Message
from splitlearn.wire import Exchange

SERVERS, ROLES = ("server 0", "server 1"), ("server 0", "server 1", "dealer")
ROWS, WIDTH, HIDDEN, CLASSES = 8, 6, 7, 4
RATE = 0.25

# How plaintext is looked for: values of at least 1/8, within 1/64 of them, which is more than fixed point, CrypTen's
# approximations and the steps taken here move them by; shapes, counts and bits are integers far below. Random ring
# elements come so near to one of some hundred values once in 10^7 runs. What a server gets by adding up two things may
# be its own share, of 40 random bits or more where it was cut back to the scale: once in 10^4.
FLOOR = 1 / 8
SCALES = {16: 1 / 64, 24: 1 / 64, 32: 2**-20}  # bits of the fraction: of values, of what is aggregated, of weights
PRODUCTS = {32: 2**-14}  # before they are cut back
COMBINED: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (torch.add, torch.sub, torch.bitwise_xor)


@dataclass
class Secrets:
    """What no server and no dealer may have: what was shared or revealed as a whole, and what never was."""

    shared: dict[str, Tensor] = field(default_factory=dict)
    hidden: dict[str, Tensor] = field(default_factory=dict)

    @property
    def all(self) -> dict[str, Tensor]:
        return self.shared | self.hidden


def possessions(record: Recorded) -> list[Tensor]:
    """All that a party received, drew and sent, and the shares that it draws from the seeds that it was sent."""
    found: list[Tensor] = []
    for exchange in record.exchanges:
        for message in (exchange.request, exchange.reply):
            found += [one for key, one in message.tensors.items() if one.numel() and not is_coin(key, one)]
            if Kind.SEED in message.tensors:
                found += held(message.tensors).values()
    return found


def is_coin(key: str, one: Tensor) -> bool:
    """Whether it is the party's own part of a number on [0, 1), with which CrypTen chooses among equals."""
    return key == f"{Kind.GLOO}/local" and bool((one >> 16 == 0).all())


def put_together(*records: Recorded) -> Recorded:
    both = Recorded(Service({}))
    for record in records:
        both.exchanges.extend(record.exchanges)
    return both


def combinations(rings: list[Tensor], shapes: Iterable[torch.Size]) -> Tensor:
    """Every sum, difference and xor of two tensors of one of these shapes."""
    values = [torch.empty(0, dtype=torch.int64)]
    for shape in set(shapes):
        alike = list({one.numpy().tobytes(): one for one in rings if one.shape == shape}.values())
        if alike:
            pairs = torch.combinations(torch.arange(len(alike)), with_replacement=True)
            first, second = (torch.stack(alike)[pairs[:, place]] for place in (0, 1))
            values += [combine(first, second).flatten() for combine in COMBINED]
    return torch.cat(values)


def in_fixed_point(values: Tensor, secret: Tensor, scales: Mapping[int, float]) -> bool:
    """Whether any of these, sorted, is a value of the secret, or its negative."""
    wide = secret.double().flatten().abs()
    wide = wide[wide >= FLOOR]
    for bits, error in scales.items():
        near, width = (wide * 2.0**bits).long(), int(error * 2**bits)
        for target in (near, -near):
            if (torch.searchsorted(values, target - width) < torch.searchsorted(values, target + width)).any():
                return True
    return False


def patterns(secret: Tensor) -> list[bytes]:
    """The bytes of the secret: as it is, and of floats each row and each value that 8 bytes tell from chance."""
    if not secret.is_floating_point():
        return [secret.to(dtype).numpy().tobytes() for dtype in (torch.int64, torch.int32, torch.uint8)]
    found = []
    for dtype in (torch.float32, torch.float64):
        own = secret.to(dtype)
        rows = [own, *(own if own.ndim > 1 else ()), *(own.flatten() if dtype is torch.float64 else ())]
        found += [row.numpy().tobytes() for row in rows if row.abs().max() >= FLOOR and row.nbytes >= 8]
    if set(secret.unique().tolist()) == {0.0, 1.0}:  # one-hot labels: zeros and ones are no pattern, a batch of them is
        found = [secret.to(dtype).numpy().tobytes() for dtype in (torch.float32, torch.float64, torch.int64)]
    return found


def leaked(record: Recorded, secrets: Mapping[str, Tensor]) -> set[str]:
    """Return which secrets a party has, or gets by adding up two things: in fixed point, as floats or as labels."""
    found = possessions(record)
    raw = b"|".join(one.contiguous().numpy().tobytes() for one in found)
    rings = [one for one in found if one.dtype is torch.int64]
    turned = [one.mT for one in secrets.values() if one.ndim > 1]
    combined = combinations(rings, [one.shape for one in [*secrets.values(), *turned]]).unique()
    alone = torch.cat([torch.empty(0, dtype=torch.int64), *(one.flatten() for one in rings)]).unique()
    return {
        name
        for name, secret in secrets.items()
        if any(one in raw for one in patterns(secret))
        or (secret.is_floating_point() and in_fixed_point(alone, secret, SCALES | PRODUCTS))
        or (secret.is_floating_point() and in_fixed_point(combined, secret, SCALES))
    }


def drained(servers: Servers) -> dict[str, Recorded]:
    return {role: servers.observed(role) for role in servers.roles}


# The protocols, each run on values worth looking for


def stages() -> tuple[nn.Module, nn.Module, nn.Module]:
    """A bottom, a stage for the servers and a head, of weights of order 1."""
    made = (
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
        nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)),
        nn.Linear(CLASSES, CLASSES),
    )
    with torch.no_grad():
        for stage in made:
            for weight in stage.parameters():
                weight.copy_(torch.randn_like(weight))
    return made


def data() -> tuple[Tensor, Tensor]:
    return 2 * torch.randn(ROWS, WIDTH), torch.randperm(ROWS) % CLASSES


def one_hot(y: Tensor) -> Tensor:
    return nn.functional.one_hot(y, CLASSES).double()


def own(stage: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Copies of its weights, by name."""
    return {f"{prefix} {name}": one.detach().clone() for name, one in stage.named_parameters()}


def learner(name: str, stage: nn.Module) -> Learner:
    return Learner(name, stage, torch.optim.SGD(stage.parameters(), lr=RATE))


def trained_weights(shared: SharedStage) -> dict[str, Tensor]:
    return {f"trained {name}": one for name, one in shared.weights().items()}


def summed_loss(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, y, reduction="sum")


def two_parties(servers: Servers) -> Secrets:
    """Activations and labels go up in shares, the loss and a gradient come down in shares."""
    (bottom, top, _), (x, y) = stages(), data()
    z = bottom(x).detach().requires_grad_()
    logits = top(z)
    logits.retain_grad()
    total = summed_loss(logits, y)
    total.backward()
    assert z.grad is not None
    assert logits.grad is not None
    secrets = Secrets({"activation": z.detach(), "one-hot": one_hot(y), "gradient": z.grad, **own(top, "first")})
    secrets.hidden = {"input": x, "labels": y, "logits": logits.detach(), "gradient above": logits.grad}
    shared = SharedStage(servers, top, lr=RATE, momentum=0.5)
    loss = mpc_2pc(learner("client", bottom), shared, x, y)
    secrets.shared |= trained_weights(shared) | {"loss": loss * ROWS}
    secrets.hidden |= own(bottom, "bottom") | {"mean loss": loss}
    return secrets


def u_shape(servers: Servers) -> Secrets:
    """Outputs come down in shares and their gradients go up; labels and loss stay with the client."""
    (bottom, middle, head), (x, y) = stages(), data()
    z = bottom(x).detach().requires_grad_()
    h = middle(z)
    h.retain_grad()
    summed_loss(head(h), y).backward()
    assert z.grad is not None
    assert h.grad is not None
    secrets = Secrets({"activation": z.detach(), "output": h.detach(), "gradient": z.grad, "gradient above": h.grad})
    secrets.shared |= own(middle, "first")
    secrets.hidden = {"input": x, "labels": y, "one-hot": one_hot(y)} | own(bottom, "bottom") | own(head, "head")
    shared = SharedStage(servers, middle, lr=RATE)
    mpc_u_shaped(learner("bottom", bottom), shared, learner("head", head), x, y)
    secrets.shared |= trained_weights(shared)
    return secrets


def inference(servers: Servers) -> Secrets:
    """One client's activation into another's stage, and the outputs back to that client."""
    (bottom, top, _), (x, _) = stages(), data()
    shared = SharedStage(servers, top)
    out = mpc_inference(Learner("client", bottom), shared.client("client"), x)
    z = bottom(x).detach()
    return Secrets({"activation": z, "output": out} | own(top, "own"), {"input": x, "inner": top[0](z).detach()})


def reloading(servers: Servers) -> Secrets:
    """Weights go up anew, and come back."""
    (_, top, _), (_, other, _) = stages(), stages()
    shared = SharedStage(servers, top)
    shared.load_weights(dict(other.named_parameters()))
    return Secrets(own(top, "first") | own(other, "second") | trained_weights(shared))


def side_by_side(servers: Servers) -> Secrets:
    """Two clients' features go up in shares, and to each its own part of the gradient comes down."""
    (first, top, _), (second, _, _) = stages(), stages()
    wide = nn.Sequential(nn.Linear(2 * WIDTH, HIDDEN), nn.ReLU(), top[2])
    (a, y), (b, _) = data(), data()
    z = torch.cat([first(a), second(b)], 1).detach().requires_grad_()
    summed_loss(wide(z), y).backward()
    assert z.grad is not None
    secrets = Secrets(
        {"a": z[:, :WIDTH].detach(), "b": z[:, WIDTH:].detach(), "one-hot": one_hot(y)} | own(wide, "own")
    )
    secrets.shared |= {"gradient a": z.grad[:, :WIDTH], "gradient b": z.grad[:, WIDTH:]}
    secrets.hidden = {"features a": a, "features b": b, "labels": y, "joined": z.detach(), "gradient": z.grad}
    shared = SharedStage(servers, wide, lr=RATE)
    sessions = [shared.client("a"), shared.client("b")]
    clients = [Features(learner("a", first), a), Features(learner("b", second), b)]
    loss = mpc_vertical(shared, sessions, clients, torch.arange(ROWS), y)
    out = JoinedOnShares(shared, sessions, clients).predict(torch.arange(ROWS))
    secrets.shared |= trained_weights(shared) | {"loss": loss * ROWS, "output": out}
    return secrets


@dataclass
class Fixed:
    """A member of a federation whose new weights are these, whatever it starts from."""

    name: str
    new: dict[str, Tensor]
    count: int

    def round(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        return {**self.new, "steps": torch.tensor(3)}, self.count


def members(servers: Servers) -> tuple[list[Fixed], list[SecureMember]]:
    plain = [Fixed(str(n), {"weight": torch.randn(CLASSES, WIDTH), "bias": torch.randn(3)}, 11 + n) for n in range(3)]
    return plain, [SecureMember(one, servers) for one in plain]


class Model(nn.Module):
    """What the fed server starts from."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(CLASSES, WIDTH)), nn.Parameter(torch.zeros(3))
        self.register_buffer("steps", torch.tensor(0))


def aggregation(servers: Servers) -> Secrets:
    """Three members' weights go up in shares, and their sum comes down in shares."""
    plain, secure = members(servers)
    model = Learner("fed server", Model())
    fedavg_round(secure, model, aggregate=SecureMean(servers))
    total, count = {name: sum(one.count * one.new[name] for one in plain) for name in plain[0].new}, 36
    for name, mean in model.weights().items():
        assert name == "steps" or (mean - total[name] / count).abs().max() < 1e-6
    secrets = Secrets(
        {f"{one.name} {name} times samples": one.count * w for one in plain for name, w in one.new.items()}
    )
    secrets.shared |= {f"sum of {name}": one for name, one in total.items() if isinstance(one, Tensor)}
    secrets.hidden = {f"{one.name} {name}": w for one in plain for name, w in one.new.items()}
    secrets.hidden |= {f"mean {name}": one for name, one in model.weights().items() if name != "steps"}
    return secrets


PROTOCOLS: dict[str, Callable[[Servers], Secrets]] = {
    "mpc_2pc": two_parties, "mpc_u_shaped": u_shape, "mpc_inference": inference, "weights": reloading,
    "mpc_vertical": side_by_side, "secure_mean": aggregation,
}  # fmt: skip


def ran(servers: Servers, protocol: str, seed: int = 0) -> tuple[Secrets, dict[str, Recorded]]:
    drained(servers)
    torch.manual_seed(seed)
    secrets = PROTOCOLS[protocol](servers)
    return secrets, drained(servers)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_party_has_any_secret_and_both_servers_together_have_all_that_was_shared(
    remembering: Servers, protocol: str
) -> None:
    secrets, seen = ran(remembering, protocol)
    for role in ROLES:
        assert leaked(seen[role], secrets.all) == set()
    assert leaked(put_together(*(seen[role] for role in SERVERS)), secrets.shared) == set(secrets.shared)


# That the scan finds what there is to find


def test_the_scan_finds_all_that_a_plain_wire_shows() -> None:
    (bottom, top, _), (x, y) = stages(), data()
    line = wire(learner("server", top))
    z, before = bottom(x).detach(), own(top, "first")
    vanilla(learner("client", bottom), line.party, x, y)
    secrets = {"activation": z, "labels": y, "input": x, **before}
    assert leaked(line.record, secrets) == {"activation", "labels"}
    line.party.weights()
    assert leaked(line.record, own(top, "trained")) == set(own(top, "trained"))


def noted(*tensors: Tensor) -> Recorded:
    record = Recorded(Service({}))
    sent = {f"{Kind.SHARE}/{place}": one for place, one in enumerate(tensors)}
    record.exchanges.append(Exchange(Message("given", sent), Message("given", {})))
    return record


@pytest.mark.parametrize(
    "shown",
    [
        lambda x: encoded(x, "x"), lambda x: encoded(-x, "x"), lambda x: encoded(x, "x", bits=24),
        lambda x: encoded(x, "x") << 16, lambda x: encoded(x.T[:1, 3:], "x") + 2, lambda x: x.float(),
        lambda x: x.double(), lambda x: x[1:2].float(), lambda x: x[0, :1].double(),
        lambda x: encoded(x, "x").view(torch.uint8).view(torch.int64),
    ],
)  # fmt: skip
def test_the_scan_finds_a_secret_in_whatever_form_it_is_shown(shown: Callable[[Tensor], Tensor]) -> None:
    x = 1 + torch.rand(ROWS, WIDTH)
    noise = torch.randint(-(2**63), 2**63 - 1, (1000,))
    assert leaked(noted(noise, shown(x)), {"x": x}) == {"x"}
    assert leaked(noted(noise, torch.arange(1000), shown(x + 4)), {"x": x}) == set()


@pytest.mark.parametrize("combine", [torch.add, torch.sub, torch.bitwise_xor])
@pytest.mark.parametrize("turned", [False, True])
def test_the_scan_finds_a_secret_between_two_masked_tensors(
    combine: Callable[[Tensor, Tensor], Tensor], turned: bool
) -> None:
    x = torch.randn(ROWS, WIDTH)
    ring = encoded(x.T if turned else x, "x")
    mask = torch.randint(-(2**63), 2**63 - 1, ring.shape)
    assert leaked(noted(mask, combine(ring, mask)), {"x": x}) == {"x"}
    assert leaked(noted(combine(ring, mask)), {"x": x}) == set()


@pytest.mark.parametrize(
    "shown",
    [lambda y: y, lambda y: one_hot(y), lambda y: one_hot(y).float(), lambda y: one_hot(y).long(),
     lambda y: encoded(one_hot(y), "y")],
)  # fmt: skip
def test_the_scan_finds_labels_in_whatever_form_they_are_shown(shown: Callable[[Tensor], Tensor]) -> None:
    y, other = torch.arange(ROWS) % CLASSES, torch.arange(ROWS).flip(0) % CLASSES
    secrets = {"labels": y, "one-hot": one_hot(y)}
    bits = torch.randint(2, (2000,))
    assert leaked(noted(bits, shown(y)), secrets)
    if shown(y).max() < 2**16:  # ones in fixed point are found whosoever they are
        assert not leaked(noted(bits, shown(other)), secrets)


@pytest.mark.slow
def test_the_scan_finds_what_the_first_party_can_read() -> None:
    with Servers(timeout=60, remember=True, insecure_trust_first_party=True) as insecure:
        secrets, seen = ran(insecure, "mpc_inference")
    assert {"activation", "own 0.weight", "own 2.weight"} <= leaked(seen["server 0"], secrets.all)
    assert leaked(seen["server 1"], secrets.all) == set()


# What is uniformly random


def ring_elements(record: Recorded) -> Tensor:
    """All ring elements that a party was sent, drew, or saw opened, but for those of a single bit."""
    found: list[Tensor] = []
    for exchange in record.exchanges:
        request, reply = exchange.request.tensors, exchange.reply.tensors
        found += held(request).values() if Kind.SEED in request else ()
        found += [one for key, one in request.items() if Kind.of(key) is Kind.SHARE]
        found += [one for key, one in reply.items() if Kind.of(key) is Kind.GLOO and not is_coin(key, one)]
    return torch.cat([one.flatten() for one in found if one.dtype is torch.int64 and one.numel() and not of_bits(one)])


def of_bits(one: Tensor) -> bool:
    return bool((one >> 1 == 0).all())


def unbalanced(values: Tensor, bits: int = 64) -> list[int]:
    """The places that hold ones, or that equal their neighbour, too often or not often enough.

    By six standard deviations, which of 10^6 runs chance makes one.
    """
    ones = torch.stack([(values >> place & 1).sum() for place in range(bits)])
    unlike = torch.stack([((values ^ (values >> 1)) >> place & 1).sum() for place in range(bits - 1)] or [ones[0]])
    far = [(one - len(values) / 2).abs() > 3 * len(values) ** 0.5 for one in (ones, unlike)]
    return sorted({place for one in far for place in one.nonzero().flatten().tolist()})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_a_server_gets_has_as_many_ones_as_zeros_and_never_the_same_twice(
    remembering: Servers, protocol: str
) -> None:
    secrets, seen = ran(remembering, protocol)
    for role in SERVERS:
        values = ring_elements(seen[role])
        assert len(values) > 100
        assert unbalanced(values) == []
        assert len(values.unique()) == len(values)  # no mask and nothing masked comes again
    plain = torch.cat([encoded(one, "secret", limit=1e6).flatten() for one in secrets.shared.values()])
    assert set(range(32, 63)) <= set(unbalanced(plain))  # which of a sign are all alike


def test_single_bits_that_are_opened_are_as_often_one_as_zero(remembering: Servers) -> None:
    drained(remembering)
    shared = SharedStage(remembering, nn.ReLU())
    shared.predict(1 + torch.rand(40, 50))  # all of one sign
    seen = drained(remembering)
    for role in SERVERS:
        opened = [one for e in seen[role].exchanges for one in e.reply.tensors.values() if e.request.verb == "opened"]
        bits = torch.cat([one.flatten() for one in opened if of_bits(one)])
        assert len(bits) == 2000
        assert unbalanced(bits, 1) == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_said_and_in_which_shapes_depends_on_no_value(remembering: Servers, protocol: str) -> None:
    def shape(record: Recorded) -> list[object]:
        return [
            (
                exchange.request.verb,
                side,
                re.sub(r"\d+$", "", key) if Kind.of(key) is Kind.SHARE else key,
                tuple(t.shape),
            )
            for exchange in record.exchanges
            for side, message in (("sent", exchange.request), ("got", exchange.reply))
            for key, t in message.tensors.items()
            if Kind.of(key) is not Kind.PARAMETERS  # names of sessions, which are counted
        ]

    (_, one), (_, other) = (ran(remembering, protocol, seed) for seed in (1, 2))
    for role in ROLES:
        assert shape(one[role]) == shape(other[role])


# The dealer

ASKED = re.compile(
    r"\{'function': '[A-Za-z0-9]+', 'device': 'cpu', 'args': \([^'\"]*(, '[a-z0-9_]+')?\), 'kwargs': \{[^\"]*\}\}"
)


def texts(record: Recorded) -> list[str]:
    found = [e.reply.tensors.get(f"{Kind.GLOO}/text") for e in record.exchanges if e.request.verb == "received"]
    return [one.numpy().tobytes().decode() for one in found if one is not None]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_dealer_has_its_own_draws_and_shapes_and_nothing_else(remembering: Servers, protocol: str) -> None:
    _, seen = ran(remembering, protocol)
    for exchange in seen["dealer"].exchanges:
        assert not exchange.request.tensors
        assert exchange.request.verb in ("drew", "received")
        keys = (
            {f"{Kind.GLOO}/dealt0", f"{Kind.GLOO}/dealt1"} if exchange.request.verb == "drew" else {f"{Kind.GLOO}/text"}
        )
        assert set(exchange.reply.tensors) <= keys
    for text in texts(seen["dealer"]):
        assert ASKED.fullmatch(text), text
        assert all(int(number) <= 256 for number in re.findall(r"\d+", text)), text  # sizes, strides, a base of 2^64
        assert not re.search(r"\d\.\d", text)  # no floating point
    asked = {"weights": 2, "secure_mean": 0}.get(protocol)  # twice weights are cut to what products take
    assert len(texts(seen["dealer"])) == asked if asked is not None else texts(seen["dealer"])


def drawn(record: Recorded) -> dict[str, set[int]]:
    """The ring elements that a server has drawn, by stream."""
    found: dict[str, set[int]] = {}
    for exchange in record.exchanges:
        for key, one in exchange.reply.tensors.items() if exchange.request.verb == "drew" else ():
            values = set() if is_coin(key, one) or of_bits(one) else set(one.flatten().tolist())
            found.setdefault(key.removeprefix(f"{Kind.GLOO}/"), set()).update(values)
    return found


def assert_streams_are_apart(first: dict[str, set[int]], second: dict[str, set[int]]) -> None:
    """But for two that both servers have, to share zeros."""
    assert {*first, *second} <= {"dealt", "common0", "common1", "local"}
    for name in ("common0", "common1"):
        assert first[name] == second[name]
        assert first[name]
    assert first["dealt"]
    assert second["dealt"]
    assert not first["dealt"] & second["dealt"]
    assert not first["common0"] & first["common1"]


def test_the_servers_draw_from_streams_alone(remembering: Servers) -> None:
    _, seen = ran(remembering, "mpc_2pc")
    assert_streams_are_apart(*(drawn(seen[role]) for role in SERVERS))


@pytest.mark.slow
def test_streams_are_apart_from_their_first_draw() -> None:
    with Servers(timeout=60, remember=True) as fresh:
        inference(fresh)
        seen = drained(fresh)
    assert_streams_are_apart(*(drawn(seen[role]) for role in SERVERS))


# What the clients get


@dataclass
class Wires:
    """What crosses between this process and the servers, by session: each exchange, and the server that it is with."""

    by_session: dict[str, list[tuple[int, Exchange]]] = field(default_factory=dict)

    def replies(self, session: str) -> list[dict[str, Tensor]]:
        """What both servers' replies add up to, one a request."""
        sides = [[e.reply.tensors for rank, e in self.by_session.get(session, []) if rank == own] for own in (0, 1)]
        return [{key: one[key] + other[key] for key in one} for one, other in zip(*sides, strict=True)]

    def record(self, session: str) -> Recorded:
        record = Recorded(Service({}))
        record.exchanges.extend(exchange for _, exchange in self.by_session.get(session, []))
        return record


@pytest.fixture
def wires(remembering: Servers, monkeypatch: pytest.MonkeyPatch) -> Wires:
    found, carry = Wires(), remembering.carry

    def noting(rank: int, frame: bytes) -> bytes:
        reply = carry(rank, frame)
        exchange = Exchange(decode(frame), decode(reply))
        found.by_session.setdefault(exchange.request.session, []).append((rank, exchange))
        return reply

    monkeypatch.setattr(remembering, "carry", noting)
    return found


def test_a_vertical_client_gets_the_gradient_of_its_own_part_alone(remembering: Servers, wires: Wires) -> None:
    top, (x, y) = nn.Linear(2 * WIDTH, CLASSES), data()
    shared = SharedStage(remembering, top, lr=RATE)
    sessions = [shared.client("a"), shared.client("b")]
    bottoms = [stages()[0], stages()[0]]
    z = torch.cat([bottom(x).detach() for bottom in bottoms], 1).requires_grad_()
    summed_loss(deepcopy(top)(z), y).backward()
    assert z.grad is not None
    clients = [Features(learner(name, bottom), x) for name, bottom in zip("ab", bottoms, strict=True)]
    mpc_vertical(shared, sessions, clients, torch.arange(ROWS), y)
    for name, session, part in zip("ab", sessions, z.grad.split(WIDTH, 1), strict=True):
        offered, collected = wires.replies(session.session)
        assert offered == {}
        assert set(collected) == {f"{Kind.SHARE}/g"}
        error = collected[f"{Kind.SHARE}/g"].double() / 2**16 - part  # its own, of the sum over the batch
        assert error.abs().max() < 0.1, name  # by CrypTen's approximations; gradients are of order 1
    (told,) = [one for one in wires.replies(shared.session) if one]
    assert set(told) == {f"{Kind.SHARE}/loss"}  # and whoever owns labels and model no gradient
    shared.close()


def test_what_is_revealed_to_nobody_is_not_answered(remembering: Servers, wires: Wires) -> None:
    (_, top, _), (x, y) = stages(), data()
    shared = SharedStage(remembering, top, lr=RATE, loss_to="nobody")
    loss, g = shared.learn(x, y)  # of an input that asks for no gradient
    assert loss.isnan()
    assert g is None
    assert wires.replies(shared.session) == [{}]
    shared.close()


def test_the_owner_of_a_model_hears_nothing_of_anothers_predictions(remembering: Servers, wires: Wires) -> None:
    (bottom, top, _), (x, _) = stages(), data()
    shared = SharedStage(remembering, top)
    client = shared.client("client")
    wires.by_session.clear()
    mpc_inference(Learner("client", bottom), client, x)
    assert set(wires.by_session) == {client.session}
    (reply,) = wires.replies(client.session)
    assert set(reply) == {f"{Kind.SHARE}/out"}
    assert leaked(wires.record(client.session), own(top, "own")) == set()
    shared.close()


@pytest.mark.parametrize("verb", ["weights", "load_weights", "learn", "forward", "backward", "learn_joined", "abandon"])
def test_one_who_did_not_open_a_stage_is_not_told_its_weights(remembering: Servers, verb: str) -> None:
    shared = SharedStage(remembering, stages()[1])
    with pytest.raises(ValueError, match=f"{verb}"):
        shared.client("client")._pair.ask(verb)
    shared.close()


# Secure aggregation


def test_the_fed_server_gets_tickets_that_are_random(remembering: Servers) -> None:
    start, tickets = {name: torch.zeros(()) for name in ("weight", "bias")}, []
    plain, secure = members(remembering)
    for _ in range(40):
        given = [member.round(start) for member in secure]
        for (weights, count), member in zip(given, plain, strict=True):
            assert set(weights) == {"ticket", "steps"}
            assert weights["ticket"].dtype is torch.uint8
            assert weights["ticket"].shape == (16,)
            assert count == member.count
            tickets.append(weights["ticket"])
            secrets = member.new | {f"{name} times samples": count * one for name, one in member.new.items()}
            assert leaked(noted(*weights.values()), secrets) == set()
        SecureMean(remembering)([weights for weights, _ in given], [count for _, count in given], start)
    every = torch.stack(tickets)
    assert len(every.unique(dim=0)) == len(every)
    assert unbalanced(every.flatten(), 8) == []


# What the tables say

ASKING = {"learn", "forward", "backward", "predict", "weights"}


def test_every_protocol_says_what_each_party_learns() -> None:
    functions = {name for name in protocols.__all__ if name.startswith("mpc_")}
    assert set(LEARNS) == functions | {"secure_mean"}
    assert set(LEARNS) == set(PROTOCOLS) - {"weights"}  # and is run above
    for protocol, told in LEARNS.items():
        assert set(SERVERS) < set(told)
        assert ("dealer" in told) == (protocol != "secure_mean")
        assert all(learnt and all(learnt) for learnt in told.values())


def test_every_verb_of_a_stage_that_asks_the_servers_has_a_row() -> None:
    rows = re.findall(r"^ *\| (`.*?`) \|", SharedStage.__doc__ or "", re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"``(\w+)``", row)}
    assert named == ASKING
    assert all(callable(getattr(SharedStage, name)) for name in named)
