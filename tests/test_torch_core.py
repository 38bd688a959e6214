"""The core functions on torch's tensors: what they write they say, and what would record them is told that it cannot."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import missing, scripted

import cusru
from cusru import call, dlpack

torch = pytest.importorskip("torch", reason='needs torch: pip install "cusru[torch]"')

L, B, D = 5, 3, 4
RECORD_INSTEAD = r"cusru\.torch\.sru"


def normal(*shape: int, **options: Any) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), **options)


def arguments() -> dict[str, Any]:
    return dict(u=normal(L, B, D, 3), x=normal(L, B, D), bias=normal(2, D), weight_c=normal(2, D), c0=normal(B, D))


def forward(**changes: Any) -> Any:
    return cusru.sru_forward(**(arguments() | changes))


def backward(**changes: Any) -> Any:
    given = dict(grad_h=normal(L, B, D), grad_c_last=normal(B, D), c=normal(L, B, D)) | arguments()
    return cusru.sru_backward(**(given | changes))


CALLS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "forward": (forward, [(L, B, D), (L, B, D), (B, D)]),
    "backward": (backward, [(L, B, D, 3), (L, B, D), (2, D), (2, D), (B, D)]),
}
MEMBERS = [(direction, i) for direction, (_, shapes) in CALLS.items() for i in range(len(shapes))]


def written(direction: str, member: int | None, make: Callable[[tuple[int, ...]], Any]) -> tuple[Any, dict[str, Any]]:
    """A tensor to write, a member of `out` or the workspace (None), and the arguments that have it written."""
    if member is None:
        tensor = make((cusru.workspace_size("backward", **arguments()) + 1,)).to(torch.uint8)
        return tensor, dict(workspace=tensor)
    shapes = CALLS[direction][1]
    tensor = make(shapes[member])
    return tensor, dict(out=[tensor if i == member else None for i in range(len(shapes))])


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("simulate", ["0", "1"])
@pytest.mark.parametrize(("direction", "member"), [*MEMBERS, ("backward", None)])
def test_every_tensor_that_is_written_says_so(
    direction: str, member: int | None, simulate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if simulate == "1" and (reason := missing("simulator")):
        pytest.skip(reason)
    monkeypatch.setenv("CUSRU_SIMULATE", simulate)
    call = CALLS[direction][0]
    tensor, given = written(direction, member, torch.zeros)
    for version in (1, 2):
        call(**given)
        assert tensor._version == version


@pytest.mark.parametrize("view", [lambda a: a, lambda a: a.detach(), lambda a: a[:], lambda a: a.view_as(a)])
@pytest.mark.parametrize(("direction", "member"), MEMBERS)
def test_a_backward_through_what_was_overwritten_raises(direction: str, member: int, view: Callable[[Any], Any]) -> None:
    tensor, _ = written(direction, member, torch.zeros)
    weight = torch.ones_like(tensor, requires_grad=True)
    loss = (weight * tensor).sum()  # saves tensor
    shapes = CALLS[direction][1]
    CALLS[direction][0](out=[view(tensor) if i == member else None for i in range(len(shapes))])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_only_read_keeps_its_version() -> None:
    given = arguments()
    cusru.sru_forward(**given)
    assert all(a._version == 0 for a in given.values())


def test_a_workspace_is_torch_s_memory_only_where_the_stream_is_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """The careful way is also that of another stream, of which torch's allocator knows nothing: it would hand out again what the
    call gives back, before the kernels have run."""
    if reason := missing("simulator"):
        pytest.skip(reason)

    class Own(torch.Tensor):
        pass

    monkeypatch.setenv("CUSRU_SIMULATE", "1")
    u, h, bias = normal(40, B, D, 3), normal(40, B, D), normal(2, D)
    asked: list[tuple[str, int]] = []
    new, needed = dlpack.new, cusru.workspace_size("backward", u, bias=bias)
    monkeypatch.setattr(dlpack, "new", lambda name, what, *rest: (asked.append((name, what.nbytes)), new(name, what, *rest))[1])
    for given in (h, h.as_subclass(Own)):
        cusru.sru_backward(given, None, h, u, bias=bias)
    assert [name for name, nbytes in asked if nbytes == needed] == ["torch", "numpy"]


def test_what_a_failed_launch_may_have_written_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("half way")

    monkeypatch.delenv("CUSRU_SIMULATE", raising=False)
    monkeypatch.setattr(call, "_run_numpy", fail)
    h = torch.zeros(L, B, D)
    with pytest.raises(RuntimeError, match="half way"):
        forward(out=(h, None, None))
    assert h._version == 1


def torchs_own(out: Any) -> None:
    torch.add(torch.ones(out.shape, dtype=out.dtype), 1, out=out)


def inference(shape: tuple[int, ...]) -> Any:
    with torch.inference_mode():
        return torch.full(shape, 7.0)


OUTS: dict[str, Callable[[tuple[int, ...]], Any]] = {
    "plain": lambda shape: torch.full(shape, 7.0),
    "a leaf that requires grad": lambda shape: torch.full(shape, 7.0, requires_grad=True),
    "a Parameter": lambda shape: torch.nn.Parameter(torch.full(shape, 7.0)),
    "computed from one that does": lambda shape: torch.full(shape, 7.0, requires_grad=True) * 1,
    "detached": lambda shape: torch.full(shape, 7.0, requires_grad=True).detach(),
    "inference": inference,
    "a view of an inference tensor": lambda shape: inference(shape)[:],
    "expanded": lambda shape: torch.full((1, *shape[1:]), 7.0).expand(shape),
    "transposed": lambda shape: torch.full(shape[::-1], 7.0).permute(*reversed(range(len(shape)))),
    "a subclass": lambda shape: torch.full(shape, 7.0).as_subclass(type("Mine", (torch.Tensor,), {})),
    "complex, conjugated, imaginary": lambda shape: torch.full(shape, 7j, dtype=torch.complex64).conj().imag,
}
MODES = {
    "grad": torch.enable_grad, "no grad": torch.no_grad, "inference": torch.inference_mode,
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("member", [0, 1, 2])
def test_an_out_is_refused_wherever_torchs_own_is(out: str, mode: str, member: int) -> None:
    shape = CALLS["forward"][1][member]
    mine, theirs = OUTS[out](shape), OUTS[out](shape)
    refused: Exception | None = None
    with MODES[mode]():
        try:
            torchs_own(theirs)
        except (RuntimeError, TypeError) as error:
            refused = error
        before = mine.detach().resolve_neg().clone()
        given = [mine if i == member else None for i in range(3)]
        if refused is None and "imaginary" not in out:  # torch writes lazily negated ones, cusru does not
            assert forward(out=given)[member] is mine
            torch.testing.assert_close(mine.detach().as_subclass(torch.Tensor), forward()[member])
            if not mine.is_inference():
                assert mine._version == theirs._version
            return
        with pytest.raises((ValueError, TypeError), match=rf"out\.{cusru.Output._fields[member]}\b"):
            forward(out=given)
    assert torch.equal(mine.detach().resolve_neg(), before), "nothing is written where a check refuses"


def test_an_inference_workspace_is_written_in_inference_mode_alone() -> None:
    with torch.inference_mode():
        _, given = written("backward", None, torch.zeros)
        backward(**given)
    with pytest.raises(ValueError, match=r"workspace is an inference tensor"):
        backward(**given)


def test_neither_checks_nor_versions_import_dynamo() -> None:
    code = """
        import sys, numpy, cusru
        assert "torch" not in sys.modules
        cusru.sru_forward(numpy.ones((2, 2, 2, 3)))
        assert "torch" not in sys.modules
        import torch
        out = torch.zeros(2, 2, 2), torch.zeros(2, 2, 2), torch.zeros(2, 2)
        cusru.sru_forward(torch.ones(2, 2, 2, 3), out=out)
        assert [a._version for a in out] == [1, 1, 1]
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


# ---- what would record ----------------------------------------------------------------------------------------------


def core(u: Any) -> Any:
    return cusru.sru_forward(u).h


def core_backward(u: Any) -> Any:
    return cusru.sru_backward(torch.ones(L, B, D), None, torch.ones(L, B, D), u).u


def core_size(u: Any) -> Any:
    return u + cusru.workspace_size("backward", u)


def core_into(u: Any) -> Any:
    """The only tensor is written."""
    h = u.select(-1, 0).clone()
    cusru.sru_forward(np.ones((L, B, D, 3), "f4"), out=(h, None, None))
    return h


def make_fx(mode: str, pre_dispatch: bool = False) -> Callable[..., Any]:
    from torch.fx.experimental.proxy_tensor import make_fx

    return lambda function: make_fx(function, tracing_mode=mode, pre_dispatch=pre_dispatch)(normal(L, B, D, 3))


def module(function: Any) -> Any:
    class Module(torch.nn.Module):
        def forward(self, u: Any) -> Any:
            return function(u)

    return Module()


def fake(function: Any) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return function(torch.ones(L, B, D, 3))


RECORDERS: dict[str, Any] = {
    "torch.jit.trace": lambda function: torch.jit.trace(function, normal(L, B, D, 3)),
    "make_fx": make_fx("real"),
    "make_fx, fake": make_fx("fake"),
    "make_fx, symbolic": make_fx("symbolic"),
    "make_fx before dispatch": make_fx("real", True),
    "fake tensors": fake,
    "torch.export": lambda function: torch.export.export(module(function), (normal(L, B, D, 3),), strict=False),
    "vmap": lambda function: torch.vmap(function)(normal(2, L, B, D, 3)),
    "functionalize": lambda function: torch.func.functionalize(function)(normal(L, B, D, 3)),
    "vjp": lambda function: torch.no_grad()(torch.func.vjp)(function, normal(L, B, D, 3)),
}


@pytest.mark.parametrize("function", [core, core_backward, core_size, core_into])
@pytest.mark.parametrize("recorder", [pytest.param(r, marks=scripted) if "jit" in r else r for r in RECORDERS])
def test_no_recorder_takes_a_result_for_a_constant(recorder: str, function: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TypeError, match=RECORD_INSTEAD):
            RECORDERS[recorder](function)


@pytest.mark.parametrize("recorder", ["fake tensors", "vmap", "functionalize"])
def test_an_empty_tensor_is_no_exception(recorder: str) -> None:
    with pytest.raises(TypeError, match=RECORD_INSTEAD):
        RECORDERS[recorder](lambda u: core(u[:0]))


def test_symbolic_tracing_is_refused() -> None:
    with pytest.raises(TypeError, match=r"u is a traced value.*Proxy"):
        torch.fx.symbolic_trace(module(core))


def test_numpy_arrays_are_constants_to_a_recorder_anyway() -> None:
    u = np.ones((L, B, D, 3), "f4")
    graph = make_fx("real")(lambda a: a.select(-1, 0) + torch.from_numpy(cusru.sru_forward(u).h))
    torch.testing.assert_close(graph(torch.zeros(L, B, D, 3)), torch.from_numpy(cusru.sru_forward(u).h))


def test_a_transform_may_call_with_tensors_that_it_does_not_transform() -> None:
    u = normal(L, B, D, 3)
    got = torch.vmap(lambda a: a + core(u))(torch.zeros(2, L, B, D))
    torch.testing.assert_close(got, core(u).expand(2, L, B, D))


def test_modes_that_only_watch_are_none_of_these() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        torch.testing.assert_close(forward().h, forward().h)


def test_the_operator_goes_on_inside_every_recorder() -> None:
    from cusru.torch import sru

    u = normal(L, B, D, 3)
    want, _ = sru(u)
    for mode, pre_dispatch in (("real", False), ("fake", False), ("symbolic", False), ("real", True)):
        graph = make_fx(mode, pre_dispatch)(lambda a: torch.ops.cusru.sru_forward(a, *[None] * 7, 1.0, *_OPTIONS)[0])
        torch.testing.assert_close(graph(u), want)
        torch.testing.assert_close(graph(2 * u), sru(2 * u)[0])


_OPTIONS = ("identity", "identity", "state", False, 1)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def program(u: Any) -> Any:
    u = u * 2
    o = cusru.sru_forward(u)
    h = o.h + 1
    h = h + cusru.sru_forward(u, save_every=2, activation="tanh").h
    h = h + cusru.sru_forward(u, u[..., 0].contiguous(), bias=torch.ones(2, D)).h
    into = torch.empty_like(h)
    h = h + cusru.sru_forward(u=u, c0=torch.ones(u.shape[1], D), out=[into, None, None]).h
    size = cusru.workspace_size("backward", u)
    workspace = torch.empty(size, dtype=torch.uint8)
    return h * 2, into + 1, cusru.sru_backward(h, None, o.c, u, workspace=workspace).u + size


@pytest.fixture
def dynamo() -> Iterator[Any]:
    dynamo = pytest.importorskip("torch._dynamo")
    dynamo.reset()
    yield dynamo
    dynamo.reset()


def test_torch_compile_breaks_its_graph_and_the_call_runs_as_it_is(dynamo: Any) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(program, backend=backend)
    with warnings.catch_warnings(), dynamo.config.patch(error_on_recompile=False):
        warnings.simplefilter("error")
        for batch in (3, 3, 5):  # the second batch size makes the caller's own graphs dynamic
            u = normal(L, batch, D, 3)
            for got, want in zip(compiled(u), program(u), strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0)
        settled = len(graphs)
        assert settled, "what stands between the calls is compiled"
        for batch in (7, 9, 11):
            u = normal(L, batch, D, 3)
            for got, want in zip(compiled(u), program(u), strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert len(graphs) == settled, "recompiled"
    ours = [str(node.stack_trace) for graph in graphs for node in graph.graph.nodes if "cusru/" in str(node.stack_trace or "")]
    assert not ours


def test_torch_compile_looks_at_no_frame_below_the_call(dynamo: Any) -> None:
    seen: list[str] = []
    hook = dynamo.convert_frame.register_bytecode_hook(lambda old, new: seen.append(f"{old.co_filename}: {old.co_name}"))
    try:
        for batch in (3, 5, 7):
            torch.compile(program, backend="eager")(normal(L, batch, D, 3))
    finally:
        hook.remove()
    ours = {name for name in seen if "/cusru/" in name}
    assert any("program" in name for name in seen)
    assert {name.partition(": ")[2] for name in ours} <= {"call"}, "the one that switches torch.compile off"
    assert len([name for name in seen if "/cusru/" in name]) <= 3, "compiled once for each function"


def test_an_error_leaves_torch_compile_switched_on(dynamo: Any) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def wrong(u: Any) -> Any:
        try:
            h = cusru.sru_forward(u * 2, bidirectional=2)
        except TypeError:
            h = None
        return u + 1 if h is None else h

    def right(u: Any) -> Any:
        return core(u) + 1

    torch.testing.assert_close(torch.compile(wrong, backend=backend)(normal(2, 3)), normal(2, 3) + 1)
    graphs.clear()
    u = normal(L, B, D, 3)
    torch.testing.assert_close(torch.compile(right, backend=backend)(u), right(u))
    assert graphs


@pytest.mark.skipif("reason" not in inspect.signature(torch.compiler.disable).parameters, reason="torch's own error alone")
def test_a_whole_graph_is_refused_with_what_to_call(dynamo: Any) -> None:
    with pytest.raises(Exception, match=rf"<function sru_forward at (.|\n)*{RECORD_INSTEAD}"):
        torch.compile(program, backend="eager", fullgraph=True)(normal(L, B, D, 3))


def test_the_function_itself_may_be_compiled(dynamo: Any) -> None:
    u = normal(L, B, D, 3)
    torch.testing.assert_close(torch.compile(cusru.sru_forward, backend="eager")(u).h, core(u))


# ---- tensors that are no memory -------------------------------------------------------------------------------------


def test_a_subclass_that_dispatches_for_itself_is_refused() -> None:
    class Two(torch.Tensor):
        @staticmethod
        def __new__(cls, a: Any) -> Any:
            return torch.Tensor._make_subclass(cls, a)

        @classmethod
        def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError("must not be asked")

    with pytest.raises(TypeError, match=r"bias is a .*Two"):
        forward(bias=Two(torch.zeros(2, D)))


@pytest.mark.parametrize("kind", ["Parameter", "Buffer", "subclass"])
def test_a_subclass_that_is_its_memory_is_taken(kind: str) -> None:
    if not hasattr(torch.nn, kind) and kind != "subclass":
        pytest.skip(f"torch.nn.{kind} is not there")
    make = {"subclass": lambda a: a.as_subclass(type("Mine", (torch.Tensor,), {}))}.get(kind) or getattr(torch.nn, kind)
    bias = arguments()["bias"]
    with torch.no_grad():
        torch.testing.assert_close(forward(bias=make(bias)).h, forward(bias=bias).h, rtol=0, atol=0)


def test_a_lazy_parameter_is_refused() -> None:
    with pytest.raises(TypeError, match=r"bias is a .*UninitializedParameter"):
        forward(bias=torch.nn.parameter.UninitializedParameter(requires_grad=False))
