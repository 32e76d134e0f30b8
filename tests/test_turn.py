"""Sessions that share a stage: one exchange at a time, no deadlock, and a dead client blocks nobody."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from splitlearn import Guard, Learner, turn

X, Y = torch.rand(4, 3), torch.tensor([0, 1, 1, 0])


def shared() -> tuple[Learner, Learner, Learner]:
    torch.manual_seed(0)
    stage = nn.Linear(3, 2)
    server = Learner("server", stage, torch.optim.SGD(stage.parameters(), lr=0.1, momentum=0.9))
    return server, server.session("a"), server.session("b")


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_sessions_share_stage_optimizer_and_randomness() -> None:
    server, a, b = shared()
    assert a.stage is b.stage is server.stage
    assert a.optimizer is b.optimizer is server.optimizer
    assert (a.name, b.name) == ("a", "b")
    twin, _, _ = shared()
    for number, one in enumerate((a, b, server, a)):
        assert torch.equal(one.learn(X + number, Y)[0], twin.learn(X + number, Y)[0])
    drawing, alone = (Learner("server", nn.Identity(), guard=Flip()) for _ in range(2))
    drawn = [one.label(Y).tolist() for one in (drawing.session("a"), drawing.session("b"), drawing)]
    assert drawn == [alone.label(Y).tolist() for _ in range(3)]
    assert drawn[0] != drawn[1]


class Flip(Guard):
    def label(self, y: Tensor) -> Tensor:
        return torch.randint_like(y, 1000)


def test_one_exchange_at_a_time_from_forward_to_backward() -> None:
    _, a, b = shared()
    order: list[str] = []
    a.forward(X)
    waiting = in_thread(lambda: (b.learn(X, Y), order.append("b")))
    waiting.join(0.2)
    assert waiting.is_alive()
    order.append("a")
    a.backward(torch.ones(4, 2))
    waiting.join(10)
    assert order == ["a", "b"]


def test_equal_names_are_still_two_sessions() -> None:
    server, a, _ = shared()
    namesake = server.session("a")
    a.forward(X)
    waiting = in_thread(lambda: namesake.learn(X, Y))
    waiting.join(0.2)
    assert waiting.is_alive()
    a.abandon()
    waiting.join(10)
    assert not waiting.is_alive()


def test_many_threads_neither_deadlock_nor_mix() -> None:
    # Each exchange adds the same gradient whatever the order, so that the sum tells whether any was lost or doubled.
    stage = nn.Linear(3, 2)
    server = Learner("server", stage, torch.optim.SGD(stage.parameters(), lr=1.0))
    nn.init.zeros_(stage.bias)

    def exchange(session: Learner) -> None:
        for _ in range(20):
            session.backward(torch.full_like(session.forward(X), 0.25))
            session.predict(X)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(exchange, [server.session(str(number)) for number in range(4)], timeout=30))
    assert stage.bias.tolist() == [-80.0, -80.0]
    assert stage.training


def test_a_failed_call_frees_the_turn() -> None:
    _, a, b = shared()
    for fail in (lambda: a.forward(torch.rand(4, 9)), lambda: a.learn(X * torch.nan, Y), lambda: a.learn(X, Y + 7)):
        with pytest.raises(ValueError, match="a: "):
            fail()
        done = in_thread(lambda: b.learn(X, Y))
        done.join(10)
        assert not done.is_alive()


def test_predict_and_weights_wait_for_no_turn() -> None:
    _, a, b = shared()
    a.forward(X)
    assert b.predict(X).shape == (4, 2)
    assert b.weights().keys() == {"weight", "bias"}
    a.backward(torch.ones(4, 2))


def test_predict_in_another_thread_never_switches_a_training_step_to_evaluation() -> None:
    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.modes: set[bool] = set()

        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.001)
            if torch.is_grad_enabled():
                self.modes.add(self.training)
            return x

    watch = Watch()
    server = Learner("server", nn.Sequential(watch, nn.Linear(3, 2)))
    one, other = server.session("one"), server.session("other")
    busy = in_thread(lambda: [other.predict(X) for _ in range(40)])
    for _ in range(40):
        one.learn(X, Y)
    busy.join(10)
    assert watch.modes == {True}


def test_a_dead_clients_step_is_given_up_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    server, a, b = shared()
    a.forward(X)  # and then its client dies
    monkeypatch.setattr(turn, "TURN_SECONDS", 0.05)
    before = time.monotonic()
    b.learn(X, Y)
    assert time.monotonic() - before < 10
    after = server.weights()
    with pytest.raises(ValueError, match=r"a: expected an open step.*waiting too long is given up"):
        a.backward(torch.ones(4, 2))
    assert all(torch.equal(after[name], tensor) for name, tensor in server.weights().items())
    a.backward(torch.ones_like(a.forward(X)))  # a new step is welcome
    server.state_dict()


def test_nobody_else_waiting_a_step_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn, "TURN_SECONDS", 0.01)
    _, a, _ = shared()
    z = a.forward(X)
    time.sleep(0.05)
    before = a.steps
    a.backward(torch.ones_like(z))
    assert a.steps == before + 1


def test_a_checkpoint_of_a_shared_stage_waits_for_no_open_step_and_voids_it_on_load() -> None:
    server, a, b = shared()
    state = server.state_dict()
    a.forward(X)
    with pytest.raises(ValueError, match="server: expected no open step"):
        server.state_dict()
    server.load_state_dict(state)
    with pytest.raises(ValueError, match="a: expected an open step"):
        a.backward(torch.ones(4, 2))
    b.learn(X, Y)


def test_a_session_that_is_not_the_holder_cannot_free_the_turn() -> None:
    _, a, b = shared()
    z = a.forward(X)
    b.abandon()
    with pytest.raises(ValueError, match="b: expected an open step"):
        b.backward(torch.ones(4, 2))
    a.backward(torch.ones_like(z))
