"""Cut a sequential model into stages that share its parameters, and join stages into one plain model."""

from collections import OrderedDict
from itertools import pairwise

from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["cut", "join", "layer_names"]

PASSING = (nn.Identity, nn.Flatten, nn.Unflatten)  # put out the memory that they get


def cut(model: nn.Sequential, *at: int | str) -> tuple[nn.Sequential, ...]:
    """Return ``len(at) + 1`` stages, bottom first, that share the parameters of ``model``.

    Each place is a boundary: the number of layers below it (1 … ``len(model) - 1``), or the name of the last
    layer below it. Layers keep their names, so a stage's ``state_dict`` is a part of the model's.

    Raises ``ValueError`` where a cut is impossible or would not train as the unsplit model does: a place out
    of range or out of order, weights tied across stages, a first layer above a cut that works in place, layers of no
    shape yet, a model that is no ``nn.Sequential`` or has a ``forward`` or hooks of its own.
    """
    _refuse_other_modules(model)
    if not at:
        raise ValueError("expected at least one place to cut; for example cut(model, 2)")
    places = [_boundary(model, place) for place in at]
    if any(low >= high for low, high in pairwise(places)):
        raise ValueError(f"expected cuts in rising order, each once, got {at}; sort them bottom first")
    edges = [0, *places, len(model)]
    stages = tuple(nn.Sequential(OrderedDict(_layers(model)[low:high])) for low, high in pairwise(edges))
    _refuse_tied_weights(stages)
    _refuse_in_place(stages)
    return stages


def join(*stages: nn.Sequential) -> nn.Sequential:
    """Return the stages, bottom first, as one plain ``nn.Sequential`` that shares their parameters.

    It is the inverse of ``cut``: names, ``state_dict`` keys and their order are those of the unsplit model, so
    the result loads where this toolkit is not installed.
    """
    for stage in stages:
        _refuse_other_modules(stage)
    layers = [named for stage in stages for named in _layers(stage)]
    names = [name for name, _ in layers]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"expected stages of one model, got layer names {twice} more than once; pass each stage once")
    return nn.Sequential(OrderedDict(layers))


def layer_names(model: nn.Sequential) -> list[str]:
    """Return the names of the places at which ``model`` can be cut, bottom first (all layers but the last)."""
    return [name for name, _ in _layers(model)][:-1]


def _layers(model: nn.Sequential) -> list[tuple[str, nn.Module]]:
    # Not named_children, which leaves out the second use of a layer: one ReLU may stand in several places.
    return [(name, layer) for name, layer in model._modules.items() if layer is not None]


def _refuse_other_modules(model: nn.Module) -> None:
    if not isinstance(model, nn.Sequential):
        raise ValueError(
            f"expected an nn.Sequential, got {type(model).__name__}; wrap its blocks: nn.Sequential(block1, block2, …)"
        )
    if type(model).forward is not nn.Sequential.forward:
        raise ValueError(
            f"expected layers that follow each other, got {type(model).__name__} with a forward of its own, which a "
            "cut would lose; make what it does a layer"
        )
    if model._forward_pre_hooks or model._forward_hooks or model._backward_pre_hooks or model._backward_hooks:
        raise ValueError("expected a model without hooks of its own, which a cut would lose; hook its layers instead")


def _boundary(model: nn.Sequential, place: int | str) -> int:
    names = layer_names(model)
    if isinstance(place, str):
        if place not in names:
            raise ValueError(f"expected the name of a layer below the cut, one of {', '.join(names)}; got {place!r}")
        return names.index(place) + 1
    if not names:
        raise ValueError(f"expected a model of at least 2 layers to cut, got {len(model)}; split its layer in two")
    if not isinstance(place, int) or isinstance(place, bool) or not 1 <= place <= len(names):
        raise ValueError(
            f"expected a cut between 1 and {len(names)} for a model of {len(model)} layers, got {place!r}; "
            f"or name the last layer below it: {', '.join(names)}"
        )
    return place


def _refuse_tied_weights(stages: tuple[nn.Sequential, ...]) -> None:
    owner: dict[int, tuple[int, str]] = {}
    for number, stage in enumerate(stages):
        tensors = [
            *stage.named_parameters(remove_duplicate=False),
            *stage.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in tensors:
            if is_lazy(tensor):
                raise ValueError(f"{name} has no shape yet; pass a batch through the model once, then cut it")
            # By memory, where there is any: two Parameters may be made of one tensor.
            first, first_name = owner.setdefault(tensor.data_ptr() or id(tensor), (number, name))
            if first != number:
                raise ValueError(
                    f"{first_name} and {name} are the same weights on two sides of a cut, which two parties cannot "
                    "train; untie them, or cut above or below both"
                )


def _refuse_in_place(stages: tuple[nn.Sequential, ...]) -> None:
    for stage in stages[1:]:
        for name, layer in stage.named_modules():
            if next(layer.children(), None) is not None or isinstance(layer, PASSING):
                continue
            if getattr(layer, "inplace", False):
                raise ValueError(
                    f"layer {name} works in place and comes first above a cut, where it would overwrite what the "
                    "party below sent; use inplace=False, or cut above it"
                )
            break  # only the first layer that works on the activation itself can overwrite it
