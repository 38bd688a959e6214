"""Other versions of sru than 2.6.0: state dicts and models of 3.0, arguments of 2.0 to 2.3, the interface of 2017; and
`python -m cusru.torch`, which runs the code of others.

tests/data holds what sru 3.0.0.dev6 itself saved and computed (make_sru3.py there). Where CUSRU_TEST_SRU3 names the folder of a
`pip install --target`, the same tests run on what that package makes then and there.
"""

from __future__ import annotations

import copy
import gzip
import importlib
import inspect
import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='torch is missing: pip install ".[torch]"')

from torch import nn  # noqa: E402

import cusru.torch  # noqa: E402
from cusru.torch import SRU, SRUCell, classic, install_as_sru  # noqa: E402

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
GUIDE = (ROOT / "docs/migrating-from-sru.md").read_text()
PADDING = torch.tensor([[0, 0], [0, 0], [0, 1], [0, 1]])  # make_sru3.py's
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
CASES = (
    "plain", "three matrices, rescaled", "projected", "normalised after", "projections of its own each", "without a skip",
    "projected wider", "cell", "cell, projected", "modules of its own",
)  # fmt: skip
WHOLE = ("plain", "projected", "projected wider", "cell", "modules of its own")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated in sru.*", "ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*reset_parameters"
)


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed), dtype=torch.float64).to(dtype)


def assert_close(name, ours, theirs):
    assert ours.shape == theirs.shape, name
    ours, theirs = ours.detach(), theirs.detach()
    scale = float(theirs.abs().max()) or 1.0
    assert float((ours - theirs).abs().max()) <= TOLERANCE[ours.dtype] * scale, name


@pytest.fixture
def installed():
    """install_as_sru for the length of a test: other tests of this process may have the real one."""
    ours = ("sru", "cuda_functional")
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ours}
    finders = [*sys.meta_path]
    for name in kept:
        del sys.modules[name]
    try:
        install_as_sru()
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in ours]:
            del sys.modules[name]
        sys.modules |= kept
        sys.meta_path[:] = finders


# ---- sru 3.0: state dicts ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["stored", "made now"])
def sru3(request, tmp_path_factory):
    """The folder of sru3_states.pt.gz and sru3_models.pt.gz."""
    if request.param == "stored":
        return DATA
    package = os.environ.get("CUSRU_TEST_SRU3")
    if not package:
        pytest.skip("CUSRU_TEST_SRU3 names no folder: pip install --target FOLDER --no-deps sru==3.0.0.dev6")
    out = tmp_path_factory.mktemp("sru3")
    command = [sys.executable, str(DATA / "make_sru3.py"), package, str(out)]
    compiled = Path(package) / "torch_extensions"  # a folder of its own: 2.6 compiles under the same name
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(compiled)}
    done = subprocess.run(command, text=True, capture_output=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return out


def states(folder):
    saved = torch.load(io.BytesIO(gzip.decompress((folder / "sru3_states.pt.gz").read_bytes())), weights_only=True)
    assert saved["version"] == "3.0.0.dev6"
    assert tuple(saved["cases"]) == CASES
    return saved["cases"]


def values_of(case):
    shapes = case["shapes"]
    parts = case["values"].split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def modules_of_its_own():
    """Those that make_sru3.py gives to 3.0 as transform_module."""
    return [nn.Linear(4, 12), nn.Sequential(nn.Linear(4, 12), nn.Tanh())]


def built(name, case, **more):
    """With the very arguments that were given to 3.0, but for its defaults."""
    arguments = dict(case["arguments"])
    if case["class"] == "SRUCell":
        arguments = {"rescale": False, "normalize_after": True} | arguments
    if name == "modules of its own":
        arguments["transform_module"] = modules_of_its_own()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*reset_parameters")
        return getattr(cusru.torch, case["class"])(*case["sizes"], **arguments, **more)


def assert_computes(model, case, dtype):
    values = {name: value.to(dtype) for name, value in values_of(case).items()}
    x, c0 = (values[name].clone().requires_grad_() for name in ("x", "c0"))
    h, c = model.to(dtype)(x, c0, PADDING)
    assert_close("h", h, values["h"])
    assert_close("c", c, values["c"])
    torch.autograd.backward([h, c], [values["weights of h"], values["weights of c"]])
    ours = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad, "c0": c0.grad}
    compared = set()
    for name, theirs in values.items():
        if not name.startswith("gradient of "):
            continue
        name = name.removeprefix("gradient of ")
        if "transform_module" in name and name.replace("transform_module", "custom_m") in ours:
            mine = name.replace("transform_module", "custom_m")
        elif "transform_module" in name:
            factor = name.endswith("transform_module.0.weight")
            mine = name[: name.index("transform_module")] + ("weight_proj" if factor else "weight")
            theirs = theirs.t()
            if name.endswith(("0.weight", "1.weight")) and mine.replace("weight_proj", "weight") + "_proj" not in ours:
                continue  # the product is one parameter here
        else:
            mine = name
        assert_close(mine, ours[mine], theirs)
        compared.add(mine)
    left = {name for name, value in ours.items() if value is not None} - compared
    assert left <= ({"rnn_lst.0.weight"} if case["arguments"].get("projection_size") == 5 else set())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_a_state_dict_of_3_loads_strictly_and_computes_what_3_did(sru3, name, dtype):
    case = states(sru3)[name]
    model = built(name, case)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        keys = model.to(dtype).load_state_dict(case["state"])
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert len(said) == (name == "projected wider"), [str(w.message) for w in said]
    assert_computes(model, case, dtype)


@pytest.mark.parametrize("name", ["projected", "modules of its own"])
@pytest.mark.parametrize("how", ["within a model", "DataParallel", "assigned", "not strictly", "kept parameters", "again"])
def test_a_state_dict_of_3_loads_in_every_way(name, how):
    case = states(DATA)[name]
    state, before = dict(case["state"]), dict(case["state"])
    cusru_model = built(name, case).double()
    model, options = cusru_model, {}
    if how == "within a model":
        model = nn.Sequential(nn.Linear(2, 2).double(), nn.ModuleDict({"encoder": cusru_model}))
        state = {f"1.encoder.{key}": value for key, value in state.items()} | {
            f"0.{k}": v for k, v in model[0].state_dict().items()
        }
    elif how == "DataParallel":
        model = nn.DataParallel(cusru_model)
        state = {f"module.{key}": value for key, value in state.items()}
    elif how == "assigned":
        options["assign"] = True
        model.float()
    elif how == "not strictly":
        options["strict"] = False
    elif how == "kept parameters":
        state = {key: nn.Parameter(value) for key, value in state.items()}
        options["assign"] = True
    elif how == "again":
        model.load_state_dict(state)
    given = [*state]
    keys = model.load_state_dict(state, **options)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert [*state] == given, "the caller's dict was changed"
    assert all(torch.equal(case["state"][key], value) for key, value in before.items())
    assert all(p.is_leaf and p.requires_grad and p.is_contiguous() for p in cusru_model.parameters())
    assert_computes(cusru_model, case, torch.float64)


def test_a_projection_that_is_no_narrower_is_multiplied_out_and_that_is_said():
    case = states(DATA)["projected wider"]
    model = built("projected wider", case).double()
    with pytest.warns(UserWarning, match=r"rnn_lst\.0\.weight is the product of .* training is not that of two factors"):
        model.load_state_dict(case["state"])


def test_modules_of_their_own_are_refused_by_name_where_the_model_has_a_plain_weight():
    case = states(DATA)["modules of its own"]
    advice = pytest.warns(UserWarning, match=r"rnn_lst\.0\.transform_module is no plain weight but has weight, bias.*custom_m=")
    with advice, pytest.raises(RuntimeError, match=r"rnn_lst\.0\.transform_module\.bias"):
        SRU(4, 4).load_state_dict(case["state"])
    with pytest.warns(UserWarning, match=r"rnn_lst\.1\.weight is not in the state dict"):
        keys = SRU(4, 4).load_state_dict(case["state"], strict=False)
    assert "rnn_lst.0.transform_module.weight" in keys.unexpected_keys


# ---- what a load that is not strict leaves ----------------------------------------------------------------------------------


def loaded(model, state):
    """The texts of the warnings of a load that is not strict."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.load_state_dict(state, strict=False)
    assert all(w.category is UserWarning for w in said)
    return [str(w.message) for w in said]


def test_a_load_that_is_not_strict_names_each_parameter_that_it_leaves():
    arguments = dict(projection_size=2, layer_norm=True, proj_input_to_hidden_first=True)
    full, model = SRU(6, 4, 2, **arguments).state_dict(), nn.ModuleDict({"encoder": SRU(6, 4, 2, **arguments)})
    whole = {f"encoder.{name}": value for name, value in full.items()}
    assert loaded(model, whole) == []
    for name, _ in model.named_parameters():
        (said,) = loaded(model, {n: value for n, value in whole.items() if n != name})
        assert f"{name} is not in the state dict, and keeps the values it had: random ones, unless loaded before" in said
    several = [n for n, _ in model.named_parameters() if "rnn_lst.1" in n or n.endswith("0.bias")]
    said = loaded(model, {n: value for n, value in whole.items() if n not in several})
    assert len(said) == 2  # one for each cell
    assert all(any(name in text for text in said) for name in several)
    assert "encoder.rnn_lst.1.weight_proj, encoder.rnn_lst.1.weight, " in said[1]
    assert len(loaded(model, {})) == 3


def test_a_parameter_that_another_hook_renames_is_not_missed():
    cell = torch.nn.utils.parametrizations.weight_norm(SRUCell(6, 6), "weight")
    state = cell.state_dict()
    names = {"original0": "weight_g", "original1": "weight_v"}  # of the older weight_norm
    state = {names.get(name.rpartition(".")[2], name): value for name, value in state.items()}
    assert loaded(cell, state) == []


def test_what_is_no_parameter_or_known_without_being_loaded_is_not_named():
    state = SRU(4, 4, 1, v1=True).state_dict()
    assert loaded(SRU(4, 4, 1, v1=True), {n: v for n, v in state.items() if not n.endswith(("weight_c", "scale_x"))}) == []
    assert "weight_c" in loaded(SRU(4, 4, 1), {n: v for n, v in state.items() if not n.endswith("weight_c")})[0]


def test_a_strict_load_raises_as_before():
    state = SRU(4, 4, 1).state_dict()
    del state["rnn_lst.0.bias"]
    with pytest.warns(UserWarning, match="bias"), pytest.raises(RuntimeError, match=r"Missing key.*rnn_lst\.0\.bias"):
        SRU(4, 4, 1).load_state_dict(state)


# ---- sru 3.0: whole models --------------------------------------------------------------------------------------------------


def whole_models(folder):
    return torch.load(io.BytesIO(gzip.decompress((folder / "sru3_models.pt.gz").read_bytes())), weights_only=False)


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_that_3_pickled_whole_loads_and_computes_what_3_did(sru3, installed, name):
    models = whole_models(sru3)
    assert tuple(models) == WHOLE
    model, case = models[name], states(sru3)[name]
    cells = [model] if case["class"] == "SRUCell" else list(model.rnn_lst)
    assert isinstance(model, getattr(cusru.torch, case["class"]))
    assert all(type(cell) is SRUCell and not hasattr(cell, "transform_module") for cell in cells)
    if name != "modules of its own":
        plain = SRUCell(3, 3) if name == "projected wider" else built(name, case)
        order = [n.rpartition(".")[2] for n, _ in plain.named_parameters()]
        assert [
            n.rpartition(".")[2] for n, _ in model.named_parameters() if "weight_proj" not in n or "weight_proj" in order
        ] == order
        assert all(cell.custom_m is None for cell in cells)
    if name == "projected wider":  # the two factors, as they were
        case = case | {"arguments": {}}
        assert model.rnn_lst[0].weight_proj.shape == (3, 5)
    again = pickle.loads(pickle.dumps(model))
    for same in (model, copy.deepcopy(model), again):
        assert_computes(same, case, torch.float64)
        assert repr(same).startswith(case["class"])
    torch.jit.script(model)
    again.load_state_dict(model.state_dict())
    again.reset_parameters()


def test_rnn_n_is_the_cell_of_layer_n_as_in_3():
    rnn = SRU(4, 4, 3)
    assert [rnn[i] for i in range(3)] == list(rnn) == list(rnn.rnn_lst)


@pytest.mark.parametrize("change", ["bias", "hook", "hook of the sequence", "weight norm", "another module", "frozen"])
def test_a_transform_module_is_taken_apart_only_where_a_weight_is_all_it_is(change):
    cell = SRUCell(4, 4, n_proj=2)
    transform = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 12, bias=change == "bias"))
    if change == "hook":
        transform[0].register_forward_hook(lambda module, args, output: 2 * output)
    elif change == "hook of the sequence":
        transform.register_forward_hook(lambda module, args, output: 2 * output)
    elif change == "weight norm":
        torch.nn.utils.parametrizations.weight_norm(transform[1])
    elif change == "another module":
        transform[0] = nn.Bilinear(4, 4, 2)
    elif change == "frozen":
        transform[1].weight.requires_grad_(False)
    state = dict(cell.__dict__)
    state["_parameters"] = {n: p for n, p in cell._parameters.items() if n not in ("weight", "weight_proj")}
    state["_modules"] = {n: m for n, m in cell._modules.items() if n != "custom_m"} | {"transform_module": transform}
    state.pop("custom_m", None)
    new = SRUCell.__new__(SRUCell)
    new.__setstate__(state)
    if change == "frozen":
        assert not new.weight.requires_grad
        assert new.weight_proj.requires_grad
        assert torch.equal(new.weight, transform[1].weight.t())
    else:
        assert new.custom_m is transform


def test_models_with_what_is_not_there_say_what_to_do(installed):
    with pytest.raises(ModuleNotFoundError, match=r"sru\.sru_functional.*state dict.*docs/migrating-from-sru\.md"):
        pickle.loads(b"csru.sru_functional\nSRU\n.")
    assert not hasattr(importlib.import_module("sru"), "Other")


# ---- the arguments of 2.0 to 2.3 --------------------------------------------------------------------------------------------

ARGUMENTS_OF_2 = {  # of 2.0.0, 2.1.2, 2.1.3, 2.1.4, 2.1.6 and 2.1.7, which are the same but for the last
    SRUCell: "n_in n_out dropout rnn_dropout bidirectional n_proj use_tanh use_relu use_selu weight_norm is_input_normalized "
    "highway_bias has_skip_term rescale v1",
    SRU: "input_size hidden_size num_layers dropout rnn_dropout bidirectional n_proj use_tanh use_relu use_selu weight_norm "
    "layer_norm is_input_normalized highway_bias has_skip_term rescale v1 nn_rnn_compatible_return",
}
SIZES = {"n_in": 5, "n_out": 4, "input_size": 5, "hidden_size": 4, "num_layers": 2, "dropout": 0.1}


@pytest.mark.parametrize("module", [SRU, SRUCell])
def test_every_argument_of_2_is_accepted_where_it_is_switched_off(module):
    names = ARGUMENTS_OF_2[module].split()
    off = {name: SIZES.get(name, False) for name in names}
    torch.manual_seed(0)
    old = module(**off)
    torch.manual_seed(0)
    now = module(5, 4, dropout=0.1, rescale=False, has_skip_term=False)
    assert repr(old) == repr(now)
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), now.parameters(), strict=True))
    assert set(names) - set(inspect.signature(module).parameters) - set(documented()) == set()


def documented():
    """The old arguments that have a row in the guide."""
    return re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", GUIDE, flags=re.M)))


OLD = "n_in n_out n_proj use_relu use_selu weight_norm is_input_normalized custom_u custom_v transform_module projection_size"


@pytest.mark.parametrize("name", [*OLD.split(), "return_hidden", "return_proj"])
def test_the_guide_has_a_row_for_every_old_argument(name):
    assert name in documented()


@pytest.mark.parametrize("activation", ["relu", "selu"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_use_relu_and_use_selu_are_the_activations(activation, bidirectional):
    cell = SRUCell(5, 3, bidirectional=bidirectional, **{f"use_{activation}": 1}).double()
    assert (cell.activation_type, cell.activation) == ({"relu": 2, "selu": 3}[activation], activation)
    assert f"activation={activation}" in repr(cell)
    x = normal(6, 2, 5)
    c0 = normal(2, cell.output_size)
    h, c = cell(x, c0)
    u = (x @ cell.weight).view(6, 2, cell.output_size, 4)
    expected, last = by_hand(u, cell, c0, getattr(torch, activation))
    assert_close("h", h, expected)
    assert_close("c", c, last)
    assert torch.equal(torch.jit.script(cell)(x, c0)[0], h)
    rnn = SRU(5, 3, 2, **{f"use_{activation}": True})
    assert all(cell.activation == activation for cell in rnn.rnn_lst)


def by_hand(u, cell, c0, activation, skip=None, mask=None):
    """A plain loop, columns of the second half backward; weight_c where the cell has one; dropout on the state."""
    L, _, D, _ = u.shape
    bias = cell.bias.view(2, D)
    weight_c = cell.weight_c.view(2, D) if hasattr(cell, "weight_c") else torch.zeros(2, D, dtype=u.dtype)
    skip = u[..., 3] if skip is None else skip
    h, last = [[None] * D for _ in range(L)], [None] * D
    for d in range(D):
        c = c0[:, d]
        for t in reversed(range(L)) if cell.bidirectional and d >= D // 2 else range(L):
            f = torch.sigmoid(u[t, :, d, 1] + bias[0, d] + weight_c[0, d] * c)
            r = torch.sigmoid(u[t, :, d, 2] + bias[1, d] + weight_c[1, d] * c)
            c = f * c + (1 - f) * u[t, :, d, 0]
            kept = activation(c) if mask is None else mask[:, d] * activation(c)
            h[t][d] = r * kept + (1 - r) * skip[t, :, d]
        last[d] = c
    return torch.stack([torch.stack(row, 1) for row in h]), torch.stack(last, 1)


def test_n_proj_is_projection_size_and_the_sizes_have_their_old_names():
    assert SRU(6, 5, n_proj=2).rnn_lst[0].weight_proj.shape == (6, 2)
    assert SRU(6, 5, n_proj=2).projection_size == 2
    cell = SRUCell(n_in=6, n_out=5, n_proj=2)
    assert (cell.input_size, cell.hidden_size, cell.projection_size) == (6, 5, 2)
    custom = nn.Linear(6, 20)
    assert SRUCell(6, 5, transform_module=custom).custom_m is custom
    assert SRUCell(6, 5, projection_size=2).weight_proj.shape == (6, 2)
    assert [cell.projection_size for cell in SRU(6, 5, 3, projection_size=[2, 0, 3]).rnn_lst] == [2, 0, 3]


REFUSED = {
    "weight_norm, an array": (dict(weight_norm=np.ones(2)), ValueError, "weight_norm=ndarray.*gain"),
    "weight_norm": (dict(weight_norm=True), ValueError, "weight_norm=True.*gain"),
    "is_input_normalized": (dict(is_input_normalized=True), ValueError, "is_input_normalized=True.*leave it out"),
    "custom_u": (dict(custom_u=nn.Identity()), ValueError, "custom_u=Identity.*custom_m"),
    "custom_v": (dict(custom_v=[nn.Identity()]), ValueError, "custom_v=list.*custom_m"),
    "two activations": (dict(use_relu=1, use_selu=1), ValueError, "use_relu and use_selu exclude"),
    "tanh and relu": (dict(use_tanh=1, use_relu=1), ValueError, "use_tanh and use_relu exclude"),
    "unknown": (dict(other=1), TypeError, "unexpected keyword argument 'other'"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("module", [SRU, SRUCell])
def test_what_cannot_be_had_is_refused_by_name(module, case):
    given, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        module(4, 4, **given)


def test_one_argument_by_two_names_is_refused():
    with pytest.raises(TypeError, match="n_proj and projection_size are one argument"):
        SRU(6, 5, projection_size=2, n_proj=2)
    with pytest.raises(TypeError, match="projection_size"):
        SRU(6, 5, 2, 0.0, 0.0, False, 2, n_proj=2)
    with pytest.raises(ValueError, match=r"projection_size has 1 numbers.* 2 layers"):
        SRU(6, 5, projection_size=[2])


def test_old_arguments_reach_subclasses_and_warnings_name_the_caller():
    class Own(SRU):
        def __init__(self, size):
            super().__init__(size, size, use_relu=True)

    assert Own(4).rnn_lst[0].activation == "relu"
    with pytest.warns(UserWarning, match="use_tanh") as said:
        SRU(4, 4, use_tanh=True)
    assert said[0].filename == __file__


def test_a_stack_with_relu_and_projections_each_can_be_scripted():
    rnn = SRU(5, 4, 3, projection_size=[2, 0, 3], use_relu=True)
    x = normal(6, 2, 5, dtype=torch.float32)
    assert torch.equal(torch.jit.script(rnn)(x)[0], rnn(x)[0])


# ---- 2017 -------------------------------------------------------------------------------------------------------------------

ACTIVATIONS = {"tanh": {}, "identity": dict(use_tanh=0), "relu": dict(use_relu=1), "selu": dict(use_selu=1)}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("n_in", [6, 4])
def test_a_layer_of_2017_is_its_equations(activation, bidirectional, n_in):
    function = (lambda c: c) if activation == "identity" else getattr(torch, activation)
    cell = classic.SRUCell(n_in, 3, 0.5, 0.5, bidirectional, **ACTIVATIONS[activation]).double()
    D = 6 if bidirectional else 3
    assert {n: tuple(p.shape) for n, p in cell.state_dict().items()} == {
        "weight": (n_in, D * (3 if n_in == D else 4)),
        "bias": (2 * D,),
    }
    with torch.no_grad():
        cell.bias.copy_(normal(2 * D))
    x, c0 = normal(5, 2, n_in).requires_grad_(), normal(2, D).requires_grad_()

    def expected(mask, mask_x):
        u = ((x * mask_x) @ cell.weight).view(5, 2, D, -1)
        return by_hand(u, cell, c0, function, x if n_in == D else None, mask)

    for training in (False, True):
        cell.train(training)
        mask = mask_x = torch.ones(())
        if training:  # the input's is drawn first
            torch.manual_seed(3)
            mask_x, mask = cell.get_dropout_mask_((2, n_in), 0.5), cell.get_dropout_mask_((2, D), 0.5)
            assert set(mask.unique().tolist()) == {0.0, 2.0}
        torch.manual_seed(3)
        ours, theirs = cell(x, c0), expected(mask if training else None, mask_x)
        over = [x, c0, cell.weight, cell.bias]
        grads = [torch.autograd.grad([*both], over, [normal(*t.shape, seed=9) for t in both]) for both in (ours, theirs)]
        for name, a, b in zip(("h", "c", "x", "c0", "weight", "bias"), (*ours, *grads[0]), (*theirs, *grads[1]), strict=True):
            assert_close(name, a, b)
    with torch.no_grad():  # one step, and no state
        cell.eval()
        h, c = cell(x[0])
        assert h.shape == c.shape == (2, D)
        assert_close("one step", h, cell(x[:1], torch.zeros_like(c0))[0][0])


def test_a_stack_of_2017():
    rnn = classic.SRU(5, 3, 3, 0.3, bidirectional=True)
    assert parameters_of(classic.SRU)[:8] == [
        ("input_size", inspect.Parameter.empty), ("hidden_size", inspect.Parameter.empty), ("num_layers", 2), ("dropout", 0),
        ("rnn_dropout", 0), ("bidirectional", False), ("use_tanh", 1), ("use_relu", 0),
    ]  # fmt: skip
    assert parameters_of(classic.SRUCell)[:7] == [
        ("n_in", inspect.Parameter.empty), ("n_out", inspect.Parameter.empty), ("dropout", 0), ("rnn_dropout", 0),
        ("bidirectional", False), ("use_tanh", 1), ("use_relu", 0),
    ]  # fmt: skip
    assert [*rnn.state_dict()] == [f"rnn_lst.{i}.{name}" for i in range(3) for name in ("weight", "bias")]
    assert [cell.dropout for cell in rnn.rnn_lst] == [0.3, 0.3, 0]
    x, c0 = normal(4, 2, 5, dtype=torch.float32), normal(3, 2, 6, dtype=torch.float32)
    rnn.eval()
    h, c = rnn(x, c0)
    step, states_ = x, []
    for cell, state in zip(rnn.rnn_lst, c0, strict=True):
        step, last = cell(step, state)
        states_.append(last)
    assert torch.equal(h, step)
    assert torch.equal(c, torch.stack(states_))
    assert torch.equal(rnn(x, c0, return_hidden=False), h)
    assert torch.equal(rnn(x)[0], rnn(x, torch.zeros(3, 2, 6))[0])
    rnn.set_bias(-2)
    assert all(cell.bias.tolist() == [0.0] * 6 + [-2.0] * 6 for cell in rnn.rnn_lst)
    assert classic.SRU(5, 3, highway_bias=-1).rnn_lst[1].bias.tolist() == [0.0] * 3 + [-1.0] * 3
    assert float(classic.SRUCell(300, 100).weight.detach().std()) == pytest.approx(300**-0.5, rel=0.02)
    assert rnn.to(torch.bfloat16)(x.bfloat16())[0].dtype == torch.bfloat16


def parameters_of(module):
    return [(p.name, p.default) for p in inspect.signature(module).parameters.values()]


def test_what_2017_refuses():
    for arguments, error, words in (
        (dict(weight_norm=True), ValueError, "weight_norm=True"),
        (dict(layer_norm=1), ValueError, "layer_norm=1"),
        (dict(other=1), TypeError, "no argument other"),
        (dict(use_relu=1, use_selu=1), ValueError, "exclude"),
        (dict(dropout=1), ValueError, "dropout"),
    ):
        for module in (classic.SRU, classic.SRUCell):
            with pytest.raises(error, match=words):
                module(4, 4, **arguments)
    classic.SRU(4, 4, weight_norm=False, layer_norm=0, is_input_normalized=False, rescale=False)
    classic.SRUCell(4, 4, index=1)
    x = normal(3, 2, 4, dtype=torch.float32)
    for module, arguments, error, words in (
        (classic.SRU, (x[0],), ValueError, r"\[2, 4\].*3 dimensions"),
        (classic.SRU, (x[..., 1:],), ValueError, r"n_in = 4"),
        (classic.SRU, (x, x), ValueError, r"c0.*\[2, 2, 4\]"),
        (classic.SRUCell, (x, x), ValueError, r"c0.*\[2, 4\]"),
        (classic.SRUCell, (x.double(),), TypeError, "float64.*float32"),
        (classic.SRUCell, (x.numpy(),), TypeError, "input.*numpy"),
    ):
        with pytest.raises(error, match=words):
            module(4, 4)(*arguments)


def test_the_module_of_2017_is_found_and_so_are_models_that_were_pickled_whole(installed):
    cuda_functional = importlib.import_module("cuda_functional")
    assert cuda_functional.SRU is classic.SRU
    names = {}
    exec("from cuda_functional import *", names)
    assert names["SRUCell"] is classic.SRUCell
    model = classic.SRU(5, 4).eval()
    saved = pickle.dumps(model, 2).replace(b"cusru.torch.classic", b"cuda_functional")
    assert b"cusru" not in saved
    x = normal(3, 2, 5, dtype=torch.float32)
    assert torch.equal(pickle.loads(saved)(x)[0], model(x)[0])
    early = copy.deepcopy(model.rnn_lst[0])
    state = {name: value for name, value in early.__dict__.items() if name != "activation_type"} | {"use_tanh": 1}
    cell = classic.SRUCell.__new__(classic.SRUCell)
    cell.__setstate__(state)
    assert torch.equal(cell(x)[0], early(x)[0])
    with pytest.raises(ImportError, match=r"SRU_Compute.*cusru\.torch\.sru"):
        exec("from cuda_functional import SRU_Compute")
    assert not hasattr(cuda_functional, "other")


# ---- in the place of sru ----------------------------------------------------------------------------------------------------


def test_the_modules_of_sru_are_there_or_named(installed):
    version = importlib.import_module("sru.version")
    assert version.__version__ == importlib.import_module("sru").__version__ == "2.6.0"
    assert importlib.import_module("sru").version is version
    for name in ("ops", "cuda_functional", "sru_functional", "other"):
        with pytest.raises(ModuleNotFoundError, match=rf"sru\.{name} .*docs/migrating-from-sru\.md"):
            importlib.import_module(f"sru.{name}")
        with pytest.raises(ModuleNotFoundError, match=rf"sru\.{name} .*docs/migrating-from-sru\.md"):
            exec(f"from sru import {name}")
        with pytest.raises(ModuleNotFoundError, match=rf"sru\.{name} .*docs/migrating-from-sru\.md"):
            exec(f"from sru.{name} import anything")
    with pytest.raises(ModuleNotFoundError, match="No module named 'nosuchmodule'"):
        importlib.import_module("nosuchmodule")


def test_a_cuda_functional_that_is_imported_already_stays():
    kept = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] in ("sru", "cuda_functional")}
    finders, own = [*sys.meta_path], ModuleType("cuda_functional")
    sys.modules["cuda_functional"] = own
    try:
        install_as_sru()
        assert sys.modules["cuda_functional"] is own
    finally:
        for name in ("sru", "sru.modules", "sru.version", "cuda_functional"):
            sys.modules.pop(name, None)
        sys.modules |= kept
        sys.meta_path[:] = finders


def test_the_guide_names_the_error_of_a_torchscript_archive_of_sru(tmp_path):
    code = f"""
import torch
library = torch.library.Library("sru_cuda", "DEF")
library.define("sru_bi_forward_simple(Tensor x) -> Tensor")
class Model(torch.nn.Module):
    def forward(self, x):
        return torch.ops.sru_cuda.sru_bi_forward_simple(x)
torch.jit.save(torch.jit.script(Model()), {str(tmp_path / "model.pt")!r})
"""
    (tmp_path / "save.py").write_text(code)  # torch.jit.script reads the source
    (tmp_path / "load.py").write_text(f"import torch, cusru.torch\ntorch.jit.load({str(tmp_path / 'model.pt')!r})")

    def run(name):  # in processes of their own: sru itself may have been imported in this one
        command = [sys.executable, "-W", "ignore", tmp_path / name]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, text=True, capture_output=True, timeout=120, env=environment)

    saved = run("save.py")
    assert saved.returncode == 0, saved.stderr
    assert "Unknown builtin op: sru_cuda::sru_bi_forward_simple" in run("load.py").stderr
    for document in (GUIDE, (ROOT / "docs/torch.md").read_text()):
        assert "Unknown builtin op: sru_cuda::sru_bi_forward_simple" in " ".join(document.split())


# ---- python -m cusru.torch --------------------------------------------------------------------------------------------------

PROBE = """
import json, os, sys
assert __name__ == "__main__" and sys.modules["__main__"].__dict__ is globals()
spec = __spec__ and (__spec__.name, __spec__.origin)
file = globals().get("__file__")
names = sorted(n for n in globals() if n not in ("__cached__", "json", "os", "sys", "spec", "file"))
print(json.dumps([sys.argv, sys.path[0], file, __package__, spec, type(__loader__).__name__, __doc__, names]))
"""
FIND = (
    "import sru, cuda_functional, torchqrnn; assert sru.SRU.__module__ == 'cusru.torch.modules' and cuda_functional.SRU; "
    "assert torchqrnn.QRNN.__module__ == 'cusru.torch.torchqrnn'; "
)


def start(*arguments, folder, python=(sys.executable,), **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [*python, *map(str, arguments)], cwd=folder, env=environment, text=True, capture_output=True, timeout=180
    )


def ours(*arguments, folder, **environment):
    return start("-m", "cusru.torch", *arguments, folder=folder, **environment)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    (folder / "sub").mkdir()
    (folder / "sub" / "probe.py").write_text('"""A probe."""\n' + PROBE)
    (folder / "package").mkdir()
    for name in ("__init__", "__main__", "probe"):
        (folder / "package" / f"{name}.py").write_text(PROBE * (name != "__init__"))
    with zipfile.ZipFile(folder / "app.zip", "w") as archive:
        archive.writestr("__main__.py", PROBE)
    (folder / "sru.py").write_text("raise ImportError('the one beside the program')")
    (folder / "ends.py").write_text(FIND + "import sys\nsys.exit(eval(sys.argv[1]))")
    return folder


@pytest.mark.parametrize(
    "program",
    ["-m package.probe", "-m package", "-c", "app.zip", "package", "sub/../sub/probe.py"],
)
def test_a_program_sees_what_python_shows_it(programs, program):
    arguments = ["-c", PROBE] if program == "-c" else program.split()
    arguments += ["--help", "-m", "x y"]
    theirs, mine = start(*arguments, folder=programs), ours(*arguments, folder=programs)
    assert theirs.returncode == 0, theirs.stderr
    assert mine.returncode == 0, mine.stderr
    assert json.loads(mine.stdout) == json.loads(theirs.stdout)


@pytest.mark.parametrize("end", ["7", "'a text'", "1 / 0"])
def test_a_program_ends_as_under_python_and_finds_sru(programs, end):
    theirs = start("-c", f"import sys; sys.exit({end})", folder=programs)
    mine = ours("ends.py", end, folder=programs)
    assert mine.returncode == theirs.returncode
    if end == "1 / 0":
        assert f'File "{programs / "ends.py"}", line 2' in mine.stderr
        assert mine.stderr.endswith("ZeroDivisionError: division by zero\n")
    else:
        assert mine.stderr == theirs.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "a script, -m or -c is missing"),
        (["-m"], 2, "-m needs an argument"),
        (["-c"], 2, "-c needs an argument"),
        (["-X"], 2, "-X is neither"),
        (["nosuch.py"], 2, "can't open file"),
        (["-m", "nosuch.module"], 1, "No module named 'nosuch'"),
        (["-m", "json.nosuch"], 1, "No module named json.nosuch"),
        (["-mjson.nosuch"], 1, "No module named json.nosuch"),
        (["-m", "email"], 1, "'email' is a package and cannot be directly executed"),
        (["--help"], None, "usage: python -m cusru.torch SCRIPT"),
    ],
)
def test_what_cannot_be_run_is_said(installed, monkeypatch, tmp_path, capsys, arguments, status, words):
    program = importlib.import_module("cusru.torch.__main__")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["-m", *arguments])
    monkeypatch.setenv("PYTHONPATH", "")
    if status is None:
        program.main()
    else:
        with pytest.raises(SystemExit) as ended:
            program.main()
        assert ended.value.code == status
    said = capsys.readouterr()
    assert words in (said.out if status is None else said.err)


def test_processes_that_a_program_starts_find_sru_too(tmp_path):
    (tmp_path / "train.py").write_text(
        """
import multiprocessing, subprocess, sys
from sru import SRU
import sru.modules, cuda_functional, torchqrnn

def work(model):
    assert torchqrnn.QRNN.__module__ == "cusru.torch.torchqrnn"
    assert SRU.__module__ == "cusru.torch.modules", SRU.__module__
    assert sru.modules.SRU is sru.SRU is SRU is type(model)

if __name__ == "__main__":
    for method in ("spawn", "forkserver"):
        process = multiprocessing.get_context(method).Process(target=work, args=(SRU(4, 4, 1),))
        process.start()
        process.join()
        assert process.exitcode == 0, method
    find = "import importlib.util as u; print(*(u.find_spec(name).origin for name in ('sru', 'cuda_functional', 'torchqrnn')))"
    found = subprocess.run([sys.executable, "-c", find], check=True, text=True, capture_output=True).stdout
    assert found.count("stand_in") == 3, found  # without the import of torch: spawn has shown what that gives
    print("all found it")
"""
    )
    done = ours("train.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all found it\n"
