"""The wire: exactly once, honest counts, snapshots, and a party across it equal to one beside us, bit for bit."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from splitlearn.codecs import ErrorFeedback, Int8, TopK, Zstd
from splitlearn.frames import Codec, Kind, Message, decode, encode, frame_nbytes
from splitlearn.network import PROFILES, Emulated, VirtualClock
from splitlearn.party import Guard, Learner
from splitlearn.protocols import u_shaped, vanilla
from splitlearn.remote import Remote, wire
from splitlearn.service import Service
from splitlearn.wire import Framed, Metered, Recorded, serve


def learner(name: str, *layers: nn.Module, lr: float = 0.05) -> Learner:
    stage = nn.Sequential(*layers).double()
    return Learner(name, stage, torch.optim.Adam(stage.parameters(), lr=lr), seed=len(name))


def client() -> Learner:
    torch.manual_seed(1)
    return learner("client", nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3))


def middle() -> Learner:
    torch.manual_seed(2)
    return learner("middle", nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh())


def server() -> Learner:
    torch.manual_seed(3)
    return learner("server", nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def batch(seed: int = 0, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (size,), generator=generator)


def bits(tensors: Mapping[str, Tensor]) -> bytes:
    return encode(Message("", {f"weights/{name}": tensor for name, tensor in tensors.items()}))


def learn(step: int, seed: int = 0, **changes: str) -> Message:
    z, y = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).double(), torch.arange(4) % 3
    return replace(Message("learn", {"activation": z, "label": y}, "server", step), **changes)


# Service


def test_a_repeated_step_gets_the_same_reply_and_the_weights_move_once():
    party = server()
    service = Service({"server": party})
    before = bits(party.weights())
    reply = service.request(learn(1))
    after = bits(party.weights())
    assert before != after
    for _ in range(3):
        assert encode(service.request(learn(1))) == encode(reply)
    assert bits(party.weights()) == after
    assert party.steps == 1
    service.request(learn(2))
    assert party.steps == 2


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (learn(3, session="nobody"), "expected a session among server; got 'nobody'"),
        (learn(3, verb="state_dict"), "expected a verb among forward, backward.*got 'state_dict'"),
        (learn(3, verb="__class__"), "expected a verb among"),
        (learn(3, verb="round"), "server is a Learner, which does not answer 'round'"),
        (learn(3, verb="update"), "server is a Learner, which does not answer 'update'"),
        (learn(1), "expected a step of server after 2, got 1; it was done, or comes too late"),
        (learn(2, seed=1, verb="predict"), "step 2 of server was 'learn', got 'predict' for it again"),
        (learn(2, seed=9), "repeat a step as it was, or open a new session"),
        (Message("learn", {}, "server", 3), "expected a message with input, got an empty one"),
        (replace(learn(3), tensors={"gradient": torch.zeros(1)}), "expected a message with input, got gradient"),
        (replace(learn(3), tensors={"input": torch.zeros(4, 8)}), "expected a message with label"),
        (Message("backward", {"gradient": torch.zeros(4, 3)}, "server", 3), "forward"),
    ],
)
def test_what_does_not_fit_is_refused_and_moves_nothing(message, said):
    party = server()
    service = Service({"server": party})
    service.request(learn(1))
    service.request(learn(2, seed=1))
    before = bits(party.weights())
    with pytest.raises(ValueError, match=said):
        service.request(message)
    assert bits(party.weights()) == before
    service.request(learn(3))  # the refused step did not count
    assert party.steps == 3


def test_repeats_that_arrive_at_once_are_done_once():
    party = server()
    slow = nn.Sequential(party.stage)
    slow.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    party.stage = slow
    service = Service({"server": party})
    replies: list[Message] = []
    threads = [threading.Thread(target=lambda: replies.append(service.request(learn(1)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({encode(reply) for reply in replies}) == 1
    assert len(replies) == 4
    assert party.steps == 1


def test_sessions_count_their_own_steps():
    one, other = server(), server()
    service = Service({"one": one, "other": other})
    service.request(learn(1, session="one"))
    service.request(learn(2, session="one"))
    service.request(learn(1, session="other"))
    assert (one.steps, other.steps) == (2, 1)


class Lossy:
    """A carrier that loses every other reply."""

    def __init__(self, carrier):
        self.carrier, self.calls = carrier, 0

    def __call__(self, frame: bytes) -> bytes:
        self.calls += 1
        reply = self.carrier(frame)
        if self.calls % 2:
            raise TimeoutError
        return reply


class Resending:
    """A transport that sends a message again when its reply is lost."""

    def __init__(self, transport):
        self.transport = transport

    def request(self, message: Message) -> Message:
        try:
            return self.transport.request(message)
        except TimeoutError:
            return self.transport.request(message)


def test_after_a_lost_reply_the_next_request_goes_through():
    party = server()
    remote = Remote("server", Framed(Lossy(serve(Service({"server": party})))), "server")
    z, y = (t.detach() for t in learn(0).tensors.values())
    with pytest.raises(TimeoutError):
        remote.learn(z.clone().requires_grad_(), y)
    assert remote.predict(z + 1).shape == (len(z), 3)  # another request, not the lost one again
    assert party.steps == 1


def test_a_lost_reply_can_be_asked_for_again():
    direct, party = server(), server()
    remote = Remote("server", Resending(Framed(Lossy(serve(Service({"server": party}))))), "server")
    for step in range(4):
        z, y = (t.detach() for t in learn(0, seed=step).tensors.values())
        loss, g = remote.learn(z.clone().requires_grad_(), y)
        true_loss, true_g = direct.learn(z.clone().requires_grad_(), y)
        assert torch.equal(loss, true_loss)
        assert torch.equal(g, true_g)
    assert bits(party.weights()) == bits(direct.weights())


class Member:
    """Answers with given changes to the weights it is handed."""

    def __init__(self, *changes: list[float]):
        self.changes = iter(changes)

    def round(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        return {"w": weights["w"] + torch.tensor(next(self.changes))}, 5


def test_a_codec_with_a_memory_packs_a_repeated_reply_once():
    codec = ErrorFeedback(TopK(0.5))
    carrier = serve(Service({"m": Member([3.0, 1.0], [1.0, 1.0])}), codec)
    ask = [encode(Message("update", {"weights/w": torch.zeros(2)}, "m", step), codec) for step in (1, 2)]
    first = carrier(ask[0])
    assert decode(first, codec).tensors["update/w"].tolist() == [3, 0]
    assert decode(first, codec).tensors["count"].item() == 5
    assert [carrier(ask[0]), carrier(ask[0])] == [first, first]
    assert decode(carrier(ask[1]), codec).tensors["update/w"].tolist() == [0, 2]


def test_a_member_given_other_weights_than_its_own_says_so():
    carrier = serve(Service({"m": Member([1.0, 1.0])}))
    with pytest.raises(ValueError, match="w"):
        Framed(carrier).request(Message("update", {}, "m", 1))


# Framed, serve


def test_the_text_of_an_error_crosses_and_the_next_request_goes_through():
    across = wire(server())
    z, y = learn(0).tensors.values()
    with pytest.raises(ValueError, match=r"server: its stage does not fit an input of shape \(4, 7\)"):
        across.party.learn(z[:, :7].clone().requires_grad_(), y)
    assert across.meter.nbytes["down"]["error"] > 40
    loss, _ = across.party.learn(z.clone().requires_grad_(), y)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("frame", [b"", b"SPLT", encode(learn(1))[:-1], encode(learn(1)) + b"\0"])
def test_a_malformed_request_is_answered_with_an_error(frame):
    reply = decode(serve(Service({"server": server()}))(frame))
    assert reply.verb == "error"
    assert bytes(reply.tensors["error"].tolist()).decode().startswith("malformed frame")


def test_names_from_outside_never_break_the_answer():
    carrier = serve(Service({"server": server()}))
    for name in ("\ud800", "x" * 5000, "a\nb", "\0"):
        with pytest.raises(ValueError, match="expected a session among server"):
            Framed(carrier).request(Message("learn", {}, name, 1))


def test_an_error_reply_of_any_type_is_a_value_error():
    for tensor in (torch.ones(2).bfloat16(), torch.tensor(65), torch.zeros(0), torch.tensor([[255, 200]])):
        reply = encode(Message("error", {"error": tensor}))
        with pytest.raises(ValueError):
            Framed(lambda _, reply=reply: reply).request(learn(1))


def test_an_error_reply_is_one_line_of_bounded_length():
    text = torch.frombuffer(bytearray(b"it\n\x1f is\r\n" + b"long " * 10**5), dtype=torch.uint8)
    reply = encode(Message("error", {"error": text}))
    with pytest.raises(ValueError, match=r"^it is long long ") as caught:
        Framed(lambda _: reply).request(learn(1))
    assert len(str(caught.value)) <= 10_000
    assert "\n" not in str(caught.value)


def test_transcript_and_meter_count_what_several_threads_send():
    sessions = {str(number): Learner(str(number), nn.Identity()) for number in range(4)}
    record = Recorded(Service(sessions), max_nbytes=10_000)
    meter = Metered(serve(record))
    remotes = [Remote(name, Framed(meter), name) for name in sessions]

    def ask(remote: Remote) -> None:
        for _ in range(50):
            remote.predict(torch.zeros(10))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, remotes))
    assert meter.frames == 400
    assert meter.nbytes["up"]["activation"] == 200 * 40
    assert record.dropped + len(record.exchanges) == 200
    assert len(record.exchanges) == 10_000 // 80


@pytest.mark.parametrize(
    ("theirs", "ours"), [(None, Int8()), (Int8(), None), (Int8(), Zstd(Int8())), (TopK(0.5), TopK(0.25))]
)
def test_both_ends_with_different_codecs_say_so(theirs, ours):
    remote = Remote("server", Framed(serve(Service({"server": server()}), theirs), ours), "server")
    z, y = learn(0).tensors.values()
    with pytest.raises(ValueError, match="give both ends the same codec"):
        remote.learn(z.requires_grad_(), y)


def test_what_is_not_finite_is_refused_by_a_codec_before_it_crosses():
    across = wire(server(), Int8())
    z, y = learn(0).tensors.values()
    z[1, 1] = torch.nan
    with pytest.raises(ValueError, match="expected finite values in 'activation'"):
        across.party.learn(z.requires_grad_(), y)
    assert across.meter.frames == 0


# Recorded


def test_a_transcript_holds_what_was_sent_whatever_happens_later():
    party = server()
    live = {name: tensor.detach() for name, tensor in party.stage.state_dict().items()}
    party.weights = lambda: live  # a party that hands out its own memory
    recorded = Recorded(Service({"server": party}))
    reply = recorded.request(Message("weights", {}, "server", 1))
    message = learn(2)
    kept = bits({"z": message.tensors["activation"]})
    recorded.request(message)
    message.tensors["activation"].zero_()
    asked, learnt = recorded.exchanges
    assert bits(reply.tensors) != bits(asked.reply.tensors)  # the weights have moved since
    assert bits(asked.reply.tensors) == bits({f"weights/{n}": t for n, t in server().weights().items()})
    assert bits({"z": learnt.request.tensors["activation"]}) == kept


def test_a_full_transcript_drops_its_oldest_and_counts_them():
    recorded = Recorded(Service({"server": server()}), max_nbytes=1000)
    nbytes = 4 * 8 * 8 + 4 * 8 + 8 + 4 * 8 * 8  # activation, labels, loss, gradient

    def message(step: int) -> Message:
        sample = learn(step, seed=step)
        sample.tensors["activation"].requires_grad_()
        return sample

    for step in range(1, 6):
        recorded.request(message(step))
        assert sum(len(kept.reply.tensors) for kept in recorded.exchanges) == 2 * min(step, 1000 // nbytes)
    assert [kept.request.step for kept in recorded.exchanges] == [5]
    assert recorded.dropped == 4
    recorded.clear()
    assert (len(recorded.exchanges), recorded.dropped) == (0, 0)
    recorded.request(message(6))
    assert [kept.request.step for kept in recorded.exchanges] == [6]


def test_an_exchange_too_large_to_keep_is_counted():
    recorded = Recorded(Service({"server": server()}), max_nbytes=10)
    recorded.request(learn(1))
    assert (len(recorded.exchanges), recorded.dropped) == (0, 1)


# Metered


class Tapped:
    """A carrier that keeps every frame."""

    def __init__(self, carrier):
        self.carrier, self.requests, self.replies = carrier, [], []

    def __call__(self, frame: bytes) -> bytes:
        self.requests.append(frame)
        self.replies.append(self.carrier(frame))
        return self.replies[-1]


def by_kind(frames: list[bytes]) -> Counter[str]:
    """Bytes by kind, told by another reader of the same layout."""
    counts: Counter[str] = Counter()
    for frame in frames:
        sizes = {key: tensor.nbytes for key, tensor in load(frame[24:]).items()}
        for key, nbytes in sizes.items():
            counts[key.split("#")[0].split("/")[0]] += nbytes
        counts["framing"] += len(frame) - sum(sizes.values())
    return counts


@pytest.mark.parametrize("codec", [None, Int8(), Zstd()])
@pytest.mark.parametrize("requests", ["up", "down"])
def test_counted_bytes_are_those_of_the_frames(codec, requests):
    tap = Tapped(serve(Service({"server": server()}), codec))
    meter = Metered(tap, requests=requests)
    remote, near = Remote("server", Framed(meter, codec), "server"), client()
    for step in range(3):
        vanilla(near, remote, *batch(step))
    remote.load_weights(remote.weights())
    remote.predict(near.predict(batch()[0]))
    with pytest.raises(ValueError, match="does not fit"):
        remote.predict(torch.zeros(1))
    replies = "down" if requests == "up" else "up"
    assert +meter.nbytes[requests] == +by_kind(tap.requests)
    assert +meter.nbytes[replies] == +by_kind(tap.replies)
    assert meter.nbytes[requests].keys() >= {"activation", "label", "weights", "framing"}
    assert meter.nbytes[replies].keys() >= {"gradient", "loss", "weights", "prediction", "error", "framing"}
    assert meter.total_nbytes == sum(map(len, tap.requests + tap.replies))
    assert meter.frames == len(tap.requests + tap.replies) == 14
    meter.clear()
    assert (meter.total_nbytes, meter.frames) == (0, 0)


def test_the_bytes_of_a_step_do_not_drift():
    across, near, totals = wire(server()), client(), []
    for step in range(12):
        across.meter.clear()
        vanilla(near, across.party, *batch(step))
        totals.append(across.meter.total_nbytes)
    assert len(set(totals)) == 1


def test_requests_go_up_or_down():
    with pytest.raises(ValueError, match="expected requests to go 'up' or 'down', got 'left'"):
        Metered(lambda frame: frame, requests="left")


# Remote


@pytest.mark.parametrize("where", ["service", "frames", "emulated"])
def test_training_across_a_wire_is_training_beside_it_bit_for_bit(where):
    near, far, top = client(), server(), server()
    service = Service({"server": far})
    transport = {
        "service": service,
        "frames": Framed(Metered(serve(Recorded(service)))),
        "emulated": Framed(Emulated(serve(service), PROFILES["satellite"], clock=VirtualClock())),
    }[where]
    remote, bottom = Remote("server", transport, "server"), client()
    for step in range(6):
        x, y = batch(step)
        assert torch.equal(vanilla(near, remote, x, y), vanilla(bottom, top, x, y))
        assert torch.equal(remote.predict(near.predict(x)), top.predict(bottom.predict(x)))
    assert bits(near.weights()) == bits(bottom.weights())
    assert bits(remote.weights()) == bits(far.weights()) == bits(top.weights())


def test_a_middle_stage_across_a_wire_returns_its_gradients():
    across, beside = wire(middle()), middle()
    near, head, bottom, top = client(), server(), client(), server()
    for step in range(6):
        x, y = batch(step)
        assert torch.equal(u_shaped(near, across.party, head, x, y), u_shaped(bottom, beside, top, x, y))
    assert bits(near.weights()) == bits(bottom.weights())
    assert bits(across.party.weights()) == bits(beside.weights())
    kinds = set(itertools.chain(*(e.request.tensors | e.reply.tensors for e in across.record.exchanges)))
    assert not kinds & {Kind.LABEL, Kind.LOSS}


def test_a_gradient_comes_back_if_and_only_if_the_input_asks():
    across = wire(middle())
    z = torch.randn(4, 8, dtype=torch.float64)
    across.party.forward(z)
    assert across.party.backward(torch.ones(4, 8, dtype=torch.float64)) is None
    across.party.forward(z.requires_grad_())
    assert across.party.backward(torch.ones(4, 8, dtype=torch.float64)).shape == z.shape
    kinds = [list(exchange.request.tensors) for exchange in across.record.exchanges]
    assert kinds == [["input"], ["gradient"], ["activation"], ["gradient"]]


def test_weights_are_taken_over_across_the_wire():
    across, other = wire(server()), server()
    other.learn(torch.randn(4, 8).double(), torch.arange(4) % 3)
    across.party.load_weights(other.weights())
    assert bits(across.party.weights()) == bits(other.weights())
    with pytest.raises(ValueError, match="expected the weights of its own stage"):
        across.party.load_weights({"strange": torch.zeros(1)})


def test_labels_are_asked_of_the_local_party():
    with pytest.raises(ValueError, match="ask the local party"):
        wire(server()).party.label(torch.zeros(1))


@pytest.mark.parametrize(
    "lie",
    [
        lambda reply: replace(reply, step=reply.step + 1),
        lambda reply: replace(reply, session="other"),
        lambda reply: replace(reply, verb="predict"),
        lambda reply: replace(reply, tensors={}),
        lambda reply: replace(reply, tensors={"prediction": torch.zeros(1)}),
    ],
)
def test_a_reply_to_something_else_is_refused(lie):
    class Liar:
        def request(self, message: Message) -> Message:
            return lie(Service({"server": server()}).request(message))

    z, y = learn(0).tensors.values()
    with pytest.raises(ValueError, match="expected"):
        Remote("server", Liar(), "server").learn(z.requires_grad_(), y)


@pytest.mark.parametrize("codec", [None, Int8()])
def test_private_inputs_do_not_cross(codec: Codec | None):
    tap = Tapped(serve(Service({"server": server()}), codec))
    remote, near = Remote("server", Framed(tap, codec), "server"), client()
    inputs, activations = [], []
    near.stage.register_forward_hook(lambda _, given, z: activations.append(z.detach().clone()))
    for step in range(4):
        x, y = batch(step)
        inputs.append(x)
        vanilla(near, remote, x, y)
    crossed = b"".join(tap.requests + tap.replies)
    for x in inputs:
        for row in x:
            for value in row:  # no row, and not even a single value of one
                assert value.numpy().tobytes() not in crossed
                assert value.float().numpy().tobytes() not in crossed
    for name, tensor in near.weights().items():
        assert tensor.numpy().tobytes() not in crossed, name
    found = all(row.numpy().tobytes() in crossed for z in activations for row in z)
    assert found == (codec is None)  # the scan does find what crosses


def test_a_guarded_party_sends_what_its_guard_made_of_it():
    class Rounded(Guard):
        def gradient(self, g: Tensor, y: Tensor | None = None) -> Tensor:
            return g.sign()

    party = server()
    party.guard = Rounded()
    across = wire(party)
    vanilla(client(), across.party, *batch())
    (exchange,) = across.record.exchanges
    assert set(exchange.reply.tensors["gradient"].unique().tolist()) <= {-1.0, 0.0, 1.0}


def test_bytes_of_a_frame_are_counted_alike_before_and_after_it_crosses():
    frame = encode(learn(1), Int8())
    assert frame_nbytes(frame).total() == len(frame)
    assert frame_nbytes(frame)["activation"] == 4 * 8 + 4 * 8 * 2  # levels; low and step, float64 as the activation
