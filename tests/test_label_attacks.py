"""Labels read off the wire: everything where they cross in the clear, a guess where they are drowned, Bayes between."""

from collections.abc import Callable
from itertools import product
from math import exp, log

import pytest
import torch
from torch import Tensor, nn

from attacks import GradientMatching, SentLabels
from privacy.dp import ClippedGaussian, OnGradient, RandomisedResponse
from splitlearn import Guard, Kind, Learner, Threat, View, observe, u_shaped, vanilla, wire

CLASSES = 10
LABELS = Kind.LABEL


def sent(
    y: Tensor, *, x: Tensor | None = None, batch_size: int = 32, threat: Threat | None = None, predict: bool = False
) -> View:
    """What a server sees of samples ``x`` that pass an identity, and of what is sent as labels."""
    x = torch.rand(len(y), 4) if x is None else x
    client = Learner("client", nn.Identity())
    line = wire(Learner("server", nn.Linear(x.shape[1], CLASSES)))
    for part, own in zip(x.split(batch_size), y.split(batch_size), strict=True):
        vanilla(client, line.party, part, own)
        if predict:
            line.party.predict(part)
    return observe(line.record, threat=threat if threat is not None else Threat())


def labels(count: int) -> Tensor:
    return torch.randint(0, CLASSES, (count,))


def share(guess: Tensor, truth: Tensor) -> float:
    return (guess == truth).double().mean().item()


@pytest.mark.parametrize("attack", [SentLabels(CLASSES), SentLabels(CLASSES, 8.0), SentLabels(CLASSES, 0.01)])
def test_labels_in_the_clear_are_read_to_the_last(attack: SentLabels) -> None:
    y = labels(100)
    guess = attack(sent(y, predict=True))  # requests to predict carry no labels, and mix nothing up
    assert torch.equal(guess, y)
    assert guess.dtype == y.dtype


def test_a_large_epsilon_hides_nothing() -> None:
    y = labels(500)
    answers = RandomisedResponse(20.0, CLASSES).label(y)
    # 500 answers, each another than the truth with a probability of 9·e^−20 = 2e-8.
    assert torch.equal(SentLabels(CLASSES, 20.0)(sent(answers)), y)


@pytest.mark.parametrize("epsilon", [1e-6, 1.0, 3.0])
def test_without_a_prior_it_is_right_as_often_as_the_answers_are_true(epsilon: float) -> None:
    y = labels(4000)
    response = RandomisedResponse(epsilon, CLASSES)
    accuracy = share(SentLabels(CLASSES, epsilon)(sent(response.label(y), batch_size=500)), y)
    truth = exp(epsilon) / (exp(epsilon) + CLASSES - 1)
    # Four standard deviations of a share of 4000; at ε = 1e-6 that is chance, 0.1.
    assert accuracy == pytest.approx(truth, abs=4 * (truth * (1 - truth) / 4000) ** 0.5)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_under_drowned_labels_it_falls_to_what_its_prior_knows(epsilon: float) -> None:
    logits = 3 * torch.randn(300, CLASSES)
    answers = labels(300)  # of no relation to anything
    assert torch.equal(SentLabels(CLASSES, epsilon, lambda z: z)(sent(answers, x=logits)), logits.argmax(1))


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 2.5, 6.0])
def test_it_is_the_greatest_posterior_by_brute_force(epsilon: float) -> None:
    classes, x = 3, torch.randn(60, 3)
    answers = torch.arange(60) % classes
    found = SentLabels(classes, epsilon, lambda z: z)(sent(answers, x=x))
    truth = exp(epsilon) / (exp(epsilon) + classes - 1)
    for row, answer, guess in zip(x.double().tolist(), answers.tolist(), found.tolist(), strict=True):
        prior = [exp(one) / sum(map(exp, row)) for one in row]
        likely = [truth if label == answer else (1 - truth) / (classes - 1) for label in range(classes)]
        posterior = [p * q for p, q in zip(prior, likely, strict=True)]
        # Float32 logits: two labels that are equally likely to six digits may be taken for one another.
        assert posterior[guess] >= max(posterior) * (1 - 1e-5)


def test_no_rule_on_the_answers_is_better_on_average() -> None:
    epsilon, prior = 1.2, torch.tensor([0.7, 0.2, 0.1])
    truth = exp(epsilon) / (exp(epsilon) + 2)
    channel = torch.full((3, 3), (1 - truth) / 2).fill_diagonal_(truth)  # [label, answer]
    rule = SentLabels(3, epsilon, lambda z: prior.log().expand(len(z), 3))(sent(torch.arange(3)))
    won = (prior[:, None] * channel)[rule, torch.arange(3)].sum()
    every = [(prior[:, None] * channel)[list(one), torch.arange(3)].sum() for one in product(range(3), repeat=3)]
    assert won == max(every)
    assert len(every) == 27


def test_the_prior_is_weighed_against_the_answer() -> None:
    """A prior of odds e² for label 0 stands against an answer 1 of less than ε = 2, and yields to one of more."""
    prior = torch.tensor([log(exp(2) / (exp(2) + 2)), *[log(1 / (exp(2) + 2))] * 2])

    def given(z: Tensor) -> Tensor:
        return prior.expand(len(z), 3)

    view = sent(torch.tensor([1]))
    assert [SentLabels(3, epsilon, given)(view).item() for epsilon in (1.9, 2.1)] == [0, 1]
    # Logits are read up to a constant, and a prior without any opinion changes nothing.
    assert SentLabels(3, 1.9, lambda z: 7 + given(z))(view).item() == 0
    assert SentLabels(3, 0.1, lambda z: torch.zeros(len(z), 3))(view).item() == 1


def test_a_good_prior_helps_and_is_read_from_the_same_requests() -> None:
    y = labels(2000)
    x = 1.5 * nn.functional.one_hot(y, CLASSES).float() + torch.randn(2000, CLASSES)
    answers = RandomisedResponse(2.0, CLASSES).label(y)
    view = sent(answers, x=x, batch_size=300, predict=True)
    alone, model = SentLabels(CLASSES, 2.0)(view), x.argmax(1)
    both = SentLabels(CLASSES, 2.0, lambda z: 1.5 * z)(view)  # the log-likelihoods of the labels, up to a constant
    # It gains more than 0.1 over either; a difference of two shares of 2000 spreads by 0.016 at most.
    assert share(both, y) > max(share(alone, y), share(model, y)) + 0.05


def test_the_prior_is_asked_without_gradient() -> None:
    asked: list[bool] = []
    model = nn.Linear(4, CLASSES)

    def prior(z: Tensor) -> Tensor:
        asked.append(torch.is_grad_enabled())
        return model(z)

    assert not SentLabels(CLASSES, 1.0, prior)(sent(labels(10))).requires_grad
    assert asked == [False]


def no_labels() -> View:
    line = wire(Learner("server", nn.Linear(4, CLASSES)))
    line.party.predict(torch.rand(3, 4))
    return observe(line.record, threat=Threat())


HIDDEN = Threat(sees=frozenset(Kind) - {LABELS})


@pytest.mark.parametrize(
    ("attack", "view", "error", "message"),
    [
        (SentLabels(CLASSES), no_labels, LookupError, "none crossed; record training"),
        (SentLabels(CLASSES), lambda: sent(labels(4), threat=HIDDEN), LookupError, r"grant them .*Kind\.LABEL"),
        (SentLabels(CLASSES, 1.0), lambda: sent(labels(4), threat=HIDDEN), LookupError, r"grant them .*Kind\.LABEL"),
        (
            SentLabels(CLASSES, 1.0, nn.Linear(4, CLASSES)),
            lambda: sent(labels(4), threat=Threat(sees=frozenset({LABELS}))),
            LookupError,
            r"grant them .*Kind\.ACTIVATION",
        ),
        (
            SentLabels(CLASSES, 1.0, nn.Linear(4, CLASSES)),
            lambda: sent(labels(4), threat=Threat(releases=2)),
            ValueError,
            "labels are not averaged",
        ),
        (
            SentLabels(CLASSES, 1.0, nn.Linear(4, 1)),  # would be added to every label alike, and silently do nothing
            lambda: sent(labels(4)),
            ValueError,
            "expected a prior that gives 10 logits for each of 4 labels",
        ),
    ],
)
def test_what_it_cannot_read_is_refused(
    attack: SentLabels, view: Callable[[], View], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attack(view())


@pytest.mark.parametrize("epsilon", [-1.0, float("nan")])
def test_an_epsilon_that_is_none_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match="expected an ε of 0 or more"):
        SentLabels(CLASSES, epsilon)


# Gradient matching in the U shape


def u_shape_view(guard: Guard, *, passes: int = 1) -> tuple[View, nn.Module, Tensor, Tensor]:
    """Return what the server saw of a U-shaped training of 60 samples, the head, the true labels and the inputs."""
    torch.manual_seed(3)
    x, y = torch.rand(60, 6), torch.randint(0, 5, (60,))
    bottom, middle, head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)
    client = Learner("client", bottom)
    server = Learner("server", middle, torch.optim.SGD(middle.parameters(), 0.1))
    line = wire(server)
    top = Learner("head", head, None, guard, seed=1)
    for _ in range(passes):
        for rows in torch.arange(60).split(20):
            u_shaped(client, line.party, top, x[rows], y[rows])
    return observe(line.record, threat=Threat("server")), head, y, x


def test_matching_reads_every_label_off_a_gradient_without_noise() -> None:
    view, head, y, _ = u_shape_view(Guard())
    assert torch.equal(GradientMatching(head, 5, 60)(view), y)
    clip = 0.001  # below every row's norm: directions alone are left, and they tell
    view, head, y, _ = u_shape_view(OnGradient(ClippedGaussian(clip, 0.0)))
    assert torch.equal(GradientMatching(head, 5, 60, clip)(view), y)


def test_matching_falls_to_chance_where_noise_drowns_the_gradient() -> None:
    view, head, y, _ = u_shape_view(OnGradient(ClippedGaussian(0.01, 1e4)))
    right = (GradientMatching(head, 5, 60, 0.01)(view) == y).double().mean().item()
    assert right < 0.2 + 4 * (0.2 * 0.8 / 60) ** 0.5  # one in five, and four standard errors


def test_matching_takes_the_passes_of_a_sample_together() -> None:
    noise = ClippedGaussian(0.01, 0.7)
    scores = []
    for passes in (1, 12):
        view, head, y, _ = u_shape_view(OnGradient(noise), passes=passes)
        scores.append((GradientMatching(head, 5, 60, 0.01)(view) == y).double().mean().item())
    assert scores[1] > scores[0] + 0.2


def test_matching_weighs_a_prior_by_the_noise() -> None:
    noise = ClippedGaussian(0.01, 1e4)
    view, head, y, _ = u_shape_view(OnGradient(noise))

    def knows(z: Tensor) -> Tensor:
        return 10.0 * torch.nn.functional.one_hot(y, 5)

    assert torch.equal(GradientMatching(head, 5, 60, 0.01, std=noise.std, prior=knows)(view), y)
    with pytest.raises(ValueError, match="expected std above 0 with a prior, got None"):
        GradientMatching(head, 5, 60, prior=knows)


def test_matching_without_a_u_shape_says_so() -> None:
    learner = Learner("server", nn.Linear(3, 2))
    line = wire(learner)
    line.party.predict(torch.rand(2, 3))
    with pytest.raises(LookupError, match="forward and backward requests of a U shape"):
        GradientMatching(nn.Linear(3, 2), 2, 2)(observe(line.record, threat=Threat("server")))
