"""Collaborative inference: rules and calibration by hand, who answers what over real frames, and networks that fail."""

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from splitlearn.cut import cut
from splitlearn.exits import Confidence, Entropy, Threshold, calibrated, exit_head, loss_bound, train_exit
from splitlearn.frames import Kind
from splitlearn.inference import Deadline, Inference, infer, joined, stream
from splitlearn.models import cnn28
from splitlearn.network import Emulated, Profile, VirtualClock
from splitlearn.party import Guard, Learner
from splitlearn.remote import Remote, wire
from splitlearn.service import Service
from splitlearn.train import predict
from splitlearn.wire import Carrier, Framed, Metered, serve

FAST = Profile(up=1e8, down=1e8, latency=0.01)
SLOW = Profile(up=1e8, down=1e8, latency=2.0)


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


MODEL = model()
BELOW, ABOVE = cut(MODEL, 2)
BOTTOM, HEAD = Learner("client", BELOW), Learner("exit", exit_head((8,), 3).double())
X = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NEVER, ALWAYS = Confidence(1.1), Confidence(0.0)
HALF = Confidence(float(Confidence.sureness(HEAD.predict(BOTTOM.predict(X))).median()))
SPLIT = ABOVE(BELOW(X)).detach()


def server() -> Learner:
    return Learner("server", ABOVE)


def over(carrier: Carrier) -> Remote:
    return Remote("server", Framed(carrier), "server")


def hand_made(sureness: list[float], exit_right: list[int], final_right: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of two classes by which the exit is so sure, and both are right where they should be; label 1."""
    sure = torch.tensor(sureness, dtype=torch.float64)
    gap = (sure / (1 - sure)).log() * (2 * torch.tensor(exit_right) - 1)
    final = (2 * torch.tensor(final_right) - 1).double()
    zeros = torch.zeros_like(gap)
    return torch.stack([zeros, gap], 1), torch.stack([zeros, final], 1), torch.ones(len(sure), dtype=torch.int64)


# Rules and calibration


def test_rules_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(9), 0.0], [0.0, math.log(3)]])  # .5, .9, .75
    assert Confidence.sureness(logits).tolist() == pytest.approx([0.5, 0.9, 0.75])
    assert Confidence(0.7)(logits).tolist() == [False, True, True]
    assert Confidence(0.8)(logits).tolist() == [False, True, False]
    nine, three = (-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (0.9, 0.75))
    assert Entropy.sureness(logits).tolist() == pytest.approx([-math.log(2), -nine, -three])
    assert Entropy(0.5)(logits).tolist() == [False, True, False]
    assert Entropy(0.6)(logits).tolist() == [False, True, True]
    assert not NEVER(logits).any()
    assert not Entropy.leaving(math.inf)(logits).any()
    assert ALWAYS(logits).all()


def test_a_rule_knows_the_surest_of_logits_that_overflow() -> None:
    logits = torch.tensor([[1e4, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert Entropy.sureness(logits).tolist() == pytest.approx([0.0, -math.log(3)])
    assert Confidence.sureness(logits).tolist() == pytest.approx([1.0, 1 / 3])


@pytest.mark.parametrize("kind", [Confidence, Entropy])
@pytest.mark.parametrize(
    ("max_loss", "leaving"),
    [
        (0.0, 2),  # the third is lost
        (0.1, 3),
        (0.2, 5),
        (0.3, 10),
    ],
)
def test_as_many_leave_as_the_loss_allows(kind: type[Threshold], max_loss: float, leaving: int) -> None:
    sureness = [0.99, 0.98, 0.97, 0.96, 0.95, 0.9, 0.9, 0.8, 0.7, 0.6]
    exit_right = [1, 1, 0, 0, 1, 0, 0, 1, 1, 1]
    final_right = [1, 1, 1, 1, 1, 1, 0, 1, 1, 1]  # lost so far: 0 0 1 2 2 3 3 3 3 3
    early, late, y = hand_made(sureness, exit_right, final_right)
    rule = calibrated(kind, early, late, y, max_loss=max_loss)
    assert rule(early).tolist() == [place < leaving for place in range(10)]


def test_what_is_won_makes_good_for_what_is_lost_and_equals_leave_together() -> None:
    early, late, y = hand_made([0.9, 0.8, 0.8, 0.7], [0, 1, 0, 1], [1, 0, 1, 1])  # lost so far: 1, (0 or 2) 1, 1
    assert calibrated(Confidence, early, late, y, max_loss=0.25)(early).all()
    assert not calibrated(Confidence, early, late, y, max_loss=0.2)(early).any()
    won, final, y = hand_made([0.9, 0.8], [0, 1], [1, 0])
    assert calibrated(Confidence, won, final, y, max_loss=0.0)(won).all()


def test_the_bound_is_that_of_clopper_and_pearson() -> None:
    assert loss_bound(0, 0, 100, delta=0.1) == pytest.approx(1 - 0.05 ** (1 / 100))
    exact = binomtest(7, 300).proportion_ci(0.95, "exact").high, binomtest(4, 300).proportion_ci(0.95, "exact").low
    assert loss_bound(7, 4, 300, delta=0.05) == pytest.approx(exact[0] - exact[1])
    assert loss_bound(3, 0, 3, delta=0.05) == 1


@pytest.mark.parametrize("kind", [Confidence, Entropy])
def test_with_a_bound_the_loss_elsewhere_is_kept_and_without_it_half_the_time_not(kind: type[Threshold]) -> None:
    generator = torch.Generator().manual_seed(3)
    sure = 0.5 + 0.499 * torch.rand(20_000, dtype=torch.float64, generator=generator)
    right = torch.rand(20_000, dtype=torch.float64, generator=generator) < sure  # an exit that is calibrated itself
    early, late, y = hand_made(sure.tolist(), right.long().tolist(), [1] * 20_000)
    broken = {None: 0, 0.2: 0}
    for _ in range(20):
        rows = torch.randperm(20_000, generator=generator)[:400]
        for delta in broken:
            rule = calibrated(kind, early[rows], late[rows], y[rows], max_loss=0.05, delta=delta)
            broken[delta] += int((rule(early) & ~right).double().mean() > 0.05)
    assert broken[0.2] <= 4  # of 20, where at most a fifth is promised
    assert broken[None] >= 5


def test_too_few_samples_to_tell_let_nothing_leave() -> None:
    early, late, y = hand_made([0.99] * 50, [1] * 50, [1] * 50)
    assert not calibrated(Confidence, early, late, y, max_loss=0.01, delta=0.05)(early).any()
    assert calibrated(Confidence, early, late, y, max_loss=0.1, delta=0.05)(early).all()


def test_a_fixed_grid_runs_from_strict_to_all() -> None:
    for kind in (Confidence, Entropy):
        grid = kind.grid(10)
        assert grid == sorted(grid, reverse=True)
        assert kind.leaving(grid[-1])(torch.zeros(1, 10)).all()


# Exit heads


@pytest.mark.parametrize(
    ("shape", "features"), [((16, 14, 14), 16 * 49), ((32, 4, 3), 32 * 12), ((16, 64), 16 * 7), ((12,), 12)]
)
def test_a_head_fits_its_activation_and_costs_what_it_says(shape: tuple[int, ...], features: int) -> None:
    head = exit_head(shape, 10)
    with FlopCounterMode(display=False) as counter:
        assert head(torch.rand(2, *shape)).shape == (2, 10)
    assert counter.get_total_flops() == 2 * 2 * features * 10
    assert sum(parameter.numel() for parameter in head.parameters()) == features * 10 + 10


def test_behind_the_first_block_bottom_and_head_are_a_tenth_of_the_work() -> None:
    net, x = cnn28(), torch.rand(1, 1, 28, 28)
    with FlopCounterMode(display=False) as whole:
        net(x)
    with FlopCounterMode(display=False) as edge:
        exit_head((16, 14, 14), 10)(net.block1(x))
    assert 0.09 < edge.get_total_flops() / whole.get_total_flops() < 0.1


def test_a_head_is_drawn_from_its_seed_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (exit_head((4,), 3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[-1].weight, same[-1].weight)
    assert not torch.equal(one[-1].weight, other[-1].weight)


def test_an_exit_is_trained_on_a_bottom_that_stays_as_it_is() -> None:
    before = BOTTOM.weights()
    head = exit_head((8,), 3).double()
    fresh = head[-1].weight.detach().clone()
    y = SPLIT.argmax(1)
    trained = train_exit(head, BOTTOM, X, y, epochs=60, batch_size=5, lr=0.05)
    again = train_exit(head, BOTTOM, X, y, epochs=60, batch_size=5, lr=0.05)
    assert all(torch.equal(before[name], weight) for name, weight in BOTTOM.weights().items())
    assert torch.equal(head[-1].weight, fresh)
    right = (predict([BOTTOM, trained], X).argmax(1) == y).double().mean()
    assert right > max((y == label).double().mean() for label in range(3)) + 0.1
    assert torch.equal(trained.stage[-1].weight, again.stage[-1].weight)  # type: ignore[union-attr]


# Who answers


def test_where_nothing_leaves_a_cascade_is_split_to_the_bit() -> None:
    line = wire(server())
    split = infer(X, BOTTOM, line.party, mode="split", batch_size=7)
    cascade = infer(X, BOTTOM, line.party, exit=HEAD, rule=NEVER, batch_size=7)
    assert torch.equal(split.logits, predict([BOTTOM, server()], X, batch_size=7))
    assert torch.equal(cascade.logits, split.logits)
    assert cascade.where == split.where == ("cloud",) * 20
    assert cascade.totals == {"edge": 0, "cloud": 20, "fallback": 0, "sent": 20}


def test_where_all_leave_a_cascade_is_the_edge_alone_and_no_frame_crosses() -> None:
    line = wire(server())
    edge = infer(X, BOTTOM, None, exit=HEAD, mode="edge", batch_size=7)
    cascade = infer(X, BOTTOM, line.party, exit=HEAD, rule=ALWAYS, batch_size=7)
    assert torch.equal(cascade.logits, edge.logits)
    assert torch.equal(edge.logits, predict([BOTTOM, HEAD], X, batch_size=7))
    assert cascade.totals == {"edge": 20, "cloud": 0, "fallback": 0, "sent": 0}
    assert line.meter.frames == line.meter.total_nbytes == 0


def test_each_sample_is_answered_where_the_rule_says_and_only_those_that_cross_are_on_the_wire() -> None:
    line = wire(server())
    answers = infer(X, BOTTOM, line.party, exit=HEAD, rule=HALF, batch_size=20)
    z = BOTTOM.predict(X)
    stays = HALF(HEAD.predict(z))
    assert 0 < int(stays.sum()) < 20
    assert [place == "edge" for place in answers.where] == stays.tolist() == (~answers.sent).tolist()
    assert torch.equal(answers.logits[stays], HEAD.predict(z)[stays])
    assert torch.allclose(answers.logits[~stays], SPLIT[~stays], rtol=1e-12)  # in batches of another size
    assert torch.equal(answers.labels, answers.logits.argmax(1))
    (exchange,) = line.record.exchanges
    assert torch.equal(exchange.request.tensors[Kind.ACTIVATION], z[~stays])
    assert line.meter.nbytes["up"][Kind.ACTIVATION] == int((~stays).sum()) * 8 * 8
    assert answers.share("edge") == stays.double().mean()


def test_fewer_frames_cross_where_whole_batches_leave() -> None:
    frames = {}
    for rule in (NEVER, HALF, ALWAYS):
        line = wire(server())
        infer(X, BOTTOM, line.party, exit=HEAD, rule=rule, batch_size=1)
        frames[rule] = line.meter.frames
    assert frames[NEVER] == 40
    assert frames[HALF] == 2 * int((~HALF(HEAD.predict(BOTTOM.predict(X)))).sum())
    assert frames[ALWAYS] == 0


def test_in_the_cloud_the_input_itself_crosses() -> None:
    line = wire(Learner("server", MODEL))
    answers = infer(X, None, line.party, mode="cloud", batch_size=20)
    assert torch.equal(answers.logits, SPLIT)
    (exchange,) = line.record.exchanges
    assert torch.equal(exchange.request.tensors[Kind.ACTIVATION], X)


@pytest.mark.parametrize("size", [1, 7])
def test_a_stream_is_answered_as_the_batches_are(size: int) -> None:
    at_once = infer(X, BOTTOM, wire(server()).party, exit=HEAD, rule=HALF, batch_size=size)
    seen: list[int] = []

    def arriving() -> Any:
        for number, one in enumerate(X.split(size)):
            seen.append(number)
            yield one

    answers = stream(arriving(), BOTTOM, wire(server()).party, exit=HEAD, rule=HALF)
    first = next(answers)
    assert seen == [0]  # answered before the next one came
    whole = joined([first, *answers])
    assert torch.equal(whole.logits, at_once.logits)
    assert (whole.where, whole.totals) == (at_once.where, at_once.totals)
    other = infer(X, BOTTOM, wire(server()).party, exit=HEAD, rule=HALF, batch_size=20)
    assert whole.where == other.where
    assert torch.allclose(whole.logits, other.logits, rtol=1e-12)


def test_a_device_may_have_several_exits() -> None:
    first, second, top = cut(MODEL, 2, 4)
    later = Learner("exit2", exit_head((8,), 3, seed=1).double())
    line = wire(Learner("server", top))
    deeper = Inference(Learner("client", second), line.party, later, Confidence(0.4))
    answers = infer(X, Learner("client", first), deeper, exit=HEAD, rule=HALF, batch_size=20)
    z = BOTTOM.predict(X)
    early = HALF(HEAD.predict(z))
    then = ~early & Confidence(0.4)(later.predict(second(z)))
    crosses = ~early & ~then
    assert all(int(rows.sum()) for rows in (early, then, crosses))
    assert torch.equal(answers.sent, crosses)
    assert [place == "cloud" for place in answers.where] == crosses.tolist()
    assert torch.allclose(answers.logits[then], later.predict(second(z))[then], rtol=1e-12)
    assert torch.allclose(answers.logits[crosses], SPLIT[crosses], rtol=1e-12)
    assert line.meter.nbytes["up"][Kind.ACTIVATION] == int(crosses.sum()) * 8 * 8


def test_the_exit_reads_what_would_cross() -> None:
    class Negated(Guard):
        def activation(self, z: Tensor) -> Tensor:
            return -z

    line, guarded = wire(server()), Learner("client", BELOW, guard=Negated())
    answers = infer(X, guarded, line.party, exit=HEAD, rule=HALF)
    assert [place == "edge" for place in answers.where] == HALF(HEAD.predict(-BELOW(X))).tolist()
    (exchange,) = line.record.exchanges
    assert torch.equal(exchange.request.tensors[Kind.ACTIVATION], -BOTTOM.predict(X)[answers.sent])


# Networks that fail


class Line:
    """A network that is there, slow, down, or loses replies, as told; frames really reach the server behind it."""

    def __init__(self, clock: VirtualClock):
        self.state, self.clock, self.tried = "fast", clock, 0
        self.meter = Metered(serve(Service({"server": server()})))
        self._ways = {name: Emulated(self.meter, way, clock=clock) for name, way in (("fast", FAST), ("slow", SLOW))}

    def __call__(self, frame: bytes) -> bytes:
        self.tried += 1
        if self.state == "down":
            raise ConnectionError("no route to the server")
        if self.state == "lossy":
            self.meter(frame)
            raise TimeoutError
        return self._ways[self.state](frame)


def asking(line: Line, **settings: float) -> tuple[Inference, Deadline]:
    deadline = Deadline(0.5, clock=line.clock, **settings)
    return Inference(BOTTOM, over(line), HEAD, NEVER, deadline=deadline), deadline


@pytest.mark.parametrize("state", ["slow", "down", "lossy"])
def test_when_the_network_drops_the_exit_answers_and_the_server_is_asked_again_later(state: str) -> None:
    line = Line(VirtualClock())
    whole, deadline = asking(line)
    found = []

    def one(number: int) -> str:
        answers = whole.answer(X[number : number + 1])
        wanted = SPLIT if answers.where == ("cloud",) else HEAD.predict(BOTTOM.predict(X))
        assert torch.allclose(answers.logits[0], wanted[number], rtol=1e-12)  # its own, never another's
        found.append((*answers.where, bool(answers.sent)))
        return answers.where[0]

    assert one(0) == "cloud"
    line.state = state
    assert one(1) == "fallback"
    assert deadline.failures == 1
    assert deadline.reason
    for number in (2, 3, 4):  # within a second of the failure
        assert one(number) == "fallback"
    assert line.tried == 2
    line.clock.sleep(1.0)
    assert one(5) == "fallback"  # tried again, and failed again: now it is left alone for two seconds
    assert line.tried == 3
    line.state = "fast"
    line.clock.sleep(1.5)
    assert one(6) == "fallback"
    line.clock.sleep(0.5)
    assert [one(7), one(8)] == ["cloud", "cloud"]
    assert deadline.failures == 0
    assert [sent for _, sent in found] == [True, True, False, False, False, True, False, True, True]


def test_it_is_left_alone_ever_longer_up_to_a_limit() -> None:
    line = Line(VirtualClock())
    line.state = "down"
    whole, deadline = asking(line, retry=1.0, longest=5.0)
    tries = []
    for _ in range(200):
        before = line.tried
        whole.answer(X[:1])
        tries += [line.clock.now()] if line.tried > before else []
        line.clock.sleep(0.25)
    assert tries[:6] == [0.0, 1.0, 3.0, 7.0, 12.0, 17.0]
    assert deadline.failures == line.tried
    assert deadline.reason == "no route to the server"


def test_of_a_batch_those_that_crossed_fall_back_and_the_others_stay_as_they_are() -> None:
    line = Line(VirtualClock())
    line.state = "slow"
    deadline = Deadline(0.5, clock=line.clock)
    answers = infer(X, BOTTOM, over(line), exit=HEAD, rule=HALF, deadline=deadline, batch_size=10)
    edge = infer(X, BOTTOM, None, exit=HEAD, mode="edge", batch_size=10)
    assert torch.equal(answers.logits, edge.logits)
    stays = HALF(edge.logits)
    assert [place == "edge" for place in answers.where] == stays.tolist()
    assert set(answers.where) == {"edge", "fallback"}
    assert answers.sent.tolist() == [not stay and row < 10 for row, stay in enumerate(stays.tolist())]
    assert line.meter.frames == 2  # the second batch was not sent


@pytest.mark.parametrize("mode", ["split", "cloud"])
def test_any_mode_that_crosses_can_fall_back(mode: Any) -> None:
    line = Line(VirtualClock())
    line.state = "down"
    deadline = Deadline(0.5, clock=line.clock)
    answers = infer(X, BOTTOM, over(line), exit=HEAD, mode=mode, deadline=deadline, batch_size=20)
    assert answers.totals == {"edge": 0, "cloud": 0, "fallback": 20, "sent": 20}
    assert torch.equal(answers.logits, HEAD.predict(BOTTOM.predict(X)))


def test_without_a_deadline_the_error_comes_as_it_is() -> None:
    line = Line(VirtualClock())
    line.state = "down"
    with pytest.raises(ConnectionError, match="no route to the server"):
        infer(X, BOTTOM, over(line), exit=HEAD, rule=NEVER)


def test_in_real_time_a_hanging_request_is_left_behind_and_its_late_answer_dropped() -> None:
    let_go, calls = threading.Event(), []
    carrier = serve(Service({"server": server()}))

    def hanging(frame: bytes) -> bytes:
        calls.append(frame)
        if len(calls) == 1:
            assert let_go.wait(60)
        return carrier(frame)

    deadline = Deadline(0.02, retry=1e-6, longest=1e-6)
    whole = Inference(BOTTOM, over(hanging), HEAD, NEVER, deadline=deadline)
    assert [whole.answer(X[row : row + 1]).where for row in range(3)] == [("fallback",)] * 3
    assert len(calls) == 1  # while the first is on its way, no other is made
    flight = deadline._flight
    assert flight is not None
    let_go.set()
    assert flight.done.wait(60)
    assert deadline.ready
    deadline.seconds = 60  # however busy this machine is
    late = whole.answer(X[3:4])
    assert late.where == ("cloud",)
    assert torch.allclose(late.logits, SPLIT[3:4], rtol=1e-12)
    assert len(calls) == 2


@pytest.mark.parametrize("mode", ["split", "cloud", "cascade"])
def test_a_slow_server_in_this_process_does_not_hold_up_the_exit(mode: Any) -> None:
    let_go = threading.Event()

    class Slow(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            assert let_go.wait(5)
            return z[:, :3]

    deadline = Deadline(0.02)
    answers = Inference(BOTTOM, Learner("server", Slow()), HEAD, NEVER, mode, deadline).answer(X)
    flight = deadline._flight
    assert flight is not None
    assert not flight.done.is_set()  # the exit did not wait until the server had given up
    assert answers.where == ("fallback",) * len(X)
    let_go.set()
    assert flight.done.wait(60)
    assert torch.equal(answers.logits, HEAD.predict(BOTTOM.predict(X)))


@pytest.mark.parametrize("error", [OSError("no route"), EOFError("the pipe is shut")])
def test_a_broken_pipe_is_a_failure_of_the_network(error: Exception) -> None:
    def broken() -> Tensor:
        raise error

    deadline = Deadline(60)
    assert deadline.ask(broken) is None
    assert (deadline.failures, deadline.reason) == (1, str(error))


def test_an_interrupt_in_the_request_is_raised_and_none_is_no_answer() -> None:
    def interrupted() -> Tensor:
        raise SystemExit(3)

    for clock in (None, VirtualClock()):
        with pytest.raises(SystemExit):
            Deadline(60, clock=clock).ask(interrupted)
        with pytest.raises(ValueError, match="expected an answer, got None"):
            Deadline(60, clock=clock).ask(lambda: None)


def test_an_answer_left_in_the_pipe_is_not_taken_for_the_next_samples() -> None:
    clock, pipe = VirtualClock(), []
    carrier = serve(Service({"server": server()}))

    def stale(frame: bytes) -> bytes:
        pipe.append(carrier(frame))
        if len(pipe) == 1:
            raise TimeoutError
        return pipe[-2]

    whole = Inference(BOTTOM, over(stale), HEAD, NEVER, deadline=Deadline(0.5, clock=clock))
    assert whole.answer(X[:1]).where == ("fallback",)
    clock.sleep(1.0)
    with pytest.raises(ValueError, match="expected the reply to 'predict', step 2; got one to 'predict', step 1"):
        whole.answer(X[1:2])


def test_what_does_not_fit_is_told_and_is_no_failure_of_the_network() -> None:
    line = Line(VirtualClock())
    whole, deadline = asking(line)
    with pytest.raises(ValueError, match="client: its stage does not fit an input of shape"):
        whole.answer(torch.zeros(2, 5).double())
    wide = Inference(Learner("client", nn.Identity()), over(line), HEAD, NEVER, deadline=deadline)
    with pytest.raises(ValueError, match="server: its stage does not fit an input of shape"):
        Inference(wide.bottom, wide.server, Learner("exit", nn.Linear(6, 3).double()), NEVER, deadline=deadline).answer(
            X
        )
    assert deadline.failures == 0
    assert whole.answer(X[:1]).where == ("cloud",)


# Bad input


def constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: infer(X, BOTTOM, server(), rule=NEVER), "needs bottom, server, exit, rule; got no exit"),
        (lambda: infer(X, BOTTOM, server(), exit=HEAD), "got no rule"),
        (lambda: infer(X, None, None, mode="split"), "mode 'split' needs bottom, server; got no bottom, server"),
        (lambda: infer(X, BOTTOM, None, mode="edge"), "mode 'edge' needs bottom, exit; got no exit"),
        (lambda: infer(X, BOTTOM, server(), mode="fog"), "mode among edge, cloud, split, cascade; got 'fog'"),
        (
            lambda: infer(X, BOTTOM, server(), mode="split", deadline=Deadline(1)),
            "expected an exit .* that answers when the server does not in time, got none; train one with train_exit",
        ),
        (
            lambda: Inference(
                BOTTOM, Inference(BOTTOM, server(), HEAD, NEVER), HEAD, NEVER, deadline=Deadline(1)
            ),
            "give it to that one",
        ),
        (lambda: infer(X[:0], BOTTOM, server(), mode="split"), "expected a batch of at least one sample"),
        (lambda: infer(X, BOTTOM, server(), mode="split", batch_size=0), "batch size of 1 or more, got 0"),
        (lambda: stream([], BOTTOM, server()), "got no exit, rule"),  # before the first sample
        (lambda: joined([]), "at least one batch, got none"),
        (
            lambda: infer(X, BOTTOM, server(), exit=HEAD, rule=constant(torch.zeros(3))),
            r"expected a rule that returns a boolean a sample, \[20\], got torch.float32",
        ),
        (
            lambda: infer(X, BOTTOM, server(), exit=Learner("exit", exit_head((8,), 4).double()), rule=Confidence(0.4)),
            "expected as many classes from the server as from the exit, 4, got 3",
        ),
        (
            lambda: infer(X, BOTTOM, Learner("s", nn.Flatten(0)), mode="split"),
            r"expected logits \[N, C\] for 20 samples from the server, got \(160,\)",
        ),
        (lambda: Deadline(0), "expected a deadline of finite seconds > 0, got 0"),
        (lambda: Deadline(math.nan), "expected a deadline of finite seconds > 0, got nan"),
        (lambda: Deadline(1, retry=math.inf), "expected retry of finite seconds > 0"),
        (lambda: Deadline(1, retry=2, longest=1), "expected longest of finite seconds ≥ retry = 2, got 1"),
        (lambda: Confidence(math.nan), "expected a threshold, got nan"),
        (lambda: Entropy(math.nan), "expected a threshold, got nan; give nats"),
        (lambda: Confidence(0.5)(torch.tensor([[math.nan, 0]])), "expected finite logits"),
        (lambda: Confidence(0.5)(torch.zeros(3)), r"expected logits \[N, C\]"),
        (lambda: exit_head((1, 2, 3, 4), 3), "expected an activation of shape"),
        (lambda: exit_head((8,), 1), "expected at least 2 classes"),
        (lambda: train_exit(nn.Identity(), BOTTOM, X, torch.zeros(3), epochs=1), "got 20 and 3"),
        (
            lambda: calibrated(Confidence, SPLIT, SPLIT, torch.zeros(3), max_loss=0.1),
            "of the same samples",
        ),
        (
            lambda: calibrated(Confidence, SPLIT, SPLIT, torch.zeros(20), max_loss=1.5),
            r"expected a max_loss in \[0, 1\], got 1.5",
        ),
        (lambda: loss_bound(1, 1, 5, delta=1.0), "expected a delta between 0 and 1"),
        (lambda: loss_bound(3, 3, 5, delta=0.1), "expected counts of 5 samples"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_in_a_line(call: Callable[[], object], said: str) -> None:
    with pytest.raises((ValueError, LookupError), match=said) as told:
        call()
    assert "\n" not in str(told.value)


def test_a_deadline_is_asked_when_it_is_ready() -> None:
    clock = VirtualClock()
    deadline = Deadline(1, clock=clock)
    assert deadline.ask(lambda: clock.sleep(2)) is None
    with pytest.raises(ValueError, match="expected to be asked when ready"):
        deadline.ask(lambda: 1)
    clock.sleep(1)
    assert deadline.ask(lambda: 1) == 1
