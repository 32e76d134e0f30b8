"""FedAvg, FedProx, SCAFFOLD, members that are away, and models of one's own: by hand, and what they are equal to."""

import copy
import pickle
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from defenses.aggregation import Median, Robust
from defenses.poisoning import ClippedSteps
from splitlearn import (
    Framed,
    Learner,
    Member,
    RemoteMember,
    Service,
    cut,
    fedavg_round,
    serve,
    splitfed_v1_round,
    splitfed_v2_round,
)
from splitlearn.paradigms import (
    Absent,
    Elastic,
    ProximalMember,
    ScaffoldMember,
    entries_above,
    fine_tuned,
    no_control,
    scaffold_round,
)
from splitlearn.paradigms.hooks import add_before_steps

from .toy import Batch, Lost, data, learner, model, near, plain, point, pulled_to, same

SIZES = ((4, 6), (8,), (2, 3, 2))


# FedAvg


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fedavg_of_one_full_batch_each_is_sgd_on_all_samples(momentum: float) -> None:
    everywhere, central = Learner("all", plain()), learner("central", plain(), momentum=momentum)
    parts = [data(number, (size,))[0] for number, size in enumerate((4, 7, 9))]
    members = [Member(learner(f"c{n}", plain(), momentum=momentum), None, [own]) for n, own in enumerate(parts)]
    x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    for _ in range(5):
        fedavg_round(members, everywhere)
        central.learn(x, y)
    assert near(everywhere.weights(), central.weights(), 1e-12)
    assert not near(everywhere.weights(), Learner("start", plain()).weights(), 1e-2)


# FedProx


def trained_by(protocol: str, member: Callable[..., Member]) -> list[dict[str, Tensor]]:
    """Return all weights after three rounds of three members."""
    if protocol == "fedavg":
        everywhere = Learner("all", model())
        members = [member(learner(f"c{n}", model(), momentum=0.9), None, data(n, SIZES[n])) for n in range(3)]
        for _ in range(3):
            fedavg_round(members, everywhere)
        return [everywhere.weights()]
    below, above = cut(model(), 3)
    bottom, top = Learner("bottom", copy.deepcopy(below)), learner("top", above, momentum=0.9)
    clients = [learner(f"c{n}", below, momentum=0.9) for n in range(3)]
    apart = protocol == "splitfed_v1"
    sessions = {one.name: top.replica(one.name) if apart else top.session(one.name) for one in clients}
    members = [member(one, sessions[one.name], data(n, SIZES[n])) for n, one in enumerate(clients)]
    for _ in range(3):
        if apart:
            splitfed_v1_round(members, sessions, bottom, top)
        else:
            splitfed_v2_round(members, bottom)
    return [bottom.weights(), top.weights()]


@pytest.mark.parametrize("protocol", ["fedavg", "splitfed_v1", "splitfed_v2"])
def test_without_mu_fedprox_is_fedavg_bit_for_bit(protocol: str) -> None:
    reference = trained_by(protocol, Member)
    none = trained_by(protocol, lambda *parts: ProximalMember(*parts, mu=0.0))
    some = trained_by(protocol, lambda *parts: ProximalMember(*parts, mu=0.5))
    assert all(same(one, other) for one, other in zip(reference, none, strict=True))
    assert not any(same(one, other) for one, other in zip(reference, some, strict=True))


def by_hand(stage: nn.Module, batches: list[Batch], *, mu: float, free: frozenset[str] = frozenset()) -> nn.Module:
    """Return the stage after SGD at 0.1 on the loss with its proximal term, differentiated as one."""
    stage = copy.deepcopy(stage)
    start = {name: own.detach().clone() for name, own in stage.named_parameters()}
    for x, y in batches:
        term = sum(((own - start[name]) ** 2).sum() for name, own in stage.named_parameters() if name not in free)
        loss = nn.functional.cross_entropy(stage(x), y) + mu / 2 * term
        gradients = torch.autograd.grad(loss, list(stage.parameters()))
        with torch.no_grad():
            for own, g in zip(stage.parameters(), gradients, strict=True):
                own -= 0.1 * g
    return stage


def test_the_proximal_term_by_hand() -> None:
    batches = data(0, (4, 6, 5))
    member = ProximalMember(learner("c", plain()), None, batches[:1], mu=2.0)
    start = member.learner.weights()
    first, _ = member.round(start)
    assert same(first, Member(learner("c", plain()), None, batches[:1]).round(start)[0])  # at the start it is flat
    member.batches = batches
    for _ in range(2):  # a round holds on to its own start
        stage = plain()
        stage.load_state_dict(start)
        start, count = member.round(start)
        assert count == 15
        assert near(start, by_hand(stage, batches, mu=2.0).state_dict(), 1e-14)
        assert not near(start, by_hand(stage, batches, mu=0.0).state_dict(), 1e-5)


def test_local_entries_are_not_pulled() -> None:
    local, batches = entries_above(plain(), "2"), data(0, (4, 6, 5))
    member = ProximalMember(learner("c", plain()), None, batches, mu=2.0, local=local)
    member.round(plain().state_dict())
    assert near(member.learner.weights(), by_hand(plain(), batches, mu=2.0, free=local).state_dict(), 1e-14)
    assert not near(member.learner.weights(), by_hand(plain(), batches, mu=2.0).state_dict(), 1e-5)


def test_after_a_round_nobody_pulls() -> None:
    batches = data(0, (4, 6))
    member, other = ProximalMember(learner("c", plain()), None, batches, mu=2.0), learner("c", plain())
    member.round(plain().state_dict())
    other.load_weights(member.learner.weights())
    for x, y in batches:
        member.learner.learn(x, y)
        other.learn(x, y)
    assert same(member.learner.weights(), other.weights())


@pytest.mark.parametrize("mu", [-0.1, float("nan"), float("inf")])
def test_mu_is_a_finite_number_of_0_or_more(mu: float) -> None:
    with pytest.raises(ValueError, match=f"c: expected mu of 0 or more, got {mu}"):
        ProximalMember(learner("c", plain()), None, [], mu=mu)


def test_a_member_that_trains_nothing_has_nothing_to_correct() -> None:
    for kind in (lambda one: ProximalMember(one, None, [], mu=1.0), lambda one: ScaffoldMember(one, None, [])):
        with pytest.raises(ValueError, match="c: expected a party with an optimizer, got one that trains nothing"):
            kind(Learner("c", plain()))


# What adds to an optimizer's gradients


def ones(party: Learner) -> Callable[[], list[Tensor]]:
    return lambda: [torch.ones_like(own) for own in party.stage.parameters()]


def test_an_addition_is_of_the_party_and_its_sessions_until_it_is_removed() -> None:
    party, other = point("p", 0.0, lr=0.5), pulled_to(0.0, steps=1)[0]
    handle = add_before_steps(party, ones(party))
    seen = []
    for one in (party, party.session("s")):
        one.learn(*other)
        seen.append(party.weights()["weight"].item())
    party.load_state_dict(party.state_dict())
    party.learn(*other)
    handle.remove()
    party.learn(*other)
    assert [*seen, party.weights()["weight"].item()] == [-0.5, -1.0, -1.5]


def test_no_copy_loses_an_addition() -> None:
    party = point("p", 0.0, lr=0.5)
    handle = add_before_steps(party, ones(party))
    for copied in (
        lambda: party.replica("r"),
        lambda: copy.deepcopy(party.optimizer),
        lambda: pickle.dumps(party.optimizer),
    ):
        with pytest.raises(ValueError, match=r"nothing is added to, got a SGD with a penalty.*make replicas first"):
            copied()
    for adds in (
        lambda one: ProximalMember(one, None, [], mu=1.0),
        lambda one: ScaffoldMember(one, None, []),
        lambda one: Elastic(one, 1.0),
    ):
        one = learner("c", plain())
        one.replica("before")
        adds(one)
        with pytest.raises(ValueError, match="make replicas first"):
            one.replica("after")
    handle.remove()
    replica = party.replica("r")
    replica.learn(*pulled_to(0.0, steps=1)[0])
    assert replica.weights()["weight"].item() == 0.0
    add_before_steps(replica, ones(replica))
    replica.learn(*pulled_to(0.0, steps=1)[0])
    assert (replica.weights()["weight"].item(), party.weights()["weight"].item()) == (-0.5, 0.0)


def test_an_optimizer_around_another_takes_no_addition() -> None:
    stage = plain()
    party = Learner("c", stage, ClippedSteps(torch.optim.SGD(stage.parameters(), lr=0.1), max_norm=1.0))
    with pytest.raises(ValueError, match=r"c: expected one of torch's optimizers, .* got ClippedSteps around another"):
        ProximalMember(party, None, [], mu=1.0)


# SCAFFOLD


def test_with_controls_at_zero_scaffold_is_fedavg_bit_for_bit() -> None:
    here, there = Learner("all", model()), Learner("all", model())
    plainly = [Member(learner(f"c{n}", model()), None, data(n, SIZES[n])) for n in range(3)]
    corrected = [ScaffoldMember(learner(f"c{n}", model()), None, data(n, SIZES[n])) for n in range(3)]
    control = no_control(here)
    done, control = scaffold_round(corrected, here, control)
    assert done.counts == fedavg_round(plainly, there).counts == {"c0": 10, "c1": 8, "c2": 7}
    assert same(here.weights(), there.weights())
    assert all(bool(own.any()) for own in control.values())
    scaffold_round(corrected, here, control)
    fedavg_round(plainly, there)
    assert not same(here.weights(), there.weights())


def test_controls_by_hand() -> None:
    curves, optima, samples, steps, lr, rate = [1.0, 3.0, 0.5], [2.0, -1.0, 5.0], [1, 3, 2], [4, 2, 5], 0.1, 0.7
    members = [
        ScaffoldMember(point(f"c{n}", curves[n], lr=lr), None, pulled_to(optima[n], steps=steps[n], samples=samples[n]))
        for n in range(3)
    ]
    everywhere = point("all", 1.0, lr=lr, start=0.3)
    control = no_control(everywhere)
    x, c, own = 0.3, 0.0, [0.0, 0.0, 0.0]
    for present in ([0, 1, 2], [0, 2], [1], [1, 2]):
        done, control = scaffold_round([members[n] for n in present], everywhere, control, total=3, lr=rate)
        moved, changes, counts = [], [], []
        for n in present:
            y = x
            for _ in range(steps[n]):
                y -= lr * (curves[n] * (y - optima[n]) - own[n] + c)
            change = (x - y) / (steps[n] * lr) - c
            own[n] += change
            moved.append(y)
            changes.append(change)
            counts.append(samples[n] * steps[n])
        average = sum(count * y for count, y in zip(counts, moved, strict=True)) / sum(counts)
        change = sum(count * one for count, one in zip(counts, changes, strict=True)) / sum(counts)
        x, c = x + rate * (average - x), c + len(present) / 3 * change
        assert list(done.counts.values()) == counts
        assert everywhere.weights()["weight"].item() == pytest.approx(x, rel=0, abs=1e-12)
        assert control["weight"].item() == pytest.approx(c, rel=0, abs=1e-12)
    assert [one.state_dict()["control"]["weight"].item() for one in members] == pytest.approx(own, rel=0, abs=1e-12)


def test_scaffold_holds_where_members_hold_unlike_amounts() -> None:
    curves, optima, samples, steps, lr = [1.0, 10.0], [0.0, 1.0], [16, 16], [18, 2], 0.04
    members = [
        ScaffoldMember(point(f"c{n}", curves[n], lr=lr), None, pulled_to(optima[n], steps=steps[n], samples=samples[n]))
        for n in range(2)
    ]
    found = point("all", 1.0, lr=lr)
    control = no_control(found)
    for _ in range(300):
        done, control = scaffold_round(members, found, control)
    shares = [done.counts[f"c{n}"] / sum(done.counts.values()) for n in range(2)]
    assert shares == [0.9, 0.1]
    best = sum(p * a * b for p, a, b in zip(shares, curves, optima, strict=True)) / sum(
        p * a for p, a in zip(shares, curves, strict=True)
    )
    assert abs(found.weights()["weight"].item() - best) < 1e-8


def test_scaffold_finds_the_optimum_that_fedavg_drifts_from() -> None:
    curves, optima, steps, lr = [1.0, 10.0], [0.0, 1.0], 20, 0.05
    best = sum(a * b for a, b in zip(curves, optima, strict=True)) / sum(curves)

    def parties() -> list[Learner]:
        return [point(f"c{n}", curves[n], lr=lr) for n in range(2)]

    batches = [pulled_to(one, steps=steps) for one in optima]
    plainly = [Member(one, None, own) for one, own in zip(parties(), batches, strict=True)]
    corrected = [ScaffoldMember(one, None, own) for one, own in zip(parties(), batches, strict=True)]
    drifted, found = point("all", 1.0, lr=lr), point("all", 1.0, lr=lr)
    control = no_control(found)
    for _ in range(30):
        fedavg_round(plainly, drifted)
        _, control = scaffold_round(corrected, found, control)
    assert abs(found.weights()["weight"].item() - best) < 1e-10
    assert abs(drifted.weights()["weight"].item() - best) > 0.2
    gradients = [a * (best - b) for a, b in zip(curves, optima, strict=True)]  # what the controls are to become
    assert [one.state_dict()["control"]["weight"].item() for one in corrected] == pytest.approx(gradients, abs=1e-9)


@pytest.mark.parametrize("updates", [False, True])
def test_scaffold_across_frames(updates: bool) -> None:
    def members() -> list[ScaffoldMember]:
        return [ScaffoldMember(learner(f"c{n}", model()), None, data(n, SIZES[n])) for n in range(3)]

    here, there = Learner("all", model()), Learner("all", model())
    local = members()
    remote = [RemoteMember(m.name, Framed(serve(Service({m.name: m}))), m.name, updates=updates) for m in members()]
    mine = other = no_control(here)
    for _ in range(3):
        _, mine = scaffold_round(local, here, mine)
        _, other = scaffold_round(remote, there, other)
    if updates:  # differences are rounded
        assert near(here.weights(), there.weights(), 1e-12)
        assert near(mine, other, 1e-12)
    else:
        assert same(here.weights(), there.weights())
        assert same(mine, other)


def test_the_controls_of_a_split_model_are_of_the_members_bottom() -> None:
    below, above = cut(plain(), 2)
    ends = []
    for kind in (Member, ScaffoldMember):
        bottom, top = Learner("bottom", copy.deepcopy(below)), learner("top", above)
        members = [kind(learner(f"c{n}", below), top.session(f"c{n}"), data(n, SIZES[n])) for n in range(2)]
        if kind is Member:
            splitfed_v2_round(members, bottom)
        else:
            _, control = scaffold_round(members, bottom, no_control(bottom))
            assert control.keys() == {"0.weight", "0.bias"}
            moved = [own["0.bias"] for own in (below.state_dict(), members[0].learner.weights())]
            assert torch.allclose(members[0].state_dict()["control"]["0.bias"], (moved[0] - moved[1]) / (2 * 0.1))
        ends.append((bottom.weights(), top.weights()))
    assert same(ends[0][0], ends[1][0])
    assert same(ends[0][1], ends[1][1])


def test_scaffold_under_a_robust_aggregator() -> None:
    class Boosted(ScaffoldMember):
        def result(self) -> dict[str, Tensor]:
            return {name: w * 1e6 if w.is_floating_point() else w for name, w in super().result().items()}

    def attacked(corrected: bool) -> tuple[Learner, dict[str, Tensor]]:
        kinds = [ScaffoldMember, ScaffoldMember, Boosted]
        members = [kinds[n](learner(f"c{n}", plain()), None, data(n, SIZES[n])) for n in range(3)]
        everywhere = Learner("all", plain())
        _, control = scaffold_round(members, everywhere, no_control(everywhere), aggregate=Robust(Median()))
        if corrected:
            _, control = scaffold_round(members, everywhere, control, aggregate=Robust(Median()))
        return everywhere, control

    once, control = attacked(False)
    members = [Member(learner(f"c{n}", plain()), None, data(n, SIZES[n])) for n in range(2)]
    results = [one.round(plain().state_dict())[0] for one in members]
    assert control.keys() == dict(plain().named_parameters()).keys()
    for name, w in once.weights().items():
        ends = torch.stack([one[name] for one in results])
        assert bool((w >= ends.amin(0) - 1e-12).all() & (w <= ends.amax(0) + 1e-12).all())
    assert max(float(w.abs().max()) for w in attacked(True)[0].weights().values()) < 10


@pytest.mark.parametrize(
    "make",
    [
        lambda own: torch.optim.SGD(own, lr=0.1, momentum=0.9),
        lambda own: torch.optim.SGD(own, lr=0.1, weight_decay=0.1),
        lambda own: torch.optim.SGD(own, lr=0.1, maximize=True),
        lambda own: torch.optim.SGD([{"params": own[:1], "lr": 0.2}, {"params": own[1:]}], lr=0.1),
        lambda own: torch.optim.Adam(own, lr=0.1),
    ],
)
def test_scaffold_takes_plain_sgd_alone(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
    stage = plain()
    with pytest.raises(ValueError, match="c: expected SGD without momentum or weight decay for SCAFFOLD, got"):
        ScaffoldMember(Learner("c", stage, make(list(stage.parameters()))), None, [])


def test_a_control_travels_with_its_member() -> None:
    everywhere = Learner("all", model())
    member = ScaffoldMember(learner("c", model()), None, data(0))
    _, control = scaffold_round([member], everywhere, no_control(everywhere), total=2)
    saved, start = copy.deepcopy(member.state_dict()), everywhere.weights()
    after = scaffold_round([member], everywhere, control, total=2)[1], everywhere.weights()
    for way in ("load_state_dict", "put_back"):
        again, fed = ScaffoldMember(learner("c", model()), None, data(0)), Learner("all", model())
        getattr(again, way)(saved)
        fed.load_weights(start)
        found = scaffold_round([again], fed, control, total=2)[1]
        assert same(found, after[0])
        assert same(fed.weights(), after[1])
    fresh, fed = ScaffoldMember(learner("c", model()), None, data(0)), Learner("all", model())
    fed.load_weights(start)
    assert not same(scaffold_round([fresh], fed, control, total=2)[1], after[0])


def test_who_drops_out_keeps_the_control_and_the_others_count_for_their_share() -> None:
    below, above = cut(plain(), 2)

    top, bottom = learner("top", above), Learner("bottom", copy.deepcopy(below))
    clients = [learner(f"c{n}", below) for n in range(3)]
    members = [ScaffoldMember(one, top.replica(one.name), data(n, SIZES[n])) for n, one in enumerate(clients)]
    _, control = scaffold_round(members, bottom, no_control(bottom))
    before = [copy.deepcopy(one.state_dict()["control"]) for one in members]
    members[0].server = Lost("c0", members[0].server, after=1)  # in the middle of its round
    done, after = scaffold_round(members, bottom, control)
    assert done.dropped == ("c0",)
    assert same(members[0].state_dict()["control"], before[0])
    now = [one.state_dict()["control"] for one in members]
    for name, own in after.items():
        moved = sum(done.counts[f"c{n}"] * (now[n][name] - before[n][name]) for n in (1, 2)) / sum(done.counts.values())
        assert torch.allclose(own, control[name] + 2 / 3 * moved, rtol=0, atol=1e-14)
    twin = learner("c0", below)  # nothing is left of the round: a step outside is plain
    twin.load_weights(members[0].learner.weights())
    for one in (members[0].learner, twin):
        one.forward(data(0)[0][0])
        one.backward(torch.ones(4, 4, dtype=torch.float64))
    assert same(members[0].learner.weights(), twin.weights())


def test_local_entries_have_no_control() -> None:
    local = entries_above(plain(), "2")

    def run(elsewhere: float) -> tuple[dict[str, Tensor], dict[str, Tensor], ScaffoldMember]:
        member = ScaffoldMember(learner("c", plain()), None, data(0), local=local)
        everywhere = Learner("all", plain())
        shifted = {name: w + elsewhere if name in local else w for name, w in everywhere.weights().items()}
        everywhere.load_weights(shifted)  # the fed server's own entries: nobody trains them
        control = no_control(everywhere)
        for _ in range(3):
            _, control = scaffold_round([member], everywhere, control, total=2)
        return member.learner.weights(), control, member

    weights, control, member = run(0.0)
    assert member.state_dict()["control"].keys() == dict(plain().named_parameters()).keys() - local
    assert {name for name, own in control.items() if not own.any()} == local
    assert same(weights, run(100.0)[0])


def test_scaffold_refuses_what_does_not_fit() -> None:
    everywhere, member = Learner("all", plain()), ScaffoldMember(learner("c", plain()), None, data(0))
    with pytest.raises(ValueError, match=r"c: expected a control for each parameter, got none for 0\.weight, 0\.bias"):
        member.round(everywhere.weights())
    with pytest.raises(ValueError, match="expected a total of 1 members or more, got 0"):
        scaffold_round([member], everywhere, no_control(everywhere), total=0)
    with pytest.raises(ValueError, match="each of a name of its own, got c, c"):
        scaffold_round([member, member], everywhere, no_control(everywhere))
    with pytest.raises(ValueError, match="all dropped out: c"):
        scaffold_round([Lost("c")], everywhere, no_control(everywhere))


def test_the_servers_rate_moves_no_buffers() -> None:
    members = [ScaffoldMember(learner(f"c{n}", model()), None, data(n)) for n in range(2)]
    once, thrice, start = Learner("all", model()), Learner("all", model()), model().state_dict()
    scaffold_round(members, once, no_control(once))
    members = [ScaffoldMember(learner(f"c{n}", model()), None, data(n)) for n in range(2)]
    scaffold_round(members, thrice, no_control(thrice), lr=3.0)
    parameters = dict(model().named_parameters())
    for name, w in thrice.weights().items():
        plainly = once.weights()[name]
        expected = start[name] + 3 * (plainly - start[name]) if name in parameters else plainly
        assert torch.allclose(w, expected, rtol=0, atol=1e-14)


# Away


def test_a_member_is_away_for_its_share_of_rounds() -> None:
    class Counted:
        name = "c"

        def __init__(self) -> None:
            self.rounds = 0

        def round(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
            self.rounds += 1
            return dict(weights), 1

    def there(seed: int, share: float = 0.3) -> list[bool]:
        counted = Counted()
        member, found = Absent(counted, share, seed), []
        for _ in range(1000):
            before = counted.rounds
            with suppress(ConnectionError):
                member.round({})
            found.append(counted.rounds > before)
        return found

    assert 0.25 < there(0).count(False) / 1000 < 0.35  # more than three standard deviations
    assert there(0) == there(0)
    assert there(0) != there(1)
    assert all(there(0, 0.0))
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a share of rounds from 0 to below 1"):
            Absent(Counted(), share, 0)
    with pytest.raises(ConnectionError, match="c is away in this round"):
        Absent(Counted(), 1 - 1e-9, 0).round({})


def test_one_in_another_process_is_asked_at_once_with_others_all_the_same() -> None:
    class Far(RemoteMember):
        elsewhere = True

    meeting = threading.Barrier(2, timeout=30)  # neither goes on before both are there

    class Meets(Member):
        def round(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
            meeting.wait()
            return super().round(weights)

    behind = [Meets(learner(f"c{n}", plain()), None, data(n)) for n in range(2)]
    far = [Absent(Far(one.name, Framed(serve(Service({one.name: one}))), one.name), 0.0, 0) for one in behind]
    assert fedavg_round(far, Learner("all", plain())).dropped == ()


def test_fedavg_does_without_who_is_away() -> None:
    def members() -> list[Member]:
        return [Member(learner(f"c{n}", model(), momentum=0.9), None, data(n, SIZES[n])) for n in range(3)]

    own, twins = members(), members()
    here, there = Learner("all", model()), Learner("all", model())
    sometimes = [Absent(own[0], 0.5, 3), *own[1:]]
    away = []
    for _ in range(6):
        done = fedavg_round(sometimes, here)
        away.append(done.dropped)
        fedavg_round([one for one in twins if one.name not in done.dropped], there)
        assert same(here.weights(), there.weights())
    assert set(away) == {(), ("c0",)}


# Models of one's own


def test_entries_above_a_layer() -> None:
    assert entries_above(plain(), "0") == {"2.weight", "2.bias", "4.weight", "4.bias"}
    assert entries_above(plain(), "3") == {"4.weight", "4.bias"}
    for layer in ("4", "5", ""):
        with pytest.raises(ValueError, match=f"expected a layer among 0, 1, 2, 3; got '{layer}'"):
            entries_above(plain(), layer)


def test_heads_stay_at_home() -> None:
    local = entries_above(plain(), "1")
    everywhere, start = Learner("all", plain()), plain().state_dict()
    members = [Member(learner(f"c{n}", plain()), None, data(n), local=local) for n in range(2)]
    sent = members[0].round(everywhere.weights())[0]
    assert sent.keys() == start.keys() - local
    for _ in range(2):
        fedavg_round(members, everywhere)
    after = everywhere.weights()
    assert {name for name in after if torch.equal(after[name], start[name])} == local
    heads = [{name: one.learner.weights()[name] for name in local} for one in members]
    assert not any(torch.equal(heads[0][name], heads[1][name]) for name in local)


def test_tuning_leaves_the_learner_as_it_was() -> None:
    global_one, twin, batches = learner("g", model(), momentum=0.9), learner("g", model(), momentum=0.9), data(0)
    for party in (global_one, twin):
        party.learn(*data(5)[0])
    tuned = fine_tuned(global_one, batches, epochs=2, name="c0")
    assert tuned.name == "c0"
    assert same(global_one.weights(), twin.weights())
    for x, y in batches * 2:
        twin.learn(x, y)
    assert same(tuned.weights(), twin.weights())
    global_one.learn(*batches[0])  # nor has it another optimizer's momentum
    twin = learner("g", model(), momentum=0.9)
    for x, y in (data(5)[0], batches[0]):
        twin.learn(x, y)
    assert same(global_one.weights(), twin.weights())


def test_tuning_that_would_tune_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="g: expected a party with an optimizer"):
        fine_tuned(Learner("g", plain()), data(0), epochs=1)
    with pytest.raises(ValueError, match="tune for an epoch or more, got 0"):
        fine_tuned(learner("g", plain()), data(0), epochs=0)
    with pytest.raises(ValueError, match="every epoch, got an iterator"):
        fine_tuned(learner("g", plain()), iter(data(0)), epochs=2)
