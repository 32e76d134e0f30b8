"""Distillation: the loss by hand, teachers across a wire, peers, and a federation that exchanges answers alone."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from defenses.aggregation import Median, Robust
from splitlearn import Framed, Kind, Learner, Member, Metered, RemoteMember, Service, mean, serve, wire
from splitlearn.data import load, split
from splitlearn.paradigms import (
    UNLABELLED,
    Consensus,
    Distilled,
    DistillingMember,
    distil,
    distillation_loss,
    distillation_round,
    mutual,
    taught,
)
from splitlearn.train import Batches, evaluate

from .toy import Lost, crossed, data, same

LOGITS = torch.tensor([[1.0, -0.5, 2.0], [0.3, 0.1, -1.2]], dtype=torch.float64)
TEACHER = torch.tensor([[0.5, 0.0, 3.0], [-1.0, 2.0, 0.4]], dtype=torch.float64)
LABELS = torch.tensor([2, 0])


def softened(row: Sequence[float], temperature: float) -> list[float]:
    powers = [math.exp(one / temperature) for one in row]
    return [one / sum(powers) for one in powers]


def by_hand(alpha: float, temperature: float, labels: Sequence[int | None]) -> float:
    """Return the loss of the example in plain numbers; None is no label."""
    divergence, entropies = 0.0, []
    for student, teacher, label in zip(LOGITS.tolist(), TEACHER.tolist(), labels, strict=True):
        p, q = softened(teacher, temperature), softened(student, temperature)
        divergence += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)) / 2
        if label is not None:
            entropies.append(-math.log(softened(student, 1.0)[label]))
    hard = sum(entropies) / len(entropies) if entropies else 0.0
    return alpha * hard + (1 - alpha) * temperature**2 * divergence


# The loss


@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("labels", [[2, 0], [2, None], [None, None]])
def test_the_loss_by_hand(alpha: float, temperature: float, labels: list[int | None]) -> None:
    y = torch.tensor([UNLABELLED if label is None else label for label in labels])
    found = distillation_loss(LOGITS, TEACHER, y, alpha=alpha, temperature=temperature).item()
    assert found == pytest.approx(by_hand(alpha, temperature, labels), rel=0, abs=1e-14)
    whole = Distilled(alpha, temperature)(LOGITS, taught(y, TEACHER)).item()
    assert whole == found


def test_the_ends_of_alpha_are_labels_alone_and_the_teacher_alone() -> None:
    labels = distillation_loss(LOGITS, TEACHER, LABELS, alpha=1.0, temperature=3.0)
    assert torch.allclose(labels, cross_entropy(LOGITS, LABELS), rtol=0, atol=1e-15)
    other = distillation_loss(LOGITS, TEACHER, LABELS.flip(0), alpha=0.0, temperature=3.0)
    assert torch.equal(distillation_loss(LOGITS, TEACHER, LABELS, alpha=0.0, temperature=3.0), other)


def test_who_says_what_the_teacher_says_is_not_moved() -> None:
    logits = TEACHER.clone().requires_grad_()
    loss = distillation_loss(logits, TEACHER, LABELS, alpha=0.0, temperature=4.0)
    (g,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert float(g.abs().max()) < 1e-15
    shifted = TEACHER + 7.0  # the same probabilities
    assert distillation_loss(shifted, TEACHER, LABELS, alpha=0.0, temperature=4.0).item() == pytest.approx(0, abs=1e-14)


def test_the_square_of_the_temperature_keeps_the_gradients_scale() -> None:
    def norm(temperature: float) -> float:
        logits = LOGITS.clone().requires_grad_()
        loss = distillation_loss(logits, TEACHER, LABELS, alpha=0.0, temperature=temperature)
        return float(torch.autograd.grad(loss, logits)[0].norm())

    # At high temperatures T²·KL goes to half the mean squared difference of centred logits, over the classes.
    difference = (LOGITS - LOGITS.mean(1, keepdim=True)) - (TEACHER - TEACHER.mean(1, keepdim=True))
    assert norm(1000.0) == pytest.approx(float(difference.norm()) / (3 * 2), rel=1e-3)
    assert 0.3 < norm(1000.0) / norm(4.0) < 3.0


def test_plain_labels_are_learned_by_cross_entropy() -> None:
    assert torch.equal(Distilled()(LOGITS, LABELS), cross_entropy(LOGITS, LABELS))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Distilled(alpha=1.1), "alpha from 0 to 1 and a temperature above 0, got 1.1 and 4.0"),
        (lambda: Distilled(alpha=float("nan")), "alpha from 0 to 1"),
        (lambda: Distilled(temperature=0.0), "a temperature above 0, got 0.5 and 0.0"),
        (lambda: Distilled(temperature=float("inf")), "a temperature above 0"),
        (
            lambda: taught(LABELS, LOGITS[:1]),
            r"labels \(batch,\) and logits \(batch, classes\), got \(2,\) and \(1, 3\)",
        ),
        (lambda: taught(LABELS[:, None], LOGITS), r"got \(2, 1\) and \(2, 3\)"),
        (
            lambda: taught(torch.tensor([257, 0]), torch.zeros(2, 300, dtype=torch.bfloat16)),
            r"labels that torch\.bfloat16 holds exactly, got 257; give wider logits",
        ),
        (
            lambda: Distilled()(LOGITS, taught(torch.tensor([-100, 1]), TEACHER)),
            "labels of 0 or more, or -1 for none, got -100",
        ),
    ],
)
def test_bad_numbers_are_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# A teacher, and peers


def net(hidden: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 2)).double()


def party(name: str, hidden: int, seed: int, loss: Distilled | None = None, lr: float = 0.5) -> Learner:
    stage = net(hidden, seed)
    return Learner(name, stage, torch.optim.SGD(stage.parameters(), lr=lr), loss=loss or Distilled(0.5, 2.0))


def test_a_student_comes_near_its_teacher_without_a_label() -> None:
    teacher, student = Learner("teacher", net(8, 1)), party("student", 4, 2, Distilled(0.0, 2.0))
    x, _ = data(0, (40,))[0]
    nothing = torch.full((40,), UNLABELLED)

    def apart() -> float:
        soft, goal = log_softmax(student.predict(x), 1), log_softmax(teacher.predict(x), 1)
        return kl_div(soft, goal, log_target=True, reduction="batchmean").item()

    before, held = apart(), teacher.weights()
    for _ in range(100):
        distil(student, teacher, x, nothing)
    assert apart() < before / 20
    assert same(teacher.weights(), held)


def test_a_teacher_across_a_wire_teaches_the_same() -> None:
    here, there = party("student", 4, 2), party("student", 4, 2)
    teacher, far = Learner("teacher", net(8, 1)), wire(Learner("teacher", net(8, 1)))
    for x, y in data(0, (5, 6, 7)):
        assert torch.equal(distil(here, teacher, x, y), distil(there, far.party, x, y))
    assert same(here.weights(), there.weights())
    assert crossed(far.meter.nbytes.values()) == {Kind.ACTIVATION, Kind.PREDICTION, Kind.FRAMING}  # samples, answers


def test_a_student_across_a_wire_is_taught_the_same() -> None:
    here, far = party("student", 4, 2), wire(party("student", 4, 2))
    local, teacher = party("student", 4, 2), Learner("teacher", net(8, 1))
    for x, y in data(0, (5, 6)):
        label = taught(y, teacher.predict(x))
        assert torch.equal(here.learn(x, label)[0], far.party.learn(x, label)[0])
        distil(local, teacher, x, y)
    assert same(here.weights(), far.party.weights())
    assert same(here.weights(), local.weights())


def test_peers_learn_from_what_the_other_said_before_either_stepped() -> None:
    first, second = party("a", 4, 1), party("b", 6, 2)
    twins = party("a", 4, 1), party("b", 6, 2)
    for x, y in data(0, (5, 6, 7)):
        said = twins[0].predict(x), twins[1].predict(x)
        expected = twins[0].learn(x, taught(y, said[1]))[0], twins[1].learn(x, taught(y, said[0]))[0]
        assert all(torch.equal(*pair) for pair in zip(mutual(first, second, x, y), expected, strict=True))
    assert same(first.weights(), twins[0].weights())
    assert same(second.weights(), twins[1].weights())
    # and not from what it says after: the order of the two makes no difference
    turned = party("a", 4, 1), party("b", 6, 2)
    for x, y in data(0, (5, 6, 7)):
        mutual(turned[1], turned[0], x, y)
    assert same(first.weights(), turned[0].weights())
    assert same(second.weights(), turned[1].weights())


# A federation that exchanges answers

PUBLIC = data(9, (30,))[0][0]
SIZES = ((4, 6), (8,), (2, 3, 2))


def members(count: int = 3) -> list[DistillingMember]:
    """Return members whose models differ."""
    return [
        DistillingMember(party(f"c{n}", 3 + n, n), data(n, SIZES[n]), PUBLIC, batch_size=8, seed=n)
        for n in range(count)
    ]


def test_a_round_is_of_answers_and_not_of_weights() -> None:
    own, consensus = members(), Consensus(30, 2, torch.float64)
    alone = [Member(party(f"c{n}", 3 + n, n), None, data(n, SIZES[n])) for n in range(3)]
    for one in alone:  # first nobody has said anything, and nobody digests zeros
        one.round(one.learner.weights())
    done = distillation_round(own, consensus)
    assert done.counts == {"c0": 10, "c1": 8, "c2": 7}
    assert all(same(one.learner.weights(), other.learner.weights()) for one, other in zip(own, alone, strict=True))
    said = [one.learner.predict(PUBLIC) for one in alone]
    assert torch.equal(consensus.logits, mean([{"logits": one} for one in said], [10, 8, 7])["logits"])
    goal = consensus.logits
    distillation_round(own, consensus)
    for n, one in enumerate(alone):  # then it is digested, batch by batch, before a member's own batches
        nothing = torch.full((30,), UNLABELLED)
        for rows, _ in Batches(torch.arange(30), torch.arange(30), batch_size=8, seed=n):
            one.learner.learn(PUBLIC[rows], taught(nothing[rows], goal[rows]))
        one.round(one.learner.weights())
        assert same(one.learner.weights(), own[n].learner.weights())


def test_members_come_to_agree() -> None:
    def apart(digests: int | None) -> float:
        """Return how far answers are from their mean after ten rounds, each with other labels at home."""
        own, consensus = members(), Consensus(30, 2, torch.float64)
        for n, one in enumerate(own):
            one.batches = [(x, torch.full((len(x),), n % 2)) for x, _ in data(n, SIZES[n])]
            one.digests = digests or 1
        for _ in range(10):
            distillation_round(own, consensus if digests else Consensus(30, 2, torch.float64))
        said = torch.stack([log_softmax(one.learner.predict(PUBLIC), 1).exp() for one in own])
        return float((said - said.mean(0)).abs().mean())

    assert apart(5) < apart(None) / 2


def test_nothing_but_answers_and_counts_crosses() -> None:
    here, there = Consensus(30, 2, torch.float64), Consensus(30, 2, torch.float64)
    local, behind = members(), members()
    meters = [Metered(serve(Service({one.name: one})), requests="down") for one in behind]
    remote = [RemoteMember(one.name, Framed(meter), one.name) for one, meter in zip(behind, meters, strict=True)]
    for _ in range(2):
        assert distillation_round(local, here).counts == distillation_round(remote, there).counts
    assert torch.equal(here.logits, there.logits)
    for meter in meters:
        assert crossed(meter.nbytes.values()) == {Kind.WEIGHTS, Kind.COUNT, Kind.FRAMING}
        answers = 2 * 30 * 2 * 8  # two rounds, samples, classes, bytes
        assert meter.nbytes["up"][Kind.WEIGHTS] == meter.nbytes["down"][Kind.WEIGHTS] == answers
        assert meter.nbytes["up"][Kind.COUNT] == 2 * 8


def test_a_robust_aggregator_keeps_a_liars_answers_out() -> None:
    class Liar(DistillingMember):
        def round(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
            found, count = super().round(weights)
            return {name: -1e6 * w for name, w in found.items()}, count

    own = members()
    own[2] = Liar(own[2].learner, data(2, SIZES[2]), PUBLIC)
    consensus = Consensus(30, 2, torch.float64)
    distillation_round(own, consensus, aggregate=Robust(Median()))
    said = torch.stack([one.learner.predict(PUBLIC) for one in own[:2]])
    low, high = said.amin(0), said.amax(0)
    assert bool(((consensus.logits >= low - 1e-9) & (consensus.logits <= high + 1e-9)).all())


def test_who_drops_out_is_left_out_of_the_consensus() -> None:
    here, there = Consensus(30, 2, torch.float64), Consensus(30, 2, torch.float64)
    done = distillation_round([*members(2), Lost("c2")], here)
    distillation_round(members(2), there)
    assert done.dropped == ("c2",)
    assert torch.equal(here.logits, there.logits)


def test_members_and_answers_that_do_not_fit_say_so() -> None:
    stage = net(4, 0)
    with pytest.raises(ValueError, match="c: expected a learner whose loss is Distilled, got <function cross_entropy"):
        DistillingMember(Learner("c", stage, torch.optim.SGD(stage.parameters(), lr=0.1)), [], PUBLIC)
    with pytest.raises(ValueError, match="c: expected to digest once or more, got 0"):
        DistillingMember(party("c", 4, 0), [], PUBLIC, digests=0)
    with pytest.raises(
        ValueError, match=r"c0: expected logits on 30 public samples, got \{'logits': \(29, 2\)\}; begin"
    ):
        distillation_round(members(1), Consensus(29, 2))
    with pytest.raises(ValueError, match=r"c0: expected logits on 30 public samples, got \{'w': \(1,\)\}"):
        members(1)[0].round({"w": torch.zeros(1)})


# What it is for


def gains(seed: int) -> tuple[float, float, float]:
    """Return the accuracy on digits of a teacher, of a student alone, and of the student with the teacher.

    The student has the labels of one in ten of the private samples; on the others the teacher alone says something.
    """
    splits = split(load("digits"), private=1000, auxiliary=0, test=597, seed=seed)
    x, y = splits.private.x, splits.private.y
    few = torch.full_like(y, UNLABELLED)
    few[:100] = y[:100]

    def made(name: str, width: int) -> Learner:
        torch.manual_seed(seed)
        stage = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1, momentum=0.9)
        return Learner(name, stage, optimizer, loss=Distilled(0.5, 4.0))

    def accuracy(one: Learner) -> float:
        return evaluate([one], splits.test.x, splits.test.y)["accuracy"]

    teacher, alone, student = made("teacher", 128), made("student", 16), made("student", 16)
    for epochs, one, lessons in (
        (30, teacher, Batches(x, y, batch_size=32, seed=seed)),
        (300, alone, Batches(x[:100], y[:100], batch_size=32, seed=seed)),  # as many steps as the student's
    ):
        for _ in range(epochs):
            for some, labels in lessons:
                one.learn(some, labels)
    lessons = Batches(x, few, batch_size=32, seed=seed)
    for _ in range(37):
        for some, labels in lessons:
            distil(student, teacher, some, labels)
    assert abs(alone.steps - student.steps) < 20
    return accuracy(teacher), accuracy(alone), accuracy(student)


@pytest.mark.slow
def test_a_student_with_few_labels_gains_by_a_teacher() -> None:
    measured = [gains(seed) for seed in range(3)]
    assert sum(student - alone for _, alone, student in measured) / 3 >= 0.01


def test_the_loss_leaves_what_it_is_given_as_it_is() -> None:
    copies = copy.deepcopy((LOGITS, TEACHER, LABELS))
    Distilled()(LOGITS, taught(LABELS, TEACHER))
    assert all(torch.equal(*pair) for pair in zip(copies, (LOGITS, TEACHER, LABELS), strict=True))
