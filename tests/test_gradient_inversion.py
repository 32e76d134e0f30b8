"""Inputs and labels from updates: exact where theory says so, at the baseline without a signal, by the view alone."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from attacks.gradients.analytic import AnalyticInversion
from attacks.gradients.bottom import BottomGradientMatching
from attacks.gradients.dlg import DLG, IDLG
from attacks.gradients.inverting import InvertingGradients
from attacks.gradients.labels import UpdateLabels
from attacks.gradients.updates import Seen, Update, own_update, seen_update, seen_updates, together
from attacks.inversion.reconstruction import Reconstruction
from splitlearn import (
    Framed,
    Kind,
    Learner,
    Member,
    Recorded,
    Remote,
    RemoteMember,
    Service,
    Threat,
    View,
    cut,
    fedavg_round,
    observe,
    serve,
    splitfed_v1_round,
    u_shaped,
    wire,
)  # fmt: skip
from splitlearn.data import load, split
from splitlearn.metrics import score_reconstruction
from splitlearn.models import digits_cnn

LR = 0.1
SHAPE = (1, 8, 8)
PARTS = split(load("digits"), private=800, auxiliary=600, test=397, seed=0)
ROUNDS: Seen = partial(seen_updates, lr=LR)
Attack = DLG | IDLG | AnalyticInversion | InvertingGradients | BottomGradientMatching


def lenet(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    convs = [nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.Sigmoid(), nn.Conv2d(12, 12, 3, padding=1), nn.Sigmoid()]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(12 * 4 * 4, 10)).double()


def dense(seed: int = 0, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10, bias=bias)]
    return nn.Sequential(*layers).double()


def untrained_cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return digits_cnn()


def private(count: int, model: nn.Module, *, first: int = 0) -> tuple[Tensor, Tensor]:
    x = PARTS.private.x[first : first + count].to(next(model.parameters()).dtype)
    return x, PARTS.private.y[first : first + count]


def learner(name: str, stage: nn.Module) -> Learner:
    stage = copy.deepcopy(stage)
    return Learner(name, stage, torch.optim.SGD(stage.parameters(), lr=LR))


def across(member: Member, *, updates: bool = False) -> tuple[RemoteMember, Recorded]:
    record = Recorded(Service({member.name: member}))
    return RemoteMember(member.name, Framed(serve(record)), member.name, updates=updates), record


def fedavg(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    batch_size: int = 1,
    updates: bool = False,
    threat: Threat | None = None,
) -> View:
    """Return the fed server's view of one round: a member a batch, one step of SGD each, across the wire."""
    batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    members = [Member(learner(f"c{n}", model), None, [batch]) for n, batch in enumerate(batches)]
    remote, records = zip(*[across(member, updates=updates) for member in members], strict=True)
    fedavg_round(remote, Learner("all", copy.deepcopy(model)))
    return observe(*records, threat=threat if threat is not None else Threat(name="FedAvg's server"))


def splitfed(model: nn.Sequential, place: int, x: Tensor, y: Tensor) -> View:
    """Return the fed server's view of a SplitFed round, one sample a member: the bottoms, and nothing else."""
    bottom, top = cut(copy.deepcopy(model), place)
    main, start = learner("main", top), Learner("bottom", bottom)
    sessions = {f"c{n}": main.replica(f"c{n}") for n in range(len(x))}
    members = [
        Member(learner(f"c{n}", bottom), sessions[f"c{n}"], [(x[n : n + 1], y[n : n + 1])]) for n in range(len(x))
    ]
    remote, records = zip(*[across(member) for member in members], strict=True)
    splitfed_v1_round(remote, sessions, start, main)
    return observe(*records, threat=Threat(name="fed server"))


def advantage(x: Tensor, found: Reconstruction) -> float:
    return score_reconstruction(x, found.x_hat, auxiliary_x=PARTS.auxiliary.x.to(x.dtype)).advantage


def mse(x: Tensor, found: Reconstruction) -> float:
    """The worst sample's."""
    assert found.x_hat.shape == x.shape
    assert found.x_hat.dtype == x.dtype
    return (found.x_hat - x).square().flatten(1).mean(1).max().item()


def gradient_of(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    loss = nn.functional.cross_entropy(model(x), y)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def noisy(view: View) -> list[Update]:
    """What is left where a defence drowns the gradient: noise of its length."""
    generator = torch.Generator().manual_seed(1)

    def drowned(g: Tensor) -> Tensor:
        return torch.randn(g.shape, generator=generator, dtype=g.dtype) * g.square().mean().sqrt()

    return [replace(u, gradient={name: drowned(g) for name, g in u.gradient.items()}) for u in ROUNDS(view)]


def exchanged(view: View) -> list[Update]:
    """Each update with the next one's gradient."""
    updates = list(ROUNDS(view))
    return [
        replace(one, gradient=other.gradient) for one, other in zip(updates, updates[1:] + updates[:1], strict=True)
    ]


# One row an attack, at toy size: name, the model, the attack of it, and the MSE that every sample stays below.
ATTACKS: list[tuple[str, Callable[[], nn.Sequential], Callable[[nn.Module], Attack], float]] = [
    ("analytic", dense, lambda model: AnalyticInversion(model, ROUNDS, SHAPE), 1e-24),
    ("dlg", dense, lambda model: DLG(model, ROUNDS, SHAPE), 1e-10),
    ("idlg", lenet, lambda model: IDLG(model, ROUNDS, SHAPE), 1e-10),
    ("inverting", untrained_cnn, lambda model: InvertingGradients(model, ROUNDS, SHAPE, 200, 1), 1e-3),
    ("bottom", dense, lambda model: BottomGradientMatching(model[:3], ROUNDS, SHAPE), 1e-10),
]
BY_NAME = [pytest.param(*row[1:], id=row[0]) for row in ATTACKS]


# What is seen


@pytest.mark.parametrize("updates", [False, True])
def test_an_update_is_the_gradient(updates: bool) -> None:
    model = lenet()
    x, y = private(3, model)
    update = seen_update(fedavg(model, x, y, batch_size=3, updates=updates), lr=LR)
    assert update.count == 3
    for name, g in gradient_of(model, x, y).items():
        assert torch.equal(update.weights[name], model.state_dict()[name])
        assert torch.allclose(update.gradient[name], g, rtol=0, atol=1e-15 / LR)  # rounding of weights below 1


def test_updates_come_in_the_order_in_which_they_crossed() -> None:
    model = dense()
    x, y = private(3, model)
    view = fedavg(model, x, y)
    with pytest.raises(LookupError, match="expected one round in the view, got 3"):
        seen_update(view, lr=LR)
    found = AnalyticInversion(model, ROUNDS, SHAPE)(view)
    assert mse(x, found) < 1e-24


@pytest.mark.parametrize("kind", [Kind.WEIGHTS, Kind.UPDATE, Kind.COUNT])
def test_what_is_not_granted_is_not_there(kind: Kind) -> None:
    model = dense()
    x, y = private(1, model)
    view = fedavg(model, x, y, updates=True, threat=Threat(sees=frozenset(Kind) - {kind}))
    for _, _, attack, _ in ATTACKS:
        with pytest.raises(LookupError, match=rf"grant them with Threat\(sees=frozenset\({{Kind.{kind.name}"):
            attack(model)(view)
    with pytest.raises(LookupError, match=f"Kind.{kind.name}"):
        UpdateLabels(model, ROUNDS)(view)


def test_without_rounds_there_is_nothing_to_read() -> None:
    line = wire(Learner("server", dense()))
    line.party.predict(torch.rand(1, *SHAPE, dtype=torch.float64))
    with pytest.raises(LookupError, match="reads the updates of rounds, and none crossed"):
        seen_updates(observe(line.record, threat=Threat()), lr=LR)


# Controls


@pytest.mark.parametrize(("make", "attack", "limit"), BY_NAME)
def test_unprotected_inputs_are_rebuilt(
    make: Callable[[], nn.Sequential], attack: Callable[[nn.Module], Attack], limit: float
) -> None:
    model = make()
    x, y = private(2, model)
    found = attack(model)(fedavg(model, x, y))
    assert mse(x, found) <= limit
    assert advantage(x, found) > 0.98
    assert found.evidence["converged"] == 1
    if "labels" in found.evidence:
        assert found.evidence["labels"] == " ".join(map(str, y.tolist()))


@pytest.mark.parametrize("destroyed", [noisy, exchanged])
@pytest.mark.parametrize(("make", "attack", "limit"), BY_NAME)
def test_without_a_signal_it_falls_to_the_baseline(
    make: Callable[[], nn.Sequential], attack: Callable[[nn.Module], Attack], limit: float, destroyed: Seen
) -> None:
    model = make()
    x, y = private(2, model)
    made = attack(model)
    small = made if isinstance(made, AnalyticInversion) else replace(made, iterations=60, restarts=1)
    found = replace(small, seen=destroyed)(fedavg(model, x, y))
    assert advantage(x, found) <= 0.1


@pytest.mark.parametrize(("make", "attack", "limit"), BY_NAME[1:])
def test_the_seed_decides_and_the_global_generator_stays(
    make: Callable[[], nn.Sequential], attack: Callable[[nn.Module], Attack], limit: float
) -> None:
    model = make()
    view = fedavg(model, *private(1, model))
    made = attack(model)
    assert not isinstance(made, AnalyticInversion)
    small = replace(made, iterations=3, restarts=1)
    before = torch.get_rng_state()
    first, again = small(view).x_hat, small(view).x_hat
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, replace(small, seed=1)(view).x_hat)


# The figures


@pytest.mark.parametrize("bias", [True, False])
def test_labels_are_exact_for_one_sample_and_untrained_networks(bias: bool) -> None:
    right = 0
    for seed in range(10):
        model = dense(seed, bias=bias)
        x, y = private(10, model, first=10 * seed)
        right += int((UpdateLabels(model, ROUNDS)(fedavg(model, x, y)) == y).sum())
    assert right == 100


@pytest.mark.parametrize("steps", [0, 300])
def test_labels_are_exact_for_relu_networks_in_float32_trained_or_not(steps: int) -> None:
    model = untrained_cnn()
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        rows = torch.randint(0, 600, (32,))
        adam.zero_grad()
        nn.functional.cross_entropy(model(PARTS.auxiliary.x[rows]), PARTS.auxiliary.y[rows]).backward()
        adam.step()
    x, y = private(100, model)
    assert torch.equal(UpdateLabels(model, ROUNDS)(fedavg(model, x, y)), y)


def test_analytic_inversion_is_exact_to_rounding() -> None:
    model = dense(3)
    x, y = private(100, model)
    found = AnalyticInversion(model, ROUNDS, SHAPE)(fedavg(model, x, y))
    assert (found.x_hat - x).abs().max() <= 1e-12
    bottom = AnalyticInversion(model[:3], ROUNDS, SHAPE)(splitfed(model, 3, x[:5], y[:5]))  # a fed server needs no more
    assert (bottom.x_hat - x[:5]).abs().max() <= 1e-12


def test_analytic_inversion_says_what_it_cannot_explain() -> None:
    model = dense()
    view = fedavg(model, *private(2, model))
    attack = AnalyticInversion(model, ROUNDS, SHAPE)
    assert attack(view).evidence["objective_last"] < 1e-24
    drowned = replace(attack, seen=noisy)(view)
    assert drowned.evidence["objective_last"] > 0.5
    assert drowned.evidence["converged"] == 0


def test_matching_goes_by_its_objective_alone() -> None:
    model = dense()
    x, y = private(1, model)
    view = fedavg(model, x, y)
    attack = IDLG(model, ROUNDS, SHAPE, enough=0.0, restarts=2)
    found, first = attack(view), replace(attack, restarts=1)(view)
    assert found.evidence["attempts"] == 2
    assert found.evidence["objective_last"] <= first.evidence["objective_last"]
    other = replace(attack, seen=exchanged, restarts=1)(
        fedavg(model, *private(2, model))
    )  # it matches another's gradient, as well
    assert other.evidence["objective_last"] < 1e-16
    assert replace(attack, enough=1e-8)(view).evidence["attempts"] == 1


def test_dlg_rebuilds_a_batch_in_some_order() -> None:
    model = dense()
    x, y = private(2, model, first=2)
    found = DLG(model, ROUNDS, SHAPE)(fedavg(model, x, y, batch_size=2))
    order = torch.cdist(x.flatten(1), found.x_hat.flatten(1)).argmin(1)
    assert sorted(order.tolist()) == [0, 1]
    assert mse(x, replace(found, x_hat=found.x_hat[order])) < 1e-10
    assert [found.evidence["labels"].split()[place] for place in order] == [str(label) for label in y.tolist()]


# Who sees what


class UShapedMember:
    """A member of a U-shaped SplitFed: bottom and head are its own and averaged, the middle is the main server's."""

    name = "c"

    def __init__(self, bottom: Learner, middle: Remote, head: Learner, batches: Sequence[tuple[Tensor, Tensor]]):
        self.parts, self.middle, self.batches = (bottom, head), middle, batches

    def round(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        bottom, head = self.parts
        for part in self.parts:
            part.load_weights({name: weights[name] for name in part.weights()})
        for x, y in self.batches:
            u_shaped(bottom, self.middle, head, x, y)
        return bottom.weights() | head.weights(), sum(len(x) for x, _ in self.batches)


def colluding(model: nn.Sequential, x: Tensor, y: Tensor) -> tuple[View, nn.Module]:
    """Return what fed and main server see together of one step of U-shaped SplitFed, and the middle before it."""
    bottom, middle, head = cut(copy.deepcopy(model), 2, 4)
    line = wire(learner("main", middle))
    member = UShapedMember(learner("bottom", bottom), line.party, learner("head", head), [(x, y)])
    fed = Recorded(Service({"c": member}))
    RemoteMember("c", Framed(serve(fed)), "c").round({**bottom.state_dict(), **head.state_dict()})
    return observe(fed, line.record, threat=Threat(name="both servers")), middle


def test_servers_that_collude_put_a_full_update_together() -> None:
    model = lenet()
    x, y = private(1, model)
    view, middle = colluding(model, x, y)
    with pytest.raises(LookupError, match=r"got nothing of 2\.weight, 2\.bias; .* servers that collude"):
        DLG(model, ROUNDS, SHAPE)(view)

    def both(view: View) -> list[Update]:
        return [together(seen_update(view, lr=LR), own_update(view, middle))]

    for name, g in gradient_of(model, x, y).items():
        assert torch.allclose(both(view)[0].gradient[name], g, rtol=0, atol=1e-15 / LR)
    found = IDLG(model, both, SHAPE)(view)
    assert mse(x, found) < 1e-10
    assert found.evidence["labels"] == str(y.item())


def test_a_main_servers_own_update_from_activations_and_labels() -> None:
    model = lenet()
    bottom, top = cut(model, 2)
    x, y = private(2, model)
    line = wire(learner("main", top))
    line.party.learn(bottom(x).detach().requires_grad_(), y)
    view = observe(line.record, threat=Threat())
    own, whole = own_update(view, top), gradient_of(model, x, y)
    assert own.count == 2
    assert all(torch.allclose(g, whole[name], rtol=0, atol=1e-15) for name, g in own.gradient.items())
    with pytest.raises(LookupError, match=r"Kind\.ACTIVATION"):
        own_update(observe(line.record, threat=Threat(sees=frozenset({Kind.LABEL}))), top)
    line.party.learn(bottom(x).detach().requires_grad_(), y)
    with pytest.raises(LookupError, match="one training step of the main server's, got 2"):
        own_update(observe(line.record, threat=Threat()), top)
    with pytest.raises(ValueError, match="no entry twice"):
        together(own, own)


def test_a_fed_server_alone_rebuilds_what_is_behind_two_smooth_convolutions() -> None:
    model = lenet()
    x, y = private(2, model)
    view = splitfed(model, 4, x, y)
    found = BottomGradientMatching(model[:4], ROUNDS, SHAPE)(view)
    assert mse(x, found) < 1e-6
    assert "labels" not in found.evidence
    with pytest.raises(LookupError, match=r"got nothing of 5\.weight, 5\.bias; a server that sees the bottom's alone"):
        DLG(model, ROUNDS, SHAPE)(view)
    with pytest.raises(LookupError, match=r"reads the gradient of the last layer, got none of 5\.bias"):
        UpdateLabels(model, ROUNDS)(view)


def test_a_first_convolution_alone_fits_many_inputs() -> None:
    model = lenet()  # 120 weights against 64 pixels and 192 gradients
    x, y = private(2, model)
    found = BottomGradientMatching(model[:2], ROUNDS, SHAPE)(splitfed(model, 2, x, y))
    assert found.evidence["objective_worst"] < 1e-6
    assert advantage(x, found) == 0


# What cannot be


def test_what_an_attack_cannot_invert_is_said() -> None:
    model, cnn = dense(), untrained_cnn()
    pair = fedavg(model, *private(2, model), batch_size=2)
    for attack in (AnalyticInversion(model, ROUNDS, SHAPE), IDLG(model, ROUNDS, SHAPE), UpdateLabels(model, ROUNDS)):
        with pytest.raises(ValueError, match=r"expected (an update|updates) of one sample, got one of 2"):
            attack(pair)
    view = fedavg(cnn, *private(1, cnn))
    with pytest.raises(ValueError, match="expected a fully connected first layer with a bias"):
        AnalyticInversion(cnn, ROUNDS, SHAPE)(view)

    def still(view: View) -> list[Update]:
        return [replace(u, gradient={name: 0 * g for name, g in u.gradient.items()}) for u in ROUNDS(view)]

    for make in (AnalyticInversion, DLG, IDLG, BottomGradientMatching, InvertingGradients):
        with pytest.raises(ValueError, match="not all 0"):
            make(model, still, SHAPE)(fedavg(model, *private(1, model)))
    with pytest.raises(ValueError, match="not all 0"):
        UpdateLabels(model, still)(fedavg(model, *private(1, model)))


@pytest.mark.parametrize("make", [AnalyticInversion, DLG, IDLG, BottomGradientMatching, InvertingGradients])
def test_a_wrong_shape_and_no_update_are_one_clear_line(make: type) -> None:
    model = dense()
    view = fedavg(model, *private(1, model))
    with pytest.raises(
        ValueError, match=r"expected .* got .*\(1, 7, 8\).* input_shape|input_shape of \(1, 7, 8\)"
    ) as caught:
        make(model, ROUNDS, (1, 7, 8))(view)
    assert "\n" not in str(caught.value)
    with pytest.raises(LookupError, match="expected at least one update in the view, got none"):
        make(model, lambda view: [], SHAPE)(view)
    with pytest.raises(LookupError, match="expected at least one update"):
        UpdateLabels(model, lambda view: [])(view)


def test_a_bias_is_that_of_the_same_layer() -> None:
    layers = [nn.Flatten(), nn.Linear(64, 32, bias=False), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 10)]
    model = nn.Sequential(*layers).double()
    with pytest.raises(
        ValueError, match=r"first layer with a bias, got 1.weight .* 2.weight of shape \(32,\); use DLG"
    ):
        AnalyticInversion(model, ROUNDS, SHAPE)(fedavg(model, *private(1, model)))


def test_two_classes_without_a_bias_look_alike() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False)).double()
    x, _ = private(1, model)
    with pytest.raises(ValueError, match="without a bias two classes look alike"):
        UpdateLabels(model, ROUNDS)(fedavg(model, x, torch.tensor([1])))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DLG(dense(), ROUNDS, SHAPE, iterations=0), "at least one iteration"),
        (lambda: IDLG(dense(), ROUNDS, SHAPE, restarts=0), "at least one iteration and one attempt"),
        (lambda: InvertingGradients(dense(), ROUNDS, SHAPE, lr=0), "lr > 0"),
        (lambda: BottomGradientMatching(dense(), ROUNDS, SHAPE, tv_weight=-1), "weight of 0 or more"),
        (lambda: seen_updates(fedavg(dense(), *private(1, dense())), lr=0.0), "learning rate, above 0, got 0.0"),
    ],
)
def test_settings_that_make_no_sense(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


# Slow


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("attack", [DLG, IDLG])
@pytest.mark.parametrize("make", [lenet, dense])
def test_the_figures_of_dlg(make: Callable[[int], nn.Sequential], attack: type[DLG] | type[IDLG], seed: int) -> None:
    model = make(seed)
    x, y = private(5, model, first=5 * seed)
    found = attack(model, ROUNDS, SHAPE, seed=seed)(fedavg(model, x, y))
    assert mse(x, found) <= 1e-10
    assert found.evidence["labels"] == " ".join(map(str, y.tolist()))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_figures_of_inverting_gradients(seed: int) -> None:
    model = untrained_cnn(seed)
    x, y = private(3, model, first=3 * seed)
    found = InvertingGradients(model, ROUNDS, SHAPE, seed=seed)(fedavg(model, x, y))
    assert mse(x, found) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("place", "rebuilt"), [("relu1", False), ("relu2", False), ("relu3", True)])
def test_the_figures_of_a_fed_server_alone(place: str, rebuilt: bool, seed: int) -> None:
    model = untrained_cnn(seed)
    number = list(dict(model.named_children())).index(place) + 1
    x, y = private(2, model, first=2 * seed)
    found = BottomGradientMatching(model[:number], ROUNDS, SHAPE, seed=seed)(splitfed(model, number, x, y))
    assert (advantage(x, found) > 0.8) if rebuilt else (advantage(x, found) < 0.1)
