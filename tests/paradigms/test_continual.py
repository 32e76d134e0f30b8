"""Learning one task after the other: the reservoir, replayed batches, Fisher information, elasticity, forgetting."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from splitlearn import Kind, Learner, Member, cut, fedavg_round, vanilla, wire
from splitlearn.paradigms import Elastic, Forgetting, ProximalMember, Replay, Replayed, fisher, forgetting
from splitlearn.train import Batches

from .toy import Batch, data, learner, model, near, plain, point, pulled_to, same


def numbered(count: int, start: int = 0) -> Batch:
    """Return samples that are their own numbers, and labels."""
    rows = torch.arange(start, start + count)
    return rows[:, None].double(), rows % 2


# Replay


def test_a_reservoir_keeps_its_capacity_and_rows_with_their_labels() -> None:
    memory = Replay(5, seed=0)
    for number in range(4):
        memory.add(*numbered(3, 3 * number))
        assert (memory.seen, len(memory.x), len(memory.y)) == (
            3 * number + 3,
            min(5, 3 * number + 3),
            min(5, 3 * number + 3),
        )
    kept = [int(x) for x in memory.x]
    assert len(set(kept)) == 5
    assert [int(y) for y in memory.y] == [row % 2 for row in kept]


def test_every_sample_has_the_same_chance_to_be_kept() -> None:
    counts = torch.zeros(20)
    for seed in range(1500):
        memory = Replay(5, seed)
        for start in (0, 8):  # in two batches of unlike size
            memory.add(*numbered(8 if start == 0 else 12, start))
        counts[[int(x) for x in memory.x]] += 1
    expected = 1500 * 5 / 20
    # Of 20 counts that are nearly independent, with the variance of a share of ¼: chi-square of 19, its 99.9 % is 43.8.
    statistic = float(((counts - expected) ** 2 / (expected * (1 - 5 / 20))).sum()) * 19 / 20
    assert statistic < 43.8
    late = float(counts[-5:].mean())
    assert abs(late - expected) < 40  # and not the latest, as a queue keeps, nor the first


def test_what_is_kept_is_a_copy() -> None:
    memory, (x, y) = Replay(3, seed=0), numbered(3)
    memory.add(x, y)
    x.zero_()
    y.fill_(7)
    assert sorted(int(one) for one in memory.x) == [0, 1, 2]
    assert max(int(one) for one in memory.y) == 1


def test_draws_are_without_replacement_and_seeded() -> None:
    assert Replay(3, seed=0).draw(2) is None
    memory = Replay(6, seed=0)
    memory.add(*numbered(6))
    drawn = memory.draw(4)
    assert drawn is not None
    assert len(set(drawn[0][:, 0].tolist())) == 4
    assert drawn[1].tolist() == [int(row) % 2 for row in drawn[0][:, 0]]
    everything = memory.draw(50)
    assert everything is not None
    assert sorted(everything[0][:, 0].tolist()) == list(range(6))


def test_a_memory_travels() -> None:
    memory, again = Replay(4, seed=0), Replay(4, seed=9)
    memory.add(*numbered(10))
    again.load_state_dict(copy.deepcopy(memory.state_dict()))
    for one in (memory, again):
        one.add(*numbered(10, 10))
    mine, other = memory.draw(3), again.draw(3)
    assert mine is not None
    assert other is not None
    assert all(torch.equal(*pair) for pair in zip(mine, other, strict=True))
    assert again.seen == 20


def test_replayed_batches_are_the_task_and_as_many_from_before() -> None:
    memory = Replay(10, seed=0)
    first = Replayed([numbered(4), numbered(3, 4)], memory)
    assert [len(x) for x, _ in first] == [4, 3]  # nothing is from before
    assert memory.seen == 0  # it learns of a task when that is over
    first.remember()
    assert memory.seen == 7
    second = Replayed([numbered(4, 100), numbered(2, 104)], memory)
    for (x, y), (own, labels) in zip(second, second.batches, strict=True):
        assert len(x) == len(y) == 2 * len(own)
        assert torch.equal(x[: len(own)], own)
        assert torch.equal(y[: len(own)], labels)
        assert float(x[len(own) :].max()) < 7
        assert y[len(own) :].tolist() == [int(row) % 2 for row in x[len(own) :, 0]]
    assert [len(x) for x, _ in Replayed(second.batches, memory, share=0.5)] == [6, 3]
    assert [len(x) for x, _ in Replayed(second.batches, memory, share=0.01)] == [5, 3]  # one at the least
    assert [len(x) for x, _ in Replayed([numbered(9, 100)], memory, share=5.0)] == [16]  # no more than there are
    second.remember()
    assert memory.seen == 13


def test_replay_makes_a_member_remember_an_earlier_task() -> None:
    x, _ = data(0, (80,))[0]
    y = (x[:, 0] > x[:, 1]).long()

    def accuracies(replays: bool) -> list[float]:
        """Return the accuracy on each class, of which one was learned after the other."""
        torch.manual_seed(0)
        stage = nn.Linear(3, 2).double()
        everywhere, memory = Learner("all", stage), Replay(40, seed=0)
        member = Member(learner("c", stage, lr=0.5), None, [])
        for label in (0, 1):
            task = Batches(x[y == label], y[y == label], batch_size=8, seed=0)
            member.batches = Replayed(task, memory) if replays else task
            for _ in range(20):
                fedavg_round([member], everywhere)
            if isinstance(member.batches, Replayed):
                member.batches.remember()
        right = (everywhere.predict(x).argmax(1) == y).double()
        return [float(right[y == label].mean()) for label in (0, 1)]

    assert accuracies(False) == [0.0, 1.0]
    assert min(accuracies(True)) > 0.8


def test_a_member_with_a_memory_goes_on_where_it_was() -> None:
    def made() -> Member:
        memory = Replay(4, seed=0)
        memory.add(*data(7, (9,))[0])
        x, y = data(0, (10,))[0]
        return Member(learner("c", plain()), None, Replayed(Batches(x, y, batch_size=4, seed=0), memory))

    first, second = made(), made()
    first.round(plain().state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    start = first.learner.weights()
    assert same(first.round(start)[0], second.round(start)[0])
    assert not same(made().round(start)[0], second.round(start)[0])


def test_a_memory_of_nothing_is_one_line() -> None:
    with pytest.raises(ValueError, match="expected room for a sample or more, got 0"):
        Replay(0, seed=0)
    for share in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"a share above 0 of a batch to replay, got {share}"):
            Replayed([], Replay(1, seed=0), share=share)


# Fisher information


def squares(stage: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the mean squared gradient over samples, each differentiated alone."""
    totals = [torch.zeros_like(own) for own in stage.parameters()]
    for one in range(len(x)):
        loss = nn.functional.cross_entropy(stage(x[one : one + 1]), y[one : one + 1])
        for total, g in zip(totals, torch.autograd.grad(loss, list(stage.parameters())), strict=True):
            total += g**2
    return [total / len(x) for total in totals]


def test_fisher_information_of_a_linear_model_by_hand() -> None:
    x, y = data(0, (7,))[0]
    stage = nn.Linear(3, 2).double()
    found = fisher([party := learner("c", stage)], party.learn, x, y)
    with torch.no_grad():
        off = torch.softmax(stage(x), 1) - nn.functional.one_hot(y, 2)  # of the loss in the logits
    weight, bias = found[0]
    assert torch.allclose(weight, (off[:, :, None] ** 2 * x[:, None] ** 2).mean(0), rtol=0, atol=1e-15)
    assert torch.allclose(bias, (off**2).mean(0), rtol=0, atol=1e-15)


def test_each_half_of_a_split_model_finds_its_own_part_across_a_wire() -> None:
    below, above = cut(plain(), 2)
    x, y = data(0, (6,))[0]
    client, server = learner("c", below, momentum=0.9), learner("s", above, momentum=0.9)
    far = wire(server)
    for one in data(3):
        vanilla(client, far.party, *one)
    held = [(party.weights(), copy.deepcopy(party.state_dict()["optimizer"])) for party in (client, server)]
    far.meter.clear()
    halves = fisher([client, server], lambda one, label: vanilla(client, far.party, one, label), x, y)
    whole = squares(nn.Sequential(*client.stage, *server.stage), x, y)
    assert [len(half) for half in halves] == [2, 4]
    assert all(torch.allclose(*pair, rtol=0, atol=1e-15) for pair in zip([*halves[0], *halves[1]], whole, strict=True))
    assert far.meter.frames == 2 * 6  # a request and its reply a sample
    for party, (weights, optimizer) in zip((client, server), held, strict=True):
        assert same(party.weights(), weights)
        now = party.state_dict()["optimizer"]
        assert now["param_groups"] == optimizer["param_groups"]
        assert optimizer["state"]
        for place, kept in optimizer["state"].items():
            assert torch.equal(now["state"][place]["momentum_buffer"], kept["momentum_buffer"])
    unsplit = learner("u", plain())
    unsplit.load_weights({**client.weights(), **server.weights()})
    (alone,) = fisher([unsplit], unsplit.learn, x, y)
    assert all(torch.allclose(*pair, rtol=0, atol=1e-15) for pair in zip(alone, whole, strict=True))


def test_fisher_information_moves_neither_buffers_nor_what_comes_next() -> None:
    torch.manual_seed(0)
    stage = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.BatchNorm1d(1), nn.Flatten(), nn.Linear(3, 2)).double()
    party, twin = learner("c", stage, momentum=0.9), learner("c", stage, momentum=0.9)
    for one in (party, twin):
        one.learn(*data(1)[0])
    held = party.weights()
    fisher([party], party.learn, *data(0, (5,))[0])
    assert same(party.weights(), held)
    for one in (party, twin):
        one.learn(*data(1)[1])
    assert same(party.weights(), twin.weights())


def test_penalties_are_no_part_of_the_information() -> None:
    x, y = data(0, (5,))[0]
    party, plainly = learner("c", plain()), learner("c", plain())
    elastic = Elastic(party, 100.0)
    elastic.consolidate([torch.ones_like(own) for own in party.stage.parameters()])
    party.load_weights({name: w + 1 for name, w in party.weights().items()})
    plainly.load_weights(party.weights())
    pairs = zip(fisher([party], party.learn, x, y)[0], fisher([plainly], plainly.learn, x, y)[0], strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_information_that_cannot_be_had_is_one_line_and_moves_nothing() -> None:
    below, above = cut(plain(), 2)
    client, server = learner("c", below), learner("s", above)
    session, (x, y) = server.session("c"), data(0, (4,))[0]
    held = client.weights(), server.weights()
    with pytest.raises(
        ValueError, match="a step of each learner a sample, got none, or several, of s; pass the learners"
    ):
        fisher([client, server], lambda one, label: vanilla(client, session, one, label), x, y)
    assert same(client.weights(), held[0])
    assert same(server.weights(), held[1])
    assert isinstance(client.optimizer, torch.optim.SGD)
    with pytest.raises(ValueError, match="a sample or more and as many labels, got 0 and 0"):
        fisher([client], client.learn, x[:0], y[:0])
    with pytest.raises(ValueError, match="n: expected a party with an optimizer"):
        fisher([nothing := Learner("n", plain())], nothing.learn, x, y)


# Elasticity


def test_the_elastic_term_by_hand() -> None:
    stage, batches = plain(), data(0, (4, 6, 5, 3))
    party = learner("c", stage)
    elastic = Elastic(party, 3.0)
    reference = copy.deepcopy(stage)
    tasks: list[tuple[list[Tensor], list[Tensor]]] = []
    for x, y in batches:
        loss = nn.functional.cross_entropy(reference(x), y)
        for weights, information in tasks:
            for own, w, f in zip(reference.parameters(), weights, information, strict=True):
                loss = loss + 3.0 / 2 * (f * (own - w) ** 2).sum()
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for own, g in zip(reference.parameters(), gradients, strict=True):
                own -= 0.1 * g
        party.learn(x, y)
        assert near(party.weights(), reference.state_dict(), 1e-14)
        information = squares(reference, x, y)
        (found,) = fisher([party], party.learn, x, y)
        elastic.consolidate(found)
        tasks.append(([own.detach().clone() for own in reference.parameters()], information))
    assert not near(party.weights(), trained_plainly(stage, batches), 1e-6)


def trained_plainly(stage: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    party = learner("p", stage)
    for x, y in batches:
        party.learn(x, y)
    return party.weights()


@pytest.mark.parametrize("strength", [0.0, 5.0])
def test_without_strength_or_tasks_nothing_is_held(strength: float) -> None:
    party, batches = learner("c", model(), momentum=0.9), data(0)
    twin = learner("c", model(), momentum=0.9)
    elastic = Elastic(party, strength)
    if not strength:
        elastic.consolidate([torch.ones_like(own) for own in party.stage.parameters()])
    for x, y in batches:
        party.learn(x, y)
        twin.learn(x, y)
    assert same(party.weights(), twin.weights())


def test_a_strong_hold_ends_between_two_tasks_where_the_penalty_says() -> None:
    party = point("p", 2.0, lr=0.1)
    elastic = Elastic(party, 3.0)
    for x, y in pulled_to(1.0, steps=200):
        party.learn(x, y)
    elastic.consolidate([torch.full((1, 1), 0.5, dtype=torch.float64)])
    for x, y in pulled_to(-1.0, steps=200):
        party.learn(x, y)
    # 2·(w + 1) + 3·0.5·(w − 1) = 0
    assert party.weights()["weight"].item() == pytest.approx(-0.5 / 3.5, abs=1e-10)


def test_both_halves_of_a_split_model_are_held_each_by_its_own_party() -> None:
    below, above = cut(plain(), 2)
    client, server, whole = learner("c", below), learner("s", above), learner("u", plain())
    far = wire(server)
    holds = [(Elastic(party, 4.0), party) for party in (client, server)]
    unsplit = Elastic(whole, 4.0)
    for x, y in data(0, (4, 5, 6)):
        for _ in range(3):
            vanilla(client, far.party, x, y)
            whole.learn(x, y)
        far.meter.clear()
        parts = fisher([client, server], lambda one, label: vanilla(client, far.party, one, label), x, y)
        for (elastic, _), part in zip(holds, parts, strict=True):
            elastic.consolidate(part)
        unsplit.consolidate(fisher([whole], whole.learn, x, y)[0])
    assert near({**client.weights(), **server.weights()}, whole.weights(), 1e-13)
    assert far.meter.nbytes["up"][Kind.WEIGHTS] == 0  # no information, and no weights, cross


def test_elasticity_and_another_addition_add_up() -> None:
    party = point("p", 0.0, lr=0.1, start=2.0)
    member = ProximalMember(party, None, pulled_to(0.0, steps=2), mu=3.0)
    Elastic(party, 5.0).consolidate([torch.ones(1, 1, dtype=torch.float64)])
    found, _ = member.round({"weight": torch.full((1, 1), 1.0, dtype=torch.float64)})
    first = 1.0 - 0.1 * 5.0 * (1.0 - 2.0)
    second = first - 0.1 * (5.0 * (first - 2.0) + 3.0 * (first - 1.0))
    assert found["weight"].item() == pytest.approx(second, abs=1e-14)


def test_elasticity_refuses_what_does_not_fit() -> None:
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"c: expected a strength of 0 or more, got {strength}"):
            Elastic(learner("c", plain()), strength)
    with pytest.raises(ValueError, match=r"information of each parameter's shape; take it with fisher"):
        Elastic(learner("c", plain()), 1.0).consolidate([torch.ones(2)])


# Forgetting


def test_forgetting_by_hand() -> None:
    table = [[0.9, 0.1, 0.2], [0.95, 0.8, 0.3], [0.5, 0.85, 0.7]]
    found = forgetting(table)
    assert found.accuracy == pytest.approx((0.5 + 0.85 + 0.7) / 3, abs=1e-15)
    assert found.forgetting == pytest.approx(((0.95 - 0.5) + (0.8 - 0.85)) / 2, abs=1e-15)  # a task may gain
    assert found.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.85 - 0.8)) / 2, abs=1e-15)
    assert found.learned == pytest.approx((0.9 + 0.8 + 0.7) / 3, abs=1e-15)
    assert forgetting([[1.0, 0.0], [0.0, 1.0]]) == Forgetting(0.5, 1.0, -1.0, 1.0)
    above = [[0.9, 0.6, 0.7], [0.95, 0.8, 0.99], [0.5, 0.85, 0.7]]
    assert forgetting(above) == found  # what a task scored before it was learned is not forgotten


@pytest.mark.parametrize("table", [[], [[1.0]], [[1.0, 0.0]], [[1.0, 0.0], [1.0]]])
def test_forgetting_needs_two_tasks_and_a_square(table: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="expected a square table of accuracies over 2 tasks or more"):
        forgetting(table)


def test_bad_steps_leave_the_optimizer_where_it_was() -> None:
    party, (x, y) = learner("c", plain()), data(0)[0]
    before = party.optimizer

    def fails(one: Tensor, label: Tensor) -> None:
        raise ConnectionResetError("gone")

    steps: list[Callable[[Tensor, Tensor], object]] = [fails, lambda one, label: None]
    for step, kind in zip(steps, (ConnectionResetError, ValueError), strict=True):
        with pytest.raises(kind):
            fisher([party], step, x, y)
        assert party.optimizer is before
