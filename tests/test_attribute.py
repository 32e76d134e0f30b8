"""Attributes: read where activations hold them, not where they do not, and never counted where the label tells them."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks import AttributeInference
from experiments import attribute
from experiments.attribute import ATTRIBUTE, Config, attribute_splits, guess_by_label, usual_attribute
from experiments.catalogue import BUILT_ATTACKS, EXPERIMENTS
from experiments.experiment import Options
from experiments.training import load_splits
from splitlearn import Encoder, Grants, Guard, Kind, Learner, Threat, View, observe, predict, wire
from splitlearn.data import Dataset, Splits, split

FULL = Threat(queries=True, auxiliary=True, auxiliary_labels=True)
ONCE = Options(seeds=(0,))
TOY = Config(epochs=1, private=100, auxiliary=80, targets=50, protections=("none",))


class Drowned(Guard):
    """Sends noise and nothing else."""

    def activation(self, z: Tensor) -> Tensor:
        return torch.randn_like(z)


class Shifted(Guard):
    """Adds noise of the same strength to every entry, drawn anew each time."""

    def activation(self, z: Tensor) -> Tensor:
        return z + torch.randn_like(z)


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs of ten numbers, and an attribute of three values, half of them 0, that the signs of three of them tell."""
    draws = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (count, 10), generator=draws)
    x = 0.3 * torch.randn(count, 10, generator=draws) + 2.0 * signs - 1.0
    return x, (signs[:, 3] ^ signs[:, 7]) * (1 + signs[:, 5])


def seen(guard: Guard | None = None, *, threat: Threat = FULL, auxiliary: int = 1500) -> tuple[View, Tensor]:
    """What a server sees of 300 private samples, and their attribute."""
    stage = nn.Sequential(nn.Linear(10, 24), nn.ReLU())
    client, line = Learner("client", stage, None, guard), wire(Learner("server", nn.Linear(24, 2)))
    x, truth = samples(300, 1)
    predict([client, line.party], x)
    own, known = samples(auxiliary, 2)
    return observe(line.record, threat=threat, grants=Grants(Encoder(stage, guard), own, known)), truth


def share(scores: Tensor, truth: Tensor) -> float:
    return (scores.argmax(1) == truth).double().mean().item()


def test_it_reads_an_attribute_that_the_activation_holds() -> None:
    view, truth = seen()
    found = AttributeInference(3)(view)
    assert found.scores.shape == (300, 3)
    assert share(found.scores, truth) >= 0.9  # half of the samples have the commonest value
    assert found.evidence["held_out_accuracy"] == pytest.approx(share(found.scores, truth), abs=0.1)


def test_it_falls_to_the_commonest_value_where_nothing_crosses() -> None:
    view, truth = seen(Drowned())
    most = truth.bincount().max().item() / len(truth)
    assert share(AttributeInference(3)(view).scores, truth) <= most + 0.1  # 3.5 standard deviations of a share of 300


def test_a_large_image_is_read_by_its_patches() -> None:
    x, truth = torch.rand(60, 1, 64, 64), torch.arange(60) % 2
    x[:, :, :32, :32] += truth[:, None, None, None]
    stage = nn.Conv2d(1, 8, 3, padding=1)  # 32,768 entries
    client, line = Learner("client", stage), wire(Learner("server", nn.Flatten()))
    predict([client, line.party], x[:20])
    view = observe(line.record, threat=FULL, grants=Grants(Encoder(stage), x[20:], truth[20:]))
    assert share(AttributeInference(2, epochs=5)(view).scores, truth[:20]) == 1


def test_of_its_classifiers_the_one_counts_that_does_best_on_its_own_samples() -> None:
    view, truth = seen()
    alone = {width: share(AttributeInference(3, widths=(width,))(view).scores, truth) for width in (0, 128)}
    assert alone[128] > alone[0]  # whether two signs differ is no line's matter
    assert AttributeInference(3)(view).evidence["width"] == 128


def test_it_draws_from_a_seed_of_its_own() -> None:
    view, _ = seen(Shifted())
    attack = AttributeInference(3, epochs=2, seed=5)
    before = torch.get_rng_state()
    first = attack(view)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(attack(view).scores, first.scores)
    assert not torch.equal(replace(attack, seed=6)(view).scores, first.scores)


@pytest.mark.parametrize(
    ("threat", "message"),
    [
        (
            Threat(auxiliary=True, auxiliary_labels=True),
            r"sends inputs of its own; grant that with Threat\(queries=True",
        ),
        (Threat(queries=True), r"needs samples of its own; grant them with Threat\(auxiliary=True"),
        (Threat(queries=True, auxiliary=True), r"labels of its own samples; grant them with Threat\(auxiliary_labels="),
        (replace(FULL, sees=frozenset({Kind.LABEL})), r"tensors of kind activation; grant them with Threat\(sees="),
    ],
)
def test_what_is_not_granted_is_not_there(threat: Threat, message: str) -> None:
    view, _ = seen(threat=threat)
    with pytest.raises(LookupError, match=message):
        AttributeInference(3, epochs=1)(view)


def test_the_weights_do_in_place_of_queries() -> None:
    view, truth = seen(threat=replace(FULL, queries=False, white_box=True))
    assert share(AttributeInference(3)(view).scores, truth) >= 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 1}, "expected an attribute of 2 values or more"),
        ({"classes": 3, "widths": ()}, "widths of 0 or more"),
        ({"classes": 3, "epochs": 0}, "expected at least one epoch"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttributeInference(**change)


def test_samples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected attributes from 0 to 1, got 0 to 2; raise classes"):
        AttributeInference(2)(seen()[0])
    with pytest.raises(ValueError, match="expected at least 16 own samples"):
        AttributeInference(3)(seen(auxiliary=10)[0])


def test_the_guess_by_the_label_is_the_commonest_of_that_label() -> None:
    own_y, known = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([2, 2, 0, 1, 1, 0])
    assert guess_by_label(torch.tensor([1, 0, 1, 2]), own_y, known, 3).tolist() == [1, 2, 1, 0]
    # Label 2 was never seen: 0, 1 and 2 are equally common then, and the first is taken.


# Attributes of data sets


def test_digits_are_parted_into_odd_and_upper_half() -> None:
    splits = load_splits("digits", None)
    known = attribute_splits(splits, "half")
    assert usual_attribute(splits.private) == "half"
    assert torch.equal(known.splits.private.y, splits.private.y % 2)
    assert torch.equal(known.private, (splits.private.y >= 5).long())
    assert torch.equal(known.auxiliary, (splits.auxiliary.y >= 5).long())
    # Of the five even digits two are upper, of the odd three: the label alone gets three in five.
    by_label = guess_by_label(known.splits.private.y, known.splits.auxiliary.y, known.auxiliary, 2)
    assert share(nn.functional.one_hot(by_label, 2), known.private) == pytest.approx(0.6, abs=0.05)


def table() -> Splits:
    """60 persons: a number, and a category of three in one-hot columns; the label is of no matter."""
    kind = torch.arange(60) % 3
    x = torch.cat([torch.arange(60.0)[:, None], nn.functional.one_hot(kind, 3).float()], 1)
    names = ("age", "sex=a", "sex=b", "sex=c")
    dataset = Dataset("persons", x, torch.arange(60) // 2 % 2, 2, "table", torch.arange(60), names=names)
    return split(dataset, private=30, auxiliary=20, test=10)


def test_a_column_is_taken_out_of_the_inputs() -> None:
    splits = table()
    known = attribute_splits(splits, "sex")
    assert usual_attribute(splits.private) == "sex"
    assert known.classes == 3
    assert known.splits.test.names == ("age",)
    assert torch.equal(known.splits.private.x, splits.private.x[:, :1])
    assert torch.equal(known.private, splits.private.x[:, 1:].argmax(1))
    ages = attribute_splits(splits, "age")
    assert ages.splits.private.names == ("sex=a", "sex=b", "sex=c")
    assert torch.equal(ages.auxiliary, (splits.auxiliary.x[:, 0] > splits.auxiliary.x[:, 0].median()).long())
    with pytest.raises(LookupError, match="no column is named 'sexe': did you mean sex"):
        attribute_splits(splits, "sexe")


def test_groups_are_whose_a_sample_is_unless_the_label_is() -> None:
    y, persons = torch.arange(60) % 2, torch.arange(60) % 5 + 100
    dataset = Dataset("beats", torch.randn(60, 1, 8), y, 2, "signal", torch.arange(60), groups=persons)
    splits = split(dataset, private=30, auxiliary=20, test=10)
    assert usual_attribute(splits.private) == "group"
    known = attribute_splits(splits, "group")
    assert known.classes == 5
    assert torch.equal(known.private, splits.private.groups - 100)  # type: ignore[operator]
    same = replace(dataset, y=persons - 100, num_classes=5)
    faces = split(same, private=30, auxiliary=20, test=10)
    assert usual_attribute(faces.private) == "half"
    with pytest.raises(ValueError, match="expected an attribute that the label does not tell, got group of beats"):
        attribute_splits(faces, "group")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attribute": "group"}, "expected a data set of patients or persons, got digits; use --attribute half"),
        ({"attribute": "sex"}, "expected group or half as attribute of image, got sex"),
        ({"targets": 0}, "expected --targets of 1 or more"),
        ({"protections": ("nois",)}, "no protection is named 'nois'"),
        ({"cuts": ("conv9",)}, "expected the name of a layer below the cut"),
    ],
)
def test_bad_options_end_before_any_work(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, LookupError), match=message):
        attribute.tasks(replace(TOY, **change), ONCE)


# The experiment


def test_the_experiment_scores_beside_majority_and_label() -> None:
    config = replace(TOY, protections=("none", "gaussian_noise:0.5"), cuts=("relu1", "default"))
    found = attribute.tasks(config, ONCE)
    assert [(task.labels["cut"], task.labels["protection"]) for task in found] == [
        ("relu1", "none"), ("relu1", "gaussian_noise"), ("relu2", "none"), ("relu2", "gaussian_noise"),
    ]  # fmt: skip
    assert len({task.trial for task in found}) == 4
    words = shlex.split(found[1].command)
    assert words[:3] == ["splitlearn", "run", "attribute"]
    assert words[words.index("--protections") + 1] == "gaussian_noise:0.5"
    outcome = found[0].call()
    (leak,) = outcome.leakage
    assert (leak.attack, leak.family) == ("attribute", "property")
    best = max(leak.baselines["accuracy_majority"], leak.baselines["accuracy_by_label"])
    assert leak.baseline("accuracy") == best
    assert leak.advantage == pytest.approx(max(0, (leak.metrics["accuracy"] - best) / (1 - best)))
    assert leak.standing
    assert outcome.visible["attacker (attribute)"][-1] == "of its own samples, the attribute in place of the label"
    assert EXPERIMENTS["attribute"] is ATTRIBUTE
    assert "attribute" in BUILT_ATTACKS


@pytest.mark.slow
def test_on_digits_the_half_is_read_below_the_cut() -> None:
    (task,) = attribute.tasks(Config(protections=("none",)), ONCE)
    (leak,) = task.call().leakage
    assert leak.metrics["accuracy"] >= 0.93
    assert leak.baselines["accuracy_by_label"] <= 0.65


@pytest.mark.parametrize(("data", "name"), [("adult", "sex"), ("mitbih", "group"), ("orl_faces", "half")])
def test_real_data_have_attributes(data: str, name: str, real_data: Path) -> None:
    splits = load_splits(data, real_data, sizes=(100, 60, 20))
    assert usual_attribute(splits.private) == name
    known = attribute_splits(splits, name)
    assert int(known.private.max()) < known.classes
    assert known.classes == 2 or name == "group"
    assert not any(one.startswith("sex=") for one in known.splits.private.names or ())
