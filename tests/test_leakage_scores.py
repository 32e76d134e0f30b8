"""Scores of labels and of membership by hand and by closed form, and what a threat tells of labels and own inputs."""

import pytest
import torch
from torch import nn

from splitlearn import Encoder, Grants, Guard, Learner, Recorded, Threat, View, observe, vanilla, wire
from splitlearn.leakage import clopper_pearson, leak_auc, matched, score_labels, score_membership, tpr_at_fpr

# Labels


def test_accuracy_stands_beside_the_commonest_label() -> None:
    y = torch.tensor([0, 0, 0, 1, 2])
    score = score_labels(torch.tensor([0, 0, 1, 1, 2]), y, num_classes=3)
    assert score.metrics == {"accuracy": pytest.approx(4 / 5)}
    assert score.baselines == {"accuracy_majority": pytest.approx(3 / 5)}
    assert score.advantage == pytest.approx((4 / 5 - 3 / 5) / (1 - 3 / 5))


def test_who_always_says_the_commonest_label_has_no_advantage() -> None:
    y = torch.tensor([0, 0, 0, 1, 2])
    assert score_labels(torch.zeros(5, dtype=torch.int64), y, num_classes=3).advantage == 0
    assert score_labels(torch.full((5,), 2), y, num_classes=3).advantage == 0


def test_clusters_take_the_names_that_suit_them_best() -> None:
    y = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    clusters = torch.tensor([2, 2, 0, 0, 0, 1, 1, 1])  # 2 → 0, 0 → 1, 1 → 2: seven of eight
    assert torch.equal(matched(clusters, y, 3), torch.tensor([0, 0, 1, 1, 1, 2, 2, 2]))
    assert score_labels(clusters, y, num_classes=3, named=False).metrics["accuracy"] == pytest.approx(7 / 8)
    assert score_labels(clusters, y, num_classes=3).metrics["accuracy"] == pytest.approx(1 / 8)


def test_names_are_given_for_the_best_sum_and_not_one_by_one() -> None:
    # Cluster 0 holds 3 of class 0 and 2 of class 1, cluster 1 holds 2 of class 0 and none of class 1: by turns
    # 0 → 0 gives 3 right; 0 → 1 and 1 → 0 give 4.
    clusters, y = torch.tensor([0, 0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 0, 0])
    assert (matched(clusters, y, 2) == y).sum() == 4


@pytest.mark.parametrize("order", [[3, 1, 0, 2], [1, 2, 3, 0]])
def test_any_permutation_is_undone(order: list[int]) -> None:
    y = torch.randint(4, (200,))
    assert torch.equal(matched(torch.tensor(order)[y], y, 4), y)


def test_more_clusters_than_classes_leave_some_without_a_name() -> None:
    y = torch.tensor([0, 0, 0, 1, 1])
    assert matched(torch.tensor([0, 0, 2, 1, 1]), y, 2).tolist() == [0, 0, -1, 1, 1]


def test_the_leak_auc_is_within_each_batch_and_batches_of_one_class_are_left_out() -> None:
    # Batch 1: the positive scores above both others, 1. Batch 2: one class. Batch 3: above one, below one: 1/2.
    scores = torch.tensor([3.0, 1, 2, 9, 8, 5, 4, 6])
    y = torch.tensor([1, 0, 0, 1, 1, 1, 0, 0])
    found = leak_auc(scores, y, [3, 2, 3])
    assert found == {"leak_auc": 0.75, "leak_auc_p95": pytest.approx(0.975), "batches_left_out": 1.0}
    # Of one batch: of 4 · 4 pairs the positive is above in 3 > {1, 2}, 9, 8 > all four, 5 > {1, 2, 4}.
    assert leak_auc(scores, y)["leak_auc"] == pytest.approx((2 + 4 + 4 + 3) / 16)
    score = score_labels(None, y, num_classes=2, scores=scores, sizes=[3, 2, 3])
    assert score.advantage == pytest.approx(0.5)
    assert score.baselines == {"leak_auc_chance": 0.5}


def test_ties_count_half_and_a_reversed_score_has_no_advantage() -> None:
    y = torch.tensor([0, 1, 0, 1])
    assert leak_auc(torch.ones(4), y)["leak_auc"] == 0.5
    assert score_labels(None, y, num_classes=2, scores=torch.tensor([1.0, 0, 1, 0])).advantage == 0


def test_scores_and_guesses_stand_together_and_the_scores_decide() -> None:
    y = torch.tensor([0, 1, 0, 1])
    score = score_labels(torch.zeros(4, dtype=torch.int64), y, num_classes=2, scores=torch.tensor([0.0, 1, 0, 1]))
    assert score.metrics["accuracy"] == 0.5
    assert score.advantage == 1


@pytest.mark.parametrize(
    ("scores", "y", "sizes", "message"),
    [
        (torch.ones(4), torch.tensor([1, 1, 0, 0]), [2, 2], "a batch with both labels, got batches of one class"),
        (torch.ones(3), torch.tensor([1, 1, 0, 0]), [], "one score a label"),
        (torch.ones(4), torch.tensor([1, 1, 0, 0]), [2, 1], r"\(4,\) and 3 samples in batches"),
        (torch.ones(4), torch.tensor([1, 2, 0, 0]), [], "two classes, 0 and 1, for a leak AUC, got labels up to 2"),
    ],
)
def test_what_has_no_leak_auc_is_refused(scores, y, sizes, message) -> None:
    with pytest.raises(ValueError, match=message):
        leak_auc(scores, y, sizes)


def test_an_attack_that_returns_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected guesses or scores, got neither"):
        score_labels(None, torch.tensor([0, 1]), num_classes=2)
    with pytest.raises(ValueError, match=r"one guess a sample, got \(3,\) for labels \(2,\)"):
        score_labels(torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1]), num_classes=2)


# Membership


@pytest.mark.parametrize(
    ("hits", "of", "low", "high"),
    [
        (0, 10, 0.0, 1 - 0.025 ** (1 / 10)),  # closed forms at both ends
        (10, 10, 0.025 ** (1 / 10), 1.0),
        (5, 10, 0.18709, 0.81291),  # published tables
        (1, 20, 0.00127, 0.24873),
        (81, 263, 0.25273, 0.36763),  # Newcombe 1998, table I
    ],
)
def test_clopper_pearson_is_that_of_the_tables(hits: int, of: int, low: float, high: float) -> None:
    assert clopper_pearson(hits, of) == pytest.approx((low, high), abs=1e-4)


def test_clopper_pearson_widens_with_confidence_and_refuses_what_is_no_share() -> None:
    low, high = clopper_pearson(3, 10)
    wide_low, wide_high = clopper_pearson(3, 10, 0.99)
    assert wide_low < low < 0.3 < high < wide_high
    for hits, of in ((11, 10), (-1, 10), (0, 0)):
        with pytest.raises(ValueError, match="expected hits from 0 to"):
            clopper_pearson(hits, of)


def test_true_positives_at_a_false_positive_rate_by_hand() -> None:
    others = torch.arange(100.0)
    members = torch.tensor([98.0, 98.5, 99.5, 97.0])
    assert tpr_at_fpr(members, others, 0.01) == 2  # one other may stand above: the threshold is 98
    assert tpr_at_fpr(members, others, 0.02) == 3
    assert tpr_at_fpr(members, others, 0.001) == 1  # none may
    assert tpr_at_fpr(members, others, 1.0) == 4
    assert tpr_at_fpr(torch.ones(4), torch.ones(100), 0.01) == 0  # ties are no hits


def test_membership_stands_with_its_bounds() -> None:
    members, others = torch.tensor([99.5, 98.5, 1.5, 0.5]), torch.arange(100.0)
    score = score_membership(members, others)
    assert score.metrics["auc"] == pytest.approx((100 + 99 + 2 + 1) / 400)
    assert score.metrics["tpr_at_1pct"] == 0.5
    low, high = clopper_pearson(2, 4)
    assert (score.metrics["tpr_at_1pct_low"], score.metrics["tpr_at_1pct_high"]) == (low, high)
    assert score.advantage == pytest.approx(2 * 202 / 400 - 1)
    assert score.baselines == {"auc_chance": 0.5, "tpr_at_1pct_chance": 0.01}
    assert "tpr_at_01pct" not in score.metrics  # of a hundred others, none is a thousandth


def test_a_thousandth_is_told_with_ten_thousand_others() -> None:
    score = score_membership(torch.tensor([9990.5, 9988.5]), torch.arange(10_000.0))
    assert score.metrics["tpr_at_01pct"] == 0.5  # ten others may stand above: 9990 and more
    assert score.metrics["tpr_at_01pct_low"] < 0.5 < score.metrics["tpr_at_01pct_high"]


# What a threat tells of labels and of own inputs


X, Y = torch.linspace(-1, 1, 24).reshape(6, 4), torch.tensor([2, 0, 2, 1, 0, 1])


def recorded() -> tuple[Recorded, nn.Module]:
    bottom = nn.Linear(4, 5)
    line = wire(Learner("server", nn.Linear(5, 3)))
    vanilla(Learner("client", bottom), line.party, X, Y)
    return line.record, bottom


def view(**threat) -> View:
    record, bottom = recorded()
    return observe(record, threat=Threat(**threat), grants=Grants(Encoder(bottom, Guard()), own_x=X, y=Y))


def test_hints_are_the_first_of_each_class() -> None:
    places, labels = view(hints=1).hints
    assert places.tolist() == [0, 1, 3]
    assert labels.tolist() == [2, 0, 1]
    places, labels = view(hints=5).hints  # no more than there are
    assert torch.equal(labels, Y[places])
    assert len(places) == 6


def test_labels_beyond_the_hints_are_not_in_the_view() -> None:
    held = view(hints=1)._granted.y
    assert held is not None
    assert held.tolist() == [2, 0, -1, 1, -1, -1]
    assert view()._granted.y is None
    assert view(own_inputs=True)._granted.y is None


def test_hints_and_own_inputs_are_not_there_without_their_grant() -> None:
    with pytest.raises(LookupError, match=r"labels of some private samples; grant Threat\(hints=1\)"):
        _ = view(own_inputs=True).hints
    with pytest.raises(LookupError, match=r"its own inputs; grant them with Threat\(own_inputs=True\)"):
        _ = view(hints=1).own_x
    with pytest.raises(LookupError, match="needs the victim's weights"):
        _ = view(hints=1).encoder
    assert view(hints=1)._granted.own_x is None


def test_own_inputs_bring_the_stage_with_them_and_nothing_else() -> None:
    seen = view(own_inputs=True)
    assert torch.equal(seen.own_x, X)
    assert seen.encoder(X).shape == (6, 5)
    with pytest.raises(LookupError, match="sends inputs of its own"):
        seen.query(X)


def test_what_is_granted_must_be_handed_over() -> None:
    record, _ = recorded()
    empty = observe(record, threat=Threat(hints=1, own_inputs=True))
    with pytest.raises(LookupError, match=r"nothing was handed over; pass Grants\(y=…\)"):
        _ = empty.hints
    with pytest.raises(LookupError, match=r"nothing was handed over; pass Grants\(own_x=…\)"):
        _ = empty.own_x


def test_a_threat_says_in_words_what_it_knows_of_labels() -> None:
    words = Threat(hints=2, own_inputs=True).in_words()
    assert "the labels of 2 private samples of each class" in words
    assert "the inputs, and the weights of the stage below the cut: they are its own" in words
    assert "the labels of 1 private sample of each class" in Threat(hints=1).in_words()
    with pytest.raises(ValueError, match="0 or more labels of each class that are known, got -1"):
        Threat(hints=-1)


def test_what_the_attack_was_told_is_not_counted_and_batches_shrink() -> None:
    y = torch.tensor([0, 1, 0, 1, 1, 0])
    scores = torch.tensor([0.0, 9.0, 5.0, 1.0, 4.0, 3.0])
    told = score_labels(None, y, num_classes=2, scores=scores, sizes=[3, 3], known=torch.tensor([1, 2]))
    assert told.metrics["batches_left_out"] == 1  # the first holds one label of 0 alone
    assert told.metrics["leak_auc"] == pytest.approx(0.5)  # of 1 and 4 against 3
    guessed = torch.tensor([1, 1, 1, 1, 1, 1])
    assert score_labels(guessed, y, num_classes=2, known=torch.tensor([0, 2])).metrics["accuracy"] == 0.75


def test_clusters_at_random_have_no_advantage() -> None:
    draws = torch.Generator().manual_seed(3)
    y = torch.randint(0, 40, (400,), generator=draws)
    clusters = torch.randint(0, 40, (400,), generator=draws)
    score = score_labels(clusters, y, num_classes=40, named=False)
    assert score.baselines["accuracy_shuffled"] > 2 * score.baselines["accuracy_majority"]
    assert score.advantage < 0.02
    assert score_labels(y, y, num_classes=40, named=False).advantage == 1
