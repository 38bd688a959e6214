"""cusru.torch.qrnn and linear_recurrence, and `starts` in all three: what they compute, under which of torch's transforms they
work, how often they can be differentiated."""

from __future__ import annotations

import io
import itertools
import warnings
from typing import Any

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch", reason='needs torch: pip install "cusru[torch]"')

from cusru.torch import SRU, SRUCell, linear_recurrence, operator, qrnn, sru  # noqa: E402

L, B, D = 6, 3, 4
OPTIONS = {
    "affine, a per step": ("linear_recurrence", dict(form="affine"), "step"),
    "complement, a per column": ("linear_recurrence", dict(form="complement"), "column"),
    "blend, a per batch": ("linear_recurrence", dict(form="blend", bidirectional=True), "batch"),
    "affine, both masks": ("linear_recurrence", dict(form="affine", mask_pad="mask", starts="mask", reverse=True), "step"),
    "blend, all": ("linear_recurrence", dict(form="blend", mask_pad="mask", starts="mask", bidirectional=True), "column"),
    "f": ("qrnn", dict(pooling="f", zoneout=0.2), 2),
    "fo": ("qrnn", dict(pooling="fo", starts="mask", bidirectional=True), 3),
    "ifo": ("qrnn", dict(pooling="ifo", gate="update", zoneout="mask", mask_pad="mask", reverse=True), 4),
}
FUNCTIONS = {"qrnn": qrnn, "linear_recurrence": linear_recurrence}
every_family = pytest.mark.parametrize("case", OPTIONS)


def normal(*shape: int, seed: int = 0, dtype: Any = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def mask(*shape: int) -> torch.Tensor:
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) < 0.4
    if len(shape) == 2:
        chosen[0, 0] = True
    return chosen


def problem(case: str, dtype: Any = torch.float64) -> tuple[Any, tuple[torch.Tensor, ...], dict[str, Any]]:
    """The function of its tensors that have gradients, those, and its options."""
    family, options, shape = OPTIONS[case]
    options = {n: mask(L, B, *(D,) * (n == "zoneout")) if v == "mask" else v for n, v in options.items()}
    if family == "qrnn":
        tensors = normal(L, B, D, shape, dtype=dtype), normal(B, D, dtype=dtype)
    else:
        of_a = {"step": (L, B, D), "batch": (B, D), "column": (D,)}[shape]
        tensors = normal(*of_a, seed=1, dtype=dtype), normal(L, B, D, dtype=dtype), normal(B, D, dtype=dtype)
    function = FUNCTIONS[family]

    def call(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        *inputs, c0 = given
        return function(*inputs, c0=c0, save_every=2, **options)

    return call, tuple(a.requires_grad_() for a in tensors), options


def gradients(call: Any, tensors: Any) -> tuple[torch.Tensor, ...]:
    h, c_last = call(*tensors)
    weights = normal(*h.shape, seed=3, dtype=h.dtype), normal(*c_last.shape, seed=4, dtype=c_last.dtype)
    return torch.autograd.grad((h, c_last), tensors, weights)


# ---- what they compute -------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_oracle_says_the_same(case, dtype):
    call, tensors, options = problem(case, dtype)
    family, name = OPTIONS[case][0], str(dtype).removeprefix("torch.")
    h, c_last = call(*tensors)
    weights = normal(L, B, D, seed=3, dtype=dtype), normal(B, D, seed=4, dtype=c_last.dtype)
    found = torch.autograd.grad((h, c_last), tensors, weights)
    arrays = [a.detach().to(torch.float64).numpy() for a in (*tensors, *weights)]
    *inputs, c0 = arrays[: len(tensors)]
    options = {n: a.numpy() if isinstance(a, torch.Tensor) else a for n, a in options.items()}
    expected = getattr(oracle, f"{family}_forward")(*inputs, c0=c0, save_every=None, **options)
    wide = {"h": h.detach().to(torch.float64).numpy(), "c_last": c_last.detach().to(torch.float64).numpy()}
    oracle.check(wide, expected, name)
    wanted = getattr(oracle, f"{family}_backward")(*arrays[len(tensors) :], *inputs, c0=c0, **options)
    names = ("u", "c0") if family == "qrnn" else ("a", "b", "c0")
    oracle.check({n: g.to(torch.float64).numpy() for n, g in zip(names, found, strict=True)}, wanted, name, ())
    assert [g.dtype for g in found] == [a.dtype for a in tensors]


@every_family
def test_gradients_are_finite_differences(case):
    call, tensors, _ = problem(case)
    assert torch.autograd.gradcheck(call, tensors)


LINEAR = [case for case, (family, _, _) in OPTIONS.items() if family == "linear_recurrence"]


@pytest.mark.parametrize("case", LINEAR)
def test_the_linear_recurrence_has_derivatives_of_its_derivatives(case):
    call, tensors, _ = problem(case)
    plain = gradients(call, tensors)
    h, c_last = call(*tensors)
    weights = normal(L, B, D, seed=3), normal(B, D, seed=4)
    with_graph = torch.autograd.grad((h, c_last), tensors, weights, create_graph=True)
    for a, b in zip(plain, with_graph, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("masks", itertools.product((False, True), (False, True)))
@pytest.mark.parametrize("ways", itertools.product((False, True), (False, True)))
@pytest.mark.parametrize("form", ["affine", "complement", "blend"])
def test_its_gradients_are_a_linear_recurrence_that_runs_the_other_way(form, ways, masks):
    """As the kernels compute them, and as functions with derivatives: padding, starts and both directions of both ways."""
    pad, starts = (mask(L, B) if one else None for one in masks)
    options = dict(form=form, bidirectional=ways[0], reverse=ways[1], mask_pad=pad, starts=starts)
    tensors = [a.requires_grad_() for a in (normal(L, B, D, seed=1), normal(L, B, D), normal(B, D))]
    for given in ((True, True), (True, False), (False, True)):
        results = linear_recurrence(tensors[0], tensors[1], c0=tensors[2], **options)
        chosen = [(r, normal(*r.shape, seed=7)) for r, yes in zip(results, given, strict=True) if yes]
        outputs, weights = zip(*chosen, strict=True)
        plain = torch.autograd.grad(outputs, tensors, weights, retain_graph=True)
        for a, b in zip(plain, torch.autograd.grad(outputs, tensors, weights, create_graph=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_hessian_is_that_of_the_written_out_loop():
    a, b = normal(4, 1, 2, seed=1), normal(4, 1, 2)

    def ours(a):
        return linear_recurrence(a, b)[0].square().sum()

    def loop(a):
        c, total = torch.zeros(1, 2, dtype=a.dtype), 0
        for t in range(4):
            c = a[t] * c + b[t]
            total = total + c.square().sum()
        return total

    hessian = torch.autograd.functional.hessian
    torch.testing.assert_close(hessian(ours, a), hessian(loop, a))
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(ours))(a), hessian(loop, a))


def written_out(a, b, form, c0, mask_pad=None, starts=None, reverse=False):
    """The states, step by step, of columns that all run one way."""
    h = [torch.zeros_like(c0)] * len(b)
    c = c0
    for t in reversed(range(len(b))) if reverse else range(len(b)):
        begins = starts is not None and (starts[t] if not reverse else t + 1 < len(b) and starts[t + 1])
        c = 0 * c if begins else c
        if mask_pad is None or not mask_pad[t]:
            h[t] = c = a[t] * c + b[t] if form == "affine" else (1 - a[t]) * c + (b[t] if form == "complement" else a[t] * b[t])
    return torch.stack(h), c


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", ["affine", "complement", "blend"])
def test_third_derivatives_are_those_of_the_written_out_loop(form, reverse):
    pad, starts = torch.tensor([0, 1, 0, 0, 0]).bool(), torch.tensor([0, 0, 0, 1, 0]).bool()
    both = []
    for of_one in (linear_recurrence, written_out):
        a, b, c0 = tensors = [t.requires_grad_() for t in (normal(5, 1, 2, seed=1), normal(5, 1, 2), normal(1, 2))]
        columns = (lambda m: m.unsqueeze(1)) if of_one is linear_recurrence else (lambda m: m)
        h, c_last = of_one(a, b, form=form, c0=c0, mask_pad=columns(pad), starts=columns(starts), reverse=reverse)
        found, loss = [], h.sin().sum() + c_last.cos().sum()
        for _ in range(3):
            found += torch.autograd.grad(loss, tensors, create_graph=True)
            loss = sum(g.square().sum() for g in found[-3:])
        both.append(found)
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["affine", "complement", "blend"])
def test_derivatives_of_derivatives_round_nothing_to_16_bits_on_the_way(form):
    """a in float32 and near 1 or 0, b in bfloat16, and of float32 the results that are looked at: 2e-5 of float64's."""
    near = 1e-3 * torch.rand(300, 1, 4, generator=torch.Generator().manual_seed(0))
    a, b = 1 - near if form == "affine" else near, normal(300, 1, 4, dtype=torch.bfloat16)

    def second(a, b):
        a.requires_grad_()
        _, c_last = linear_recurrence(a, b, form=form)
        (first,) = torch.autograd.grad(c_last.sum(), a, create_graph=True)
        return first, *torch.autograd.grad(first.square().mean(), a)

    for ours, exact in zip(second(a, b), second(a.detach().double(), b.double()), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).abs().max() <= 2e-5 * exact.abs().max()


@pytest.mark.parametrize("where", ["padding", "another piece"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", ["affine", "complement", "blend"])
def test_what_is_not_a_number_elsewhere_is_in_no_derivative_of_derivatives(form, reverse, where):
    there = torch.tensor([1, 1, 1, 0, 0, 0]).bool() if where == "another piece" else torch.tensor([0, 0, 1, 1, 0, 0]).bool()
    masks = dict(starts=torch.arange(6).eq(3).unsqueeze(1)) if where == "another piece" else dict(mask_pad=there.unsqueeze(1))

    def derivatives(bad):
        a, b = (t.masked_fill(there[:, None, None], bad).requires_grad_() for t in (normal(6, 1, 2, seed=1), normal(6, 1, 2)))
        h, _ = linear_recurrence(a, b, form=form, reverse=reverse, **masks)
        first = torch.autograd.grad(h.sin().sum(), (a, b), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (a, b))
        return [g.detach()[~there] for g in (*first, *second)]

    for bad, good in zip(derivatives(torch.nan), derivatives(1), strict=True):
        assert torch.equal(bad, good)


@pytest.mark.parametrize("saved_by", ["export", "script"])
def test_a_saved_program_has_derivatives_of_derivatives_too(saved_by):
    class Model(torch.nn.Module):
        def forward(self, a, b):
            return torch.ops.cusru.linear_recurrence_forward(a, b, None, None, "blend", True, 2)[0]

    tensors = [t.requires_grad_() for t in (normal(D, seed=1), normal(L, B, D))]
    saved = torch.export.export(Model(), tuple(tensors)).module() if saved_by == "export" else torch.jit.script(Model())

    def second(h):
        first = torch.autograd.grad(h.sin().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    for a, b in zip(
        second(saved(*tensors)), second(linear_recurrence(*tensors, form="blend", bidirectional=True)[0]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_of_gradients_may_be_mapped():
    a, b = normal(3, L, 1, 2, seed=1), normal(3, L, 1, 2)
    first = torch.func.grad(lambda a, b: linear_recurrence(a, b, form="complement", bidirectional=True)[0].sin().sum())
    second = torch.func.grad(lambda a, b: first(a, b).square().sum(), argnums=(0, 1))
    for found, one_by_one in zip(torch.vmap(second)(a, b), zip(*map(second, a, b), strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(one_by_one), rtol=1e-12, atol=1e-12)


def test_the_qrnn_says_that_it_has_no_derivative_of_its_gradients():
    u = normal(L, B, D, 3).requires_grad_()
    (g,) = torch.autograd.grad(qrnn(u)[0].sum(), u, create_graph=True)
    with pytest.raises(NotImplementedError, match="QRNN recurrence's gradients"):
        g.sum().backward()


def test_inference_keeps_no_states_and_a_backward_asks_for_them():
    a, b = normal(D), normal(L, B, D)
    with torch.no_grad():
        assert linear_recurrence(a, b, save_every=None)[0].shape == (L, B, D)
    with pytest.raises(ValueError, match="save_every=None keeps no states"):
        linear_recurrence(a.requires_grad_(), b, save_every=None)


# ---- the straight way --------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_plain_tensors_go_straight_with_the_bits_and_memory_of_the_operator(case, dtype, monkeypatch):
    went, run = [], operator._straight
    call, tensors, _ = problem(case, dtype)

    def both(straight):
        monkeypatch.setattr(operator, "_straight", straight)
        recorded, (h, c_last) = gradients(call, tensors), call(*tensors)
        with torch.no_grad():
            return *recorded, h, c_last, *call(*tensors)

    def watched(*given):
        results = run(*given)
        went.append(results is not None)
        return results

    for a, b in zip(both(watched), both(lambda *_: None), strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
    assert went == [True] * 3


@every_family
def test_gradients_that_nobody_asks_for_have_no_memory(case, monkeypatch):
    call, tensors, _ = problem(case)
    expected, run, unwanted = gradients(call, tensors), operator._run, []

    def watched(one, inputs, options, *rest, **keywords):
        unwanted.append(rest[0] if rest else ())
        return run(one, inputs, options, *rest, **keywords)

    monkeypatch.setattr(operator, "_run", watched)
    names = ("grad_u", "grad_c0") if len(tensors) == 2 else ("grad_weight_c", "grad_u", "grad_c0")
    for i, wanted in enumerate(expected):
        only = [a.detach().requires_grad_(i == j) for j, a in enumerate(tensors)]
        h, c_last = call(*only)
        weights = normal(*h.shape, seed=3), normal(*c_last.shape, seed=4)
        assert torch.equal(*torch.autograd.grad((h, c_last), only[i], weights), wanted)
        assert unwanted[-1] == (*names[:i], *names[i + 1 :])


@pytest.mark.parametrize("case", ["blend, all", "ifo"])
def test_the_kernels_own_source_gives_the_same(case, monkeypatch):
    from conftest import missing

    if reason := missing("simulator"):
        pytest.skip(reason)
    call, tensors, _ = problem(case)
    expected = (*gradients(call, tensors), *call(*tensors))
    monkeypatch.setenv("CUSRU_SIMULATE", "1")
    for a, b in zip((*gradients(call, tensors), *call(*tensors)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---- torch's transforms ------------------------------------------------------------------------------------------------


@every_family
def test_compiled_as_one_graph_they_give_the_same_bits(case):
    call, tensors, _ = problem(case)
    expected = gradients(call, tensors)
    torch._dynamo.reset()
    found = gradients(torch.compile(call, fullgraph=True, backend="aot_eager"), tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", ["blend, all", "ifo"])
def test_exported_saved_and_loaded_they_give_the_same_bits(case):
    call, tensors, _ = problem(case)

    class Model(torch.nn.Module):
        def forward(self, *given):
            return call(*given)

    file = io.BytesIO()
    torch.export.save(torch.export.export(Model(), tensors), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for a, b in zip(loaded(*tensors), call(*tensors), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(loaded, tensors), gradients(call, tensors), strict=True):
        assert torch.equal(a, b)


@every_family
def test_vmap_is_a_loop(case):
    call, tensors, _ = problem(case)
    several = [torch.stack([a.detach() * s for s in (1, -0.5)]) for a in tensors]
    for run in (call, lambda *given: gradients_by_func(call, given)):
        found = torch.func.vmap(run)(*several)
        for i in range(2):
            for a, b in zip(found, run(*(s[i] for s in several)), strict=True):
                torch.testing.assert_close(a[i], b, rtol=1e-12, atol=1e-12)


def gradients_by_func(call, tensors):
    return torch.func.grad(lambda given: sum(a.sin().sum() for a in call(*given)))(tuple(tensors))


def test_vmap_over_a_mask_and_over_starts():
    u, zoneout = normal(L, B, D, 3), torch.stack([mask(L, B, D), ~mask(L, B, D)])
    found = torch.func.vmap(lambda zoned: qrnn(u, zoneout=zoned)[0])(zoneout)
    assert torch.equal(found, torch.stack([qrnn(u, zoneout=zoned)[0] for zoned in zoneout]))
    starts = torch.stack([mask(L, B), ~mask(L, B)])
    found = torch.func.vmap(lambda begins: sru(u, starts=begins)[0])(starts)
    assert torch.equal(found, torch.stack([sru(u, starts=begins)[0] for begins in starts]))


@every_family
def test_checkpointed_they_give_the_same_gradients(case):
    call, tensors, _ = problem(case)
    run = lambda *given: torch.utils.checkpoint.checkpoint(call, *given, use_reentrant=False)  # noqa: E731
    assert all(torch.equal(a, b) for a, b in zip(gradients(run, tensors), gradients(call, tensors), strict=True))


def test_a_trace_that_was_saved_and_loaded_runs_with_any_number_of_steps():
    """Its masks are inputs; zoneout as a number is the trace's own."""
    masks = dict(starts=mask(L, B), zoned=mask(L, B, D))
    functions = (
        (lambda u, starts, zoned: qrnn(u, zoneout=zoned, starts=starts, bidirectional=True), normal(L, B, D, 3)),
        (lambda u, starts, zoned: qrnn(u, zoneout=0.25, mask_pad=starts, reverse=True), normal(L, B, D, 3)),
        (lambda b, starts, zoned: linear_recurrence(b[0], b, form="blend", starts=starts), normal(L, B, D)),
    )
    for function, first in functions:
        given, file = (first, *masks.values()), io.BytesIO()
        torch.jit.save(torch.jit.trace(function, given), file)
        file.seek(0)
        loaded = torch.jit.load(file)
        for inputs in (given, [torch.cat((a, a)) for a in given]):
            for a, b in zip(loaded(*inputs), function(*inputs), strict=True):
                assert torch.equal(a, b)


def test_autocast_casts_nothing_of_theirs():
    a, b, u = normal(D, dtype=torch.float32), normal(L, B, D, dtype=torch.bfloat16), normal(L, B, D, 3, dtype=torch.bfloat16)
    for call, tensors in ((linear_recurrence, (a, b)), (qrnn, (u,))):
        tensors = [t.requires_grad_() for t in tensors]
        with torch.autocast("cpu", torch.float16):
            found = (*gradients(call, tensors), *call(*tensors))
        for x, y in zip(found, (*gradients(call, tensors), *call(*tensors)), strict=True):
            assert torch.equal(x, y)
            assert x.dtype == y.dtype


def test_the_operators_are_what_torch_asks_of_operators():
    ops = torch.ops.cusru
    u, a, b = (t.requires_grad_() for t in (normal(L, B, D, 4), normal(B, D), normal(L, B, D)))
    c0, masks = normal(B, D).requires_grad_(), (mask(L, B), mask(L, B, D))
    of_qrnn = (u, c0, masks[0], masks[1], 0.0, "ifo", "forget", True, 2, mask(L, B), True)
    of_linear = (a, b, c0, masks[0], "blend", False, 2, mask(L, B), False)
    for name, arguments in (("qrnn", of_qrnn), ("linear_recurrence", of_linear)):
        torch.library.opcheck(getattr(ops, f"{name}_forward").default, arguments)
        detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
        h, c, c_last = getattr(ops, f"{name}_forward")(*detached)
        torch.library.opcheck(
            getattr(ops, f"{name}_backward").default, (h, c_last, c, *detached), test_utils=("test_schema", "test_faketensor")
        )


def test_a_program_that_was_saved_before_there_were_starts_and_reverse_still_runs():
    """Its calls have fewer arguments."""
    u = normal(L, B, D, 3).requires_grad_()
    old = (u, *[None] * 7, 1.0, "identity", "identity", "state", False, 2)
    h, _, c_last = torch.ops.cusru.sru_forward(*old)
    assert all(torch.equal(a, b) for a, b in zip((h, c_last), sru(u), strict=True))
    (found,), (wanted,) = torch.autograd.grad(h.sum(), u), torch.autograd.grad(sru(u)[0].sum(), u)
    assert torch.equal(found, wanted)
    schema = str(torch.ops.cusru.sru_forward.default._schema)
    assert "Tensor? starts=None, bool reverse=False) ->" in schema

    class Model(torch.nn.Module):
        def forward(self, u):
            return torch.ops.cusru.sru_forward(u, *[None] * 7, 1.0, "identity", "identity", "state", False, 2)[0]

    program = torch.export.export(Model(), (u.detach(),))
    (node,) = [n for n in program.graph.nodes if n.op == "call_function" and "sru" in str(n.target)]
    assert len(node.args) == 14
    assert torch.equal(program.module()(u), h)


# ---- starts in the modules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options", [{}, dict(v1=True, layer_norm=True), dict(projection_size=3, highway_bias=-1.0, use_tanh=True)]
)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_layers_with_starts_are_the_pieces_run_by_themselves(batch_first, options, bidirectional):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = SRU(5, 4, 2, bidirectional=bidirectional, batch_first=batch_first, **options).double()
    pieces = [normal(n, 2, 5, seed=n) for n in (4, 1, 7)]
    starts = torch.zeros(12, 2, dtype=torch.int64)
    starts[[0, 4, 5]] = 3

    def turn(a):
        return a.transpose(0, 1) if batch_first else a

    h, _ = layers(turn(torch.cat(pieces)), starts=turn(starts))
    wanted = torch.cat([turn(layers(turn(piece))[0]) for piece in pieces])
    torch.testing.assert_close(turn(h), wanted, rtol=1e-12, atol=1e-12)
    weight = layers.rnn_lst[0].weight if projectionless(options) else next(layers.parameters())
    (found,), (sum_of_pieces,) = torch.autograd.grad(h.square().sum(), weight), torch.autograd.grad(wanted.square().sum(), weight)
    torch.testing.assert_close(found, sum_of_pieces, rtol=1e-11, atol=1e-11)


def projectionless(options):
    return "projection_size" not in options


def test_starts_go_through_script_and_compile_and_a_cell():
    layers, x, starts = SRU(5, 4, 2).double(), normal(L, B, 5), mask(L, B)
    h, c = layers(x, starts=starts)
    for other in (torch.jit.script(layers), torch.compile(layers, backend="aot_eager")):
        for a, b in zip(other(x, starts=starts), (h, c), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    cell = SRUCell(5, 4).double()
    at_first, plain = cell(x[:1], normal(B, 4), starts=torch.ones(1, B)), cell(x[:1])
    torch.testing.assert_close(at_first[1], plain[1])


def test_starts_of_the_wrong_shape_or_beside_a_packed_sequence_are_refused():
    layers, x = SRU(5, 4), normal(L, B, 5, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"starts has shape .*expected \[6, 3\]"):
        layers(x, starts=mask(B, L))
    with pytest.raises(ValueError, match=r"starts has shape .*\(B, L\)"):
        SRU(5, 4, batch_first=True)(x.transpose(0, 1), starts=mask(L, B))
    with pytest.raises(TypeError, match=r"starts must be a torch\.Tensor, not list"):
        layers(x, starts=[0])
    with pytest.raises(ValueError, match="starts cannot be given with a PackedSequence"):
        layers(torch.nn.utils.rnn.pack_sequence([x[:, 0]]), starts=mask(L, 1))


# ---- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: qrnn(normal(L, B, D, 3), zoneout=True), ValueError, "zoneout must be a number from 0 to 1"),
        (lambda: qrnn(normal(L, B, D, 3), zoneout=1.5), ValueError, "zoneout must be a number from 0 to 1"),
        (lambda: qrnn(normal(L, B, D, 3), zoneout="x"), TypeError, "zoneout must be a number or a tensor of bool or uint8"),
        (lambda: qrnn(normal(L, B, D, 3), zoneout=normal(L, B, D)), TypeError, "zoneout has dtype float64"),
        (lambda: qrnn(normal(L, B, D, 3), pooling="f"), ValueError, "u has shape .*pooling='f'"),
        (lambda: qrnn(np.zeros((2, 2, 2, 3))), TypeError, r"u must be a torch\.Tensor"),
        (lambda: linear_recurrence(None, normal(L, B, D)), TypeError, r"a must be a torch\.Tensor, not NoneType"),
        (lambda: linear_recurrence(normal(D), normal(L, B)), ValueError, "b has shape"),
        (lambda: linear_recurrence(normal(D + 1), normal(L, B, D)), ValueError, "a has shape"),
        (lambda: linear_recurrence(normal(D), normal(L, B, D), form="x"), ValueError, "form must be one of"),
        (lambda: linear_recurrence(normal(D), normal(L, B, D), reverse="x"), TypeError, "reverse must be a bool"),
        (lambda: sru(normal(L, B, D, 3), starts=mask(L, B + 1)), ValueError, "starts has shape"),
        (lambda: sru(normal(L, B, D, 3), starts=normal(L, B)), TypeError, "starts has dtype float64"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
