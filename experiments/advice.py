"""A plan in plain words, and its table."""

from typing import TYPE_CHECKING

from experiments.figures import count, number, seconds, spread
from experiments.planner import KNOWN, Candidate, Measured
from experiments.summary import Spread
from experiments.tables import Table

if TYPE_CHECKING:
    from experiments.plan import Plan

__all__ = ["advice", "plan_table"]

DEAR = 10.0  # points of accuracy, from which on less leakage is not worth a word
LEAKY = 0.9  # from which on the advice says that nothing is protected


def advice(plan: "Plan") -> list[str]:
    """Return the recommendation: what to do, what it costs, what leaks, what else there is."""
    found = plan.found
    lines = []
    if found.best is None:
        lines.append(f"Nothing keeps these bounds: {_bounds(plan)}.")
        lines += _nearest(plan)
    else:
        one = found.best
        lines.append(f"{_do(one.candidate)}, for the least {_word(plan.minimise)} within {_bounds(plan)}.")
        lines += [_costs(plan, one), _worth(plan, one), _leaks(one)]
        lines += _further(plan, one)
    lines += [_whole(plan, one) for one in plan.whole]
    lines.append(_effort(plan))
    lines += plan.skipped
    return lines


def plan_table(plan: "Plan") -> Table:
    """Return a row for each candidate that was measured, cheapest first, and for not splitting."""
    rows, strong = [], set()
    ordered = sorted(plan.found.measured, key=lambda one: one.objective(plan.minimise))
    for number_, one in enumerate([*ordered, *plan.whole]):
        keeps = one.keeps(plan.bounds)
        rows.append(
            (
                one.candidate.name + (" *" if plan.best is not None and one.candidate == plan.best.candidate else ""),
                seconds(one.cost.seconds),
                _joules(one.cost.joules),
                count(one.nbytes),
                spread(_rounded(one.loss)),
                spread(one.leakage),
                "yes" if keeps else "no",
                "yes" if one in plan.front else "no" if one in ordered else "",
            )
        )
        strong |= {number_} if keeps else set()
    caption = (
        "Per sample: time, the device's energy, bytes both ways; points of accuracy lost against the unsplit model and "
        f"leakage, means over the seeds with the lowest and the highest. * the plan; on the front: nothing else "
        f"measured is as good in time, loss and leakage and better in one. {_where(plan)}"
    )
    heads = ("candidate", "time", "energy", "bytes", "points lost", "leakage", "in bounds", "on the front")
    return Table(caption, heads, tuple(rows), 1, strong=frozenset(strong))


def _do(one: Candidate) -> str:
    parts = [f"Cut after {one.place}"]
    parts.append("send float32 as it is" if one.compression == "none" else f"compress with {one.compression}")
    parts.append("without a protection" if one.protection == "none" else f"protect with {one.protection}")
    return ", ".join(parts)


def _costs(plan: "Plan", one: Measured) -> str:
    cost = one.cost
    return (
        f"A sample takes {seconds(cost.seconds)}: {seconds(cost.edge_seconds)} on the device, "
        f"{seconds(cost.up_seconds + cost.down_seconds)} on the network, {seconds(cost.cloud_seconds)} in the cloud; "
        f"{_joules(cost.joules)} of the device; {count(cost.up_nbytes)} up and {count(cost.down_nbytes)} down. "
        f"{_where(plan)}"
    )


def _worth(plan: "Plan", one: Measured) -> str:
    gained = " (a gain)" if one.loss.mean < 0 else ""
    return (
        f"Accuracy: {spread(_rounded(one.loss))} points lost{gained}, of {number(100 * plan.accuracy)} unsplit, over "
        f"{one.loss.n} seeds."
    )


def _leaks(one: Measured) -> str:
    said = ", which is no protection" if one.leakage.mean >= LEAKY else ""
    return (
        f"What leaks: {spread(one.leakage)} of the inputs{said}, by the strongest attack run, on a scale from 0 (no "
        "better than the mean image) to 1 (everything). In training the labels cross in the clear."
    )


def _further(plan: "Plan", best: Measured) -> list[str]:
    """Return what else on the front leaks less for some points more, if anything measured does."""
    less = [
        one
        for one in plan.found.front
        if one.leakage.mean < best.leakage.low and one.loss.mean < max(best.loss.mean, 0.0) + DEAR
    ]
    if not less:
        return []
    one = min(less, key=lambda other: other.loss.mean)
    beyond = ", beyond your bound," if one.loss.mean > plan.bounds.loss else ""
    return [
        f"Less leaks under {one.candidate.name}: {spread(one.leakage)}, at {spread(_rounded(one.loss))} points lost"
        f"{beyond} and {seconds(one.cost.seconds)}."
    ]


def _nearest(plan: "Plan") -> list[str]:
    """Return what comes nearest, of what was measured or else glimpsed, and which bound it breaks."""
    if plan.found.measured:
        near = min(plan.found.measured, key=lambda one: _excess(plan, one.loss.mean, one.leakage.mean))
        return [
            f"Nearest: {near.candidate.name}, with {spread(_rounded(near.loss))} points lost and leakage "
            f"{spread(near.leakage)}, at {seconds(near.cost.seconds)} and {count(near.nbytes)} a sample."
        ]
    seen = plan.found.glimpses
    if not seen:
        return ["Every candidate costs more than the bounds allow: raise them, or take another device or network."]
    one = min(seen, key=lambda other: _excess(plan, seen[other].loss, seen[other].leakage))
    return [
        f"Nearest at a glimpse: {one.name}, with {number(seen[one].loss)} points lost and leakage "
        f"{number(seen[one].leakage)} by the smallest attack; no candidate came near enough to be measured."
    ]


def _excess(plan: "Plan", loss: float, leakage: float) -> float:
    """Return by how much the bounds are broken, a point of accuracy counting as a hundredth of leakage."""
    return max(0.0, loss - plan.bounds.loss) / 100 + max(0.0, leakage - plan.bounds.leakage)


def _whole(plan: "Plan", one: Measured) -> str:
    where = "All on the device" if one.candidate.at else "All in the cloud"
    leaks = "nothing crosses, and the device holds the whole model" if one.candidate.at else "the inputs cross"
    fits = "" if one.cost.edge_memory <= plan.site.edge.memory else "; it does not fit the device's memory"
    return (
        f"{where}, not split: {seconds(one.cost.seconds)}, {_joules(one.cost.joules)}, {count(one.nbytes)} a sample; "
        f"{leaks}{fits}."
    )


def _effort(plan: "Plan") -> str:
    found = plan.found
    return (
        f"Of {len(plan.costs)} candidates {len(found.dear)} cost too much, {len(found.hopeless)} fell at a glimpse, "
        f"{len(found.measured)} {'was' if len(found.measured) == 1 else 'were'} trained whole and attacked, "
        f"{len(plan.costs) - len(found.dear) - len(found.hopeless) - len(found.measured)} could do no better."
    )


def _bounds(plan: "Plan") -> str:
    bounds, said = plan.bounds, []
    for name, text in (
        ("loss", lambda v: f"{v:g} points of accuracy lost"),
        ("leakage", lambda v: f"leakage of {v:g}"),
        ("seconds", lambda v: f"{seconds(v)} a sample"),
        ("joules", lambda v: f"{_joules(v)} a sample"),
        ("nbytes", lambda v: f"{count(v)} a sample"),
    ):
        value = getattr(bounds, name)
        if value < float("inf"):
            said.append(text(value))
    return ", ".join([*said, "the device's memory"])


def _where(plan: "Plan") -> str:
    site = plan.site
    network = site.network if isinstance(site.network, str) else "a network of your own"
    said = "modelled" if site.edge.modelled or site.cloud.modelled else "calibrated on this machine; network modelled"
    what = "training steps" if site.training else "predictions"
    ends = f"{site.edge.name} over {network} to {site.cloud.name}"
    return f"{what[0].upper()}{what[1:]} of {site.batch} at once, {ends}: {said}."


def _word(minimise: str) -> str:
    words = {"seconds": "time", "joules": "energy", "nbytes": "bytes"}
    return words[minimise] if minimise in KNOWN else minimise


def _joules(value: float) -> str:
    return f"{1e3 * value:.3g} mJ" if value < 1 else f"{value:.3g} J"


def _rounded(found: Spread) -> Spread:
    """Return points of accuracy to two places, below which a test set has none."""
    return Spread(round(found.mean, 2), found.std, round(found.low, 2), round(found.high, 2), found.n)
