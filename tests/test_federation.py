"""Rounds: who is averaged, who is left out, what stays local, in which order; means by hand."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from splitlearn import (
    ErrorFeedback,
    Framed,
    Kind,
    Learner,
    Member,
    Message,
    Metered,
    Recorded,
    RemoteMember,
    Service,
    TopK,
    apart_round,
    cut,
    fedavg_round,
    in_turn_round,
    mean,
    parallel_round,
    serve,
    splitfed_v1_round,
    splitfed_v2_round,
    splitfed_v3_round,
)
from splitlearn.federation import batch_norm_entries, sample

Batch = tuple[Tensor, Tensor]


def data(number: int, sizes: Sequence[int] = (4, 6)) -> list[Batch]:
    generator = torch.Generator().manual_seed(number)
    return [
        (
            torch.rand(size, 3, generator=generator, dtype=torch.float64),
            torch.randint(0, 2, (size,), generator=generator),
        )
        for size in sizes
    ]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


def learner(name: str, stage: nn.Module) -> Learner:
    stage = copy.deepcopy(stage)
    return Learner(name, stage, torch.optim.SGD(stage.parameters(), lr=0.1, momentum=0.9))


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Lost:
    """A server, or a member, that cannot be reached from the given call on."""

    def __init__(self, name: str, inner: Learner | Member | None = None, *, after: int = 0):
        self.name, self._inner, self._left = name, inner, after

    def learn(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        self._left -= 1
        if self._left < 0:
            raise ConnectionResetError("gone")
        return self._inner.learn(z, y)

    def round(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        raise ConnectionRefusedError("gone")


class Table:
    """Three clients of different sizes around one server."""

    def __init__(self) -> None:
        bottom, top = cut(model(), 3)
        self.bottom, self.top = Learner("bottom", copy.deepcopy(bottom)), learner("server", top)
        self.clients = [learner(f"c{number}", bottom) for number in range(3)]
        self.sessions = {client.name: self.top.replica(client.name) for client in self.clients}
        self.batches = [data(0), data(1, (8,)), data(2, (2, 2, 2))]

    def members(self, servers: Callable[[str], Learner] | None = None) -> list[Member]:
        of = servers or self.sessions.__getitem__
        return [Member(one, of(one.name), own) for one, own in zip(self.clients, self.batches, strict=True)]


# The average


def test_mean_weighs_by_samples_and_leaves_integers_alone() -> None:
    a, b = {"w": torch.tensor([1.0, -2.0]), "n": torch.tensor(3)}, {"w": torch.tensor([5.0, 6.0]), "n": torch.tensor(9)}
    average = mean([a, b], [3, 1])
    assert average["w"].tolist() == [2.0, 0.0]
    assert average["n"] == 3
    assert average["n"] is not a["n"]
    assert mean([a, b], [0, 2])["w"].tolist() == [5.0, 6.0]
    assert mean([a, b], [0, 2])["n"] == 9
    diverged = {"w": torch.tensor([torch.nan, torch.inf]), "n": torch.tensor(0)}
    assert mean([diverged, b, diverged], [0, 2, 0])["w"].tolist() == [5.0, 6.0]


def test_mean_of_one_is_itself_and_n_over_total_times_w_to_the_bit() -> None:
    w = torch.tensor([0.1, -0.0, 1e-320, 3e38], dtype=torch.float64)
    assert mean([{"w": w}], [7])["w"].view(torch.int64).tolist() == w.view(torch.int64).tolist()
    v = torch.rand(4, dtype=torch.float64)
    expected = (3 / 10) * w + (7 / 10) * v  # and not (3w + 7v) / 10, which differs in the last place
    assert torch.equal(mean([{"w": w}, {"w": v}], [3, 7])["w"], expected)


@pytest.mark.parametrize(
    ("weights", "counts", "message"),
    [
        ([], [], "weights of members with some samples, got 0 weights"),
        ([{"w": torch.ones(1)}], [0], r"some samples, got 1 weights, counts \[0\]"),
        ([{"w": torch.ones(1)}], [1, 2], "some samples"),
        ([{"w": torch.ones(1)}] * 2, [3, -1], r"counts \[3, -1\]"),
        ([{"w": torch.ones(1)}, {"v": torch.ones(1)}], [1, 1], "same entries from every member"),
        (
            [{"w": torch.ones(2)}, {"w": torch.ones(1)}],
            [1, 1],
            r"'w' of one shape from every member, got \(2,\), \(1,\)",
        ),
    ],
)
def test_mean_refuses_what_has_no_mean(weights: list[dict[str, Tensor]], counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean(weights, counts)


def test_a_round_is_the_mean_of_its_members_by_hand() -> None:
    everywhere = Learner("all", model())
    start = everywhere.weights()
    members = [Member(learner(f"c{number}", model()), None, data(number)) for number in range(2)]
    members[1].batches = data(1, (30,))
    alone = [Member(learner(one.name, model()), None, one.batches).round(start) for one in members]
    done = fedavg_round(members, everywhere)
    assert done.counts == {"c0": 10, "c1": 30}
    assert done.dropped == ()
    for name, tensor in everywhere.weights().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, (10 / 40) * alone[0][0][name] + (30 / 40) * alone[1][0][name])
        else:
            assert tensor == 2  # batches seen, as the first member counted them
    losses = [member.loss for member in members]
    assert all(0 < loss < 2 for loss in losses)


def test_an_aggregator_may_be_passed_to_every_round() -> None:
    def first(
        weights: Sequence[Mapping[str, Tensor]], counts: Sequence[int], start: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        assert all(start[name].shape == entry.shape for name, entry in weights[0].items())
        seen.append(list(counts))
        return dict(weights[0])

    seen: list[list[int]] = []
    table = Table()
    splitfed_v1_round(table.members(), table.sessions, table.bottom, table.top, aggregate=first)
    assert same(table.bottom.weights(), table.clients[0].weights())
    assert same(table.top.weights(), table.sessions["c0"].weights())
    splitfed_v3_round(table.members(), table.sessions, table.top, aggregate=first)
    splitfed_v2_round(table.members(lambda name: table.top), table.bottom, aggregate=first)
    parallel_round(table.clients, table.top, table.batches, bottom=table.bottom, aggregate=first)
    assert seen == [[10, 8, 6]] * 5


# Drop-outs


def test_tops_may_be_aggregated_in_another_way_than_bottoms() -> None:
    def first(
        weights: Sequence[Mapping[str, Tensor]], counts: Sequence[int], start: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return dict(weights[0])

    table, plain = Table(), Table()
    start = table.top.weights()
    splitfed_v1_round(table.members(), table.sessions, table.bottom, table.top, aggregate_tops=first)
    splitfed_v1_round(plain.members(), plain.sessions, plain.bottom, plain.top)
    assert same(table.bottom.weights(), plain.bottom.weights())
    assert same(table.top.weights(), table.sessions["c0"].weights())
    assert not same(table.top.weights(), start)
    assert not same(table.top.weights(), plain.top.weights())


def test_who_drops_out_is_left_out_of_both_averages() -> None:
    table, twin = Table(), Table()
    members = table.members()
    members[1].server = Lost("c1", table.sessions["c1"])
    done = splitfed_v1_round(members, table.sessions, table.bottom, table.top)
    assert done.counts == {"c0": 10, "c2": 6}
    assert done.dropped == ("c1",)
    others = [twin.members()[0], twin.members()[2]]
    splitfed_v1_round(others, twin.sessions, twin.bottom, twin.top)
    assert same(table.bottom.weights(), twin.bottom.weights())
    assert same(table.top.weights(), twin.top.weights())


def test_a_member_that_lost_its_server_in_the_middle_is_clean_for_the_next_round() -> None:
    table = Table()
    members = table.members()
    members[2].server = Lost("c2", table.sessions["c2"], after=1)
    assert splitfed_v1_round(members, table.sessions, table.bottom, table.top).dropped == ("c2",)
    members[2].state_dict()  # no open step: a checkpoint can be taken
    members[2].server = table.sessions["c2"]
    assert splitfed_v1_round(members, table.sessions, table.bottom, table.top).dropped == ()


@pytest.mark.parametrize("protocol", ["fedavg", "v1", "v2", "v3", "in_turn", "apart"])
def test_a_round_that_all_drop_out_of_is_an_error_and_changes_nothing(protocol: str) -> None:
    table = Table()
    members = table.members(lambda name: Lost(name))
    before = table.bottom.weights(), table.top.weights()
    gone = [Lost("c0"), Lost("c1")]
    rounds: dict[str, Callable[[], object]] = {
        "fedavg": lambda: fedavg_round(gone, table.bottom),
        "v1": lambda: splitfed_v1_round(gone, table.sessions, table.bottom, table.top),
        "v2": lambda: splitfed_v2_round(gone, table.bottom),
        "v3": lambda: splitfed_v3_round(members, table.sessions, table.top),
        "in_turn": lambda: in_turn_round(gone, table.bottom),
        "apart": lambda: apart_round(members),
    }
    with pytest.raises(ValueError, match="expected a member to finish the round, all dropped out: c0, c1"):
        rounds[protocol]()
    assert same(table.bottom.weights(), before[0])
    assert same(table.top.weights(), before[1])


def test_in_turn_hands_the_bottom_past_who_drops_out() -> None:
    table, twin = Table(), Table()
    first, _, last = table.members(lambda name: table.top)
    done = in_turn_round([first, Lost("c1"), last], table.bottom)
    assert done.dropped == ("c1",)
    own = twin.members(lambda name: twin.top)
    weights, _ = own[0].round(twin.bottom.weights())
    weights, _ = own[2].round(weights)
    assert same(table.bottom.weights(), weights)
    assert same(table.top.weights(), twin.top.weights())


def test_only_lost_connections_are_drop_outs() -> None:
    table = Table()
    table.batches[1] = [(torch.rand(2, 9).double(), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match="c1: its stage does not fit"):
        splitfed_v1_round(table.members(), table.sessions, table.bottom, table.top)


# Who and in which order


def test_sampling_is_reproducible_and_keeps_the_order() -> None:
    people = list("abcdefgh")
    drawn = [sample(people, 3, torch.Generator().manual_seed(4)) for _ in range(2)]
    assert drawn[0] == drawn[1] == sorted(set(drawn[0]))
    generator = torch.Generator().manual_seed(4)
    assert len({tuple(sample(people, 3, generator)) for _ in range(20)}) > 5
    assert sample(people, 8, generator) == people
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"sample of 1 to 8 members, got {count}"):
            sample(people, count, generator)


def test_v2_visits_in_the_servers_order_and_averages_in_the_members() -> None:
    visited: list[str] = []

    class Visited(Member):
        def round(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
            visited.append(self.name)
            return super().round(weights)

    def run(order: list[int] | None) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
        table = Table()
        members = [Visited(one.learner, table.top.session(one.name), one.batches) for one in table.members()]
        done = splitfed_v2_round(members, table.bottom, order=order)
        return table.bottom.weights(), table.top.weights(), list(done.counts)

    as_given, turned, again = run(None), run([2, 0, 1]), run([2, 0, 1])
    assert visited == ["c0", "c1", "c2", "c2", "c0", "c1", "c2", "c0", "c1"]
    assert as_given[2] == turned[2] == ["c0", "c1", "c2"]
    assert same(turned[0], again[0])
    assert same(turned[1], again[1])
    assert not same(as_given[1], turned[1])
    for order in ([0, 1], [0, 1, 1], [0, 1, 3], []):
        with pytest.raises(ValueError, match="order that visits each of 3 members once"):
            run(order)


def test_names_are_unique_and_have_sessions() -> None:
    table = Table()
    members = table.members()
    with pytest.raises(ValueError, match="each of a name of its own, got c0, c0"):
        fedavg_round([members[0], members[0]], table.bottom)
    with pytest.raises(ValueError, match="got none"):
        splitfed_v2_round([], table.bottom)
    with pytest.raises(ValueError, match=r"session of the main server for each member, got none for c2; .*replica"):
        splitfed_v1_round(members, {n: table.sessions[n] for n in ("c0", "c1")}, table.bottom, table.top)


# What stays with a member


def test_local_entries_neither_leave_nor_arrive() -> None:
    local = batch_norm_entries(model())
    assert local == {f"1.{entry}" for entry in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    everywhere = Learner("all", model())
    members = [Member(learner(f"c{number}", model()), None, data(number), local=local) for number in range(2)]
    services = [Recorded(Service({one.name: one})) for one in members]
    remote = [RemoteMember(one.name, Framed(serve(s)), one.name) for one, s in zip(members, services, strict=True)]
    start = everywhere.weights()
    fedavg_round(remote, everywhere)
    kept = [{name: one.learner.weights()[name] for name in local} for one in members]
    assert not torch.equal(kept[0]["1.running_mean"], kept[1]["1.running_mean"])
    for service in services:
        replies = [key for exchange in service.exchanges for key in exchange.reply.tensors]
        assert not any(key.endswith(entry) for key in replies for entry in local)
    after = everywhere.weights()
    assert all(torch.equal(after[name], start[name]) for name in local)
    assert not torch.equal(after["0.weight"], start["0.weight"])
    for member, own in zip(members, kept, strict=True):
        member.batches = []
        member.round(after)
        assert all(torch.equal(member.learner.weights()[name], own[name]) for name in local)
        assert torch.equal(member.learner.weights()["0.weight"], after["0.weight"])


def test_batch_norm_entries_at_the_root_and_deep() -> None:
    assert batch_norm_entries(nn.BatchNorm2d(2, affine=False)) == {"running_mean", "running_var", "num_batches_tracked"}
    assert "0.1.weight" in batch_norm_entries(nn.Sequential(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2))))
    assert batch_norm_entries(nn.Sequential(nn.LayerNorm(2))) == frozenset()


def test_a_members_parts_are_checked_when_it_is_made() -> None:
    with pytest.raises(ValueError, match=r"c: expected local entries of its own stage, got 1.mean; it has 0.weight"):
        Member(learner("c", model()), None, data(0), local=["1.mean", "0.weight"])
    with pytest.raises(ValueError, match=r"c: expected batches that can be gone through every round, got an iterator"):
        Member(learner("c", model()), None, iter(data(0)))


def test_a_client_without_batches_counts_for_nothing() -> None:
    table, twin = Table(), Table()
    table.batches[1] = []
    members = table.members()
    done = splitfed_v1_round(members, table.sessions, table.bottom, table.top)
    assert done.counts == {"c0": 10, "c1": 0, "c2": 6}
    assert members[1].loss != members[1].loss
    pair = [twin.members()[0], twin.members()[2]]
    splitfed_v1_round(pair, twin.sessions, twin.bottom, twin.top)
    assert same(table.bottom.weights(), twin.bottom.weights())
    assert same(table.top.weights(), twin.top.weights())
    table.batches = [[], [], []]
    with pytest.raises(ValueError, match="members with some samples"):
        splitfed_v1_round(table.members(), table.sessions, table.bottom, table.top)


def test_optimizer_state_outlives_the_round_and_travels_with_the_member() -> None:
    everywhere = Learner("all", model())
    member = Member(learner("c", model()), None, data(0))
    fedavg_round([member], everywhere)
    saved = copy.deepcopy(member.state_dict())
    fedavg_round([member], everywhere)
    again = Member(learner("c", model()), None, data(0))
    again.load_state_dict(saved)
    start = Learner("all", model())
    start.load_weights(saved["learner"]["stage"])
    fedavg_round([again], start)
    assert same(start.weights(), everywhere.weights())
    fresh = Member(learner("c", model()), None, data(0))
    start.load_weights(saved["learner"]["stage"])
    fedavg_round([fresh], start)
    assert not same(start.weights(), everywhere.weights())


# Across a wire


def test_updates_through_error_feedback_carry_what_was_left_out() -> None:
    stage = nn.Linear(3, 4).double()
    codec = ErrorFeedback(TopK(0.25, kinds=frozenset({Kind.UPDATE})))
    member = Member(learner("c", stage), None, [])
    meter = Metered(serve(Service({"c": member}), codec), requests="down")
    remote = RemoteMember("c", Framed(meter, codec), "c", updates=True)
    exact = RemoteMember(
        "c", Framed(serve(Service({"c": Member(learner("c", stage), None, data(0))}))), "c", updates=True
    )
    start = member.learner.weights()
    new, count = remote.round(start)
    assert count == 0
    assert same(new, start)
    member.batches = data(0)
    new, count = remote.round(start)
    whole, _ = exact.round(start)
    assert count == 10
    moved = new["weight"] - start["weight"]
    assert (moved != 0).sum() == 4  # one of three in each row: a quarter, rounded up
    residual = codec.state_dict()[f"{Kind.UPDATE}/weight"]
    assert torch.allclose(moved + residual, whole["weight"] - start["weight"], rtol=0, atol=1e-15)
    assert meter.nbytes["down"][Kind.WEIGHTS] == 2 * 16 * 8  # requests are not packed
    member.batches = []
    assert not same(remote.round(start)[0], start)  # what was left out comes now
    assert meter.nbytes["up"][Kind.WEIGHTS] == 0


def test_remote_rounds_equal_local_ones_bit_for_bit() -> None:
    here, there = Learner("all", model()), Learner("all", model())
    local = [Member(learner(f"c{number}", model()), None, data(number)) for number in range(2)]
    behind = [Member(learner(f"c{number}", model()), None, data(number)) for number in range(2)]
    remote = [RemoteMember(one.name, Framed(serve(Service({one.name: one}))), one.name) for one in behind]
    for _ in range(2):
        assert fedavg_round(local, here).counts == fedavg_round(remote, there).counts
    assert same(here.weights(), there.weights())


@pytest.mark.parametrize("updates", [False, True])
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"KIND/w": torch.ones(3)}, "m: expected a count of samples in its answer, got None"),
        ({"KIND/w": torch.ones(3), "count": torch.tensor(-1)}, "count of samples in its answer, got -1"),
        ({"KIND/w": torch.ones(3), "count": torch.tensor([1, 2])}, "count of samples"),
        ({"KIND/w": torch.ones(3), "count": torch.tensor(1.5)}, "count of samples"),
        ({"KIND/w": torch.ones(1), "count": torch.tensor(1)}, r"entries of the weights .* got 'w' of shape \(1,\)"),
        ({"KIND/v": torch.ones(3), "count": torch.tensor(1)}, "entries of the weights that it was given, got 'v'"),
    ],
)
def test_a_members_malformed_answer_is_one_line(answer: dict[str, Tensor], message: str, updates: bool) -> None:
    class Liar:
        def request(self, asked: Message) -> Message:
            kind = Kind.UPDATE if updates else Kind.WEIGHTS
            return replace(asked, tensors={key.replace("KIND", kind): t for key, t in answer.items()})

    with pytest.raises(ValueError, match=message):
        RemoteMember("m", Liar(), "m", updates=updates).round({"w": torch.zeros(3)})


# Parallel


def test_parallel_clients_leave_when_their_batches_end() -> None:
    table = Table()
    done = parallel_round(table.clients, table.top, table.batches)
    assert done.counts == {"c0": 10, "c1": 8, "c2": 6}
    assert [client.steps for client in table.clients] == [2, 1, 3]
    assert table.top.steps == 3
    twin = Table()
    steps = [[0, 1, 2], [0, 2], [2]]
    total = 0.0
    for step, present in enumerate(steps):
        parts = [(twin.clients[n], *twin.batches[n][step]) for n in present]
        z = [client.forward(x) for client, x, _ in parts]
        joint = torch.cat([one.detach() for one in z]).requires_grad_()
        loss, g = twin.top.learn(joint, torch.cat([y for _, _, y in parts]))
        for (client, _, _), own in zip(parts, g.split([len(one) for one in z]), strict=True):
            client.backward(own)
        total += loss.item() * len(joint)
    assert done.loss == total / 24
    for mine, other in zip([*table.clients, table.top], [*twin.clients, twin.top], strict=True):
        assert same(mine.weights(), other.weights())


def test_parallel_with_a_common_bottom_starts_and_ends_there() -> None:
    table = Table()
    start = {name: tensor + 1 for name, tensor in table.bottom.weights().items()}
    table.bottom.load_weights(start)
    table.batches[2] = []
    parallel_round(table.clients, table.top, table.batches, bottom=table.bottom)
    assert same(table.clients[2].weights(), start)
    assert same(table.bottom.weights(), mean([client.weights() for client in table.clients], [10, 8, 0]))


def test_parallel_refuses_what_it_cannot_run() -> None:
    table = Table()
    with pytest.raises(ValueError, match="expected batches for each client, got 2 for 3 clients"):
        parallel_round(table.clients, table.top, table.batches[:2])
    with pytest.raises(ValueError, match="expected a client with some samples"):
        parallel_round(table.clients, table.top, [[], [], []])
    with pytest.raises(ValueError, match="name of its own"):
        parallel_round([table.clients[0]] * 2, table.top, table.batches[:2])


def test_v1_and_v3_refuse_sessions_that_share_a_stage() -> None:
    server, bottom = Learner("server", model()), Learner("bottom", model())
    sessions = {name: server.session(name) for name in ("c0", "c1")}
    members = [Member(learner(name, model()), sessions[name], data(0)) for name in sessions]
    with pytest.raises(ValueError, match=r"use server\.replica\(name\)"):
        splitfed_v1_round(members, sessions, bottom, server)
    with pytest.raises(ValueError, match=r"use server\.replica\(name\)"):
        splitfed_v3_round(members, sessions, server)


def test_a_member_that_times_out_is_left_out() -> None:
    class Late:
        name = "late"

        def round(self, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
            raise TimeoutError

    everywhere = Learner("all", model())
    done = fedavg_round([Member(learner("c0", model()), None, data(0)), Late()], everywhere)
    assert done.dropped == ("late",)
    assert list(done.counts) == ["c0"]
