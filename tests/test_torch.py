"""cusru.torch.sru: the recurrence as a differentiable operator of torch, under each of torch's transforms."""

from __future__ import annotations

import inspect
import io
import threading
from typing import Any

import numpy as np
import pytest
import strategies
from conftest import missing, scripted
from test_errors import BAD, Elsewhere, raises
from test_errors import inputs as arguments

import cusru

torch = pytest.importorskip("torch", reason='needs torch: pip install "cusru[torch]"')

from torch.autograd import forward_ad  # noqa: E402
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from cusru.torch import sru  # noqa: E402

L, B, D = 7, 3, 4
DIFFERENTIABLE = ("u", "x", "bias", "weight_c", "c0")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*_prims_common.*:FutureWarning")


def tensor(a: np.ndarray) -> torch.Tensor:
    """Over the same memory."""
    if a.dtype == strategies.BFLOAT16:
        return torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def keywords(problem: strategies.Problem) -> dict[str, Any]:
    return {n: tensor(a) if isinstance(a, np.ndarray) else a for n, a in problem.inputs.items()}


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def leaves(k: int = 3, step: bool = False, flat: bool = False, **options: Any) -> dict[str, Any]:
    """Arguments of sru, all that can be differentiated as leaves."""
    given = dict(u=normal(L, B, D, k), bias=normal(2, D), weight_c=normal(L, B, D, 2) if step else normal(2, D), c0=normal(B, D))
    if k == 3:
        given["x"] = normal(L, B, D)
    if flat:
        given |= {n: given[n].flatten() for n in ("bias", "weight_c") if given[n].ndim == 2}
    return {n: a.requires_grad_() for n, a in given.items()} | options


def gradients(given: dict[str, Any], run: Any = sru) -> dict[str, torch.Tensor]:
    wanted = [n for n in DIFFERENTIABLE if isinstance(given.get(n), torch.Tensor)]
    h, c_last = run(**given)
    loss = (h * normal(*h.shape).to(h.dtype)).sum() + (c_last * normal(*c_last.shape).to(c_last.dtype)).sum()
    return dict(zip(wanted, torch.autograd.grad(loss, [given[n] for n in wanted]), strict=True))


def loss_of(run: Any) -> Any:
    """A scalar of h and c_last that is linear in neither."""

    def loss(*args: Any, **given: Any) -> torch.Tensor:
        h, c_last = run(*args, **given)
        return h.sin().sum() + c_last.square().sum()

    return loss


VARIANTS = {
    "k = 3": dict(),
    "k = 4, tanh, two directions": dict(k=4, activation="tanh", bidirectional=True),
    "QRNN": dict(candidate="tanh", mask_c=torch.full((B, D), 1.25, dtype=torch.float64)),
    "weights per step": dict(step=True, mask_target="gate", mask_c=normal(B, D)),
    "flat, padded, scaled": dict(
        flat=True,
        bidirectional=True,
        mask_pad=torch.arange(L)[:, None] >= torch.tensor([7, 2, 0]),
        scale_x=torch.tensor([1.5], dtype=torch.float64),
    ),
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


# ---- it is the recurrence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [r for r in strategies.COVERING if r[0] in strategies.DTYPES], ids="-".join)
def test_results_are_bit_for_bit_those_of_cusrus_functions(row):
    problem = strategies.typical(row, save_every=5)
    given = keywords(problem)
    with torch.no_grad():
        output = cusru.sru_forward(**given)
        g = cusru.sru_backward(tensor(problem.grad_h), tensor(problem.grad_c_last), output.c, **given)
    wanted = [n for n in DIFFERENTIABLE if given[n] is not None]
    for name in wanted:
        given[name].requires_grad_()
    results = sru(**given)
    found = torch.autograd.grad(
        results, [given[n] for n in wanted], (tensor(problem.grad_h), tensor(problem.grad_c_last)), allow_unused=True
    )
    assert torch.equal(results[0], output.h)
    assert torch.equal(results[1], output.c_last)
    for name, a in zip(wanted, found, strict=True):
        assert a.dtype == given[name].dtype
        assert torch.equal(a, getattr(g, name)), name


@variants
def test_gradients_are_those_of_finite_differences(variant):
    given = leaves(**variant)
    names = [n for n in DIFFERENTIABLE if n in given]
    others = {n: v for n, v in given.items() if n not in names}
    assert torch.autograd.gradcheck(
        lambda *a: sru(**dict(zip(names, a, strict=True)), save_every=3, **others), [given[n] for n in names], fast_mode=True
    )


def test_signature_is_that_of_sru_forward_but_for_who_owns_the_memory():
    ours, theirs = (inspect.signature(f).parameters for f in (sru, cusru.sru_forward))
    assert list(ours) == [n for n in theirs if n not in ("out", "workspace", "stream")]
    assert all(ours[n].default == theirs[n].default for n in ours if n != "save_every")


def test_only_what_is_asked_for_is_differentiated():
    u, bias = normal(L, B, D, 3), normal(2, D).requires_grad_()
    h, c_last = sru(u, bias=bias)
    c_last.sum().backward()  # h is not in the loss
    assert u.grad is None
    assert bias.grad.abs().sum() > 0
    h, _ = sru(u.requires_grad_(), bias=bias)
    h.sum().backward()
    assert u.grad.abs().sum() > 0
    with torch.no_grad():
        assert not sru(u)[0].requires_grad


def test_save_every_changes_no_bit():
    first = None
    for every in (1, 2, 32, 1000):
        found = gradients(leaves(save_every=every))
        first = first or found
        assert all(torch.equal(found[n], first[n]) for n in first)
    with torch.no_grad():
        assert torch.equal(sru(**leaves(save_every=None))[0], sru(**leaves())[0])


def test_what_is_kept_for_the_backward_is_the_inputs_and_little_more():
    length, batch, width = 320, 4, 16
    u = normal(length, batch, width, 3).requires_grad_()
    kept: dict[int, int] = {}

    def pack(a):
        kept[a.untyped_storage().data_ptr()] = a.untyped_storage().nbytes()
        return a

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
        sru(u)
    assert sum(kept.values()) - u.nbytes < 0.05 * u.nbytes


def test_any_strides_give_the_same_bits():
    expected = gradients(leaves())

    def strided(name, a):
        a = a.detach()
        swapped = torch.empty(a.shape[::-1], dtype=a.dtype).permute(*range(a.ndim)[::-1])
        return swapped.copy_(a)

    given = {n: strided(n, a).requires_grad_() for n, a in leaves().items()}
    assert not given["u"].is_contiguous()
    found = gradients(given)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    one = normal(1, 1, D, 3).expand(L, B, D, 3)
    assert torch.equal(sru(one)[0], sru(one.contiguous())[0])


def test_h_and_the_gradient_of_u_lie_in_memory_as_u_does():
    batch_first = normal(B, L, D, 3).transpose(0, 1).requires_grad_()
    h, _ = sru(batch_first)
    assert h.transpose(0, 1).is_contiguous()
    (g,) = torch.autograd.grad(h.sum(), batch_first)
    assert g.stride() == batch_first.stride()
    assert sru(normal(L, B, D, 3))[0].is_contiguous()


def test_results_are_torchs_own_memory():
    """What torch did not allocate could not be resized."""
    assert all(a.untyped_storage().resizable() for a in sru(normal(L, B, D, 3)))
    given = leaves()
    assert all(a.untyped_storage().resizable() for a in gradients(given).values())


@pytest.mark.parametrize("shape", [(0, B, D), (L, 0, D), (L, B, 0)])
def test_lengths_of_zero(shape):
    u, c0 = normal(*shape, 3).requires_grad_(), normal(*shape[1:]).requires_grad_()
    h, c_last = sru(u, c0=c0)
    (h.sum() + c_last.sum()).backward()
    assert u.grad.shape == u.shape
    if not shape[0]:
        assert torch.equal(c_last, c0)
        assert torch.equal(c0.grad, torch.ones_like(c0))


@pytest.mark.skipif(missing("simulator") is not None, reason=missing("simulator") or "")
def test_the_kernels_own_source_gives_the_same(monkeypatch):
    expected = gradients(leaves())
    monkeypatch.setenv("CUSRU_SIMULATE", "1")
    found = gradients(leaves())
    for name, a in expected.items():
        torch.testing.assert_close(found[name], a, rtol=1e-11, atol=1e-11)


# ---- torch's transforms --------------------------------------------------------------------------------------------


def operands(given: dict[str, Any], save_every: int = 3) -> tuple[Any, ...]:
    """Of torch.ops.cusru.sru_forward."""
    scale = given.get("scale_x", 1.0)
    tensors = [given.get(n) for n in ("u", "x", "bias", "weight_c", "c0", "mask_c", "mask_pad")]
    by_value = isinstance(scale, float)
    options = (given.get("activation", "identity"), given.get("candidate", "identity"), given.get("mask_target", "state"))
    return (
        *tensors,
        None if by_value else scale,
        scale if by_value else 1.0,
        *options,
        given.get("bidirectional", False),
        save_every,
    )


@variants
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_operators_are_what_torch_asks_of_operators(variant, batch_first):
    given = leaves(**variant)
    if batch_first:
        given["u"] = given["u"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    forward = operands(given)
    torch.library.opcheck(torch.ops.cusru.sru_forward.default, forward)
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in forward]
    h, c, c_last = torch.ops.cusru.sru_forward(*detached)
    for grad_c_last in (c_last, None):
        torch.library.opcheck(
            torch.ops.cusru.sru_backward.default,
            (h, grad_c_last, c, *detached),
            test_utils=("test_schema", "test_faketensor"),  # it has no derivative
        )


@variants
def test_compiled_as_one_graph_it_gives_the_same_bits(variant):
    expected = gradients(leaves(**variant))
    torch._dynamo.reset()
    found = gradients(leaves(**variant), torch.compile(sru, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_compiled_by_inductor_within_a_model():
    def model(u, bias):
        h, c_last = sru(u.sin(), bias=bias * 2, activation="tanh")
        return h.cos().sum() + c_last.exp().sum()

    given = [normal(L, B, D, 3).requires_grad_(), normal(2, D).requires_grad_()]
    torch._dynamo.reset()
    expected = torch.autograd.grad(model(*given), given)
    for found, a in zip(torch.autograd.grad(torch.compile(model, fullgraph=True)(*given), given), expected, strict=True):
        torch.testing.assert_close(found, a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_whole_training_step_can_be_compiled(backend):
    def step(u):
        h, _ = sru(u)
        h.sum().backward()
        return h

    eager, compiled = (normal(L, B, D, 3).requires_grad_() for _ in range(2))
    compiled.data = eager.data
    torch._dynamo.reset()
    assert torch.equal(torch.compile(step, backend=backend)(compiled), step(eager))
    assert torch.equal(compiled.grad, eager.grad)


def test_within_a_frame_that_is_not_compiled_the_compiler_leaves_the_operator_s_own_python_alone():
    options = (*[None] * 7, 1.0, "identity", "identity", "state", False, 32)
    skipped = torch._dynamo.disable(lambda u: torch.ops.cusru.sru_forward(u, *options)[0], recursive=False)
    u, graphs = normal(L, B, D, 3), []
    torch._dynamo.reset()
    compiled = torch.compile(lambda u: skipped(u) + 1, backend=lambda graph, _: graphs.append(graph) or graph)
    assert torch.equal(compiled(u), sru(u)[0] + 1)
    assert [node.name for graph in graphs for node in graph.graph.nodes if node.op == "call_function"] == ["add"]


def test_compiled_for_any_length_and_batch():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda u, s: sru(u, scale_x=s)[0], fullgraph=True, dynamic=True, backend=backend)
    for length, batch, scale in ((5, 2, 1.0), (40, 3, 1.0), (100, 7, 1.0), (33, 2, 1.0)):
        u = normal(length, batch, D, 3)
        assert torch.equal(compiled(u, scale), sru(u, scale_x=scale)[0])
    assert len(graphs) == 1
    assert torch.equal(compiled(u, 2.5), sru(u, scale_x=2.5)[0])


class Recurrence(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(normal(2, D))

    def forward(self, u: torch.Tensor, weight_c: torch.Tensor | None = None) -> Any:
        return sru(u, bias=self.bias, weight_c=weight_c)


@pytest.mark.parametrize("strict", [False, True])
def test_export_for_any_length_and_batch(strict):
    model = Recurrence()
    sizes = dict(u={0: torch.export.Dim("L"), 1: torch.export.Dim("B")})
    exported = torch.export.export(model, (normal(L, B, D, 3),), dynamic_shapes=sizes, strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for length, batch in ((2, 2), (32, 3), (33, 3), (200, 5)):
        u = normal(length, batch, D, 3)
        for found, a in zip(loaded(u), model(u), strict=True):
            assert torch.equal(found, a)
        assert torch.equal(
            torch.autograd.grad(loaded(u)[0].sum(), loaded.bias)[0], torch.autograd.grad(model(u)[0].sum(), model.bias)[0]
        )


def test_export_with_weights_per_step_compares_no_length_with_a_width():
    sizes = {0: torch.export.Dim("L"), 1: torch.export.Dim("B")}
    given = normal(L, B, D, 3), normal(L, B, D, 2)
    exported = torch.export.export(Recurrence(), given, dynamic_shapes=(sizes, sizes)).module()
    for length in (2, 2 * D, 50):
        assert exported(normal(length, B, D, 3), normal(length, B, D, 2))[0].shape == (length, B, D)


def test_meta_tensors_have_the_shapes_and_dtypes_of_the_results():
    for dtype, state in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        u = torch.empty(L, B, D, 3, device="meta", dtype=dtype, requires_grad=True)
        h, c_last = sru(u)
        assert (h.shape, h.dtype, h.device.type) == ((L, B, D), dtype, "meta")
        assert (c_last.shape, c_last.dtype) == ((B, D), state)
        assert torch.autograd.grad(h.sum(), u)[0].shape == u.shape


@variants
def test_func_grad_is_autograd(variant):
    given = leaves(**variant)
    names = [n for n in DIFFERENTIABLE if n in given]
    others = {n: v for n, v in given.items() if n not in names}
    loss = loss_of(lambda tensors: sru(**tensors, **others))
    expected = torch.autograd.grad(loss({n: given[n] for n in names}), [given[n] for n in names])
    found = grad(loss)({n: given[n].detach() for n in names})
    for name, a in zip(names, expected, strict=True):
        assert torch.equal(found[name], a)


BATCHED = {  # which arguments are vmapped, and where their axis stands
    "u": dict(u=0),
    "u, in the midst": dict(u=1),
    "u, last": dict(u=-1, x=2),
    "all": dict(u=0, x=1, bias=0, weight_c=1, c0=2, mask_c=0, mask_pad=0),
    "parameters": dict(bias=1, weight_c=0),
    "padding": dict(u=0, mask_pad=1),
    "state and dropout": dict(c0=0, mask_c=1),
    "scale": dict(scale_x=0, u=0),
}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("batched", BATCHED.values(), ids=BATCHED)
def test_vmap_and_the_gradients_of_each_are_those_of_a_loop(batched, step, bidirectional):
    size = 3
    given = {n: a.detach() for n, a in leaves(step=step, flat=batched.get("bias") == 1).items()} | dict(
        mask_c=normal(B, D).abs(), mask_pad=normal(L, B) > 0.8, scale_x=torch.tensor([1.25], dtype=torch.float64)
    )
    each = {
        n: torch.stack([a + i * 0.1 if a.is_floating_point() else a.roll(i, 0) for i in range(size)]) for n, a in given.items()
    }
    stacked = {n: each[n].movedim(0, batched[n]) if n in batched else given[n] for n in given}
    dims = {n: batched.get(n) for n in given}

    def run(given):
        return sru(**given, bidirectional=bidirectional, save_every=3, mask_target="gate")

    loss = loss_of(run)

    def of(i):
        return {n: each[n][i] if n in batched else given[n] for n in given}

    for found, *expected in zip(vmap(run, (dims,))(stacked), *(run(of(i)) for i in range(size)), strict=True):
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
    names = DIFFERENTIABLE

    def differentiated(given):
        return grad(lambda wanted: loss(given | wanted))({n: given[n] for n in names})

    found = vmap(differentiated, (dims,))(stacked)
    for name in names:
        torch.testing.assert_close(
            found[name], torch.stack([differentiated(of(i))[name] for i in range(size)]), rtol=1e-11, atol=1e-11
        )


def test_vmap_in_vmap_and_gradients_through_it():
    u = normal(2, 3, L, B, D, 3).requires_grad_()
    bias = normal(2, D).requires_grad_()
    loss = loss_of(lambda u: sru(u, bias=bias))
    nested = vmap(vmap(loss))(u)
    looped = torch.stack([torch.stack([loss(b) for b in a]) for a in u])
    torch.testing.assert_close(nested, looped, rtol=1e-12, atol=1e-12)
    for found, a in zip(torch.autograd.grad(nested.sum(), [u, bias]), torch.autograd.grad(looped.sum(), [u, bias]), strict=True):
        torch.testing.assert_close(found, a, rtol=1e-11, atol=1e-11)


def test_jacobians_by_reverse_mode():
    u = normal(3, 1, 2, 3)
    jacobian = jacrev(lambda u: sru(u)[0])(u)
    rows = [torch.autograd.functional.vjp(lambda u: sru(u)[0], u, v.reshape(3, 1, 2))[1] for v in torch.eye(6, dtype=u.dtype)]
    torch.testing.assert_close(jacobian.reshape(6, *u.shape), torch.stack(rows), rtol=1e-12, atol=1e-12)
    _, pull = vjp(lambda u: sru(u)[0], u)
    assert torch.equal(pull(torch.ones(3, 1, 2, dtype=u.dtype))[0], grad(lambda u: sru(u)[0].sum())(u))


TRANSFORMS = dict(
    grad=lambda f: grad(f),
    vmap=lambda f: vmap(f),
    vmap_grad=lambda f: vmap(grad(f)),
    grad_vmap=lambda f: grad(lambda u: vmap(f)(u).sum()),
)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_compile_as_one_graph(transform):
    transformed = transform(loss_of(lambda u: sru(u, save_every=3)))
    u = normal(5, L, B, D, 3)
    torch._dynamo.reset()
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    u = u[0] if transform is TRANSFORMS["grad"] else u
    torch.testing.assert_close(compiled(u), transformed(u), rtol=1e-12, atol=1e-12)


def test_functional_call_sees_the_parameters_it_is_given():
    model, u = Recurrence(), normal(L, B, D, 3)
    other = normal(2, D, seed=5)
    assert torch.equal(functional_call(model, dict(bias=other), (u,))[0], sru(u, bias=other)[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(use_reentrant):
    given, again = leaves(), leaves()
    sum(a.square().sum() for a in sru(**given)).backward()
    kept = again.pop("u"), again.pop("x")
    h, c_last = checkpoint(lambda u, x: sru(u, x, **again), *kept, use_reentrant=use_reentrant)
    (h.square().sum() + c_last.square().sum()).backward()
    again |= dict(zip("ux", kept, strict=True))
    for name in given:
        assert torch.equal(again[name].grad, given[name].grad), name


def test_inference_mode():
    given = leaves()
    with torch.inference_mode():
        h, c_last = sru(**given)
    assert h.is_inference()
    expected = sru(**given)
    assert torch.equal(h, expected[0])
    assert torch.equal(c_last, expected[1])


def test_backward_on_other_threads():
    expected = gradients(leaves())
    found: list[Any] = [None] * 4

    def work(i):
        found[i] = gradients(leaves())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for g in found:
        assert all(torch.equal(g[n], expected[n]) for n in expected)


@scripted
def test_scripts_may_call_the_operator_and_differentiate_it():
    @torch.jit.script
    def script(u: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        h, _, _ = torch.ops.cusru.sru_forward(
            u, None, bias, None, None, None, None, None, 1.0, "tanh", "identity", "state", False, 8
        )
        return h

    u, bias = normal(L, B, D, 3), normal(2, D).requires_grad_()
    expected = sru(u, bias=bias, activation="tanh")[0]
    assert torch.equal(script(u, bias), expected)
    assert torch.equal(*(torch.autograd.grad(h.square().sum(), bias)[0] for h in (script(u, bias), expected)))


# ---- what is not there ---------------------------------------------------------------------------------------------


def test_forward_mode_raises():
    u, bias = normal(L, B, D, 3), normal(2, D)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        jvp(lambda u: sru(u)[0], (u,), (u,))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="forward-mode"):
            sru(forward_ad.make_dual(u, u))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            sru(u, bias=forward_ad.make_dual(bias, bias))
        for call in (cusru.sru_forward, lambda u: torch.ops.cusru.sru_forward(*operands(dict(u=u)))):
            with pytest.raises(TypeError, match=r"\bu carries a forward-mode tangent"):
                call(forward_ad.make_dual(u, u))
        assert sru(u)[0].shape == (L, B, D)  # without a tangent


def test_a_derivative_of_the_gradients_raises():
    u = normal(L, B, D, 3).requires_grad_()
    for run in (sru, lambda u: torch.ops.cusru.sru_forward(*operands(dict(u=u)))):
        (g,) = torch.autograd.grad(run(u)[0].square().sum(), u, create_graph=True)
        with pytest.raises(NotImplementedError, match="double backward"):
            g.sum().backward()
    with pytest.raises(NotImplementedError, match=r"forward-mode|double backward"):
        hessian(lambda u: sru(u)[0].sum())(u.detach())
    with pytest.raises(NotImplementedError, match="double backward"):
        grad(lambda u: grad(lambda u: sru(u)[0].sin().sum())(u).sum())(u.detach())


@pytest.mark.parametrize("name", ["mask_c", "scale_x"])
def test_a_gradient_that_does_not_exist_is_refused(name):
    u, value = normal(L, B, D, 3), (normal(B, D) if name == "mask_c" else normal(1)).requires_grad_()
    raises(TypeError, [name, "no gradient", "detach"], sru, u=u, **{name: value})
    with torch.no_grad():
        sru(u, **{name: value})
    several = torch.stack([u, u])

    def hidden(value):
        return vmap(lambda u, value: sru(u, **{name: value})[0].sum())(several, value).sum()

    def operator(value):
        return torch.ops.cusru.sru_forward(*operands({"u": u.requires_grad_(), name: value}))[0].sum()

    for loss, given in ((hidden, torch.stack([value, value])), (operator, value)):
        with pytest.raises(TypeError, match=f"{name} requires grad, and cusru has no gradient"):
            torch.autograd.grad(loss(given), value)
    with pytest.raises(TypeError, match=f"{name} requires grad, and cusru has no gradient"):
        grad(hidden)(torch.stack([value, value]).detach())


def test_without_saved_states_there_is_no_backward_to_ask_for():
    raises(ValueError, ["save_every=None", "backward"], sru, u=normal(L, B, D, 3).requires_grad_(), save_every=None)


# ---- bad input -----------------------------------------------------------------------------------------------------

NOT_HERE = ("workspace of rank 2", "workspace of floats", "Metal", "ROCm", "oneAPI", "two devices")


def as_tensors(given: dict[str, Any]) -> dict[str, Any]:
    return {n: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for n, a in given.items()}


@pytest.mark.parametrize("case", [n for n in BAD if n not in NOT_HERE])
def test_bad_input_names_the_argument(case):
    changes, error, words = BAD[case]
    assert not any(isinstance(a, Elsewhere) for a in changes.values())
    raises(error, words, sru, **as_tensors(arguments(**changes)))


@pytest.mark.parametrize("case", [n for n in BAD if n not in NOT_HERE])
def test_bad_input_without_memory_gets_the_same_error(case):
    """The fake kernel, which tracers run, makes every check that can be made."""
    changes, error, words = BAD[case]
    given = as_tensors(arguments(**changes))
    raises(error, words, sru, **{n: a.to("meta") if isinstance(a, torch.Tensor) else a for n, a in given.items()})


def test_tensors_on_two_devices_are_refused_by_name():
    given = as_tensors(arguments())
    given["bias"] = given["bias"].to("meta")
    raises(ValueError, ["bias", "meta", r"\bu\b", "cpu"], sru, **given)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        u, c0 = torch.empty(L, B, D, 3, device="cuda:0"), torch.empty(B, D)
        raises(ValueError, ["c0", "cpu", r"\bu\b", "cuda:0"], sru, u=u, c0=c0)
        assert sru(u)[0].device == torch.device("cuda:0")
        raises(ValueError, [r"\bu\b", "Metal|mps"], sru, u=torch.empty(L, B, D, 3, device="mps"))


def test_bad_input_fails_when_it_is_compiled():
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"x has shape .*expected"):
        torch.compile(sru, fullgraph=True, backend="aot_eager")(normal(L, B, D, 3), normal(L, B, D + 1))


def test_bad_input_under_vmap_is_told_the_sizes_of_one_problem():
    u = normal(2, L, B, D, 3)
    raises(ValueError, ["bias", r"\(7,\)", r"\(2, 4\) or \(8,\)"], vmap(lambda u, b: sru(u, bias=b)), args=(u, normal(2, 7)))
    raises(ValueError, ["c0", r"\(3, 5\)", r"\(3, 4\)"], vmap(lambda u, c: sru(u, c0=c)), args=(u, normal(2, B, 5)))
    raises(ValueError, ["bidirectional", "even"], vmap(lambda u: sru(u, bidirectional=True)), args=(normal(2, L, B, 5, 3),))
    assert vmap(sru)(u[:0])[0].shape == (0, L, B, D)


def test_other_arrays_are_refused_by_name():
    raises(TypeError, [r"\bu\b", "torch.Tensor", "numpy.ndarray"], sru, u=np.zeros((L, B, D, 3)))
    raises(TypeError, ["bias", "torch.Tensor", "list"], sru, u=normal(L, B, D, 3), bias=[0.0])
    raises(TypeError, [r"\bu\b", "sparse"], sru, u=normal(L, B, D, 3).to_sparse())


def test_a_tensor_that_requires_grad_is_sent_here_by_cusrus_functions():
    with pytest.raises(TypeError, match=r"u requires grad.*cusru\.torch\.sru"):
        cusru.sru_forward(normal(L, B, D, 3).requires_grad_())
