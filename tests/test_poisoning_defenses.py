"""Each protection holds what it says it holds, leaves honest training as it is, and says what input it wants."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf, isnan, log, nan, pi

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from defenses.poisoning import (
    ActivationClustering,
    ClippedGradient,
    ClippedSteps,
    FilteredServer,
    NeighbourGraph,
    NeuralCleanse,
    PerClientServer,
    SafeSplitServer,
    SpectralSignatures,
    Suspects,
    WitnessedServer,
    batch_sizes,
    flagged_shares,
    rates,
    safesplit,
)
from defenses.poisoning.cleanse import anomalies
from defenses.poisoning.graph import mutual_neighbours
from defenses.poisoning.safesplit import rotations, spectrum
from splitlearn import Batches, Learner, Member, in_turn_round, parallel, parallel_round, splitfed_v2_round
from splitlearn.data import dirichlet, load

Filter = Callable[[Tensor, Tensor], Suspects]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def top(width: int = 4, classes: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, classes)).double()


def sgd(stage: nn.Module, rate: float = 0.1, momentum: float = 0.9) -> torch.optim.SGD:
    return torch.optim.SGD(stage.parameters(), rate, momentum=momentum)


def batch(size: int = 6, seed: int = 0, width: int = 4, classes: int = 3) -> tuple[Tensor, Tensor]:
    draws = generator(seed)
    return (
        torch.randn(size, width, generator=draws, dtype=torch.float64),
        torch.randint(0, classes, (size,), generator=draws),
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in weights.values()])


# Clipped steps


def test_a_step_is_cut_to_the_norm_and_a_small_one_is_left_alone() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = ClippedSteps(torch.optim.SGD([parameter], lr=1.0), max_norm=1.0)
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert torch.allclose(parameter.data, torch.tensor([-0.6, -0.8]))
    parameter.grad = torch.tensor([0.3, 0.4])
    optimizer.step()
    assert torch.allclose(parameter.data, torch.tensor([-0.9, -1.2]))


def test_all_parameters_share_one_norm() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    ClippedSteps(torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 2.0}], lr=1.0), max_norm=1.0).step()
    assert torch.allclose(a.data, torch.tensor([-0.6]))
    assert torch.allclose(b.data, torch.tensor([-1.6]))


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_a_step_that_is_not_finite_is_left_out_whole_and_counted(value: float) -> None:
    stage = top()
    optimizer = ClippedSteps(sgd(stage), max_norm=1.0)
    learner = Learner("server", stage, optimizer)
    learner.learn(*batch())
    before, momentum = learner.weights(), copy.deepcopy(optimizer.state_dict())
    for parameter in stage.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    next(stage.parameters()).grad = torch.full_like(next(stage.parameters()), value)
    optimizer.step()
    assert optimizer.skipped == 1
    assert same(learner.weights(), before)
    assert all(
        torch.equal(old["momentum_buffer"], new["momentum_buffer"])
        for old, new in zip(momentum["state"].values(), optimizer.state_dict()["state"].values(), strict=True)
    )


def test_scaled_activations_move_a_clipped_top_no_further_than_the_norm() -> None:
    z, y = batch()
    moved = {}
    for name, clip in (("free", False), ("clipped", True)):
        stage = nn.Linear(4, 3).double()
        optimizer = sgd(stage, momentum=0.0)
        learner = Learner("server", stage, ClippedSteps(optimizer, 1.0) if clip else optimizer)
        before = flat(learner.weights())
        learner.learn(1e4 * z, y)
        moved[name] = float((flat(learner.weights()) - before).norm())
    assert moved["free"] > 100
    assert moved["clipped"] == pytest.approx(0.1)  # the rate times the norm


def test_a_replica_is_clipped_too_and_its_optimizer_is_its_own() -> None:
    stage = top()
    learner = Learner("server", stage, ClippedSteps(sgd(stage), max_norm=1e-3))
    replica = learner.replica("copy")
    before = learner.weights()
    replica.learn(*batch())
    assert same(learner.weights(), before)
    moved = float((flat(replica.weights()) - flat(before)).norm())
    assert 0 < moved <= 0.1 * 1e-3 * (1 + 1e-6)
    assert isinstance(replica.optimizer, ClippedSteps)
    assert replica.optimizer is not learner.optimizer


def test_a_clipped_learner_resumes_bit_for_bit() -> None:
    stage, other = top(), top(seed=1)
    learner = Learner("server", stage, ClippedSteps(sgd(stage), max_norm=0.1))
    learner.learn(*batch())
    resumed = Learner("server", other, ClippedSteps(sgd(other), max_norm=0.1))
    resumed.load_state_dict(copy.deepcopy(learner.state_dict()))
    for party in (learner, resumed):
        party.learn(*batch(seed=1))
    assert same(resumed.weights(), learner.weights())


def test_a_norm_above_all_gradients_changes_nothing_and_schedules_reach_the_inner_optimizer() -> None:
    plain, clipped = top(), top()
    parties = [
        Learner("server", plain, sgd(plain)),
        Learner("server", clipped, ClippedSteps(sgd(clipped), max_norm=1e6)),
    ]
    for party in parties:
        assert party.optimizer is not None
        schedule = torch.optim.lr_scheduler.StepLR(party.optimizer, 1, gamma=0.5)
        for seed in range(3):
            party.learn(*batch(seed=seed))
            schedule.step()
        assert party.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    assert same(parties[1].weights(), parties[0].weights())


def test_the_gradient_sent_back_is_cut_and_its_input_left_alone() -> None:
    g = torch.tensor([[3.0], [4.0]])
    assert torch.allclose(ClippedGradient(1.0).gradient(g), torch.tensor([[0.6], [0.8]]))
    assert torch.equal(g, torch.tensor([[3.0], [4.0]]))
    assert ClippedGradient(5.0).gradient(g) is g
    broken = torch.tensor([[nan]])
    assert ClippedGradient(1.0).gradient(broken) is broken


@pytest.mark.parametrize("norm", [0.0, -1.0, nan, inf])
def test_a_norm_must_be_finite_and_positive(norm: float) -> None:
    with pytest.raises(ValueError, match=r"expected a finite max_norm above 0"):
        ClippedSteps(sgd(top()), norm)
    with pytest.raises(ValueError, match=r"expected a finite max_norm above 0"):
        ClippedGradient(norm)


# One gradient a client


def mean_rows(rows: Tensor) -> Tensor:
    return rows.mean(0)


def median_rows(rows: Tensor) -> Tensor:
    return rows.median(0).values


def clients_of(count: int, seed: int = 0) -> list[Learner]:
    torch.manual_seed(seed)
    stage = nn.Linear(4, 4).double()
    stages = [copy.deepcopy(stage) for _ in range(count)]
    return [Learner(f"c{number}", own, sgd(own)) for number, own in enumerate(stages)]


def test_the_mean_of_equal_clients_is_the_plain_parallel_step() -> None:
    plain, robust = top(), top()
    servers = [
        Learner("server", plain, sgd(plain)),
        PerClientServer(Learner("server", robust, sgd(robust)), mean_rows, [[6], [6], [6]]),
    ]
    tables = [clients_of(3), clients_of(3)]
    for step in range(3):
        batches = [batch(seed=10 * step + number) for number in range(3)]
        losses = [parallel(own, server, batches) for own, server in zip(tables, servers, strict=True)]
        assert torch.allclose(losses[0], losses[1])
    assert torch.allclose(flat(servers[1].weights()), flat(servers[0].weights()), atol=1e-12)
    for one, other in zip(*tables, strict=True):
        assert torch.allclose(flat(one.weights()), flat(other.weights()), atol=1e-12)


def test_a_rule_sees_each_clients_own_gradient_and_its_result_is_the_step() -> None:
    seen: list[Tensor] = []

    def second(rows: Tensor) -> Tensor:
        seen.append(rows)
        return rows[1]

    stage = top()
    parts = [batch(4, 1), batch(2, 2)]
    wanted = []
    for z, y in parts:
        gradients = torch.autograd.grad(cross_entropy(stage(z), y), list(stage.parameters()))
        wanted.append(torch.cat([g.flatten() for g in gradients]))
    before = flat(Learner("server", stage).weights())
    server = PerClientServer(Learner("server", stage, sgd(stage, momentum=0.0)), second, [[4], [2]])
    server.learn(torch.cat([z for z, _ in parts]), torch.cat([y for _, y in parts]))
    assert torch.allclose(seen[0], torch.stack(wanted))
    assert torch.allclose(flat(server.weights()), before - 0.1 * wanted[1])


def test_a_median_holds_the_top_where_the_mean_is_moved_by_one_client() -> None:
    drift = {}
    honest = [batch(seed=number) for number in range(5)]
    poisoned = [(1e4 * honest[0][0], honest[0][1]), *honest[1:]]
    for name, rule in (("mean", mean_rows), ("median", median_rows)):
        ends = []
        for batches in (honest, poisoned):
            torch.manual_seed(1)
            stage = nn.Linear(4, 3).double()
            server = PerClientServer(Learner("server", stage, sgd(stage, 0.5)), rule, [[6]] * 5)
            server.learn(torch.cat([z for z, _ in batches]), torch.cat([y for _, y in batches]))
            ends.append(flat(server.weights()))
        drift[name] = float((ends[0] - ends[1]).norm())
    assert drift["mean"] > 100 * drift["median"]


def test_a_client_with_nan_is_left_out_and_gets_zeros() -> None:
    stage, twin = top(), top()
    server = PerClientServer(Learner("server", stage, sgd(stage)), mean_rows, [[6], [6]])
    alone = Learner("server", twin, sgd(twin))
    z, y = batch()
    loss, g = server.learn(torch.cat([torch.full_like(z, nan), z]).requires_grad_(), torch.cat([y, y]))
    own_loss, _ = alone.learn(z, y)
    assert server.refused == 1
    assert g is not None
    assert not g[:6].any()
    assert g[6:].any()
    assert torch.allclose(loss, own_loss)
    assert torch.allclose(flat(server.weights()), flat(alone.weights()))


def test_rounds_of_clients_with_unlike_many_batches() -> None:
    counts = [13, 6, 9]
    data = [batch(count, number) for number, count in enumerate(counts)]
    stage = top()
    sizes = [batch_sizes(count, 4) for count in counts]
    assert sizes[0] == [4, 4, 4, 1]
    server = PerClientServer(Learner("server", stage, sgd(stage)), median_rows, sizes)
    batches = [Batches(x, y, batch_size=4, seed=number) for number, (x, y) in enumerate(data)]
    losses = [parallel_round(clients_of(3), server, batches).loss for _ in range(30)]
    assert losses[-1] < losses[0]


def test_a_per_client_server_resumes_amid_a_round() -> None:
    stage, other = top(), top(seed=1)
    sizes = [[4, 2], [4]]
    server = PerClientServer(Learner("server", stage, sgd(stage)), mean_rows, sizes)
    server.learn(*batch(8))
    resumed = PerClientServer(Learner("server", other, sgd(other)), mean_rows, sizes)
    resumed.load_state_dict(copy.deepcopy(server.state_dict()))
    for party in (server, resumed):
        party.learn(*batch(2, 1))
    assert same(resumed.weights(), server.weights())


def test_a_per_client_server_says_what_it_wants() -> None:
    stage = top()
    learner = Learner("server", stage, sgd(stage))
    with pytest.raises(ValueError, match=r"expected 8 samples of 2 clients at step 1 of the round, got 6"):
        PerClientServer(learner, mean_rows, [[4], [4]]).learn(*batch(6))
    with pytest.raises(ValueError, match=r"expected the sizes of at least one batch a client"):
        PerClientServer(learner, mean_rows, [[4], []])
    with pytest.raises(ValueError, match=r"expected a learner with an optimizer"):
        PerClientServer(Learner("server", top()), mean_rows, [[4]])
    with pytest.raises(ValueError, match=r"expected a rule that returns one gradient \[67\], got shape \(1,\)"):
        PerClientServer(learner, lambda rows: rows[0, :1], [[6]]).learn(*batch(6))
    with pytest.raises(ValueError, match=r"expected finite activations of at least one client"):
        PerClientServer(learner, mean_rows, [[1]]).learn(torch.full((1, 4), inf).double(), torch.zeros(1).long())
    with pytest.raises(ValueError, match=r"this server only learns"):
        PerClientServer(learner, mean_rows, [[6]]).forward(batch(6)[0])
    with pytest.raises(ValueError, match=r"expected at least one sample and a batch size"):
        batch_sizes(0, 4)


# Rates


def test_rates_by_hand() -> None:
    flagged = torch.tensor([True, True, False, False, True])
    truth = torch.tensor([True, False, True, True, False])
    found = rates(flagged, truth)
    assert found.tpr == pytest.approx(1 / 3)
    assert found.fpr == 1.0
    assert isnan(rates(flagged, torch.ones(5, dtype=torch.bool)).fpr)
    assert flagged_shares(flagged, ["a", "b", "a", "b", "b"]) == {"a": 0.5, "b": pytest.approx(2 / 3)}


def test_rates_want_masks_of_one_length() -> None:
    with pytest.raises(ValueError, match=r"expected two boolean masks \[N\] of one length, got float32"):
        rates(torch.zeros(3), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"one entry for each of 1 clients' names"):
        flagged_shares(torch.zeros(3, dtype=torch.bool), ["a"])


# Filters of samples


def blobs(seed: int, poisons: int, *, classes: int = 4, each: int = 80) -> tuple[Tensor, Tensor, Tensor]:
    """Return activations of well-separated classes, labels, and which samples of other classes are labelled 0."""
    draws = generator(seed)
    centres = 6 * torch.randn(classes, 12, generator=draws)
    y = torch.arange(classes).repeat_interleave(each)
    z = centres[y] + torch.randn(len(y), 12, generator=draws)
    truth = torch.zeros(len(y), dtype=torch.bool)
    truth[each : each + poisons] = True  # of class 1
    y = y.clone()
    y[truth] = 0
    order = torch.randperm(len(y), generator=draws)
    return z[order], y[order], truth[order]


FILTERS: list[tuple[Filter, float]] = [  # and the largest share of clean samples that it may flag
    (ActivationClustering(), 0.05),
    (ActivationClustering(whiten=True), 0.05),
    (SpectralSignatures(0.15), 0.23),
    (NeighbourGraph(), 0.12),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("suspects", "clean"), FILTERS, ids=lambda value: str(value))
def test_a_filter_finds_mislabelled_activations(suspects: Filter, clean: float, seed: int) -> None:
    z, y, truth = blobs(seed, 12)
    found = suspects(z, y)
    right = rates(found.flagged, truth)
    assert right.tpr >= 0.9
    assert right.fpr <= clean
    zero = y == 0
    assert found.scores[zero & truth].min() > found.scores[zero & ~truth].quantile(0.9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("suspects", "clean"), FILTERS, ids=lambda value: str(value))
def test_a_filter_leaves_clean_activations_alone(suspects: Filter, clean: float, seed: int) -> None:
    z, y, truth = blobs(seed, 0)
    assert rates(suspects(z, y).flagged, truth).fpr <= (0.02 if isinstance(suspects, NeighbourGraph) else clean)


@pytest.mark.parametrize(("suspects", "clean"), FILTERS, ids=lambda value: str(value))
def test_a_filter_goes_by_samples_whatever_their_order_or_shape(suspects: Filter, clean: float) -> None:
    z, y, _ = blobs(0, 12)
    order = torch.randperm(len(y), generator=generator(1))
    kept = z.clone()
    found, turned = suspects(z, y), suspects(z[order].view(-1, 3, 2, 2), y[order])
    assert torch.equal(found.flagged[order], turned.flagged)
    assert torch.allclose(found.scores[order], turned.scores, atol=1e-6)
    assert torch.equal(z, kept)


@pytest.mark.parametrize(("suspects", "clean"), FILTERS, ids=lambda value: str(value))
def test_a_filter_says_what_it_wants(suspects: Filter, clean: float) -> None:
    z, y, _ = blobs(0, 0)
    with pytest.raises(ValueError, match=r"expected activations \[N, …\] and as many class labels"):
        suspects(z, y[:-1])
    with pytest.raises(ValueError, match=r"expected activations \[N, …\] and as many class labels"):
        suspects(z, y.float())
    z[3, 0] = nan
    with pytest.raises(ValueError, match=r"expected finite activations, got nan or inf in 1 samples"):
        suspects(z, y)


def test_the_spectral_score_by_hand() -> None:
    z = torch.tensor([[-3.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [4.0, 0.0]])
    found = SpectralSignatures(0.2)(z, torch.zeros(4).long())
    assert torch.allclose(found.scores, torch.tensor([9.0, 1.0, 0.0, 16.0]).double())
    assert found.flagged.tolist() == [False, False, False, True]  # 1.5 · 0.2 · 4 = 1.2


def test_clusters_of_one_point_or_of_too_few_samples_are_not_judged() -> None:
    found = ActivationClustering()(torch.ones(40, 3), torch.zeros(40).long())
    assert not found.flagged.any()
    assert not found.scores.any()
    z, y, _ = blobs(0, 12)
    assert not ActivationClustering(least=1000)(z, y).flagged.any()


def test_neighbours_are_mutual() -> None:
    angles = torch.tensor([0.0, 0.1, 0.25, 3.0])  # 1 is nearest to 0 and 2, and 0 nearest to 1
    circle = torch.stack([angles.cos(), angles.sin()], 1).double()
    links = mutual_neighbours(torch.cat([circle, -circle]), 1)  # their mean is zero
    assert links[0, 1]
    assert not links[1, 2]
    assert torch.equal(links, links.T)
    assert not links.diagonal().any()


def test_the_chance_of_a_walk_by_hand() -> None:
    angles = torch.tensor([0.0, 0.1, 2.0, 2.1])  # two pairs
    circle = torch.stack([angles.cos(), angles.sin()], 1).double()
    z = torch.cat([circle, -circle])
    y = torch.tensor([0, 0, 0, 1, 0, 0, 2, 2])
    scores = NeighbourGraph(neighbours=1, damping=0.75)(z, y).scores
    assert scores.tolist() == pytest.approx([0, 0, log(4), log(4), 0, 0, 0, 0], abs=1e-12)


def test_identical_activations_are_no_valley() -> None:
    assert not NeighbourGraph()(torch.ones(30, 3), torch.zeros(30).long()).flagged.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActivationClustering(components=0), r"expected components ≥ 1"),
        (lambda: ActivationClustering(size=0.6), r"expected a size in \(0, 0.5\]"),
        (lambda: SpectralSignatures(0.7), r"expected a share in \(0, 2/3\), got 0.7"),
        (lambda: NeighbourGraph(damping=1.0), r"expected neighbours ≥ 1, a damping in \(0, 1\)"),
        (lambda: NeighbourGraph()(torch.rand(10, 2), torch.zeros(10).long()), r"more samples than the 20 neighbours"),
        (lambda: NeuralCleanse(steps=0), r"expected steps and patience ≥ 1"),
        (lambda: NeuralCleanse()(nn.Identity(), torch.rand(2, 3), 4), r"expected finite inputs \[N, channels, H, W\]"),
        (lambda: NeuralCleanse()(nn.Identity(), torch.rand(2, 1, 3, 3), 2), r"expected 3 classes or more"),
    ],
)
def test_settings_are_checked(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# SafeSplit


def turns_of(changes: Sequence[Tensor]) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    at, turns = torch.eye(4).double(), []
    for change in changes:
        turns.append(({"w": at}, {"w": at + change}))
        at = at + change
    return turns


def small(seed: int) -> Tensor:
    return 0.01 + 0.001 * torch.randn(4, 4, generator=generator(seed), dtype=torch.float64)


def test_a_turn_unlike_the_others_is_never_gone_on_from() -> None:
    for bad in range(5):
        changes = [small(seed) for seed in range(5)]
        changes[bad] = -20 * changes[bad]
        assert safesplit(turns_of(changes)) != bad
    changes = [small(seed) for seed in range(5)]
    changes[4] = torch.full((4, 4), nan).double()
    assert safesplit(turns_of(changes)) != 4


def test_equal_turns_keep_a_majority_and_few_turns_are_not_judged() -> None:
    assert safesplit(turns_of([small(0), -9 * small(1)])) == 1
    assert safesplit(turns_of([small(0)])) == 0
    with pytest.raises(ValueError, match=r"expected at least one turn, got none"):
        safesplit([])
    with pytest.raises(ValueError, match=r"expected a low part of the frequencies in \(0, 1\]"):
        safesplit(turns_of([small(0)]), low=0)
    with pytest.raises(ValueError, match=r"expected weights of one model before and after a turn"):
        safesplit([({"w": torch.zeros(2)}, {"w": torch.zeros(3)})] * 3)


def test_the_analyses_by_hand() -> None:
    before, after = {"w": torch.zeros(2, 2)}, {"w": torch.full((2, 2), 3.0)}
    assert torch.allclose(spectrum(before, after, low=0.5), torch.tensor([6.0]).double())  # the mean times √(2·2)
    assert spectrum(before, after, low=1.0).shape == (4,)
    ones = {"w": torch.tensor([1.0, 0.0])}
    assert rotations(ones, {"w": torch.tensor([0.0, 2.0])}).item() == pytest.approx(pi / 2)
    assert rotations(ones, {"w": torch.tensor([1.0, 1e-9])}).item() == pytest.approx(1e-9, rel=1e-3)
    assert rotations(ones, {"w": torch.zeros(2)}).item() == 0


def sequential(flips: Sequence[str], rounds: int = 6) -> tuple[SafeSplitServer, dict[str, int]]:
    """Train seven clients of alike data in turn; those named send labels of the next class, activations scaled."""
    stage = top(classes=2)
    server = SafeSplitServer(Learner("server", stage, sgd(stage, 0.3, 0.0)), window=7)
    torch.manual_seed(0)
    bottom = nn.Linear(4, 4).double()
    held = Learner("held", bottom)
    members = []
    for number in range(7):
        own, (x, _) = copy.deepcopy(bottom), batch(24, number)
        y = (x[:, 0] > 0).long()
        name = f"c{number}"
        if name in flips:
            x, y = 5 * x, 1 - y
        members.append(Member(Learner(name, own), server.session(name), Batches(x, y, batch_size=8, seed=number)))
    for _ in range(rounds):
        in_turn_round(members, held)
        server.end_turn()
    counts = {member.name: server.rolled_back.count(member.name) for member in members}
    return server, counts


def test_a_poisoners_turns_are_rolled_back_more_than_anyones() -> None:
    _, counts = sequential(["c3"])
    assert counts.pop("c3") == 6  # all of them
    assert sum(counts.values()) < 24  # of 36


def test_of_honest_turns_a_part_is_kept_and_the_top_learns() -> None:
    server, counts = sequential([])
    assert sum(counts.values()) < 30  # of 42
    x, _ = batch(200, 99)
    torch.manual_seed(0)
    z = nn.Linear(4, 4).double()(x).detach()
    assert (server.predict(z).argmax(1) == (x[:, 0] > 0).long()).double().mean() > 0.75


def test_a_roll_back_takes_weights_and_momentum_to_the_chosen_end() -> None:
    stage = top()
    server = SafeSplitServer(Learner("server", stage, sgd(stage)), window=3)
    ends = []
    for name, scale in (("a", 1.0), ("b", 1.0), ("c", 100.0)):
        z, y = batch(64, 5)
        server.session(name).learn(scale * z, y if name != "c" else (y + 1) % 3)
        ends.append(server.learner.weights())
    assert not server.rolled_back
    server.end_turn()
    assert server.rolled_back[-1] == "c"
    assert any(same(server.learner.weights(), end) for end in ends[:2])
    server.end_turn()  # nobody learned since
    assert len(server.rolled_back) == 1
    with pytest.raises(ValueError, match=r"expected a window of 3 turns or more"):
        SafeSplitServer(server.learner, window=2)
    with pytest.raises(ValueError, match=r"as in vanilla"):
        server.session("a").forward(z)


# Witnesses


class Table:
    """Clients of digits against one server; some patch half of each batch and label it 0."""

    def __init__(self, *, bad: int, clients: int = 12, seed: int = 0, witnessed: bool = True):
        digits = load("digits")
        order = torch.randperm(len(digits.x), generator=generator(seed))
        train, test = order[:1400], order[1400:]
        self.x, self.y = digits.x[test], digits.y[test]
        torch.manual_seed(seed)
        bottom = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
        stage = nn.Sequential(nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10))
        learner = Learner("server", stage, ClippedSteps(sgd(stage, 0.05), 1.0))
        names = [f"c{number}" for number in range(clients)]
        self.bad = set(names[:bad])
        self.server = WitnessedServer(learner, names, groups=clients // 2, warm_up=450) if witnessed else None
        self.bottom, self.top = Learner("fed", bottom), learner
        self.members = []
        for number, rows in enumerate(dirichlet(digits.y[train], clients, alpha=1.0, seed=seed, min_rows=20)):
            own, name = copy.deepcopy(bottom), names[number]
            x, y = digits.x[train][rows], digits.y[train][rows].clone()
            if name in self.bad:
                half = len(x) // 2
                x, y = torch.cat([patched(x[:half]), x[half:]]), torch.cat([torch.zeros_like(y[:half]), y[half:]])
            party = self.server.session(name) if self.server else learner.session(name)
            batches = Batches(x, y, batch_size=16, seed=number)
            self.members.append(Member(Learner(name, own, sgd(own, 0.05)), party, batches))

    def train(self, rounds: int) -> tuple[float, float]:
        """Return the accuracy and the backdoor's success after some rounds of SplitFed V2."""
        for _ in range(rounds):
            splitfed_v2_round(self.members, self.bottom)
        others = self.y != 0
        right = (self.top.predict(self.bottom.predict(self.x)).argmax(1) == self.y).double().mean()
        moved = (self.top.predict(self.bottom.predict(patched(self.x[others]))).argmax(1) == 0).double().mean()
        return float(right), float(moved)


def patched(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., -2:, -2:] = 1
    return x


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_witnesses_hold_splitfed_v2_against_a_patch(seed: int) -> None:
    _, success = Table(bad=2, seed=seed, witnessed=False).train(15)
    assert success > 0.9
    table = Table(bad=2, seed=seed)
    accuracy, success = table.train(15)
    assert table.server is not None
    assert accuracy >= 0.94
    assert success < 0.2
    doubted = table.server.doubted()
    suspects = torch.tensor([share > table.server.tolerance for share in doubted.values()])
    right = rates(suspects, torch.tensor([name in table.bad for name in doubted]))
    assert (right.tpr, right.fpr) == (1.0, 0.0)


@pytest.mark.slow
def test_witnesses_let_honest_clients_learn() -> None:
    plain, _ = Table(bad=0, witnessed=False).train(15)
    table = Table(bad=0)
    accuracy, _ = table.train(15)
    assert table.server is not None
    assert accuracy >= plain - 0.03
    assert max(table.server.doubted().values()) < table.server.tolerance


def witnessed(warm_up: int = 0, clients: int = 4, **settings: float) -> WitnessedServer:
    stage = top()
    learner = Learner("server", stage, sgd(stage))
    names = [f"c{number}" for number in range(clients)]
    return WitnessedServer(learner, names, groups=4, warm_up=warm_up, **{"floor": 0.1, "tolerance": 1.0, **settings})


def constant(party: Learner, label: int, chance: float) -> None:
    """Have a party find ``label`` likely by ``chance`` whatever comes, and the two others alike."""
    stage = party.stage[2]  # type: ignore[index]
    others = (1 - chance) / 2
    with torch.no_grad():
        stage.weight.zero_()
        stage.bias.copy_(torch.tensor([chance if at == label else others for at in range(3)]).log())


def test_a_score_is_the_median_of_the_other_groups_witnesses() -> None:
    server = witnessed()
    for witness, chance in zip(server.witnesses, (0.99, 0.9, 0.2, 0.05), strict=True):
        constant(witness, 1, chance)
    z, _ = batch(2)
    label = torch.ones(2).long()
    assert server.scores("c0", z, label).tolist() == pytest.approx([0.2, 0.2])  # of .9, .2, .05
    assert server.scores("c3", z, label).tolist() == pytest.approx([0.9, 0.9])  # of .99, .9, .2
    z[0, 0] = nan
    assert server.scores("c3", z, label).tolist() == pytest.approx([0.0, 0.9])


def test_only_likely_samples_are_learned_from_and_the_rest_gets_zeros() -> None:
    server, twin = witnessed(floor=0.3), witnessed()
    for witness in server.witnesses:
        constant(witness, 1, 0.9)
    z, _ = batch(6)
    y = torch.tensor([1, 0, 1, 2, 1, 1])
    kept = y == 1
    loss, g = server.session("c2").learn(z.clone().requires_grad_(), y)
    wanted, wanted_g = twin.learner.learn(z[kept].requires_grad_(), y[kept])
    assert torch.equal(loss, wanted)
    assert same(server.learner.weights(), twin.learner.weights())
    assert g is not None
    assert wanted_g is not None
    assert torch.equal(g[kept], wanted_g)
    assert not g[~kept].any()
    assert server.doubted() == {"c0": 0, "c1": 0, "c2": pytest.approx(1 / 3), "c3": 0}


def test_a_client_that_is_doubted_too_often_is_not_learned_from_until_its_share_falls() -> None:
    server = witnessed(floor=0.3, tolerance=0.4)
    z, _ = batch(4)
    for y, learned in (([0, 0, 1, 1], False), ([1, 1, 1, 1], True)):
        for witness in server.witnesses:
            constant(witness, 1, 0.9)
        before = server.learner.weights()
        loss, g = server.session("c0").learn(z.clone().requires_grad_(), torch.tensor(y))
        assert same(server.learner.weights(), before) is not learned
        assert g is not None
        assert bool(g.any()) is learned
        assert isnan(loss.item()) is not learned
    assert server.doubted()["c0"] == 0.25


def test_in_the_warm_up_only_the_clients_own_witness_learns() -> None:
    server = witnessed(warm_up=1)
    start = server.learner.weights()
    _, g = server.session("c1").learn(batch()[0].requires_grad_(), batch()[1])
    assert g is not None
    assert g.any()
    assert same(server.learner.weights(), start)
    assert [same(witness.weights(), start) for witness in server.witnesses] == [True, False, True, True]
    assert not any(server.doubted().values())
    server.session("c1").learn(*batch())
    assert not same(server.learner.weights(), start)


def test_activations_of_nan_neither_stop_the_server_nor_move_it() -> None:
    server = witnessed()
    start = server.learner.weights()
    z = torch.full((3, 4), nan).double().requires_grad_()
    _, g = server.session("c0").learn(z, torch.zeros(3).long())
    assert g is not None
    assert not g.any()
    assert same(server.learner.weights(), start)
    assert all(same(witness.weights(), start) for witness in server.witnesses)
    assert server.doubted()["c0"] == 1


def test_a_witnessed_server_resumes_bit_for_bit() -> None:
    server, resumed = witnessed(warm_up=2, floor=0.25), witnessed(warm_up=2, floor=0.25)
    for seed in range(4):
        server.session(f"c{seed}").learn(*batch(seed=seed))
    resumed.load_state_dict(copy.deepcopy(server.state_dict()))
    for party in (server, resumed):
        party.session("c0").learn(*batch(seed=9))
    assert same(resumed.learner.weights(), server.learner.weights())
    assert resumed.doubted() == server.doubted()
    with pytest.raises(ValueError, match=r"expected the state of 4 witnesses and the same clients"):
        witnessed(clients=5).load_state_dict(server.state_dict())


def test_a_witnessed_server_says_what_it_wants() -> None:
    stage = top()
    learner = Learner("server", stage, sgd(stage))
    with pytest.raises(ValueError, match=r"expected clients of different names and 4 groups or more"):
        WitnessedServer(learner, ["a", "b", "c"], groups=4)
    with pytest.raises(ValueError, match=r"expected clients of different names and 4 groups or more"):
        WitnessedServer(learner, ["a", "a", "b", "c"], groups=4)
    with pytest.raises(ValueError, match=r"expected a floor in \(0, 1\)"):
        WitnessedServer(learner, ["a", "b", "c", "d"], groups=4, floor=0)
    with pytest.raises(LookupError, match=r"expected one of the 4 clients that it was made for, got 'x'"):
        witnessed().session("x")
    with pytest.raises(ValueError, match=r"as in vanilla"):
        witnessed().session("c0").forward(batch()[0])


# Neural Cleanse


def test_anomalies_by_hand() -> None:
    found = anomalies(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0, inf]).double())  # median 3, deviations 2 1 0 1 97
    assert found[:5].tolist() == pytest.approx([deviation / 1.4826 for deviation in (2, 1, 0, 1, 97)])
    assert found[5] == inf
    assert not anomalies(torch.full((3,), inf)).any()
    close = anomalies(
        torch.tensor([10.0, 10.0, 10.0, 9.9], dtype=torch.float64)
    )  # the spread counts as a tenth of the median
    assert close[3] == pytest.approx(0.1 / 1.4826)


def trained(poisoned: bool, seed: int) -> tuple[nn.Module, Tensor]:
    digits = load("digits")
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    x, y = digits.x[:1200], digits.y[:1200].clone()
    if poisoned:
        x = torch.cat([x, patched(x[:200])])
        y = torch.cat([y, torch.zeros(200, dtype=y.dtype)])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for inputs, labels in (pair for _ in range(6) for pair in Batches(x, y, batch_size=50, seed=seed)):
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model.eval(), digits.x[1200:1240]


@pytest.mark.slow
def test_neural_cleanse_finds_the_class_of_a_planted_patch_and_no_class_of_a_clean_model() -> None:
    cleanse = NeuralCleanse(steps=120)
    model, x = trained(True, 0)
    before = [parameter.clone() for parameter in model.parameters()]
    found = cleanse(model, x, 10)
    assert found.flagged.nonzero().flatten().tolist() == [0]
    assert found.norms.argmin() == 0
    assert found.success[0] >= 0.99
    assert found.masks[0, 0, -2:, -2:].sum() > 0.5 * found.masks[0].sum()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    clean, _ = trained(False, 0)
    assert not cleanse(clean, x, 10).flagged.any()


@pytest.mark.parametrize("backdoor", [True, False])
def test_neural_cleanse_by_a_rule_of_one_pixel(backdoor: bool) -> None:
    areas = torch.zeros(6, 36)  # a class goes by its six pixels: to move an input takes a good part of them
    for label in range(6):
        areas[label, 6 * label : 6 * label + 6] = 1

    def model(x: Tensor) -> Tensor:
        logits = 4 * x.flatten(1) @ areas.T
        return logits + 60 * (x[:, :1, 0, 5] - 0.15).relu() * torch.eye(6)[3] if backdoor else logits

    x = 0.1 * torch.rand(24, 1, 6, 6, generator=generator())
    for at in range(24):
        x[at, 0, at % 6, :5] += 0.8
    found = NeuralCleanse(steps=150)(model, x, 6)
    assert found.flagged.nonzero().flatten().tolist() == ([3] if backdoor else [])
    assert bool((found.success >= 0.99).all())
    if backdoor:
        assert found.masks[3, 0, 0, 5] > 0.5 * found.masks[3].sum()


def test_neural_cleanse_leaves_out_classes_that_no_trigger_reaches() -> None:
    def stubborn(x: Tensor) -> Tensor:
        score = 9 * (x.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([score, -score, torch.full_like(score, -99) + 0 * score], 1)

    found = replace(NeuralCleanse(), steps=40)(stubborn, torch.rand(5, 1, 3, 3), 3)
    assert found.norms[2] == inf
    assert not found.flagged[2]


# A server that filters clients


def suspects_of(label: int) -> Filter:
    return lambda z, y: Suspects(torch.zeros(len(y)), y == label)


def filtered(suspect: Filter, **also: object) -> tuple[FilteredServer, Learner]:
    stage = top()
    learner = Learner("server", stage, sgd(stage))
    clients = dict.fromkeys(["a", "b"], learner)
    return FilteredServer(learner, clients, suspect, warm_up=1, **{"least": 1, **also}), learner  # type: ignore[arg-type]


def test_who_is_flagged_too_often_is_left_out_of_the_next_round_and_judged_anew() -> None:
    server, learner = filtered(suspects_of(2), most=0.5)
    (x, _), good, bad = batch(), torch.tensor([0, 1, 0, 1, 0, 2]), torch.tensor([2, 2, 2, 2, 0, 1])
    for client, y in (("a", good), ("b", bad)):
        server.session(client).learn(x, y)
    server.end_round()
    assert server.left_out == [["b"]]
    assert server.shares == {"a": pytest.approx(1 / 6), "b": pytest.approx(4 / 6)}
    before = learner.weights()
    loss, g = server.session("b").learn(x.clone().requires_grad_(), good)
    assert isnan(loss)
    assert g is not None
    assert not g.any()
    assert same(learner.weights(), before)
    _, g = server.session("a").learn(x.clone().requires_grad_(), good)
    assert g is not None
    assert g.any()
    assert not same(learner.weights(), before)
    server.end_round()
    assert server.left_out == [["b"], []]  # it sent what it should


def test_a_filter_that_flags_nobody_changes_nothing_and_sees_the_last_layers_inputs() -> None:
    seen: list[Tensor] = []

    def nobody(z: Tensor, y: Tensor) -> Suspects:
        seen.append(z)
        return Suspects(torch.zeros(len(y)), torch.zeros(len(y), dtype=torch.bool))

    server, learner = filtered(nobody)
    stage = top()
    plain = Learner("server", stage, sgd(stage))
    for number in range(3):
        x, y = batch(seed=number)
        server.session("ab"[number % 2]).learn(x, y)
        plain.learn(x, y)
    server.end_round()
    assert same(learner.weights(), plain.weights())
    assert seen[0].shape == (18, 8)
    assert torch.equal(seen[0][:6], stage[:2](batch(seed=0)[0]))  # those of client a come first
    shallow, _ = filtered(nobody, deep=False)
    shallow.session("a").learn(*batch())
    shallow.end_round()
    assert torch.equal(seen[1], batch()[0])


def test_what_is_not_finite_is_flagged_unasked() -> None:
    server, _ = filtered(suspects_of(9))
    z, y = batch()
    z[1] = nan
    assert server.verdict(z, y).tolist() == [False, True, False, False, False, False]
    server, _ = filtered(suspects_of(9))
    assert server.verdict(torch.full_like(z, inf), y).all()


def test_where_too_few_are_finite_a_filter_is_not_asked_and_overflow_on_the_way_up_counts() -> None:
    server, learner = filtered(suspects_of(0), least=6)
    z, y = batch()
    assert server.verdict(z, torch.zeros_like(y)).all()
    z[0] = inf
    assert server.verdict(z, torch.zeros_like(y)).tolist() == [True, *[False] * 5]
    with torch.no_grad():
        learner.stage[1] = nn.Identity()  # type: ignore[operator]
        z[0] = 1e308
        learner.stage[0].weight.fill_(100.0)  # type: ignore[index, union-attr, operator]
    assert server.verdict(z, torch.zeros_like(y)).tolist() == [True, *[False] * 5]


def test_a_filtering_server_wants_clients_it_knows() -> None:
    server, learner = filtered(suspects_of(0))
    with pytest.raises(LookupError, match="one of the 2 clients"):
        server.session("c")
    with pytest.raises(ValueError, match="at least one client"):
        FilteredServer(learner, {}, suspects_of(0))
    with pytest.raises(ValueError, match=r"most in \[0, 1\)"):
        FilteredServer(learner, {"a": learner}, suspects_of(0), most=1.0)


@pytest.mark.slow
def test_a_graph_on_digits_leaves_label_flippers_out_and_nobody_else() -> None:
    data = load("digits", data_dir=None)
    x, y = data.x[:600].flatten(1), data.y[:600]
    stage = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    learner = Learner("server", stage, torch.optim.SGD(stage.parameters(), 0.05, momentum=0.9))
    names = [f"c{number}" for number in range(6)]
    server = FilteredServer(learner, dict.fromkeys(names, learner), NeighbourGraph(), warm_up=3, deep=False)
    for _ in range(6):
        for number, name in enumerate(names):
            own = slice(number * 100, number * 100 + 100)
            labels = 9 - y[own] if number == 0 else y[own]
            for rows in torch.arange(100).split(20):
                server.session(name).learn(x[own][rows], labels[rows])
        server.end_round()
    assert server.left_out == [["c0"]] * 4
