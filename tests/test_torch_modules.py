"""SRUCell and SRU of cusru.torch: what they promise beyond the sru package, which test_torch_peers.py holds them against."""

from __future__ import annotations

import copy
import inspect
import io
import os
import pickle
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import scripted
from test_errors import raises

torch = pytest.importorskip("torch", reason='needs torch: pip install "cusru[torch]"')

from torch import nn  # noqa: E402
from torch.func import functional_call, grad, stack_module_state, vmap  # noqa: E402
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from cusru.torch import SRU, SRUCell, classic, sru  # noqa: E402

L, B, I, H = 9, 4, 6, 5
LENGTHS = torch.tensor([9, 5, 5, 1])
ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated in sru.*", "ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*_prims_common.*:FutureWarning"
)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def model(kind: Any = SRU, *args: Any, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    made = kind(*(args or (I, H)), **options).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return made


class Seen(TorchDispatchMode):
    """The names of the operators that run, with the largest size that each makes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.name().removeprefix("aten::").split(".")[0]
        self.names.append(name)
        made = result.numel() if isinstance(result, torch.Tensor) else 0
        self.largest[name] = max(self.largest.get(name, 0), made)
        return result


COPIES = ("copy_", "clone", "contiguous", "_to_copy", "cat", "_reshape_copy", "index_select")


# ---- batch first, masks, initial states --------------------------------------------------------------------------------

STACKS = {
    "plain": dict(),
    "two directions, dropout": dict(bidirectional=True, dropout=0.4, rescale=True),
    "normalised before": dict(layer_norm=True, projection_size=3),
    "normalised after": dict(layer_norm=True, normalize_after=True, rnn_dropout=0.3),
    "input first": dict(proj_input_to_hidden_first=True, nn_rnn_compatible_return=True, use_tanh=True),
    "v1": dict(v1=True, has_skip_term=False),
}


@pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)
def test_batch_first_is_the_same_transposed_and_copies_nothing(options):
    plain, first = model(**options), model(batch_first=True, **options)
    x = normal(L, B, I).requires_grad_()
    y = x.detach().transpose(0, 1).contiguous().requires_grad_()
    mask = torch.arange(L)[:, None] >= torch.tensor([9, 4, 1, 0])
    torch.manual_seed(1)
    h, c = plain(x, mask_pad=mask)
    torch.manual_seed(1)
    with Seen() as seen:
        g, d = first(y, mask_pad=mask.T)
    assert {n for n in COPIES if seen.largest.get(n, 0) >= L * B * H} == set()
    assert g.is_contiguous()
    torch.testing.assert_close((g.transpose(0, 1), d), (h, c), rtol=1e-12, atol=1e-12)
    h.sin().sum().backward()
    g.sin().sum().backward()
    torch.testing.assert_close(y.grad.transpose(0, 1), x.grad, rtol=1e-11, atol=1e-11)


def test_without_batch_first_h_and_c_are_contiguous_whatever_the_input():
    """As sru has it, so that h.view works."""
    x = normal(B, L, I).transpose(0, 1)
    for layers in (model(), model(SRUCell), model(SRU, I, H, 1, bidirectional=True, nn_rnn_compatible_return=True)):
        assert all(a.is_contiguous() for a in layers(x))
        torch.testing.assert_close(layers(x), layers(x.contiguous()), rtol=0, atol=0)


def test_batch_first_slices_stay_batch_first_and_lengths_need_not_be_known():
    layers = model(SRU, I, H, 2, batch_first=True, layer_norm=True)
    x = normal(B, 2 * L, I + 2)[:, 3 : 3 + L, :I]
    assert layers(x)[0].is_contiguous()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda x, keep: layers(x[:, keep])[0], fullgraph=True, backend="aot_eager")
        keep = torch.arange(L) % 3 > 0
        torch.testing.assert_close(compiled(x, keep), layers(x[:, keep])[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16, torch.float64])
def test_padding_is_what_is_not_zero_in_a_mask_of_any_dtype(dtype):
    layers, x = model(num_layers=2, bidirectional=True), normal(L, B, I)
    padded = torch.arange(L)[:, None] >= torch.tensor([9, 4, 1, 0])
    mask = (padded * 3).to(dtype)
    h, c = layers(x, mask_pad=mask)
    assert not h[padded].any()
    for i, length in enumerate((9, 4, 1)):
        alone, state = layers(x[:length, i : i + 1])
        torch.testing.assert_close(h[:length, i : i + 1], alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(c[:, i : i + 1], state, rtol=1e-12, atol=1e-12)
    assert not c[:, 3].any()


def test_h_at_a_padded_step_is_0_or_with_a_normalisation_after_it_that_one_s_bias():
    mask_pad = torch.arange(L)[:, None] >= LENGTHS
    assert not model()(normal(L, B, I), mask_pad=mask_pad)[0][mask_pad].any()
    layers = model(layer_norm=True, normalize_after=True)
    h = layers(normal(L, B, I), mask_pad=mask_pad)[0][mask_pad]
    assert torch.equal(h, layers.rnn_lst[-1].layer_norm.bias.expand_as(h))


def test_a_nan_in_padding_reaches_the_weights_gradient_alone():
    """By the matrix product's 0 * NaN, as docs/torch.md warns."""
    layers, mask_pad = model(SRU, I, I, 1), torch.arange(L)[:, None] >= LENGTHS
    given = [normal(L, B, I), normal(L, B, I)]
    given[1][mask_pad] = float("nan")
    results = [layers(x, mask_pad=mask_pad) for x in given]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    gradients = [torch.autograd.grad(sum(a.sum() for a in r), list(layers.parameters())) for r in results]
    names = [n for (n, _), a, b in zip(layers.named_parameters(), *gradients, strict=True) if not torch.equal(a, b)]
    assert names == ["rnn_lst.0.weight"]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_c0_and_c_go_round_in_both_shapes(bidirectional):
    options = dict(num_layers=3, bidirectional=bidirectional)
    plain, compatible = model(**options), model(nn_rnn_compatible_return=True, **options)
    directions = 2 if bidirectional else 1
    x, c0 = normal(L, B, I), normal(3, B, directions * H)
    as_rnn = c0.view(3, B, directions, H).transpose(1, 2).reshape(3 * directions, B, H)
    h, c = plain(x, c0)
    for given in (c0, as_rnn):
        g, d = compatible(x, given)
        assert torch.equal(g, h)
        assert d.shape == (3 * directions, B, H)
        assert torch.equal(d, c.view(3, B, directions, H).transpose(1, 2).reshape(d.shape))
    if not bidirectional:
        whole = plain(x, c0)
        begin = plain(x[:4], c0)
        end = plain(x[4:], begin[1])
        torch.testing.assert_close(torch.cat([begin[0], end[0]]), whole[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(end[1], whole[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_a_packed_sequence_comes_back_packed(batch_first, enforce_sorted):
    layers = model(bidirectional=True, batch_first=batch_first)
    lengths = torch.tensor([9, 7, 7, 2] if enforce_sorted else [2, 9, 5, 7])
    x = normal(L, B, I)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    h, c = layers(packed)
    unpacked, found = pad_packed_sequence(h)
    assert torch.equal(found, lengths)
    for i, length in enumerate(lengths.tolist()):
        one = x[:length, i : i + 1]
        alone, state = layers(one.transpose(0, 1) if batch_first else one)
        torch.testing.assert_close(
            unpacked[:length, i : i + 1], alone.transpose(0, 1) if batch_first else alone, rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(c[:, i : i + 1], state, rtol=1e-12, atol=1e-12)


def packings():
    """(how it came about, PackedSequence): sequences of one length side by side, which another sort may change over."""
    lengths = [3] * 8 + [2] * 7 + [1] * 5
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(2))
    x, mixed = normal(3, len(lengths), I), torch.tensor(lengths)[order]
    yield "sorted", pack_padded_sequence(x, lengths)
    yield "in any order", pack_padded_sequence(x, mixed, enforce_sorted=False)
    yield "batch first", pack_padded_sequence(x.transpose(0, 1), mixed, batch_first=True, enforce_sorted=False)
    yield "of a list", pack_sequence([x[:length, i] for i, length in enumerate(mixed.tolist())], enforce_sorted=False)
    one = pack_padded_sequence(x, lengths)
    yield "by hand", PackedSequence(one.data, one.batch_sizes)
    yield "by hand, an order of its own", PackedSequence(one.data, one.batch_sizes, order)
    yield "by hand, the inverse of one", PackedSequence(one.data, one.batch_sizes, None, order)


@pytest.mark.parametrize("packed", [pytest.param(packed, id=how) for how, packed in packings()])
@pytest.mark.parametrize("batch_first", [False, True])
def test_rows_of_a_packed_sequence_keep_their_places_as_those_of_an_lstm_do(packed, batch_first):
    layers = model(SRU, I, I, batch_first=batch_first)
    c0 = normal(2, 20, I)
    data = packed.data.requires_grad_()
    h, c = layers(packed, c0)
    of_lstm, _ = torch.nn.LSTM(I, I, dtype=torch.float64)(packed, (c0[:1], c0[:1]))
    assert h._fields == of_lstm._fields
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        ours, theirs = getattr(h, name), getattr(of_lstm, name)
        assert ours is theirs is None or torch.equal(ours, theirs), name
    padded, lengths = pad_packed_sequence(packed)
    for i, length in enumerate(lengths.tolist()):  # of the batch as it was before packing, and so c0 and c
        one = padded[:length, i : i + 1]
        alone, last = layers(one.transpose(0, 1) if batch_first else one, c0[:, i : i + 1])
        torch.testing.assert_close(c[:, i : i + 1], last, rtol=1e-12, atol=1e-12)
        alone = alone.transpose(0, 1) if batch_first else alone
        place = i if packed.unsorted_indices is None else int(packed.unsorted_indices[i])
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), packed.batch_sizes.cumsum(0)[:-1]])[:length]
        torch.testing.assert_close(h.data[starts + place], alone[:, 0], rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(h.data[0].sum(), data)
    assert grad[0].any()
    assert not grad[1:20].any()  # a row's gradient goes to its own sequence


# ---- dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [dict(), dict(input_size=H, bidirectional=False), dict(layer_norm=True, dropout=0.2, bidirectional=True)]
)
def test_autocast_runs_the_recurrence_in_float32_unless_told_otherwise(options):
    size = options.pop("input_size", I)
    for low, expected in ((False, torch.float32), (True, torch.bfloat16)):
        layers = model(SRU, size, H, dtype=torch.float32, amp_recurrence_fp16=low, **options)
        x = normal(L, B, size, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            h, c = layers(x, normal(2, B, layers.output_size, dtype=torch.float32))
        assert (h.dtype, c.dtype) == (expected, torch.float32)
        torch.manual_seed(0)
        layers.eval()
        with torch.autocast("cpu", torch.bfloat16):
            h, c = layers(x)
        full = layers(x)
        torch.testing.assert_close((h.float(), c), full, rtol=0.1, atol=0.05)
        h.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layers.parameters())
        assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_16_bits_keeps_its_dtype_over_a_float32_state(dtype):
    layers = model(dtype=dtype, rescale=True, num_layers=3)
    h, c = layers(normal(L, B, I, dtype=dtype))
    assert (h.dtype, c.dtype) == (dtype, torch.float32)
    layers(normal(L, B, I, dtype=dtype), c)[0].sum().backward()
    assert {p.grad.dtype for p in layers.parameters()} == {dtype}


def test_a_default_dtype_of_float64_makes_layers_of_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        layers = SRU(I, I, rescale=True)
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in layers.parameters()} == {torch.float64}
    assert layers(normal(L, B, I))[0].dtype == torch.float64


# ---- v1 and state_dicts -----------------------------------------------------------------------------------------------


def test_v1_uses_a_weight_c_that_is_loaded_or_written_and_reads_nothing_off_the_device():
    cell, full, x, value = model(SRUCell, v1=True), model(SRUCell), normal(L, B, I), normal(2 * H)
    assert not cell.weight_c.any()
    assert not cell.weight_c.requires_grad
    with Seen() as seen:
        initial = cell(x)[0]
    assert "_local_scalar_dense" not in seen.largest
    full.load_state_dict(cell.state_dict() | dict(weight_c=value))
    expected = full(x)[0]
    assert not torch.allclose(expected, initial)
    assert torch.equal(functional_call(cell, dict(weight_c=value), (x,))[0], expected)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], initial, rtol=1e-12, atol=1e-12)
    cell.load_state_dict(full.state_dict())
    for run in (cell, copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert torch.equal(run(x)[0], expected)
    torch.testing.assert_close(compiled(x)[0], expected, rtol=1e-12, atol=1e-12)
    cell.reset_parameters()
    cell.weight_c.data.copy_(value)
    full.load_state_dict(cell.state_dict())
    assert torch.equal(cell(x)[0], full(x)[0])


def test_v1_with_a_weight_c_that_learns_uses_it():
    cell = model(SRUCell, v1=True)
    cell.weight_c.requires_grad_()
    cell(normal(L, B, I))[0].sum().backward()
    assert cell.weight_c.grad.abs().sum() > 0


def test_scale_x_is_the_loaded_one():
    cell, x = model(SRUCell, H, H, rescale=True), normal(L, B, H)
    before = cell(x)[0]
    cell.load_state_dict(cell.state_dict() | dict(scale_x=torch.tensor([3.25])))
    assert not torch.allclose(cell(x)[0], before)
    expected = sru(
        (x.reshape(-1, H) @ cell.weight).view(L, B, H, 3),
        x,
        bias=cell.bias,
        weight_c=cell.weight_c,
        scale_x=3.25,
        mask_target="gate",
    )
    torch.testing.assert_close(cell(x), expected, rtol=1e-12, atol=1e-12)
    unscaled = model(SRUCell, H, H, rescale=False)
    before = unscaled(x)[0]
    unscaled.scale_x.fill_(9.0)
    assert torch.equal(unscaled(x)[0], before)


def test_a_state_dict_that_does_not_fit_names_the_keys():
    state = model().state_dict()
    missing = {n: a for n, a in state.items() if n != "rnn_lst.1.weight_c"}
    raises(RuntimeError, [r"rnn_lst\.1\.weight_c", "Missing"], model().load_state_dict, state_dict=missing)
    raises(
        RuntimeError,
        [r"rnn_lst\.0\.old", "Unexpected"],
        model().load_state_dict,
        state_dict=state | {"rnn_lst.0.old": state["rnn_lst.0.bias"]},
    )
    raises(
        RuntimeError,
        [r"rnn_lst\.0\.weight", "size mismatch", r"\[6, 20\]"],
        model().load_state_dict,
        state_dict=model(SRU, I, H, 2, bidirectional=True).state_dict(),
    )


# ---- torch's own ways of running a model --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)
def test_compiled_as_one_graph(options):
    layers = model(**options).eval()
    x, mask = normal(L, B, I), torch.arange(L)[:, None] >= torch.tensor([9, 4, 1, 0])
    torch._dynamo.reset()
    found = torch.compile(layers, fullgraph=True, backend="aot_eager")(x, mask_pad=mask)
    torch.testing.assert_close(found, layers(x, mask_pad=mask), rtol=1e-12, atol=1e-12)
    loss = [a.sin().sum() for a in (found[0], layers(x, mask_pad=mask)[0])]
    wanted = [p for p in layers.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(one, wanted, allow_unused=True) for one in loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_trains_compiled_with_dropout():
    torch._dynamo.reset()
    layers = model(SRU, H, H, dropout=0.5, dtype=torch.float32)
    step = torch.compile(lambda x: layers(x)[0].square().mean(), fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.5)
    x = normal(L, B, H, dtype=torch.float32)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = step(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("batch_first", [False, True])
def test_export_for_any_length_and_batch(batch_first):
    layers = model(bidirectional=True, layer_norm=True, batch_first=batch_first).eval()
    sizes = {0: torch.export.Dim("first"), 1: torch.export.Dim("second")}
    exported = torch.export.export(layers, (normal(L, B, I),), dynamic_shapes=(sizes,)).module()
    for first, second in ((2, 3), (50, 3), (3, 70)):
        x = normal(first, second, I)
        torch.testing.assert_close(exported(x), layers(x), rtol=1e-12, atol=1e-12)


@scripted
@pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)
def test_scripted_saved_and_loaded(options):
    for kind in (SRU, SRUCell):
        own = {
            n: v
            for n, v in options.items()
            if n not in ("projection_size", "proj_input_to_hidden_first", "nn_rnn_compatible_return")
        }
        layers = model(kind, **(options if kind is SRU else own))
        x = normal(L, B, I).requires_grad_()
        mask = torch.arange(L)[:, None] >= torch.tensor([9, 4, 1, 0])
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(layers), file)
        file.seek(0)
        loaded = torch.jit.load(file)
        for training in (False, True):
            layers.train(training)
            loaded.train(training)
            torch.manual_seed(3)
            expected = layers(x, mask_pad=mask)
            torch.manual_seed(3)
            found = loaded(x, mask_pad=mask)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(
                *(torch.autograd.grad(h.sin().sum(), x)[0] for h, _ in (found, expected)), rtol=1e-11, atol=1e-11
            )


@scripted
def test_traced_and_saved():
    layers, x = model(bidirectional=True).eval(), normal(L, B, I)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(layers, (x,)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    longer = normal(50, 2, I)
    assert torch.equal(loaded(longer)[0], layers(longer)[0])


def test_gradients_of_each_sample_and_ensembles_by_vmap():
    layers = model(num_layers=2)
    parameters = {n: p.detach() for n, p in layers.named_parameters()}
    x = normal(L, B, I)

    def loss(parameters, one):
        h, c = functional_call(layers, parameters, (one.unsqueeze(1),))
        return h.sin().sum() + c.square().sum()

    found = vmap(grad(loss), in_dims=(None, 1))(parameters, x)
    for i in range(B):
        for name, a in grad(loss)(parameters, x[:, i]).items():
            torch.testing.assert_close(found[name][i], a, rtol=1e-11, atol=1e-11)

    members = [model(seed=i) for i in range(3)]
    stacked, buffers = stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")
    h, _ = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(stacked, buffers)
    torch.testing.assert_close(h, torch.stack([member(x)[0] for member in members]), rtol=1e-12, atol=1e-12)


def test_replicas_on_threads_as_data_parallel_makes_them():
    layers = model(num_layers=2, bidirectional=True)
    assert torch.equal(nn.DataParallel(layers)(normal(L, B, I))[0], layers(normal(L, B, I))[0])

    def replica():
        """What torch.nn.parallel.replicate makes: modules without parameters, copies of which are plain attributes."""
        pairs = {m: m._replicate_for_data_parallel() for m in layers.modules()}
        for module, copied in pairs.items():
            for name, child in module._modules.items():
                if child is not None:
                    setattr(copied, name, pairs[child])
            for name, parameter in module._parameters.items():
                setattr(copied, name, None if parameter is None else parameter.clone())
            for name, buffer in module._buffers.items():
                setattr(copied, name, buffer.clone())
        return pairs[layers]

    x = normal(L, B, I)
    parts, found = x.chunk(2, 1), [None, None]
    replicas = [replica(), replica()]

    def work(i):
        found[i] = replicas[i](parts[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    h, _ = layers(x)
    torch.testing.assert_close(torch.cat([f[0] for f in found], 1), h, rtol=1e-12, atol=1e-12)
    torch.cat([f[0] for f in found], 1).sin().sum().backward()
    split = [p.grad.clone() for p in layers.parameters()]
    layers.zero_grad()
    h.sin().sum().backward()
    torch.testing.assert_close(split, [p.grad for p in layers.parameters()], rtol=1e-11, atol=1e-11)


DISTRIBUTED = """
import os, sys, torch
import torch.distributed as dist
from cusru.torch import QRNN, SRU, SRUpp

dist.init_process_group("gloo", rank=int(sys.argv[1]), world_size=2, init_method="tcp://127.0.0.1:" + sys.argv[2])
torch.manual_seed(0)
x = torch.randn(7, 4, 6, dtype=torch.float64)
modules = [SRU(6, 5, 2, bidirectional=True, layer_norm=True), QRNN(6, 5, 2, window=2), SRUpp(6, 5, 4)]
for layers in (module.double() for module in modules):
    for name, parameter in layers.named_parameters():
        parameter.data.fill_(0.5) if name.endswith("alpha") else None  # at 0 attention does not show
    (layers(x)[0].sin().sum() / 2).backward()
    expected = [p.grad.clone() for p in layers.parameters()]
    layers.zero_grad()
    parallel = torch.nn.parallel.DistributedDataParallel(layers)
    mine = x.chunk(2, 1)[dist.get_rank()]
    for _ in range(2):
        layers.zero_grad()
        parallel(mine)[0].sin().sum().backward()
    torch.testing.assert_close([p.grad for p in layers.parameters()], expected, rtol=1e-11, atol=1e-11)
dist.destroy_process_group()
print("equal")
"""


def test_distributed_data_parallel_gives_the_gradients_of_the_whole_batch():
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED, str(rank), str(port)], env=environment, text=True, stdout=-1, stderr=-1
        )
        for rank in range(2)
    ]
    for rank in ranks:
        out, error = rank.communicate(timeout=180)
        assert out.strip() == "equal", error


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_dropout_draws_the_same_masks_again(use_reentrant):
    x = normal(L, B, I).requires_grad_()
    layers = model(dropout=0.5, num_layers=3)
    torch.manual_seed(2)
    layers(x)[0].sin().sum().backward()
    expected = [x.grad, *(p.grad for p in layers.parameters())]
    x.grad = None
    layers.zero_grad()
    torch.manual_seed(2)
    checkpoint(layers, x, use_reentrant=use_reentrant)[0].sin().sum().backward()
    for found, a in zip([x.grad, *(p.grad for p in layers.parameters())], expected, strict=True):
        torch.testing.assert_close(found, a, rtol=1e-12, atol=1e-12)


def test_pickles_whole_and_copies():
    layers = model(num_layers=3, batch_first=True, dropout=0.2).eval()
    x = normal(B, L, I)
    file = io.BytesIO()
    torch.save(layers, file)
    file.seek(0)
    for again in (torch.load(file, weights_only=False), copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert torch.equal(again(x)[0], layers(x)[0])


def test_a_model_made_on_the_meta_device_has_shapes_and_can_be_filled():
    with torch.device("meta"):
        empty = SRU(I, H, 2, bidirectional=True, v1=True)
        assert empty(torch.empty(L, B, I))[0].shape == (L, B, 2 * H)
    full = model(num_layers=2, bidirectional=True, v1=True, dtype=torch.float32)
    full.load_state_dict(full.state_dict() | {"rnn_lst.0.weight_c": normal(4 * H, dtype=torch.float32)})
    empty.load_state_dict(full.state_dict(), assign=True)
    x = normal(L, B, I, dtype=torch.float32)
    assert torch.equal(empty(x)[0], full(x)[0])


class Wrapped(nn.Module):
    """As WeightDrop and LoRA wrap a layer: it has nothing of its cell's but the call."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.cell(*args, **named)


@pytest.mark.parametrize("wrapped", [[0], [1], [0, 1]])
@pytest.mark.parametrize("options", [dict(), dict(bidirectional=True, batch_first=True), dict(nn_rnn_compatible_return=True)])
def test_a_stack_asks_a_cell_for_a_call_alone(wrapped, options):
    layers = model(**options)
    cells = copy.deepcopy(layers)
    for i in wrapped:
        cells.rnn_lst[i] = Wrapped(cells.rnn_lst[i])
    x = normal(L, B, I)
    for mask_pad in (None, torch.arange(L)[:, None] >= LENGTHS):
        mask_pad = mask_pad.T if mask_pad is not None and options.get("batch_first") else mask_pad
        given = x.transpose(0, 1) if options.get("batch_first") else x
        for a, b in zip(cells(given, mask_pad=mask_pad), layers(given, mask_pad=mask_pad), strict=True):
            assert torch.equal(a, b)
    packed = pack_padded_sequence(x, LENGTHS)
    assert torch.equal(cells(packed)[0].data, layers(packed)[0].data)


def test_a_parameter_that_is_computed_is_computed_once_a_call():
    """As torch.nn.utils.parametrize and WeightDrop do it: spectral_norm changes state each time, dropout draws anew."""

    class Counted(nn.Module):
        calls = 0

        def forward(self, weight):
            self.calls += 1
            return weight * 2

    cell, counted = model(SRUCell), Counted()
    torch.nn.utils.parametrize.register_parametrization(cell, "weight", counted)
    counted.calls = 0
    cell(normal(L, B, I))
    assert counted.calls == 1


PARAMETERS = ("weight", "weight_proj", "weight_c", "bias", "scale_x")


class AsItIs(nn.Module):
    def forward(self, a):
        return a


def replaced(cell: nn.Module, name: str, value: torch.Tensor) -> None:
    setattr(cell, name, value if name == "scale_x" else nn.Parameter(value))


def put_among_its_own(cell: nn.Module, name: str, value: torch.Tensor) -> None:
    """As torch.func.functional_call does, and FSDP."""
    (cell._buffers if name == "scale_x" else cell._parameters)[name] = value


def made_an_attribute(cell: nn.Module, name: str, value: torch.Tensor) -> None:
    """As pruning, the older weight_norm, WeightDrop and DataParallel's replicas do."""
    delattr(cell, name)
    setattr(cell, name, value)


def computed(cell: nn.Module, name: str, value: torch.Tensor) -> None:
    replaced(cell, name, value)
    torch.nn.utils.parametrize.register_parametrization(cell, name, AsItIs())


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("change", [replaced, put_among_its_own, made_an_attribute, computed])
def test_a_parameter_is_the_one_that_the_cell_has_at_the_call(change, name):
    x = normal(L, B, H)
    cell, expected = (model(SRUCell, H, H, n_proj=2) for _ in range(2))
    before = cell(x)[0]
    value = (getattr(cell, name) * 1.5).detach()
    expected.load_state_dict(expected.state_dict() | {name: value})
    change(cell, name, value)
    assert torch.equal(cell(x)[0], expected(x)[0])
    assert not torch.allclose(cell(x)[0], before)


def test_what_a_hook_or_a_subclass_sees_of_an_absent_state_is_zeros():
    seen: list[torch.Tensor] = []

    class Own(SRUCell):
        def compute_UV(self, input, c0, mask_pad):
            seen.append(c0)
            return super().compute_UV(input, c0, mask_pad)

        def apply_recurrence(self, U, V, residual, c0, scale_val, mask_c, mask_pad):
            seen.append(c0)
            return super().apply_recurrence(U, V, residual, c0, scale_val, mask_c, mask_pad)

    model(Own)(normal(L, B, I))
    layers = model(SRU, I, H, 3)
    for cell in layers.rnn_lst:
        cell.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
        cell.register_forward_hook(lambda _, args, __: seen.append(args[1]))
    layers(normal(L, B, I))
    assert len(seen) == 2 + 2 * 3
    assert all(torch.equal(c0, torch.zeros(B, H, dtype=torch.float64)) for c0 in seen)


def test_hooks_of_a_cell_and_of_all_modules_run_once_a_call():
    layers, x, counts = model(SRU, I, H, 3), normal(L, B, I).requires_grad_(), {}

    def count(name):
        def hook(module, *_):
            if isinstance(module, SRUCell):
                counts[name] = counts.get(name, 0) + 1

        return hook

    handles = [
        nn.modules.module.register_module_forward_pre_hook(count("all, before")),
        nn.modules.module.register_module_forward_hook(count("all, after")),
        nn.modules.module.register_module_full_backward_hook(count("all, backward")),
    ]
    try:
        for cell in layers.rnn_lst:
            cell.register_forward_pre_hook(count("before"))
            cell.register_forward_hook(count("after"))
            cell.register_full_backward_hook(count("backward"))
        layers(x)[0].sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert counts == dict.fromkeys(("all, before", "all, after", "all, backward", "before", "after", "backward"), 3)


def test_a_step_makes_no_tensor_and_no_call_beyond_what_was_reached(monkeypatch):
    """One step, the recurrence replaced. Python's calls: half as many again as on 2026-11-26 (CPython 3.11, torch 2.13)."""
    h, c, x, mask_pad = normal(1, B, H), normal(B, H), normal(1, B, H), torch.zeros(1, B, dtype=torch.bool)
    cell, layers, states = model(SRUCell, H, H), model(SRU, H, H, 4), normal(4, B, H)
    monkeypatch.setattr("cusru.torch.modules.sru", lambda *_, **__: (h, c))
    layer = ["view", "mm", "view"]
    for run, made, reached in (
        (lambda: cell(x), ["zeros", *layer], 31),
        (lambda: cell(x, c, mask_pad), layer, 36),
        (lambda: cell(x[0], c), ["select", "unsqueeze", "mm", "view"], 33),
        (lambda: layers(x), ["zeros", *layer * 4, "stack"], 135),
        (lambda: layers(x, states, mask_pad), ["unbind", *layer * 4, "stack"], 152),
    ):
        with torch.no_grad():
            with Seen() as seen:
                run()
            assert sorted(seen.names) == sorted(made)
            events: list[str] = []
            before = sys.getprofile()
            sys.setprofile(lambda _, event, __, events=events: events.append(event))
            try:
                run()
            finally:
                sys.setprofile(before)
        assert events.count("call") <= 1.5 * reached


def test_sizes_that_numpy_counted_are_compiled_too():
    torch._dynamo.reset()
    old = classic.SRU(np.int64(I), np.int64(H), np.int32(1))
    assert {type(getattr(old, n)) for n in ("n_in", "n_out", "depth", "out_size")} == {int}
    layers = SRU(np.int64(I), np.int64(H), np.int32(1), projection_size=np.int64(3), highway_bias=np.float32(-1)).eval()
    assert {type(getattr(layers, n)) for n in ("input_size", "hidden_size", "output_size", "num_layers")} == {int}
    x = torch.randn(L, B, I)
    h, _ = torch.compile(layers, fullgraph=True, backend="eager")(x)
    assert torch.equal(h, layers(x)[0])
    assert "projection_size=3" in repr(layers)


def test_subclasses_may_override_each_part():
    seen: list[str] = []

    class Own(SRUCell):
        def compute_UV(self, input, c0, mask_pad):
            seen.append("compute_UV")
            return super().compute_UV(input, c0, mask_pad)

        def compute_U(self, input):
            seen.append("compute_U")
            return super().compute_U(input)

        def apply_recurrence(self, U, V, residual, c0, scale_val, mask_c, mask_pad):
            seen.append("apply_recurrence")
            assert U.shape == (L * B, H * 4)
            h, c = super().apply_recurrence(U, V, residual, c0, scale_val, mask_c, mask_pad)
            return [2 * h, c]

        def get_dropout_mask_(self, size, p):
            seen.append("get_dropout_mask_")
            return torch.ones(size, dtype=torch.float64)

    own, plain, x = model(Own, dropout=0.5, rnn_dropout=0.5), model(SRUCell, dropout=0.5, rnn_dropout=0.5), normal(L, B, I)
    assert torch.equal(own(x)[0], 2 * plain.eval()(x)[0])
    assert seen == ["get_dropout_mask_", "get_dropout_mask_", "compute_UV", "compute_U", "apply_recurrence"]


def test_a_weight_per_step_of_a_subclass_reaches_v1_too():
    class Own(SRUCell):
        def compute_UV(self, input, c0, mask_pad):
            return self.compute_U(input), normal(L, B, 2 * H)

    assert not torch.equal(model(Own, v1=True)(normal(L, B, I))[0], model(SRUCell, v1=True)(normal(L, B, I))[0])


# ---- bad use ------------------------------------------------------------------------------------------------------------

X = normal(L, B, I)
BAD_CALLS = {
    "input of rank 2": (dict(input=X[0]), ValueError, ["input", r"\[4, 6\]", "3 dimensions"]),
    "input of another size": (dict(input=normal(L, B, I + 1)), ValueError, ["input", r"\[9, 4, 7\]", "input_size = 6"]),
    "input no tensor": (dict(input=X.numpy()), TypeError, ["input", "torch.Tensor", "numpy.ndarray"]),
    "input of integers": (dict(input=X.long()), TypeError, ["input", "int64"]),
    "input sparse": (dict(input=X.to_sparse()), TypeError, ["input", "sparse"]),
    "input packed without features": (dict(input=pack_padded_sequence(X[..., 0], LENGTHS)), ValueError, ["input", r"\[20\]"]),
    "c0 a list, input packed": (dict(input=pack_padded_sequence(X, LENGTHS), c0=[1.0]), TypeError, ["c0", "list"]),
    "input of another dtype": (dict(input=X.float()), TypeError, ["input", "float32", "float64"]),
    "input elsewhere": (dict(input=X.to("meta")), ValueError, ["input", "meta", "cpu"]),
    "c0 of the other shape": (dict(c0=normal(4, B, H)), ValueError, ["c0", r"\[4, 4, 5\]", r"\[2, 4, 10\]"]),
    "c0 of another batch": (dict(c0=normal(2, B + 1, 2 * H)), ValueError, ["c0", r"\[2, 5, 10\]", r"\[2, 4, 10\]"]),
    "c0 of one layer": (dict(c0=normal(B, 2 * H)), ValueError, ["c0", r"\[4, 10\]"]),
    "c0 of integers": (dict(c0=torch.zeros(2, B, 2 * H, dtype=torch.long)), TypeError, ["c0", "int64"]),
    "c0 a list": (dict(c0=[1.0]), TypeError, ["c0", "torch.Tensor", "list"]),
    "mask_pad transposed": (dict(mask_pad=torch.zeros(B, L)), ValueError, ["mask_pad", r"\[4, 9\]", r"\[9, 4\]"]),
    "mask_pad flat": (dict(mask_pad=torch.zeros(L * B)), ValueError, ["mask_pad", r"\[36\]", r"\[9, 4\]"]),
    "mask_pad a list": (dict(mask_pad=[0]), TypeError, ["mask_pad", "torch.Tensor", "list"]),
    "mask_pad elsewhere": (dict(mask_pad=torch.zeros(L, B, device="meta")), ValueError, ["mask_pad", "meta"]),
    "mask_pad and lengths": (
        dict(input=pack_padded_sequence(X, LENGTHS), mask_pad=torch.zeros(L, B)),
        ValueError,
        ["mask_pad", "PackedSequence"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_names_the_argument(case):
    changes, error, words = BAD_CALLS[case]
    raises(error, words, model(bidirectional=True), **(dict(input=X) | changes))


C0, MASK = normal(B, H), torch.zeros(L, B)
BAD_CELL_CALLS = {
    "input of rank 1": (dict(input=X[0, 0]), ValueError, ["input", r"\[6\]"]),
    "input of another size": (dict(input=normal(L, B, I + 1)), ValueError, ["input", r"\[9, 4, 7\]", "input_size = 6"]),
    "input a list": (dict(input=[1.0]), TypeError, ["input", "torch.Tensor", "list"]),
    "input absent": (dict(input=None), TypeError, ["input", "torch.Tensor", "NoneType"]),
    "input of integers": (dict(input=X.long()), TypeError, ["input", "int64"]),
    "input of another dtype": (dict(input=X.float()), TypeError, ["input", "float32", "float64"]),
    "input sparse": (dict(input=X.to_sparse()), TypeError, ["input", "sparse"]),
    "input negated": (dict(input=torch._neg_view(X)), TypeError, ["input", "negated"]),
    "input elsewhere": (dict(input=X.to("meta")), ValueError, ["input", "meta", "cpu"]),
    "c0 of another batch": (dict(c0=normal(B + 1, H)), ValueError, ["c0", r"\[5, 5\]", r"\[4, 5\]"]),
    "c0 a list": (dict(c0=[1.0]), TypeError, ["c0", "torch.Tensor", "list"]),
    "c0 of integers": (dict(c0=C0.long()), TypeError, ["c0", "int64"]),
    "c0 complex": (dict(c0=C0.cfloat()), TypeError, ["c0", "complex64"]),
    "c0 conjugated": (dict(c0=C0.cfloat().conj()), TypeError, ["c0", "conjugated"]),
    "c0 sparse": (dict(c0=C0.to_sparse()), TypeError, ["c0", "sparse"]),
    "c0 negated": (dict(c0=torch._neg_view(C0)), TypeError, ["c0", "negated"]),
    "c0 elsewhere": (dict(c0=C0.to("meta")), ValueError, ["c0", "meta", "cpu"]),
    "mask_pad transposed": (dict(mask_pad=MASK.T), ValueError, ["mask_pad", r"\[4, 9\]", r"\[9, 4\]"]),
    "mask_pad a list": (dict(mask_pad=[0]), TypeError, ["mask_pad", "torch.Tensor", "list"]),
    "mask_pad sparse": (dict(mask_pad=MASK.to_sparse()), TypeError, ["mask_pad", "sparse"]),
    "mask_pad negated": (dict(mask_pad=torch._neg_view(MASK)), TypeError, ["mask_pad", "negated"]),
    "mask_pad elsewhere": (dict(mask_pad=MASK.to("meta")), ValueError, ["mask_pad", "meta", "cpu"]),
    "the first of two faults": (dict(input=X.to("meta"), c0=[1.0]), TypeError, ["c0", "torch.Tensor", "list"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CELL_CALLS)
def test_a_bad_call_of_a_cell_names_the_argument(case):
    changes, error, words = BAD_CELL_CALLS[case]
    raises(error, words, model(SRUCell), **(dict(input=X) | changes))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_layer_that_was_moved_is_named_by_what_it_meets(which):
    for move, error, words in (
        (lambda cell: cell.to("meta"), ValueError, ["is on cpu, and the parameters on meta"]),
        (lambda cell: cell.half(), TypeError, ["input has dtype torch.float64, and the parameters torch.float16"]),
    ):
        layers = model(num_layers=3)
        layers(X)
        move(layers.rnn_lst[which])
        raises(error, words, layers, input=X)


BAD_MODELS = {
    "no features": (dict(input_size=0, hidden_size=4), ["input_size", "0"]),
    "a half": (dict(input_size=3, hidden_size=2.5), ["hidden_size", "2.5"]),
    "no layers": (dict(input_size=3, hidden_size=4, num_layers=0), ["num_layers", "0"]),
    "dropout of 1": (dict(input_size=3, hidden_size=4, dropout=1.0), ["dropout", "1.0"]),
    "dropout of one layer": (dict(input_size=3, hidden_size=4, num_layers=1, dropout="a"), ["dropout", "'a'"]),
    "rnn_dropout no number": (dict(input_size=3, hidden_size=4, rnn_dropout="a"), ["rnn_dropout", "'a'"]),
    "projections for other layers": (dict(input_size=3, hidden_size=4, projection_size=[2, 2, 2]), ["projection_size", "3", "2"]),
    "dropout no number": (dict(input_size=3, hidden_size=4, dropout="a"), ["dropout", "'a'"]),
    "negative dropout": (dict(input_size=3, hidden_size=4, rnn_dropout=-0.1), ["rnn_dropout", "-0.1"]),
    "negative weight_c_init": (dict(input_size=3, hidden_size=4, weight_c_init=-1), ["weight_c_init", "-1"]),
    "weight_c_init no number": (dict(input_size=3, hidden_size=4, weight_c_init=float("nan")), ["weight_c_init", "nan"]),
    "endless highway_bias": (dict(input_size=3, hidden_size=4, highway_bias=float("inf")), ["highway_bias", "inf"]),
    "modules for other layers": (dict(input_size=3, hidden_size=4, custom_m=[nn.Linear(3, 12)]), ["custom_m", "1", "2"]),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_names_the_argument(case):
    given, words = BAD_MODELS[case]
    raises(ValueError, words, SRU, **given)


FLAGS = {
    kind: [name for name, parameter in inspect.signature(kind).parameters.items() if parameter.annotation in (bool, "bool")]
    for kind in (SRU, SRUCell, classic.SRU, classic.SRUCell)
}
OLD_FLAGS = [(kind, flag) for kind in FLAGS for flag in ("use_relu", "use_selu")]
OLD_FLAGS += [(kind, "use_tanh") for kind in (classic.SRU, classic.SRUCell)]


@pytest.mark.parametrize(("kind", "flag"), [(kind, flag) for kind, flags in FLAGS.items() for flag in flags] + OLD_FLAGS)
def test_a_flag_is_a_bool_or_0_or_1(kind, flag):
    assert len(FLAGS[SRU]) > 8
    for value in ("False", None, 2, 0.0, np.zeros(2, bool), torch.tensor(False)):
        with pytest.raises(TypeError, match=f"{flag} must be a bool"):
            kind(I, H, **{flag: value})
    for value in (False, True):
        states = []
        for same in (value, int(value), np.bool_(value)):
            torch.manual_seed(0)
            states.append(kind(I, H, **{flag: same}).state_dict())
        assert all(torch.equal(s[n], states[0][n]) for s in states for n in states[0])


def test_a_custom_module_that_returns_something_else_is_named():
    class Custom(nn.Module):
        def __init__(self, result):
            super().__init__()
            self.result = result

        def forward(self, x):
            return self.result

        def reset_parameters(self):
            pass

    good, V = normal(L, B, 4 * H), normal(L, B, 2 * H)
    for result, words in (
        (normal(L, B, 4), ["custom_m", "U", r"\[9, 4, 4\]", "20"]),
        ((good, normal(L, B, H + H - 1)), ["custom_m", "V", r"\[9, 4, 9\]", "10"]),
        ((good,), ["custom_m", "1 tensors"]),
        (good.transpose(0, 1), ["custom_m", "U", r"\[4, 9, 20\]", r"\[9, 4, 6\]"]),
        ((good, V.transpose(0, 1)), ["custom_m", "V", r"\[4, 9, 10\]"]),
        ((good, V, V), ["custom_m", "3 tensors"]),
    ):
        raises(ValueError, words, model(SRUCell, custom_m=Custom(result)), input=normal(L, B, I))
    assert model(SRUCell, custom_m=Custom((good, V)))(normal(L, B, I))[0].shape == (L, B, H)
    with pytest.warns(UserWarning, match="Linear.*reset_parameters|reset_parameters"):
        SRUCell(I, H, custom_m=nn.Identity())


# ---- in the place of sru ------------------------------------------------------------------------------------------------


def run(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_install_as_sru_makes_the_imports_of_other_code_work():
    run(
        """
import cusru.torch
cusru.torch.install_as_sru()
cusru.torch.install_as_sru()
import importlib.util
import sru, sru.modules
from sru import SRU, SRUCell
from sru.modules import SRU as Same
assert SRU is Same is cusru.torch.SRU and SRUCell is sru.modules.SRUCell is cusru.torch.SRUCell
assert sru.__version__ == "2.6.0" and importlib.util.find_spec("sru").name == "sru"
try:
    import sru.ops
except ModuleNotFoundError as error:
    assert "sru.ops" in str(error)
else:
    raise AssertionError
"""
    )


def test_install_as_sru_refuses_where_another_sru_is_imported(monkeypatch):
    from types import ModuleType

    from cusru.torch import install_as_sru

    for name in ("sru", "sru.modules"):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "sru", raising=False)
            patch.delitem(sys.modules, "sru.modules", raising=False)
            patch.setitem(sys.modules, name, ModuleType(name))
            with pytest.raises(RuntimeError, match="sru package is imported already"):
                install_as_sru()
