"""Local losses, which send no gradient, and devices of unlike cuts: what they are equal to."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from splitlearn import (
    Kind,
    Learner,
    Member,
    cut,
    fedavg_round,
    splitfed_v1_round,
    splitfed_v2_round,
    vanilla,
    wire,
)
from splitlearn.paradigms import LocalLossMember, local_loss, unlike_cuts_round

from .toy import Lost, crossed, data, learner, model, near, same

SIZES = ((4, 6), (8,), (2, 3, 2))


# Local losses


def head(width: int = 4) -> nn.Module:
    torch.manual_seed(5)
    return nn.Linear(width, 2).double()


def halves() -> tuple[nn.Sequential, nn.Sequential]:
    below, above = cut(model(), 3)
    return below, above


def test_a_local_loss_is_two_trainings_by_hand() -> None:
    below, above = halves()
    client, own, server = learner("c", below, momentum=0.9), learner("h", head()), learner("s", above, momentum=0.9)
    bottom, aux, top = copy.deepcopy(below), head(), copy.deepcopy(above)
    near_to = torch.optim.SGD(
        [{"params": bottom.parameters(), "momentum": 0.9}, {"params": aux.parameters(), "momentum": 0.0}], lr=0.1
    )
    far = torch.optim.SGD(top.parameters(), lr=0.1, momentum=0.9)
    for x, y in data(0, (4, 6, 5)):
        found = local_loss(client, own, server, x, y)
        z = bottom(x)
        near_to.zero_grad()
        nn.functional.cross_entropy(aux(z), y).backward()  # one loss, through bottom and head
        near_to.step()
        far.zero_grad()
        loss = nn.functional.cross_entropy(top(z.detach()), y)
        loss.backward()
        far.step()
        assert torch.equal(found, loss.detach())
    for party, stage in ((client, bottom), (own, aux), (server, top)):
        assert same(party.weights(), stage.state_dict())


def test_no_gradient_crosses_to_a_server_across_a_wire() -> None:
    below, above = halves()
    client, own, far = learner("c", below), learner("h", head()), wire(learner("s", above))
    here = learner("c", below), learner("h", head()), learner("s", above)
    for x, y in data(0):
        assert torch.equal(local_loss(client, own, far.party, x, y), local_loss(*here, x, y))
    kinds = crossed(far.meter.nbytes.values())
    assert Kind.GRADIENT not in kinds
    assert crossed([far.meter.nbytes["down"]]) == {Kind.LOSS, Kind.FRAMING}
    assert [exchange.request.verb for exchange in far.record.exchanges] == ["learn"] * 2
    assert same(client.weights(), here[0].weights())
    assert same(own.weights(), here[1].weights())
    assert same(far.party.weights(), here[2].weights())
    vanilla(learner("c", below), far.party, *data(0)[0])
    assert Kind.GRADIENT in crossed([far.meter.nbytes["down"]])  # the meter would have seen one


def test_the_server_has_no_part_in_what_the_client_learns() -> None:
    below, above = halves()
    ends = []
    for scale in (1.0, -3.0):
        top = {name: w * scale if w.is_floating_point() else w for name, w in above.state_dict().items()}
        client, own, server = learner("c", below), learner("h", head()), learner("s", above)
        server.load_weights(top)
        for x, y in data(0):
            local_loss(client, own, server, x, y)
        ends.append(client.weights())
    assert same(*ends)


def test_a_federation_with_heads_of_its_own() -> None:
    below, above = halves()
    bottom, top = Learner("bottom", copy.deepcopy(below)), learner("top", above)
    far = [wire(top.session(f"c{n}")) for n in range(2)]
    members = [
        LocalLossMember(learner(f"c{n}", below), learner(f"h{n}", head()), far[n].party, data(n, SIZES[n]))
        for n in range(2)
    ]
    twin_top, twins = learner("top", above), [(learner(f"c{n}", below), learner(f"h{n}", head())) for n in range(2)]
    for _ in range(2):
        start = bottom.weights()
        done = splitfed_v2_round(members, bottom)
        for n, (client, own) in enumerate(twins):
            client.load_weights(start)
            for x, y in data(n, SIZES[n]):
                local_loss(client, own, twin_top, x, y)
        assert done.counts == {"c0": 10, "c1": 8}
        assert same(top.weights(), twin_top.weights())
        for member, (client, own) in zip(members, twins, strict=True):
            assert same(member.learner.weights(), client.weights())
            assert same(member.head.weights(), own.weights())
    assert not any(Kind.GRADIENT in crossed(one.meter.nbytes.values()) for one in far)
    assert not same(members[0].head.weights(), members[1].head.weights())
    saved = copy.deepcopy(members[0].state_dict())
    again = LocalLossMember(learner("c0", below), learner("h0", head()), far[0].party, data(0))
    again.load_state_dict(saved)
    assert same(again.head.weights(), members[0].head.weights())
    assert same(again.learner.weights(), members[0].learner.weights())


# Unlike cuts


def parts(at: int) -> tuple[nn.Sequential, nn.Sequential]:
    below, above = cut(model(), at)
    return below, above


def fleet(cuts: Sequence[int], momentum: float = 0.9) -> tuple[list[Member], dict[str, Learner], Learner]:
    """Return members that cut at these places, their tops, and the global model."""
    pairs = [parts(at) for at in cuts]
    tops = {f"c{n}": learner(f"c{n}", above, momentum=momentum) for n, (_, above) in enumerate(pairs)}
    members = [
        Member(learner(f"c{n}", below, momentum=momentum), tops[f"c{n}"], data(n, SIZES[n]))
        for n, (below, _) in enumerate(pairs)
    ]
    return members, tops, Learner("all", model())


def test_one_cut_for_all_is_splitfed_v1_bit_for_bit() -> None:
    members, tops, whole = fleet([3, 3, 3])
    twins, twin_tops, _ = fleet([3, 3, 3])
    below, above = parts(3)
    bottom, top = Learner("bottom", copy.deepcopy(below)), Learner("top", copy.deepcopy(above))
    for _ in range(3):
        done = unlike_cuts_round(members, tops, whole)
        assert done.counts == splitfed_v1_round(twins, twin_tops, bottom, top).counts == {"c0": 10, "c1": 8, "c2": 7}
        assert same(whole.weights(), {**bottom.weights(), **top.weights()})
    assert not same(whole.weights(), model().state_dict())


@pytest.mark.parametrize("at", [1, 2, 3])
def test_one_member_trains_the_unsplit_model_wherever_it_cuts(at: int) -> None:
    members, tops, whole = fleet([at])
    unsplit = learner("unsplit", model(), momentum=0.9)
    for _ in range(2):
        unlike_cuts_round(members, tops, whole)
        for x, y in data(0, SIZES[0]):
            unsplit.learn(x, y)
        assert same(whole.weights(), unsplit.weights())


def test_unlike_cuts_are_fedavg_of_whole_models() -> None:
    members, tops, whole = fleet([1, 2, 3])
    everywhere = Learner("all", model())
    plainly = [Member(learner(f"c{n}", model(), momentum=0.9), None, data(n, SIZES[n])) for n in range(3)]
    for _ in range(2):
        assert unlike_cuts_round(members, tops, whole).counts == fedavg_round(plainly, everywhere).counts
        assert same(whole.weights(), everywhere.weights())


def test_who_drops_out_is_left_out_with_both_halves() -> None:
    members, tops, whole = fleet([1, 2, 3], momentum=0.0)
    others, other_tops, other = fleet([1, 2, 3], momentum=0.0)
    members[1].server = Lost("c1", tops["c1"])
    done = unlike_cuts_round(members, tops, whole)
    unlike_cuts_round([others[0], others[2]], other_tops, other)
    assert (done.counts, done.dropped) == ({"c0": 10, "c2": 7}, ("c1",))
    assert same(whole.weights(), other.weights())


def test_tops_across_a_wire_are_those_of_this_process() -> None:
    members, tops, whole = fleet([1, 3])
    others, other_tops, other = fleet([1, 3])
    far = {name: wire(top).party for name, top in other_tops.items()}
    for one in others:
        one.server = far[one.name]
    for _ in range(2):
        unlike_cuts_round(members, tops, whole)
        unlike_cuts_round(others, far, other)
    assert near(whole.weights(), other.weights(), 0.0)


def test_tops_that_do_not_fit_are_one_line() -> None:
    members, tops, whole = fleet([1, 3])
    start = whole.weights()

    with pytest.raises(ValueError, match=r"c1: expected a top cut from the model, got 7\.weight, 7\.bias beside it"):
        unlike_cuts_round(members, {**tops, "c1": learner("c1", renamed("7"))}, whole)
    with pytest.raises(ValueError, match="expected a session of the main server for each member, got none for c1"):
        unlike_cuts_round(members, {"c0": tops["c0"]}, whole)
    with pytest.raises(ValueError, match=r"c1: expected the weights of its own stage, '1\.weight' of shape"):
        unlike_cuts_round(members, {**tops, "c1": learner("c1", parts(1)[1])}, whole)  # cut elsewhere than the member
    shared = learner("top", parts(3)[1])
    both = fleet([3, 3])[0]
    with pytest.raises(ValueError, match="a top for each member, got sessions of one stage"):
        unlike_cuts_round(both, {one.name: shared.session(one.name) for one in both}, whole)
    assert same(whole.weights(), start)


def renamed(name: str) -> nn.Module:
    """Return a top whose one layer the model does not have."""
    stage = nn.Sequential()
    stage.add_module(name, nn.Linear(4, 2).double())
    return stage


def test_the_first_load_of_a_wrong_top_moves_nothing() -> None:
    members, tops, whole = fleet([1, 3])
    before: list[dict[str, Tensor]] = [one.learner.weights() for one in members]
    with pytest.raises(ValueError, match="beside it"):
        unlike_cuts_round(members, {**tops, "c1": learner("c1", renamed("7"))}, whole)
    assert all(same(one.learner.weights(), was) for one, was in zip(members, before, strict=True))
