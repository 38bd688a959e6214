"""The Quasi-RNN's modules, torchqrnn's (`cusru.torch`) and fastai's (`cusru.torch.fastai`), held to the equations written out.

torchqrnn needs CuPy of 2017 and no package index has it; fastai pulls in half of the world. What they compute is written out
here, from their sources: step by step, one linear map of the window's steps, one gate.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason='torch is missing: pip install ".[torch]"')

from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import cusru.torch  # noqa: E402
from cusru.torch import QRNN, ForgetMult, QRNNLayer, fastai  # noqa: E402

Tensor = torch.Tensor
BOTH = pytest.mark.parametrize("kind", [QRNNLayer, fastai.QRNNLayer], ids=["torchqrnn", "fastai"])
OPTIONS = [
    dict(window=window, output_gate=gate, batch_first=first, backward=backward)
    for window, gate, first, backward in itertools.product((1, 2, 4), (True, False), (False, True), (False, True))
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_close(a: Tensor, b: Tensor, where: Any = "") -> None:
    assert a.shape == b.shape, where
    assert float((a - b).abs().max()) <= 1e-12 * max(1.0, float(b.abs().max())), where


def written_out(
    layer: Any,
    x: Tensor,
    hidden: Tensor | None = None,
    kept: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """h and c of every step, of x (L, B, n), in its time order. kept: the window - 1 steps before; mask: of the update gate."""
    weight, bias, window = layer.linear.weight, layer.linear.bias, layer.window
    length, batch, n = x.shape
    order = range(length - 1, -1, -1) if layer.backward else range(length)
    sign = 1 if layer.backward else -1
    h, c = [None] * length, [None] * length
    state = torch.zeros(batch, len(bias) // (3 if layer.output_gate else 2), dtype=x.dtype) if hidden is None else hidden
    for t in order:
        seen = []
        for i in range(window):
            place = t + sign * i
            if 0 <= place < length:
                seen.append(x[place])
            elif kept is None:
                seen.append(torch.zeros(batch, n, dtype=x.dtype))
            else:
                seen.append(kept[place - length if layer.backward else place + window - 1])
        gates = (torch.cat(seen, 1) @ weight.t() + bias).chunk(3 if layer.output_gate else 2, 1)
        z, f = gates[0].tanh(), 1 / (1 + (-gates[1]).exp())
        f = f * scale if mask is None else f * mask[t]
        state = f * z + (1 - f) * state
        c[t] = state
        h[t] = state / (1 + (-gates[2]).exp()) if layer.output_gate else state
    return torch.stack(h), torch.stack(c)


def time_first(layer: Any, a: Tensor) -> Tensor:
    return a.transpose(0, 1) if layer.batch_first else a


def last(layer: Any, c: Tensor) -> Tensor:
    return c[0] if layer.backward else c[-1]


# ---- the equations ----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_a_layer_is_its_equations_gradients_included(kind: Any, options: dict[str, Any]) -> None:
    layer = kind(5, 7, **options).double()
    for hidden in (None, normal(3, 7).requires_grad_()):
        x = normal(6, 3, 5).requires_grad_()
        leaves = [x, *layer.parameters(), *([] if hidden is None else [hidden])]
        h, c = layer(time_first(layer, x), hidden)
        h, c = time_first(layer, h), c.reshape(3, 7)
        expected_h, states = written_out(layer, x, hidden)
        assert_close(h, expected_h)
        assert_close(c, last(layer, states))
        weights = normal(*h.shape), normal(*c.shape)
        ours = torch.autograd.grad([h, c], leaves, weights)
        theirs = torch.autograd.grad([expected_h, last(layer, states)], leaves, weights)
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)


def test_the_state_that_is_returned_is_c_and_its_shape_is_each_package_s() -> None:
    layer, x = QRNNLayer(4).double(), normal(5, 2, 4)
    h, c = layer(x)
    assert c.shape == (1, 2, 4)
    assert_close(c[0], written_out(layer, x)[1][-1])
    assert float((c[0] - h[-1]).abs().max()) > 1e-3
    assert fastai.QRNNLayer(4)(torch.zeros(2, 5, 4))[1].shape == (2, 4)


@pytest.mark.parametrize(
    "options", [dict(), dict(batch_first=True), dict(window=2, zoneout=0.25), dict(output_gate=False)], ids=str
)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_stack_of_torchqrnn_joins_directions_at_each_layer(bidirectional: bool, options: dict[str, Any]) -> None:
    model = QRNN(5, 4, num_layers=3, bidirectional=bidirectional, **options).double().eval()
    directions = 2 if bidirectional else 1
    x, hidden = normal(6, 3, 5), normal(3 * directions, 3, 4)
    h, c = model(time_first(model, x), hidden)
    expected, states = x, []
    for i, layer in enumerate(model.layers):
        parts = []
        for j, one in enumerate([layer, model.layers_bwd[i]] if bidirectional else [layer]):
            out, every = written_out(one, expected, hidden[directions * i + j], scale=1 - model.layers[0].zoneout)
            parts.append(out)
            states.append(last(one, every))
        expected = torch.cat(parts, -1)
    assert_close(time_first(model, h), expected)
    assert_close(c, torch.stack(states))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_stack_of_fastai_joins_two_stacks_at_the_end(bidirectional: bool, batch_first: bool) -> None:
    model = fastai.QRNN(5, 4, 3, batch_first, bidirectional=bidirectional).double()
    assert [layer.window for layer in model.layers] == [2, 1, 1]
    stacks = [model.layers, model.layers_bwd] if bidirectional else [model.layers]
    x, hid = normal(6, 3, 5), normal(3 * len(stacks), 3, 4)
    h, c = model(time_first(model, x), hid)
    outputs, states = [], {}
    for j, stack in enumerate(stacks):
        out = x
        for i, layer in enumerate(stack):
            out, every = written_out(layer, out, hid[len(stacks) * i + j])
            states[len(stacks) * i + j] = last(layer, every)
        outputs.append(out)
    assert_close(time_first(model, h), torch.cat(outputs, -1))
    assert_close(c, torch.stack([states[i] for i in range(len(states))]))


def test_sizes_of_deeper_layers_and_the_smallest_calls() -> None:
    model = QRNN(32, 256, num_layers=2)
    assert [tuple(layer.linear.weight.shape) for layer in model.layers] == [(768, 32), (768, 256)]
    assert [tuple(layer.linear.weight.shape) for layer in QRNN(32, 8, 2, bidirectional=True, window=2).layers_bwd] == [
        (24, 64),
        (24, 32),
    ]
    for length, batch in ((7, 20), (1, 20), (7, 1), (1, 1), (0, 2), (3, 0)):
        h, c = model(torch.rand(length, batch, 32))
        assert (h.shape, c.shape) == ((length, batch, 256), (2, batch, 256))
        h, c = fastai.QRNN(4, 6, 2)(torch.rand(batch, length, 4))
        assert (h.shape, c.shape) == ((batch, length, 6), (2, batch, 6))
    hidden = torch.rand(2, 3, 256)
    x = torch.rand(4, 3, 32)
    assert torch.equal(model(x, [None, hidden[1]])[0], model(x, torch.stack([torch.zeros(3, 256), hidden[1]]))[0])
    assert torch.equal(model(torch.rand(0, 3, 32), hidden)[1], hidden)


def test_awd_lstm_s_own_use_a_list_of_layers_each_with_its_own_state() -> None:
    rnns = [QRNNLayer(input_size=4, hidden_size=6, save_prev_x=True, zoneout=0, window=2 if i == 0 else 1) for i in (0,)]
    _, c = rnns[0](torch.rand(5, 2, 4), torch.zeros(1, 2, 6))  # (1, B, H), as it keeps them
    h2, c = rnns[0](torch.rand(5, 2, 4), c)
    assert (h2.shape, c.shape) == ((5, 2, 6), (1, 2, 6))


# ---- interface --------------------------------------------------------------------------------------------------------------

SIGNATURES = {
    QRNN: dict(num_layers=1, bias=True, batch_first=False, dropout=0, bidirectional=False, layers=None),
    QRNNLayer: dict(hidden_size=None, save_prev_x=False, zoneout=0, window=1, output_gate=True, use_cuda=True),
    fastai.QRNN: dict(
        n_layers=1, batch_first=True, dropout=0, bidirectional=False, save_prev_x=False, zoneout=0, window=None, output_gate=True
    ),
    fastai.QRNNLayer: dict(
        hidden_size=None, save_prev_x=False, zoneout=0, window=1, output_gate=True, batch_first=True, backward=False
    ),
}


@pytest.mark.parametrize("kind", SIGNATURES, ids=lambda kind: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}")
def test_the_arguments_by_position_and_their_defaults_are_those_of_the_package(kind: Any) -> None:
    parameters = [p for p in inspect.signature(kind).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert defaults == SIGNATURES[kind]
    assert list(defaults) == list(SIGNATURES[kind])
    assert [p.name for p in parameters][: len(parameters) - len(defaults)] == ["input_size", "hidden_size"][
        : 2 - ("Layer" in kind.__name__)
    ]
    first, second = [name for name in inspect.signature(kind.forward).parameters if name != "self"][:2]
    names = {"QRNN": ("input", "hidden"), "QRNNLayer": ("X", "hidden")}[kind.__name__]
    assert (first, second) == (("inp", "hid") if kind.__module__.endswith("fastai") else names)


def test_state_dicts_and_initial_values_are_those_of_one_linear_map_a_layer() -> None:
    for build, sizes in (
        (lambda: QRNN(5, 4, num_layers=2, window=2), [(10, 12), (8, 12)]),
        (lambda: fastai.QRNN(5, 4, 2), [(10, 12), (4, 12)]),
    ):
        torch.manual_seed(3)
        model, state = build(), torch.get_rng_state()
        torch.manual_seed(3)
        expected = {
            f"layers.{i}.linear.{name}": value
            for i, size in enumerate(sizes)
            for name, value in nn.Linear(*size).state_dict().items()
        }
        assert torch.equal(state, torch.get_rng_state())
        assert list(model.state_dict()) == list(expected)
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name])
        assert not model.load_state_dict(expected, strict=True).missing_keys


def test_attributes_are_those_of_the_packages() -> None:
    layer = QRNNLayer(5, window=2, use_cuda=False)
    expected = dict(window=2, input_size=5, hidden_size=5, zoneout=0, save_prev_x=False, prevX=None, output_gate=True)
    assert {name: getattr(layer, name) for name in expected} == expected
    assert layer.use_cuda is False
    model = QRNN(5, 5, layers=(one for one in [layer, QRNNLayer(5)]))
    assert (model.num_layers, model.layers[0], model.input_size, model.hidden_size) == (2, layer, 5, 5)
    assert model(torch.rand(3, 2, 5))[0].shape == (3, 2, 5)
    other = fastai.QRNN(5, 4, 2, dropout=0.5, bidirectional=True)
    assert (other.n_layers, other.batch_first, other.dropout, other.bidirectional) == (2, True, 0.5, True)


# ---- zoneout and dropout ----------------------------------------------------------------------------------------------------


def test_zoneout_in_evaluation() -> None:
    for kind, expected in ((QRNNLayer, 0.25), (fastai.QRNNLayer, 0.5)):
        layer = kind(1, 1, zoneout=0.5, output_gate=False).double().eval()
        with torch.no_grad():
            layer.linear.weight.zero_()
            layer.linear.bias[:] = torch.tensor([40.0, 0.0])  # z = 1, update gate 1/2
        assert float(layer(torch.ones(1, 1, 1, dtype=torch.float64))[0]) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    "options", [dict(), dict(window=2), dict(output_gate=False, backward=True), dict(batch_first=True)], ids=str
)
@BOTH
def test_zoneout_in_training_draws_the_package_s_mask(kind: Any, options: dict[str, Any]) -> None:
    options = dict(batch_first=False) | options
    p, x = 0.3, normal(6, 3, 5).requires_grad_()
    layer = kind(5, 7, zoneout=p, **options).double()
    torch.manual_seed(4)
    h, _ = layer(time_first(layer, x))
    state = torch.get_rng_state()
    torch.manual_seed(4)
    mask = torch.empty(time_first(layer, torch.empty(6, 3, 7)).shape, dtype=torch.float64).bernoulli_(1 - p)
    assert torch.equal(state, torch.get_rng_state())
    mask = time_first(layer, mask) / (1 - p if kind is fastai.QRNNLayer else 1)
    expected, _ = written_out(layer, x, mask=mask)
    assert_close(time_first(layer, h), expected)
    weights = normal(*expected.shape)
    for a, b in zip(
        torch.autograd.grad(time_first(layer, h), [x, *layer.parameters()], weights),
        torch.autograd.grad(expected, [x, *layer.parameters()], weights),
        strict=True,
    ):
        assert_close(a, b)


@pytest.mark.parametrize("build", [lambda p: QRNN(4, 4, 2, dropout=p), lambda p: fastai.QRNN(4, 4, 2, dropout=p)])
def test_dropout_acts_between_layers_in_training_alone(build: Any) -> None:
    torch.manual_seed(0)
    model, x = build(1.0), torch.rand(3, 3, 4)
    with torch.no_grad():
        silent = model.layers[1](torch.zeros(3, 3, 4))[0]
    assert torch.equal(model(x)[0], silent)
    assert not torch.equal(model.eval()(x)[0], silent)


# ---- the x that is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(4, 3), (1,) * 7, (1, 5, 1), (0, 2, 0, 5)])
@pytest.mark.parametrize("window", [2, 3, 5])
@BOTH
def test_chunks_equal_the_whole(kind: Any, window: int, lengths: tuple[int, ...]) -> None:
    layer = kind(3, 4, window=window, save_prev_x=True).double()
    x, c = normal(7, 2, 3), None
    whole = time_first(layer, layer(time_first(layer, x))[0])
    layer.reset()
    chunks = []
    for chunk in x.split(lengths):
        h, c = layer(time_first(layer, chunk), c)
        chunks.append(time_first(layer, h))
    assert_close(torch.cat(chunks), whole)
    assert layer.prevX is not None
    assert time_first(layer, layer.prevX).shape == (window - 1, 2, 3)


def test_chunks_in_reverse_order_equal_the_whole_of_a_layer_that_runs_backward() -> None:
    layer, x = QRNNLayer(3, 4, window=3, save_prev_x=True, backward=True).double(), normal(7, 2, 3)
    whole, _ = layer(x)
    layer.reset()
    last_chunk, c = layer(x[3:])
    first_chunk, _ = layer(x[:3], c)
    assert_close(torch.cat([first_chunk, last_chunk]), whole)


@BOTH
def test_no_gradient_goes_back_through_the_kept_x_and_it_is_no_view_of_the_input(kind: Any) -> None:
    layer = kind(3, 4, window=2, save_prev_x=True).double()
    first, second = (normal(2, 2, 3, seed=s).requires_grad_() for s in (1, 2))
    layer(first)
    kept = layer.prevX.clone()
    with torch.no_grad():
        first.add_(1)
    assert torch.equal(layer.prevX, kept)
    layer(second)[0].sum().backward()
    assert first.grad is None
    assert second.grad.abs().min() > 0


@BOTH
def test_reset_is_a_new_sequence_and_no_state_dict_has_the_kept_x(kind: Any) -> None:
    layer, x = kind(3, 4, window=2, save_prev_x=True).double(), normal(2, 2, 3)
    fresh = layer(x)[0]
    assert not torch.equal(layer(x)[0], fresh)
    assert list(layer.state_dict()) == ["linear.weight", "linear.bias"]
    layer.reset()
    assert torch.equal(layer(x)[0], fresh)
    stack = (QRNN if kind is QRNNLayer else fastai.QRNN)(3, 3, 2, window=2, save_prev_x=True)
    stack(x.float())
    stack.reset()
    assert all(layer.prevX is None for layer in stack.layers)
    forgetful = kind(3, 4, window=2).double()
    forgetful(x)
    assert forgetful.prevX is None


def test_a_call_that_is_refused_leaves_the_kept_x_as_it_was() -> None:
    layer, model = QRNNLayer(3, 4, window=2, save_prev_x=True), QRNN(3, 4, 2, window=2, save_prev_x=True)
    layer(torch.rand(5, 2, 3))
    model(torch.rand(5, 2, 3))
    kept = [layer.prevX, *(one.prevX for one in model.layers)]
    with pytest.raises(ValueError, match=r"hidden has shape \[2, 5\]"):
        layer(torch.rand(5, 2, 3), torch.zeros(2, 5))
    for states, which in ((torch.zeros(2, 3, 4), 0), ([torch.zeros(2, 4), torch.zeros(2, 5)], 1), ([None, torch.zeros(4)], 1)):
        with pytest.raises(ValueError, match=rf"hidden\[{which}\] has shape .*; expected \[2, 4\]"):
            model(torch.rand(5, 2, 3), states)
    assert all(a is b for a, b in zip(kept, [layer.prevX, *(one.prevX for one in model.layers)], strict=True))


def test_another_batch_size_is_refused_by_torchqrnn_s_layer_and_fitted_by_fastai_s() -> None:
    layer = QRNNLayer(3, 4, window=2, save_prev_x=True)
    layer(torch.rand(5, 4, 3))
    with pytest.raises(ValueError, match=r"X has a batch of 2, .* of 4: call reset\(\)"):
        layer(torch.rand(5, 2, 3))
    layer.reset()
    layer(torch.rand(5, 2, 3))
    for batch_first in (True, False):
        other = fastai.QRNNLayer(3, 4, window=2, save_prev_x=True, batch_first=batch_first).double()
        first, second = normal(2, 4, 3), normal(3, 4, 3)
        for rows in (2, 4):  # of 3: some go, or new ones come, which see zeros
            other.reset()
            other(time_first(other, first[:, :3]))
            kept = torch.zeros(1, rows, 3, dtype=torch.float64)
            kept[0, : min(rows, 3)] = first[-1, : min(rows, 3)]
            h = time_first(other, other(time_first(other, second[:, :rows]))[0])
            assert_close(h, written_out(other, second[:, :rows], kept=kept)[0])


# ---- masks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
@pytest.mark.parametrize("options", [dict(), dict(bidirectional=True), dict(bidirectional=True, batch_first=True)], ids=str)
@pytest.mark.parametrize("kind", [QRNN, fastai.QRNN], ids=["torchqrnn", "fastai"])
def test_sequences_end_to_end_equal_the_pieces(kind: Any, options: dict[str, Any], dtype: Any) -> None:
    model = kind(3, 4, 2, **dict(batch_first=False) | options, window=3).double()
    x = normal(9, 1, 3)
    pieces = x.split([4, 1, 4])
    starts = torch.zeros(9, 1, dtype=dtype)
    starts[[0, 4, 5]] = 1
    h, _ = model(time_first(model, x), starts=time_first(model, starts))
    alone = torch.cat([time_first(model, model(time_first(model, piece))[0]) for piece in pieces])
    assert_close(time_first(model, h), alone)
    ours, theirs = (torch.autograd.grad(a.square().sum(), list(model.parameters())) for a in (h, alone))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("backward", [False, True])
def test_starts_and_the_kept_x(window: int, backward: bool) -> None:
    """What is kept ends where its sequence does: chunks with starts equal the whole with starts."""
    layer = QRNNLayer(3, 4, window=window, save_prev_x=True, backward=backward).double()
    x = normal(8, 3, 3)
    starts = torch.zeros(8, 3, dtype=torch.bool)
    starts[4, 0] = starts[3, 1] = starts[5, 1] = True  # at the cut, beside it, and none
    whole, _ = layer(x, starts=starts)
    layer.reset()
    order = (slice(4, 8), slice(0, 4)) if backward else (slice(0, 4), slice(4, 8))
    parts, c = [], None
    for part in order:
        if backward and part.start == 0 and c is not None:
            c = torch.where(starts[4].view(1, 3, 1), torch.zeros_like(c), c)  # c0 is what a reversed column begins with
        h, c = layer(x[part], c, starts=starts[part])
        parts.append(h)
    assert_close(torch.cat(parts[::-1] if backward else parts), whole)


@pytest.mark.parametrize("options", [dict(), dict(bidirectional=True), dict(bidirectional=True, batch_first=True)], ids=str)
@pytest.mark.parametrize("kind", [QRNN, fastai.QRNN], ids=["torchqrnn", "fastai"])
def test_a_padded_batch_equals_single_sequences_whatever_lies_in_the_padding(kind: Any, options: dict[str, Any]) -> None:
    model = kind(3, 4, 2, **dict(batch_first=False) | options, window=2).double()
    x, lengths = normal(6, 3, 3), (6, 4, 1)
    pad = torch.arange(6).unsqueeze(1) >= torch.tensor(lengths)
    h, c = model(time_first(model, x.masked_fill(pad.unsqueeze(-1), 1e3)), mask_pad=time_first(model, pad.float()))
    for row, length in enumerate(lengths):
        alone, state = model(time_first(model, x[:length, row : row + 1]))
        assert_close(time_first(model, h)[:length, row], time_first(model, alone)[:, 0])
        assert_close(c[:, row], state[:, 0])
        assert not time_first(model, h)[length:, row].any()


# ---- `linear` is a module ---------------------------------------------------------------------------------------------------


class Dropped(nn.Module):
    """A linear map whose weight is drawn anew at each call, as awd-lstm-lm's WeightDrop and fastai's WeightDropout do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.module, self.calls = linear, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.linear(x, self.module.weight * 0.5, self.module.bias)


@BOTH
@pytest.mark.parametrize("window", [1, 2])
def test_linear_is_called_as_a_module_once_a_call(kind: Any, window: int) -> None:
    layer, x = kind(3, 4, window=window).double(), normal(5, 5, 3)
    plain = layer(x)[0]
    seen = []
    handle = layer.linear.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    assert torch.equal(layer(x)[0], plain)
    assert seen == [(5, 5, 3 * window)]
    handle.remove()
    halved = copy.deepcopy(layer)
    with torch.no_grad():
        halved.linear.weight.mul_(0.5)
    layer.linear = Dropped(layer.linear)
    assert_close(layer(x)[0], halved(x)[0])
    assert layer.linear.calls == 1
    layer.linear(x.new_zeros(1, 3 * window)).sum().backward()  # its parameters are found
    assert layer.linear.module.weight.grad is not None


def test_window_1_copies_nothing_and_a_wider_one_joins_once() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if name in ("cat", "stack", "clone", "copy_", "contiguous", "_to_copy", "index", "constant_pad_nd"):
                big = args[0][0] if isinstance(args[0], list | tuple) else args[0]
                if big.numel() >= 6 * 2 * 8:
                    copies.append(name)
            return func(*args, **(kwargs or {}))

    for batch_first in (False, True):
        for window, expected in ((1, []), (2, ["constant_pad_nd", "cat"]), (4, ["constant_pad_nd", "cat"])):
            layer = QRNNLayer(8, 16, window=window, batch_first=batch_first)
            copies: list[str] = []
            with Copies(), torch.no_grad():
                layer(torch.rand(*((2, 6) if batch_first else (6, 2)), 8))
            assert copies == expected


# ---- what they work under ---------------------------------------------------------------------------------------------------

MODELS = {
    "torchqrnn": lambda **o: QRNN(4, 6, 2, window=2, **o),
    "torchqrnn, two directions": lambda **o: QRNN(4, 6, 2, window=3, bidirectional=True, batch_first=True, **o),
    "fastai": lambda **o: fastai.QRNN(4, 6, 2, batch_first=False, **o),
    "fastai, two directions": lambda **o: fastai.QRNN(4, 6, 2, bidirectional=True, **o),
}
models = pytest.mark.parametrize("name", MODELS)


@models
def test_compiled_as_one_graph(name: str) -> None:
    model, x = MODELS[name](), torch.rand(5, 5, 4)
    starts = torch.zeros(5, 5, dtype=torch.bool)
    starts[2:3, 2:3] = True
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for masks in ({}, dict(starts=starts)):
        for a, b in zip(compiled(x, **masks), model(x, **masks), strict=True):
            torch.testing.assert_close(a, b)
        compiled(x, **masks)[0].sum().backward()


def test_compiled_with_the_kept_x_and_zoneout() -> None:
    model, x = QRNN(4, 6, 2, window=2, save_prev_x=True), torch.rand(5, 3, 4)
    expected = [model(x)[0], model(x)[0]]
    model.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for one in expected:
        torch.testing.assert_close(compiled(x)[0], one)
    torch.compile(fastai.QRNN(4, 6, 2, zoneout=0.3), backend="aot_eager", fullgraph=True)(x)[0].sum().backward()
    torch.compile(QRNN(4, 6, 2, zoneout=0.3), backend="aot_eager", fullgraph=True)(x)[0].sum().backward()


@models
def test_exported_for_any_length_and_batch(name: str) -> None:
    model = MODELS[name]().eval()
    first, second = torch.export.Dim("first"), torch.export.Dim("second")
    program = torch.export.export(model, (torch.rand(5, 3, 4),), dynamic_shapes=({0: first, 1: second},)).module()
    for length, batch in ((5, 3), (2, 7), (9, 2)):
        x = torch.rand(length, batch, 4)
        for a, b in zip(program(x), model(x), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_keeps_x_is_not_exported_without_a_word() -> None:
    model, x = QRNN(4, 6, window=2, save_prev_x=True).eval(), torch.rand(5, 3, 4)
    model(x)
    kept = model.layers[0].prevX
    for export in (lambda: torch.export.export(model, (x,)), lambda: torch.jit.trace(model, x)):
        with pytest.raises(RuntimeError, match="save_prev_x keeps x in the module"):
            export()
    model.layers[0].save_prev_x = False  # what was kept would be in the program
    with pytest.raises(RuntimeError, match=r"save_prev_x keeps x in the module.*call reset\(\)"):
        torch.export.export(model, (x,))
    assert model.layers[0].prevX is kept
    model.reset()
    assert torch.equal(torch.export.export(model, (x,)).module()(x)[0], model(x)[0])


def test_what_keeps_x_is_not_mapped() -> None:
    layer, x = QRNNLayer(4, 5, window=2, save_prev_x=True), torch.rand(3, 2, 4)
    with pytest.raises(RuntimeError, match="save_prev_x keeps x in the module"):
        torch.vmap(lambda one: layer(one)[0])(torch.rand(7, 3, 2, 4))
    assert layer(x)[0].shape == (3, 2, 5)


@models
def test_autocast_runs_the_gemm_in_its_dtype_and_keeps_the_state_in_float32(name: str) -> None:
    model, x = MODELS[name](), torch.rand(5, 5, 4)
    expected, _ = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        h, c = model(x)
        h, c = model(x, c)  # goes round
    assert (h.dtype, c.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert float((model(x)[0] - expected).abs().max()) < 0.05
    half = copy.deepcopy(model).bfloat16()
    h, c = half(x.bfloat16(), c.bfloat16())
    assert (h.dtype, c.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("options", [dict(zoneout=0.3), dict(save_prev_x=True)], ids=str)
def test_checkpointing_gives_the_gradients_of_the_call(use_reentrant: bool, options: dict[str, Any]) -> None:
    model, x = QRNN(3, 4, 2, window=2, **options).double(), normal(5, 2, 3)
    results = []
    for run in (model, lambda chunk: checkpoint(model, chunk, use_reentrant=use_reentrant)):
        model.reset()
        torch.manual_seed(7)
        for chunk in (x[:3], x[3:]):
            model.zero_grad()
            run(chunk.clone().requires_grad_())[0].square().sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_and_a_reset_before_the_backward(use_reentrant: bool) -> None:
    layer, a, b = QRNNLayer(3, 4, window=2, save_prev_x=True).double(), normal(3, 2, 3), normal(3, 2, 3, seed=2)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        layer.reset()
        layer(a)
        x = b.clone().requires_grad_()
        h, _ = run(x)
        layer.reset()
        h.square().sum().backward()
        assert layer.prevX is None
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_checkpointing_of_a_call_that_is_not_the_last_is_refused_where_x_is_kept() -> None:
    model, x = QRNN(3, 4, 1, window=2, save_prev_x=True).double(), normal(6, 2, 3).requires_grad_()
    outputs = [checkpoint(model, chunk, use_reentrant=False)[0] for chunk in x.split(3)]
    with pytest.raises(RuntimeError, match="save_prev_x under activation checkpointing"):
        sum(out.sum() for out in outputs).backward()


def test_gradients_of_each_sample_and_copies() -> None:
    model, x = QRNN(3, 4, 2, window=2), torch.rand(5, 6, 3)

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (one.unsqueeze(1),))[0].square().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 1))(dict(model.named_parameters()), x)
    model(x)[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x)[0], copy.deepcopy(model)(x)[0])


# ---- the other names --------------------------------------------------------------------------------------------------------


def test_forget_mult_is_its_equation_in_both_packages_orders() -> None:
    f, x, h0 = normal(5, 2, 3).sigmoid().requires_grad_(), normal(5, 2, 3, seed=2).requires_grad_(), normal(2, 3).requires_grad_()
    for given in (None, h0, h0.unsqueeze(0)):
        state, states = torch.zeros(2, 3, dtype=torch.float64) if given is None else h0, []
        for t in range(5):
            state = f[t] * x[t] + (1 - f[t]) * state
            states.append(state)
        expected = torch.stack(states)
        leaves = [f, x] + ([] if given is None else [h0])
        expected_gradients = torch.autograd.grad(expected.square().sum(), leaves, retain_graph=True)
        for ours in (ForgetMult()(f, x, given), ForgetMult()(f, x, hidden_init=given, use_cuda=False)):
            assert_close(ours, expected)
            for a, b in zip(torch.autograd.grad(ours.square().sum(), leaves), expected_gradients, strict=True):
                assert_close(a, b)
        assert_close(fastai.forget_mult_CPU(x, f, given, batch_first=False), expected)
        swapped = fastai.ForgetMultGPU.apply(x.transpose(0, 1), f.transpose(0, 1), given)
        assert_close(swapped.transpose(0, 1), expected)
        for other in (fastai.ForwardForgetMult.apply(x, f, given, False), fastai.ForgetMultGPU(False)(x, f, given)):
            assert_close(other, expected)
        for other in (
            fastai.BwdForgetMult.apply(x.flip(0), f.flip(0), given, False),
            fastai.BwdForgetMultGPU.apply(x.flip(0), f.flip(0), given, False),
            fastai.ForgetMultGPU.apply(x.flip(0), f.flip(0), given, False, True),
            fastai.forget_mult_CPU(x.flip(0), f.flip(0), given, False, backward=True),
        ):
            assert_close(other.flip(0), expected)
    assert fastai.dispatch_cuda(fastai.ForgetMultGPU, fastai.forget_mult_CPU, x) is fastai.forget_mult_CPU


IMPORTS = """
import sys
import cusru.torch
cusru.torch.install_as_torchqrnn()
cusru.torch.install_as_torchqrnn()
import torchqrnn, torchqrnn.qrnn
from torchqrnn import QRNN, QRNNLayer, ForgetMult
from torchqrnn.forget_mult import ForgetMult, CPUForgetMult, GPUForgetMult
from torchqrnn.qrnn import QRNN as same
assert QRNN is same is cusru.torch.QRNN and QRNNLayer is cusru.torch.QRNNLayer and ForgetMult is CPUForgetMult
assert "cupy" not in sys.modules
"""


def test_install_as_torchqrnn_makes_the_imports_of_other_code_work() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)


def test_install_as_torchqrnn_refuses_to_hide_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchqrnn", ModuleType("torchqrnn"))
    with pytest.raises(RuntimeError, match=r"torchqrnn .*imported already.*install_as_torchqrnn"):
        cusru.torch.install_as_torchqrnn()


THEIRS = {  # module, class -> the attributes that an object of it was pickled with
    ("torchqrnn.qrnn", "QRNNLayer"): "window input_size hidden_size zoneout save_prev_x prevX output_gate use_cuda",
    ("torchqrnn.qrnn", "QRNN"): "input_size hidden_size num_layers bias batch_first dropout bidirectional",
    ("fastai.text.models.qrnn", "QRNNLayer"): "save_prev_x zoneout window output_gate batch_first backward prevX",
    ("fastai.text.models.qrnn", "QRNN"): "n_layers batch_first dropout bidirectional",
}


@pytest.mark.parametrize("package", ["torchqrnn", "fastai"])
def test_a_model_that_the_package_pickled_whole_loads(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = QRNN(3, 4, 2, window=2) if package == "torchqrnn" else fastai.QRNN(3, 4, 2, bidirectional=True)
    classes = {}
    for (module, name), attributes in THEIRS.items():
        if module.startswith(package):
            classes[name] = type(name, (nn.Module,), {"__module__": module, "kept": attributes.split()})
            for parent in itertools.accumulate(module.split("."), "{}.{}".format):
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    for one in classes.values():
        setattr(sys.modules[one.__module__], one.__name__, one)

    def theirs(module: Any) -> Any:
        """The same with their classes, and no attribute that they have not."""
        if type(module).__name__ not in classes:
            return module
        made = classes[type(module).__name__]()
        for name in made.kept:
            setattr(made, name, getattr(module, name))
        for name, child in module.named_children():
            child = nn.ModuleList(map(theirs, child)) if isinstance(child, nn.ModuleList) else child
            made.add_module(name, child)
        return made

    file = io.BytesIO()
    torch.save(theirs(ours), file)
    file.seek(0)
    for module, _ in THEIRS:
        if module.startswith(package):
            monkeypatch.setitem(sys.modules, module, cusru.torch if package == "torchqrnn" else fastai)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(ours)
    x = torch.rand(5, 5, 3)
    assert torch.equal(loaded(x)[0], ours(x)[0])
    assert "QRNNLayer" in repr(loaded)


# ---- bad input --------------------------------------------------------------------------------------------------------------

X, STATE = torch.rand(4, 2, 3), torch.zeros(2, 3)
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "bias": (lambda: QRNN(3, 4, bias=False), ValueError, r"bias=False is not supported.*linear"),
    "bias, fastai": (lambda: fastai.QRNN(3, 4, bias=False), ValueError, r"bias=False is not supported.*linear"),
    "kept x": (lambda: QRNN(3, 4, bidirectional=True, save_prev_x=True), ValueError, r"save_prev_x=True excludes bidirectional"),
    "kept x, fastai": (
        lambda: fastai.QRNN(3, 4, bidirectional=True, save_prev_x=True), ValueError, r"save_prev_x=True excludes bidirectional"
    ),
    "layers": (lambda: QRNN(3, 4, bidirectional=True, layers=[QRNNLayer(3)]), ValueError, r"layers cannot be given"),
    "layers' order": (lambda: QRNN(3, 3, batch_first=True, layers=[QRNNLayer(3)]), ValueError, r"layers\[0\] has batch_first"),
    "no layer": (lambda: QRNN(3, 3, layers=[3]), TypeError, r"layers\[0\] must be a torch.nn.Module, not int"),
    "window": (lambda: QRNNLayer(3, window=0), ValueError, r"window must be an integer of at least 1; got 0"),
    "zoneout": (lambda: QRNNLayer(3, zoneout=1.5), ValueError, r"zoneout must be a probability, from 0 to 1; got 1.5"),
    "zoneout, fastai": (lambda: fastai.QRNNLayer(3, zoneout=1), ValueError, r"zoneout must be a probability, .* below 1; got 1"),
    "dropout": (lambda: QRNN(3, 4, dropout=-1), ValueError, r"dropout must be a probability"),
    "size": (lambda: QRNN(0, 4), ValueError, r"input_size must be an integer of at least 1"),
    "layer's flag": (lambda: QRNNLayer(3, output_gate="no"), TypeError, r"output_gate"),
    "X": (lambda: QRNNLayer(3)(torch.rand(4, 3)), ValueError, r"X has shape \[4, 3\]; expected 3 dimensions, \(L, B, "),
    "inp": (lambda: fastai.QRNNLayer(3)(torch.rand(4, 2, 5)), ValueError, r"inp has shape .*last size of input_size = 3"),
    "input": (lambda: QRNN(3, 3)(torch.rand(4, 2, 5)), ValueError, r"input has shape .*last size of input_size = 3"),
    "type": (lambda: QRNN(3, 3)([1]), TypeError, r"input must be a torch.Tensor, not list"),
    "type of X": (lambda: QRNNLayer(3)(None), TypeError, r"X must be a torch.Tensor, not NoneType"),
    "dtype": (lambda: QRNNLayer(3)(X.double()), TypeError, r"X has dtype torch.float64, and the parameters"),
    "dtype of hidden": (lambda: QRNNLayer(3)(X, STATE.long()), TypeError, r"hidden has dtype"),
    "device": (lambda: QRNNLayer(3)(X, torch.zeros(2, 3, device="meta")), ValueError, r"hidden is on meta"),
    "hidden": (lambda: QRNNLayer(3)(X, torch.zeros(3, 3)), ValueError, r"hidden has shape \[3, 3\]; expected \[2, 3\]"),
    "hid": (lambda: fastai.QRNNLayer(3)(X, torch.zeros(3)), ValueError, r"hid has shape \[3\]; expected \[4, 3\]"),
    "states": (lambda: QRNN(3, 3, 2)(X, torch.zeros(1, 2, 3)), ValueError, r"hidden has 1 states; expected 2"),
    "a bool for a number": (lambda: fastai.QRNN(3, 4, 2, True, True), ValueError, r"dropout must be a number.*bias"),
    "states' type": (lambda: QRNN(3, 3, 2)(X, 3), TypeError, r"hidden must be a torch.Tensor, or a sequence .* not int"),
    "states' number": (lambda: QRNN(3, 3, 2)(X, []), ValueError, r"hidden has 0 states; expected 2"),
    "states, fastai": (
        lambda: fastai.QRNN(3, 3, 2, bidirectional=True)(X, torch.zeros(2, 2, 3)), ValueError, r"hid has 2 .*4"
    ),
    "starts": (lambda: QRNN(3, 3)(X, starts=torch.zeros(2, 4)), ValueError, r"starts has shape .*expected \[4, 2\]"),
    "mask_pad": (
        lambda: QRNNLayer(3, window=2, save_prev_x=True)(X, mask_pad=torch.zeros(4, 2)), ValueError,
        r"mask_pad cannot be given with save_prev_x"
    ),
    "f": (lambda: ForgetMult()(torch.rand(2, 3), torch.rand(2, 3)), ValueError, r"f has shape \[2, 3\]"),
    "hidden_init": (
        lambda: ForgetMult()(X, X, torch.rand(3, 3)), ValueError, r"hidden_init has shape \[3, 3\]"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_had_is_refused_by_name(case: str) -> None:
    call, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        call()
