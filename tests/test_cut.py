"""Cut and join: the stages share the model's parameters and names, and what would not train as unsplit is refused."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from splitlearn import cut, join
from splitlearn.cut import layer_names
from splitlearn.models import digits_cnn


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("at", [(1,), (4,), (1, 2), (1, 2, 3, 4)])
def test_stages_share_parameters_and_keep_names(at: tuple[int, ...]) -> None:
    model = mlp()
    stages = cut(model, *at)
    assert len(stages) == len(at) + 1
    entries = [entry for stage in stages for entry in stage.state_dict().items()]
    assert [name for name, _ in entries] == list(model.state_dict())
    assert [t.data_ptr() for _, t in entries] == [t.data_ptr() for t in model.state_dict().values()]
    z = x = torch.rand(2, 4)
    for stage in stages:
        z = stage(z)
    assert torch.equal(z, model(x))


@pytest.mark.parametrize("place", layer_names(digits_cnn()))
def test_every_name_cuts_as_its_number_does(place: str) -> None:
    model = digits_cnn()
    by_name, by_number = cut(model, place), cut(model, layer_names(model).index(place) + 1)
    assert [list(stage.state_dict()) for stage in by_name] == [list(stage.state_dict()) for stage in by_number]
    assert list(by_name[0]._modules)[-1] == place


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ((), "at least one place"),
        ((0,), "between 1 and 4 .* got 0"),
        ((5,), "between 1 and 4 for a model of 5 layers, got 5"),
        ((-1,), "between 1 and 4"),
        ((2.0,), "between 1 and 4 .* got 2.0"),
        ((True,), "between 1 and 4 .* got True"),
        ((3, 2), "rising order.*sort them"),
        ((2, 2), "rising order, each once"),
        (("2", 3, "2"), "rising order"),
        (("relu9",), r"one of 0, 1, 2, 3; got 'relu9'"),
        (("4",), "name of a layer below the cut"),
    ],
)
def test_impossible_places_are_refused(at: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut(mlp(), *at)


@pytest.mark.parametrize("layers", [[], [nn.Linear(2, 2)]])
def test_too_short_a_model_is_refused(layers: list[nn.Module]) -> None:
    with pytest.raises(ValueError, match=f"at least 2 layers to cut, got {len(layers)}"):
        cut(nn.Sequential(*layers), 1)


def test_a_model_whose_shapes_are_not_known_yet_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^0.weight has no shape yet; pass a batch"):
        cut(nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.Linear(3, 2)), 1)


def test_hooks_of_the_whole_model_are_refused_and_those_of_a_layer_kept() -> None:
    model = mlp()
    model[0].register_forward_hook(lambda _, __, output: 2 * output)
    stage, *_ = cut(model, 1)
    assert torch.equal(stage(torch.ones(1, 4)), model[0](torch.ones(1, 4)))
    model.register_forward_hook(lambda _, __, output: 2 * output)
    with pytest.raises(ValueError, match="without hooks of its own, which a cut would lose"):
        cut(model, 1)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def test_only_layers_that_follow_each_other_can_be_cut() -> None:
    with pytest.raises(ValueError, match=r"expected an nn.Sequential, got Linear; wrap"):
        cut(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="Residual with a forward of its own"):
        cut(Residual(nn.Linear(2, 2), nn.Linear(2, 2)), 1)
    block = nn.Sequential(nn.Linear(2, 2), Residual(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    x = torch.rand(3, 2)
    assert torch.equal(join(*cut(block, 1, 2))(x), block(x))  # inside a layer it stays whole


def test_one_layer_in_two_places_stays_in_both() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2))
    assert layer_names(model) == ["0", "1", "2", "3"]
    bottom, top = cut(model, 3)
    x = torch.randn(8, 4)
    assert torch.equal(top(bottom(x)), model(x))
    assert torch.equal(join(bottom, top)(x), model(x))
    assert len(join(bottom, top)) == 5


def test_weights_tied_across_a_cut_are_refused_within_a_stage_not() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"0.weight and 2.weight are the same weights"):
        cut(model, 1)
    bottom, _ = cut(model, 3)
    assert len(list(bottom.parameters())) == 2

    untied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    untied[2].weight = nn.Parameter(untied[0].weight.data)  # another Parameter, the same memory
    with pytest.raises(ValueError, match=r"0.weight and 2.weight are the same weights"):
        cut(untied, 2)

    norm = nn.BatchNorm1d(4, affine=False)
    with pytest.raises(ValueError, match=r"running_mean and .*running_mean are the same"):
        cut(nn.Sequential(norm, nn.Linear(4, 4), norm), 1)


def test_a_first_layer_in_place_above_a_cut_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"layer 1 works in place .* use inplace=False, or cut above it"):
        cut(model, 1)
    cut(model, 2)  # the party below may overwrite its own
    nested = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Sequential(nn.ReLU(inplace=True)), nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"layer 1.0.0 works in place"):
        cut(nested, 1)
    through_a_view = nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Identity(), nn.ReLU(inplace=True))
    with pytest.raises(ValueError, match="layer 3 works in place"):
        cut(through_a_view, 1)
    cut(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)), 1)


def test_join_is_the_inverse_of_cut() -> None:
    model = digits_cnn()
    joined = join(*cut(model, 2, "relu2"))
    assert type(joined) is nn.Sequential
    assert list(joined.state_dict()) == list(model.state_dict())
    fresh = digits_cnn()
    fresh.load_state_dict(joined.state_dict(), strict=True)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(fresh(x), model(x))


def test_join_refuses_what_is_not_stages_of_one_model() -> None:
    bottom, top = cut(mlp(), 2)
    with pytest.raises(ValueError, match=r"layer names \['0', '1'\] more than once"):
        join(bottom, top, bottom)
    with pytest.raises(ValueError, match=r"expected an nn.Sequential, got Linear"):
        join(bottom, nn.Linear(8, 3))


ELSEWHERE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "splitlearn":
            raise ImportError("this toolkit is not installed here")

sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file
from torch import nn

folder, x = sys.argv[1], torch.linspace(-1, 1, 12).reshape(3, 4)
whole = torch.load(f"{folder}/whole.pt", weights_only=False)
state = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
state.load_state_dict(torch.load(f"{folder}/state.pt", weights_only=True))
tensors = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
tensors.load_state_dict(load_file(f"{folder}/state.safetensors"))
expected = torch.load(f"{folder}/expected.pt")
assert all(torch.equal(model(x), expected) for model in (whole, state, tensors))
assert not any(name.partition(".")[0] == "splitlearn" for name in sys.modules)
"""


def test_a_joined_model_loads_where_this_toolkit_is_not_installed(tmp_path: Path) -> None:
    joined = join(*cut(mlp(), 2))
    torch.save(joined, tmp_path / "whole.pt")
    torch.save(joined.state_dict(), tmp_path / "state.pt")
    save_file(joined.state_dict(), tmp_path / "state.safetensors")
    torch.save(joined(torch.linspace(-1, 1, 12).reshape(3, 4)).detach(), tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_cut_leaves_the_model_as_it_was() -> None:
    model = digits_cnn().eval()
    before = copy.deepcopy(model.state_dict())
    cut(model, 3)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
