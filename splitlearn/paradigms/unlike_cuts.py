"""Devices of different strength: each member cuts the same model where its device bears it."""

from collections.abc import Mapping, Sequence

from splitlearn.federation import Aggregator, mean
from splitlearn.members import FedMember
from splitlearn.party import Learner, Party
from splitlearn.rounds import Round, check_names, collect_each, finished

__all__ = ["unlike_cuts_round"]


def unlike_cuts_round(
    members: Sequence[FedMember], sessions: Mapping[str, Party], model: Party, *, aggregate: Aggregator = mean
) -> Round:
    """Each member trains a bottom of its own depth against a top that is the rest; whole models are averaged.

    SplitFed V1 (Thapa et al. 2022, arXiv:2004.12088) with a cut for each device, as in ARES (Samikwa et al. 2022).
    ``sessions`` are tops by member name, whose entries are what of ``model`` is above that member's cut. With one cut
    for all the weights are those of ``splitfed_v1_round``, bit for bit. Averaging takes both halves of every member, so
    that main and fed server are one party here: it holds whole models beside activations.
    """
    check_names(members, sessions)
    stages = [id(one.stage) for one in sessions.values() if isinstance(one, Learner)]
    if len(set(stages)) < len(stages):
        raise ValueError("expected a top for each member, got sessions of one stage; cut a copy of the model for each")
    start = model.weights()
    bottoms = []
    for member in members:
        above = sessions[member.name].weights().keys()
        if unknown := [name for name in above if name not in start]:
            raise ValueError(f"{member.name}: expected a top cut from the model, got {', '.join(unknown)} beside it")
        sessions[member.name].load_weights({name: start[name] for name in above})
        bottoms.append({name: w for name, w in start.items() if name not in above})
    weights, counts, done = finished(*collect_each(members, bottoms))
    wholes = [{**own, **sessions[name].weights()} for name, own in zip(done.counts, weights, strict=True)]
    model.load_weights({**start, **aggregate(wholes, counts, start)})
    return done
