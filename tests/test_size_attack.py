"""Sizes of sealed frames: they tell the class where a codec's output depends on it, and nothing where it does not."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from attacks import Inference, SizeGuess
from splitlearn import Ans, Framed, Grants, Int8, Learner, Remote, Service, Threat, Uniform, View, Zstd, serve
from splitlearn.codecs import Padded
from splitlearn.enclave import Attested, Host, enclosed
from splitlearn.exits import Confidence
from splitlearn.frames import Codec
from splitlearn.inference import Inference as Answering
from splitlearn.metrics import accuracy, accuracy_advantage
from splitlearn.network import VirtualClock
from splitlearn.threat import observe_host

ATTESTED = Attested(runs="the top", vouched="this test")
THREAT = Threat("host", sees=frozenset(), queries=True, auxiliary=True, auxiliary_labels=True)
CLASSES = 3


def samples(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of 200 numbers: of class 0 nearly all are alike, of class 2 none."""
    draws = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (num,), generator=draws)
    x = torch.randn(num, 200, generator=draws)
    keep = torch.rand(num, 200, generator=draws) < torch.tensor([0.1, 0.5, 1.0])[y][:, None]
    return torch.where(keep, x, torch.zeros(())), y


def crossed(x: Tensor, codec: Codec | None, *, slow: bool = False, leave: bool = False) -> Host:
    """The host after samples crossed one by one; with ``slow`` the enclave takes longer for what has more in it."""
    clock = VirtualClock()
    torch.manual_seed(0)
    server = Learner("server", nn.Linear(200, CLASSES))
    answer = serve(Service({"server": server}), codec)
    work = [0.0]

    def inside(frame: bytes) -> bytes:
        clock.sleep(0.01 + work[0])
        return answer(frame)

    carrier, host = enclosed(inside, ATTESTED, clock=clock)
    party = Remote("server", Framed(carrier, codec), "server")
    client, exit_ = Learner("client", nn.Identity()), Learner("exit", Sparse())
    answering = Answering(client, party, exit_, Confidence(0.9), "cascade" if leave else "split")
    for number, sample in enumerate(x.split(1), 1):
        work[0] = float((sample != 0).sum()) / 1000 if slow else 0.0
        answering.answer(sample)
        if len(host.rows) < number:
            host.silent()
    return host


class Sparse(nn.Module):
    """An exit that is sure of what has little in it."""

    def forward(self, z: Tensor) -> Tensor:
        little = ((z != 0).double().mean(1) < 0.3).double()
        return torch.stack([5 * little, torch.zeros_like(little), torch.zeros_like(little)], 1)


@cache
def guessed(codec: Codec | None, slow: bool = False, leave: bool = False) -> tuple[Inference, float]:
    """The attack's answer and its advantage on 150 private samples; the host has 200 of its own."""
    (x, y), (own, known) = samples(150, 1), samples(200, 2)
    grants = Grants(
        auxiliary_x=own, auxiliary_y=known, sizes_of=lambda z: crossed(z, codec, slow=slow, leave=leave).sizes
    )
    view = observe_host(crossed(x, codec, slow=slow, leave=leave), threat=THREAT, grants=grants)
    found = SizeGuess(CLASSES)(view)
    baseline = (y == known.bincount().argmax()).double().mean().item()
    return found, accuracy_advantage(accuracy(found.scores, y), baseline)


@pytest.mark.parametrize("codec", [Ans(Uniform(4)), Zstd(Int8()), Padded(Ans(Uniform(4)), 1)], ids=lambda one: one.name)
def test_entropy_coded_frames_tell_the_class(codec: Codec) -> None:
    found, advantage = guessed(codec)
    assert found.scores.shape == (150, CLASSES)
    assert advantage > 0.8
    assert found.evidence["held_out_accuracy"] == pytest.approx(1 - (1 - advantage) * 2 / 3, abs=0.15)


@pytest.mark.parametrize(
    "codec", [None, Int8(), Uniform(2), Padded(Ans(Uniform(4)), 2048)], ids=lambda one: getattr(one, "name", "none")
)
def test_frames_of_one_length_and_time_tell_nothing(codec: Codec | None) -> None:
    found, advantage = guessed(codec)
    assert advantage == 0
    assert found.evidence["classifier"] == "most frequent"
    assert len(found.scores.unique(dim=0)) == 1


def test_padding_lets_less_and_less_through_against_who_knows_of_it() -> None:
    steps = [guessed(Padded(Ans(Uniform(4)), multiple))[1] for multiple in (1, 64, 2048)]
    assert steps[0] >= steps[1] > steps[2] == 0


def test_times_tell_where_sizes_do_not() -> None:
    assert guessed(Int8(), slow=True)[1] > 0.8


def test_what_leaves_at_an_early_exit_tells_by_its_absence() -> None:
    found, advantage = guessed(Int8(), leave=True)
    assert 0.3 < advantage < 0.7  # class 0 from the others, and these not from each other
    assert len(found.scores.unique(dim=0)) == 2


@pytest.mark.parametrize(
    ("change", "grant"),
    [
        ({"queries": False}, "queries=True"),
        ({"auxiliary_labels": False}, "auxiliary_labels=True"),
        ({"auxiliary": False, "auxiliary_labels": False}, "auxiliary=True"),
    ],
)
def test_it_names_the_grant_that_it_lacks(change: dict[str, bool], grant: str) -> None:
    host = Host(lambda frame: frame, clock=VirtualClock())
    host.silent()
    grants = Grants(
        auxiliary_x=torch.zeros(20, 2), auxiliary_y=torch.arange(20) % 2, sizes_of=lambda x: torch.zeros(len(x), 3)
    )
    with pytest.raises(LookupError, match=grant):
        SizeGuess(2)(observe_host(host, threat=replace(THREAT, **change), grants=grants))  # type: ignore[arg-type]


def made(own: Tensor, known: Tensor, seen: Tensor) -> View:
    host = Host(lambda frame: frame, clock=VirtualClock())
    host.rows = [tuple(row) for row in seen.tolist()]
    return observe_host(host, threat=THREAT, grants=Grants(auxiliary_x=own, auxiliary_y=known, sizes_of=lambda x: x))


def test_sizes_that_have_nothing_to_do_with_the_class_tell_nothing_of_it() -> None:
    draws = torch.Generator().manual_seed(0)
    own, seen = (torch.rand(num, 3, generator=draws, dtype=torch.float64) for num in (400, 400))
    known, truth = (torch.randint(0, 4, (400,), generator=draws) for _ in range(2))
    found = SizeGuess(4)(made(own, known, seen))
    right = accuracy(found.scores, truth)
    assert right < 0.25 + 0.1  # 4.6 standard deviations of a share of 400


def test_it_answers_the_same_twice_and_leaves_the_global_randomness_alone() -> None:
    own, known = torch.rand(60, 3, dtype=torch.float64), torch.arange(60) % 3
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again = (SizeGuess(3)(made(own + known[:, None], known, own)) for _ in range(2))
    assert torch.equal(first.scores, again.scores)
    assert first.evidence == again.evidence
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_class_without_samples_of_the_hosts_own_is_never_guessed() -> None:
    own = torch.arange(40, dtype=torch.float64)[:, None].expand(40, 3).clone()
    found = SizeGuess(5)(made(own, (own[:, 0] >= 20).long() * 3, own))
    assert set(found.scores.argmax(1).tolist()) == {0, 3}
    assert found.scores[:, [1, 2, 4]].sum() == 0
    empty = SizeGuess(5)(made(own, (own[:, 0] >= 20).long(), torch.zeros(0, 3)))
    assert empty.scores.shape == (0, 5)


def test_bad_settings_and_samples_are_refused_in_one_line() -> None:
    own, known = torch.rand(20, 3, dtype=torch.float64), torch.arange(20) % 2
    for call, match in (
        (lambda: SizeGuess(1), "2 classes or more"),
        (lambda: SizeGuess(2)(made(own[:8], known[:8], own)), "at least 16 own samples"),
        (lambda: SizeGuess(2)(made(own, known + 1, own)), "classes from 0 to 1, got 1 to 2"),
    ):
        with pytest.raises(ValueError, match=match) as caught:
            call()  # type: ignore[no-untyped-call]
        assert "\n" not in str(caught.value)
