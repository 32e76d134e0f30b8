"""Move the cut of a model in mid-training: layers change hands with their weights and optimizer state."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from splitlearn.cut import cut, join
from splitlearn.guard import Guard, Guards
from splitlearn.party import Learner

__all__ = ["moved_nbytes", "recut"]


def recut(client: Learner, server: Learner, at: int | str) -> None:
    """Move layers between two parties in place, so that the joint model is cut at ``at`` (a place as ``cut`` takes it).

    Training goes on as if it had never moved, bit for bit: weights, buffers, each layer's mode, and of each parameter
    that its party trains the optimizer's state (momentum, Adam's moments, steps) and options are kept. Parties keep
    name, guard, loss, steps and randomness, and end up as if they had been built at that cut: a party with nothing left
    to train has no optimizer, and one that had none gets one of the other's settings, so that a ``state_dict`` loads
    into parties that were recut to the same place. A scheduler does not follow to such a new optimizer.

    Not kept: who draws. The dropout of a moved layer draws from its new party's generator, and a guard's randomness
    meets another activation. Replicas of either party are not recut with it. Sessions see the stage but keep their own
    optimizer, so that one of a party that was left with nothing to train, or had nothing, learns no more: make sessions
    anew after a recut. A service holds the party itself, and serves on. This is for one client and its server, between
    steps.

    Raises ``ValueError``, and moves nothing, where ``cut`` would; for an open step; for a guard with a penalty, layers
    or tensors of its own, which belong to one cut; for other parties than plain Learners, optimizers that are not
    torch's own, optimizers with hooks, LBFGS (its state is of all parameters at once), stages on two devices; and where
    a parameter that moves would be trained by another rule: another type of optimizer, or options that none of its
    groups has.
    """
    bottom, top = _stages(client, server, at)
    for giver, taker, stage in ((client, server, bottom), (server, client, top)):
        going = _trained(giver, _leaving(giver.stage, stage))
        if going:
            _hand_over(giver, taker, going)
    for party, stage in ((client, bottom), (server, top)):
        party.stage._modules.clear()  # in place: whoever else holds the stage sees it move
        party.stage._modules.update(stage._modules)
    for party in (client, server):
        if party.optimizer is not None:
            _sort(party.optimizer, party.stage)


def moved_nbytes(client: Learner, server: Learner, at: int | str, *, training: bool = True) -> int:
    """Return the bytes that ``recut`` to ``at`` would move: weights and buffers, in ``training`` optimizer state too.

    Frames, if they cross in some, add their headers. Raises as ``recut`` does; nothing moves.
    """
    bottom, top = _stages(client, server, at)
    nbytes = 0
    for party, stage in ((client, bottom), (server, top)):
        leaving = _leaving(party.stage, stage)
        moving = {id(tensor): tensor for layer in leaving for tensor in (*layer.parameters(), *layer.buffers())}
        nbytes += sum(tensor.nbytes for tensor in moving.values())
        if training and party.optimizer is not None:
            state = party.optimizer.state
            nbytes += sum(
                entry.nbytes
                for parameter in _trained(party, leaving)
                for entry in state.get(parameter, {}).values()
                if isinstance(entry, Tensor)
            )
    return nbytes


def _stages(client: Learner, server: Learner, at: int | str) -> tuple[nn.Sequential, nn.Sequential]:
    """Return the stages that the parties are to hold, after every check."""
    for party in (client, server):
        _check(party)
    model = join(client.stage, server.stage)  # type: ignore[arg-type]  # which says so where it is no Sequential
    bottom, top = cut(model, at)
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise ValueError(
            f"expected both stages on one device, got {', '.join(sorted(map(str, devices)))}; move one of them first"
        )
    for giver, taker, stage in ((client, server, bottom), (server, client, top)):
        for parameter in _trained(giver, _leaving(giver.stage, stage)):
            if taker.optimizer is not None:
                _home(giver, taker, parameter)
    return bottom, top


def _check(party: Learner) -> None:
    if type(party) is not Learner:
        raise ValueError(
            f"expected a Learner to recut, got {type(party).__name__}; a party across a wire, or with rules of its own "
            "for its stage, cannot hand over layers"
        )
    if party._turn.taken:
        raise ValueError(f"{party.name}: expected no open step to recut, got one; finish it or abandon() it")
    for guard in _each(party.guard):
        own = [name for name, value in vars(guard).items() if isinstance(value, nn.Module | Tensor | Optimizer)]
        if guard.penalises or own:
            raise ValueError(
                f"{party.name}: expected a guard without a penalty, layers or tensors of its own, which belong to one "
                f"cut, got {guard!r}; make new parties at the other cut, and train what is the guard's anew"
            )
    optimizer = party.optimizer
    if optimizer is not None and not type(optimizer).__module__.startswith("torch.optim."):
        raise ValueError(
            f"{party.name}: expected an optimizer of torch.optim, got {type(optimizer).__name__}, which may hold more "
            "than a state for each parameter; make new parties at the other cut"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(f"{party.name}: expected an optimizer with a state for each parameter, got LBFGS; use another")
    if optimizer is not None and (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks):
        raise ValueError(
            f"{party.name}: expected an optimizer without hooks, which know the layers of one cut, got some; recut "
            "before they are added"
        )


def _each(guard: Guard) -> Iterator[Guard]:
    if isinstance(guard, Guards):
        for one in guard.guards:
            yield from _each(one)
    else:
        yield guard


def _leaving(held: nn.Module, wanted: nn.Sequential) -> list[nn.Module]:
    """Return the layers of ``held`` that are not to be in ``wanted``."""
    return [layer for name, layer in held._modules.items() if layer is not None and name not in wanted._modules]


def _trained(party: Learner, layers: list[nn.Module]) -> list[nn.Parameter]:
    """Return those parameters of the layers that the party's optimizer trains; the others move as they are."""
    groups = party.optimizer.param_groups if party.optimizer is not None else []
    held = {id(parameter) for group in groups for parameter in group["params"]}
    # Once each: a layer may stand in several places.
    found = {id(p): p for layer in layers for p in layer.parameters() if id(p) in held}
    return list(found.values())


def _hand_over(giver: Learner, taker: Learner, going: list[nn.Parameter]) -> None:
    source = giver.optimizer
    assert source is not None  # it trains what is going
    if taker.optimizer is None:
        taker.optimizer = _emptied(source)
    for parameter in going:
        _home(giver, taker, parameter)["params"].append(parameter)
        if parameter in source.state:
            taker.optimizer.state[parameter] = source.state.pop(parameter)
        group = _group(source, parameter)
        group["params"] = [other for other in group["params"] if other is not parameter]
    if not any(group["params"] for group in source.param_groups):
        giver.optimizer = None


def _group(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(other is parameter for other in group["params"]))


def _home(giver: Learner, taker: Learner, parameter: nn.Parameter) -> dict[str, Any]:
    """Return the taker's group that trains as the parameter is trained now."""
    source, target = giver.optimizer, taker.optimizer
    assert source is not None
    assert target is not None
    group = _group(source, parameter)
    if type(target) is type(source):
        for other in target.param_groups:
            if _same(group, other):
                return other
        differing = min((_differing(group, other) for other in target.param_groups), key=len)
        got = ", ".join(differing)
    else:
        got = f"{type(source).__name__} and {type(target).__name__}"
    raise ValueError(
        f"expected {giver.name} and {taker.name} to train a layer that moves by one rule, got other {got}; give both "
        "the same optimizer with the same settings"
    )


def _same(group: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return not _differing(group, other)


def _differing(group: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    missing = object()
    return [
        name
        for name in dict.fromkeys([*group, *other])
        if name != "params" and not _equal(group.get(name, missing), other.get(name, missing))
    ]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)


def _emptied(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer of the same type and settings that trains nothing yet."""
    twin = copy.copy(optimizer)  # without its hooks
    twin.defaults = dict(optimizer.defaults)
    twin.state = defaultdict(dict)
    twin.param_groups = [{**group, "params": []} for group in optimizer.param_groups]
    return twin


def _sort(optimizer: Optimizer, stage: nn.Module) -> None:
    """Put each group's parameters in the stage's order, as those of a party that is built at this cut."""
    order = OrderedDict((id(parameter), place) for place, parameter in enumerate(stage.parameters()))
    for group in optimizer.param_groups:
        group["params"].sort(key=lambda parameter: order[id(parameter)])
