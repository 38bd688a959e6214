"""cusru.jax: what it computes, under which of JAX's transforms it works, and that what is wrong is said when JAX traces."""

from __future__ import annotations

import functools
import importlib
import itertools
import random
from typing import Any

import numpy as np
import pytest
import strategies
from conftest import GRADIENTS, missing

jax = pytest.importorskip("jax", reason='needs JAX: pip install "cusru[jax]"')

import jax.numpy as jnp  # noqa: E402
from jax.sharding import PartitionSpec  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import cusru  # noqa: E402
import cusru.jax as cj  # noqa: E402
from cusru.jax import operator  # noqa: E402

L, B, D = 6, 4, 4
FUNCTIONS = {"sru": cj.sru, "qrnn": cj.qrnn, "linear_recurrence": cj.linear_recurrence}


@pytest.fixture(autouse=True)
def _wide_and_on_a_cpu():
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


def normal(*shape: int, seed: int = 0, dtype: Any = "float64") -> Any:
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def mask(*shape: int, seed: int = 0) -> Any:
    chosen = np.random.default_rng([seed, *shape]).random(shape) < 0.3
    chosen[0, 0] = True
    return jnp.asarray(chosen)


#: Arrays that have gradients by name, and the other arguments
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "v1": ("sru", dict(u=(L, B, D, 3), x=(L, B, D), bias=(2, D)), dict(save_every=2)),
    "v2, two directions": (
        "sru",
        dict(u=(L, B, D, 3), x=(L, B, D), bias=(2 * D,), weight_c=(2 * D,), c0=(B, D)),
        dict(save_every=4, bidirectional=True, activation="tanh", scale_x=1.5, mask_target="gate", mask_c="values"),
    ),
    "k = 4, padded": (
        "sru",
        dict(u=(L, B, D, 4), bias=(2, D), c0=(B, D)),
        dict(mask_pad="mask", starts="mask", reverse=True, scale_x="value"),
    ),
    "weights per step": (
        "sru",
        dict(u=(L, B, D, 3), weight_c=(L, B, D, 2), c0=(B, D)),
        dict(candidate="tanh", bidirectional=True),
    ),
    "fo": ("qrnn", dict(u=(L, B, D, 3), c0=(B, D)), dict(zoneout=0.2, bidirectional=True, save_every=1)),
    "ifo": ("qrnn", dict(u=(L, B, D, 4)), dict(pooling="ifo", gate="update", zoneout="zoneout", mask_pad="mask")),
    "affine": ("linear_recurrence", dict(a=(L, B, D), b=(L, B, D), c0=(B, D)), dict(save_every=2)),
    "blend": ("linear_recurrence", dict(a=(B, D), b=(L, B, D), c0=(B, D)), dict(form="blend", starts="mask", bidirectional=True)),
    "complement": ("linear_recurrence", dict(a=(D,), b=(L, B, D)), dict(form="complement", mask_pad="mask", reverse=True)),
}
every_case = pytest.mark.parametrize("case", CASES)
DRAWN = {
    "mask": lambda: mask(L, B), "zoneout": lambda: mask(L, B, D, seed=1), "values": lambda: abs(normal(B, D, seed=2)),
    "value": lambda: jnp.asarray([1.25]),
}  # fmt: skip


def problem(case: str, front: tuple[int, ...] = ()) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The function, its arrays, with more axes in front, and its options."""
    family, shapes, options = CASES[case]
    arrays = {n: normal(*front, *shape, seed=i) for i, (n, shape) in enumerate(shapes.items())}
    return (
        FUNCTIONS[family],
        arrays,
        {n: DRAWN[v]() if v in DRAWN else v for n, v in options.items() if isinstance(v, str)}
        | {n: v for n, v in options.items() if not isinstance(v, str)},
    )


def loss(case: str, **others: Any) -> Any:
    """A number, of the arrays by name."""
    function, _, options = problem(case)

    def of(arrays: dict[str, Any]) -> Any:
        h, c_last = function(**arrays, **(options | others))
        return (h * jnp.cos(jnp.arange(h.size)).reshape(h.shape)).sum() + (c_last**2).sum()

    return of


def close(found: Any, expected: Any, bound: float = 1e-12) -> None:
    """Trees of arrays, by the largest value of each."""
    paired = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for a, b in paired:
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * max(1.0, float(abs(np.asarray(b)).max(initial=0))))


# ---- what it computes ------------------------------------------------------------------------------------------------


def drawn() -> list[Any]:
    found = []
    for family, seed in itertools.product(strategies.FAMILIES, range(16)):
        choice = strategies.random_choice(random.Random(seed), family=family, length=(1, 2, 33, 65, 0), broadcast="none")
        found.append(pytest.param(choice | {"save_every": choice["save_every"] or 7}, id=f"{family}-{seed}"))
    return found


@pytest.mark.parametrize("choice", drawn())
def test_the_oracle_says_the_same(choice):
    """Compiled: h, c_last and every gradient, of any options and dtypes."""
    drawn = strategies.build_any(choice)
    inputs, function = drawn.inputs, FUNCTIONS[drawn.family]
    differentiable = [n for n in GRADIENTS[drawn.family]._fields if inputs.get(n) is not None]
    given = {n: jnp.asarray(inputs[n]) for n in differentiable}
    others = {n: v for n, v in inputs.items() if n not in given and v is not None}

    @jax.jit
    def run(given, cotangents):
        results, pull = jax.vjp(lambda given: function(**given, **others), given)
        return results, pull(cotangents)[0]

    state = strategies.np_dtype(strategies.state_of(drawn.dtype))
    grad_c_last = np.zeros(drawn.shape[1:], state) if drawn.grad_c_last is None else drawn.grad_c_last.astype(state)
    (h, c_last), gradients = run(given, (jnp.asarray(drawn.grad_h), jnp.asarray(grad_c_last)))
    plain = function(**given, **others)  # no states saved
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(plain, (h, c_last), strict=True))
    expected = drawn.replace(save_every=None)
    expected.check(cusru.api.Output(np.asarray(h), None, np.asarray(c_last)), expected.expected_forward())
    found = GRADIENTS[drawn.family](*(np.asarray(gradients[n]) if n in given else None for n in GRADIENTS[drawn.family]._fields))
    if drawn.grad_c_last is not None:
        drawn = drawn.replace(grad_c_last=grad_c_last)
    drawn.check(found, drawn.expected_backward())


@every_case
def test_gradients_are_finite_differences(case):
    function, arrays, options = problem(case)
    check_grads(lambda arrays: function(**arrays, **options), (arrays,), 1, modes=["rev"])


@pytest.mark.parametrize("case", ["affine", "blend", "complement"])
def test_the_linear_recurrence_has_derivatives_of_its_derivatives(case):
    function, arrays, options = problem(case)
    check_grads(lambda arrays: function(**arrays, **options), (arrays,), 2, modes=["rev"])


def test_it_is_what_cusru_computes_bit_for_bit():
    function, arrays, options = problem("v2, two directions")
    h, c_last = function(**arrays, **options)
    plain = {n: np.asarray(a) if isinstance(a, jax.Array) else a for n, a in (arrays | options).items()}
    out = cusru.sru_forward(**plain)
    assert np.array_equal(h, out.h)
    assert np.array_equal(c_last, out.c_last)


@pytest.mark.parametrize("case", ["v2, two directions", "ifo", "blend"])
def test_the_kernels_run_in_a_compiled_program(case, monkeypatch):
    if reason := missing("simulator"):
        pytest.skip(reason)
    expected = jax.value_and_grad(loss(case))(problem(case)[1])
    monkeypatch.setenv("CUSRU_SIMULATE", "1")
    started = []
    monkeypatch.setattr(operator.call.raw_kernels, "run", watched(operator.call.raw_kernels.run, started))
    close(jax.jit(jax.value_and_grad(loss(case)))(problem(case)[1]), expected)
    assert len(started) == 2


def watched(function: Any, seen: list[Any]) -> Any:
    def watch(*arguments: Any, **keywords: Any) -> Any:
        seen.append(arguments)
        return function(*arguments, **keywords)

    return watch


def test_results_and_workspace_are_xlas_own_memory(monkeypatch):
    """No copy: h is where the callback wrote it, and what it reads is where the arguments lie."""
    seen: list[Any] = []
    monkeypatch.setattr(operator.call, "run", watched(operator.call.run, seen))
    u, c0 = normal(L, B, D, 3), normal(B, D)
    h, c_last = jax.jit(lambda u, c0: cj.sru(u, c0=c0))(u, c0)
    ((_, inputs, _, out, workspace, _),) = seen
    assert [a.ctypes.data for a in (inputs[0], inputs[4], out[0], out[2])] == [
        a.unsafe_buffer_pointer() for a in (u, c0, h, c_last)
    ]
    assert out[1] is None, "no states without a gradient"
    assert workspace is None or workspace.nbytes == cusru.workspace_size("forward", np.asarray(u), c0=np.asarray(c0))


@pytest.fixture
def device():
    if reason := missing("gpu"):
        pytest.skip(reason)
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"this JAX has no CUDA device: {error}")


@pytest.mark.gpu
@every_case
def test_on_a_gpu_it_is_the_same(case, device):
    expected = jax.jit(jax.value_and_grad(loss(case)))(problem(case)[1])
    with jax.default_device(device):
        found = jax.jit(jax.value_and_grad(loss(case)))(problem(case)[1])
    assert all(a.devices() == {device} for a in jax.tree.leaves(found))
    close(jax.device_get(found), jax.device_get(expected))


@pytest.mark.gpu
def test_on_a_gpu_it_comes_after_what_it_needs_and_before_what_needs_it(device):
    """XLA's own work on both sides, again and again: the bits are the first call's."""

    def step(x, weight):
        for _ in range(4):
            x, _ = cj.sru((x @ weight).reshape(*x.shape, 3), x, weight_c=weight[:2, : x.shape[2]])
        return (x**2).sum()

    with jax.default_device(device):
        x, weight = normal(512, 8, 256, dtype="float32"), normal(256, 768, dtype="float32") / 16
        gradient = jax.jit(jax.value_and_grad(step, (0, 1)))
        first = jax.device_get(gradient(x, weight))
        for _ in range(20):
            again = jax.device_get(gradient(x, weight))
            assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True))
    close(first, jax.device_get(gradient(*jax.device_put((x, weight), jax.devices("cpu")[0]))), 1e-2)


def test_a_call_that_is_repeated_is_not_compiled_again():
    u = normal(L, B, D, 3)
    gradient = jax.grad(lambda u: cj.sru(u)[0].sum())
    gradient(u)
    with pytest.MonkeyPatch.context() as patch:
        compiled: list[Any] = []
        patch.setattr("jax._src.compiler.backend_compile_and_load", lambda *a, **k: compiled.append(a))
        gradient(u)
    assert not compiled


def test_the_gradients_of_h_and_of_c_last_add_up():
    u, c0 = normal(L, B, D, 3), normal(B, D)
    of_h, of_c, of_both = (
        jax.grad(lambda c0, select=select: sum(a.sum() for a in select(cj.sru(u, c0=c0))))(c0)
        for select in (lambda r: r[:1], lambda r: r[1:], lambda r: r)
    )
    close(of_h + of_c, of_both)
    assert jax.grad(lambda c0: (cj.sru(u, c0=c0)[0] * 0).sum())(c0).max() == 0


def test_nothing_is_promoted_that_jax_is_asked_not_to_promote():
    """Ranks and dtypes, within our own functions: told when they are traced."""

    def again(function, arrays, options):
        inner = jax.grad(lambda arrays: sum(a.sum() for a in function(**arrays, **options)))
        return jax.grad(lambda arrays: sum(a.sum() for a in jax.tree.leaves(inner(arrays))))(arrays)

    def shards(u, starts):
        own = functools.partial(cj.sequence_parallel_sru, axis_name="i", bidirectional=True)
        return jax.vmap(lambda u, starts: own(u, starts=starts), axis_name="i")(u, starts)

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for case in ("affine", "blend", "complement"):
            jax.eval_shape(functools.partial(again, FUNCTIONS["linear_recurrence"], options=problem(case)[2]), problem(case)[1])
        jax.eval_shape(shards, normal(4, L, B, D, 3), jnp.zeros((4, L, B), bool))
        layer = cj.SRU(input_size=D, hidden_size=8, dropout=0.5)
        jax.eval_shape(lambda key, x: layer.apply(layer.init(key, x.dtype), x, key=key), jax.random.key(0), normal(L, B, D))


# ---- jit, scan, checkpoint -------------------------------------------------------------------------------------------


@every_case
def test_compiled_or_recomputed_it_is_the_same(case):
    arrays = problem(case)[1]
    expected = jax.value_and_grad(loss(case))(arrays)
    close(jax.jit(jax.value_and_grad(loss(case)))(arrays), expected)
    close(jax.jit(jax.value_and_grad(jax.checkpoint(loss(case))))(arrays), expected)


def test_scan_over_layers_is_the_loop_over_layers():
    x, weight, bias = normal(L, B, D), normal(3, D, 3 * D) / 2, normal(3, 2, D)

    def layer(x, parameters):
        weight, bias = parameters
        return cj.sru((x @ weight).reshape(L, B, D, 3), x, bias=bias, weight_c=bias)

    def scanned(weight, bias):
        return jax.lax.scan(jax.checkpoint(layer), x, (weight, bias))[0].sum()

    def looped(weight, bias):
        h = x
        for parameters in zip(weight, bias, strict=True):
            h, _ = layer(h, parameters)
        return h.sum()

    close(jax.jit(jax.grad(scanned, (0, 1)))(weight, bias), jax.grad(looped, (0, 1))(weight, bias))


def test_scan_over_pieces_of_time_is_the_whole():
    u, bias = normal(2 * L, B, D, 3), normal(2, D)

    def piece(c, u):
        h, c = cj.sru(u, bias=bias, c0=c)
        return c, h

    c_last, h = jax.lax.scan(piece, jnp.zeros((B, D)), u.reshape(2, L, B, D, 3))
    close((h.reshape(2 * L, B, D), c_last), cj.sru(u, bias=bias))


# ---- vmap ------------------------------------------------------------------------------------------------------------

N = 3


@every_case
def test_gradients_of_each_example_are_those_of_the_examples(case):
    arrays = problem(case, (N,))[1]
    found = jax.jit(jax.vmap(jax.value_and_grad(loss(case))))(arrays)
    for i in range(N):
        close(jax.tree.map(lambda a, i=i: a[i], found), jax.value_and_grad(loss(case))({n: a[i] for n, a in arrays.items()}))


@pytest.mark.parametrize("own", ["u", "bias", "weight_c", "x", "c0"])
def test_what_is_not_mapped_is_shared_and_its_gradient_is_the_sum(own):
    """One array mapped: examples of one model, or models of one example. Its axis may be any."""
    case = "v2, two directions"
    arrays, several = problem(case)[1], problem(case, (N,))[1][own]
    axis = several.ndim - 1
    one = loss(case)
    whole = lambda several, arrays: jax.vmap(lambda a: one(arrays | {own: a}), in_axes=axis)(several).sum()  # noqa: E731
    found = jax.grad(whole, (0, 1))(jnp.moveaxis(several, 0, axis), arrays)
    each = [jax.grad(one)(arrays | {own: a}) for a in several]
    close(jnp.moveaxis(found[0], axis, 0), jnp.stack([g[own] for g in each]))
    for name in arrays.keys() - {own}:
        close(found[1][name], sum(g[name] for g in each))


def test_vmap_within_vmap():
    u, bias = normal(2, N, L, B, D, 3), normal(N, 2, D)
    inner = jax.vmap(lambda u, bias: cj.sru(u, bias=bias, bidirectional=True)[0])
    found = jax.vmap(inner, in_axes=(0, None))(u, bias)
    close(found, jnp.stack([jnp.stack([cj.sru(u[i, j], bias=bias[j], bidirectional=True)[0] for j in range(N)]) for i in (0, 1)]))


@pytest.mark.parametrize(("name", "shape"), [("mask_pad", (L, B)), ("starts", (L, B)), ("zoneout", (L, B, D)), ("scale_x", ())])
@pytest.mark.parametrize("shared", [False, True])
def test_masks_of_each_example(name, shape, shared, monkeypatch):
    """What columns share may differ too; a model's parameters, shared or each example's, have their gradients."""
    values = normal(N, seed=5) if name == "scale_x" else mask(N, *shape)
    u, x, bias = normal(N, L, B, D, 3), normal(N, L, B, D), normal(2, D) if shared else normal(N, 2, D)

    def one(u, x, bias, value):
        if name == "zoneout":
            h, c = cj.qrnn(u, zoneout=value, bidirectional=True)
        else:
            h, c = cj.sru(u, x, bias=bias, bidirectional=True, **{name: value})
        return (h * jnp.arange(L * B * D).reshape(h.shape)).sum() + (c**2).sum()

    seen: list[Any] = []
    monkeypatch.setattr(operator.call, "run", watched(operator.call.run, seen))
    axes = (0, 0, None if shared else 0, 0)
    run = jax.jit(jax.vmap(jax.value_and_grad(one, (0, 1, 2)), in_axes=axes))
    found = jax.block_until_ready(run(u, x, bias, values))
    both, _ = len(seen), seen.clear()
    jax.block_until_ready(jax.jit(jax.vmap(one, in_axes=axes))(u, x, bias, values))
    together = name in ("mask_pad", "starts") and shared
    forward = 1 if name == "zoneout" or together else N
    assert (len(seen), both) == (forward, 2 if name == "zoneout" else forward + N), "calls, of which each costs a launch"
    for i in range(N):
        own = u[i], x[i], bias if shared else bias[i], values[i]
        close(jax.tree.map(lambda a, i=i: a[i], found), jax.value_and_grad(one, (0, 1, 2))(*own))


@pytest.mark.parametrize("name", ["u", "mask_pad"])
def test_no_examples_have_the_shapes_of_one(name):
    u, bias, value = normal(L, B, D, 3), normal(2 * D), {"u": normal(0, L, B, D, 3), "mask_pad": jnp.zeros((0, L, B), bool)}[name]

    def one(u, bias, value):
        h, c_last = cj.sru(**({"u": u, "bias": bias} | {name: value}))
        return h.sum(), (h, c_last)

    of = jax.vmap(jax.value_and_grad(one, (0, 1), has_aux=True), in_axes=(None, None, 0))
    (_, found), gradients = of(u, bias, value)
    assert [a.shape for a in (*found, *gradients)] == [(0, L, B, D), (0, B, D), (0, *u.shape), (0, *bias.shape)]


# ---- shard_map -------------------------------------------------------------------------------------------------------


def mesh(*sizes: int) -> Any:
    names = ("i", "j")[: len(sizes)]
    if len(jax.devices("cpu")) < np.prod(sizes):
        pytest.skip("JAX had found its devices before tests/conftest.py could ask for four")
    return jax.make_mesh(
        sizes, names, devices=jax.devices("cpu")[: np.prod(sizes)], axis_types=(jax.sharding.AxisType.Auto,) * len(sizes)
    )


P = PartitionSpec
BY_BATCH = dict(u=P(None, "i"), x=P(None, "i"), bias=P(), weight_c=P(), c0=P("i"), a=P(None, "i"), b=P(None, "i"))
BY_COLUMN = dict(u=P(None, None, "i"), x=P(None, None, "i"), bias=P(None, "i"), weight_c=P(None, "i"), c0=P(None, "i"))


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize(("case", "specs"), [("v1", BY_BATCH), ("v1", BY_COLUMN), ("affine", BY_BATCH), ("v1", None)])
def test_shards_have_the_gradients_of_the_whole(case, specs, checked):
    """By batch, where each shard has the same bias and its gradient is their sum; by columns, each with its own; by both."""
    function, arrays, options = problem(case)
    grid = mesh(4) if specs else mesh(2, 2)
    specs = specs or dict(u=P(None, "i", "j"), x=P(None, "i", "j"), bias=P(None, "j"))
    specs = {n: specs[n] for n in arrays}
    first = next(iter(specs[n] for n in ("u", "b") if n in specs))

    def of_whole(arrays):
        h, c_last = jax.shard_map(
            lambda arrays: function(**arrays, **options), mesh=grid, in_specs=(specs,),
            out_specs=(P(*first[:3]), P(*first[1:3])), check_vma=checked,
        )(arrays)  # fmt: skip
        return (h * jnp.cos(jnp.arange(h.size)).reshape(h.shape)).sum() + (c_last**2).sum()

    close(jax.jit(jax.value_and_grad(of_whole))(arrays), jax.value_and_grad(loss(case))(arrays))


def test_gradients_taken_within_a_shard_are_those_of_the_whole():
    arrays = problem("v2, two directions")[1]
    specs = {n: BY_BATCH[n] for n in arrays}

    def one(arrays):
        h, c_last = cj.sru(**arrays, bidirectional=True)
        return (h**2).sum() + (c_last**3).sum()

    found = jax.jit(jax.shard_map(jax.grad(one), mesh=mesh(4), in_specs=(specs,), out_specs=specs))(arrays)
    close(found, jax.grad(one)(arrays))


def test_vmap_within_a_shard():
    u, bias, pad = normal(N, L, B, D, 3), normal(2, D), mask(N, L, B)

    def one(u, bias, pad):
        return (jax.vmap(lambda u, pad: cj.sru(u, bias=bias, mask_pad=pad)[0])(u, pad) ** 2).sum()

    by = P(None, None, "i")
    found = jax.shard_map(jax.grad(one, (0, 1)), mesh=mesh(4), in_specs=(by, P(), by), out_specs=(by, P()))(u, bias, pad)
    close(found, jax.grad(one, (0, 1))(u, bias, pad))


def test_results_stay_on_their_device():
    u = jax.device_put(normal(L, B, D, 3), jax.devices("cpu")[mesh(4).size - 2])
    for results in (cj.sru(u), jax.jit(cj.sru)(u), jax.grad(lambda u: cj.sru(u)[0].sum())(u)):
        assert all(a.devices() == u.devices() for a in jax.tree.leaves(results))


# ---- time that is sharded --------------------------------------------------------------------------------------------

PARALLEL = {
    "sru": cj.sequence_parallel_sru, "qrnn": cj.sequence_parallel_qrnn,
    "linear_recurrence": cj.sequence_parallel_linear_recurrence,
}  # fmt: skip


WAYS = [(False, False), (True, True), (False, True), (True, False)]  # two directions, reverse


LINEAR_IN_C = [case for case in CASES if "weight_c" not in CASES[case][1]]


@pytest.mark.parametrize(
    ("case", "ways"), [(case, WAYS[(i + j) % 4]) for i, case in enumerate(LINEAR_IN_C) for j in (0, 1)], ids=str
)
def test_sharded_time_is_the_whole(case, ways):
    """With starts and padding, at the shards' first and last steps too, whatever the case has."""
    family, _, options = CASES[case]
    long = 4 * L
    rng = np.random.default_rng(7)
    arrays = {
        n: normal(*(long if one == L else one for one in a.shape), seed=i) for i, (n, a) in enumerate(problem(case)[1].items())
    }
    options = problem(case)[2] | dict(bidirectional=ways[0], reverse=ways[1])
    starts = rng.random((long, B)) < 0.2
    starts[[0, L, 2 * L], [0, 1, 2]] = True
    masks = dict(mask_pad=jnp.asarray(rng.random((long, B)) < 0.3), starts=jnp.asarray(starts))
    if isinstance(options.get("zoneout"), jax.Array):
        masks["zoneout"] = mask(long, B, D)
    options = {n: v for n, v in options.items() if n not in masks}
    time = {n: P("i") if a.shape[0] == long else P() for n, a in (arrays | masks).items()}

    def weighted(results):
        h, c_last = results
        return (h * jnp.cos(jnp.arange(h.size)).reshape(h.shape)).sum() + (c_last**2).sum()

    def one(arrays):
        return weighted(FUNCTIONS[family](**arrays, **masks, **options))

    def many(arrays):
        run = functools.partial(PARALLEL[family], axis_name="i", **options)
        return weighted(
            jax.shard_map(lambda given: run(**given), mesh=mesh(4), in_specs=(time,), out_specs=(P("i"), P()))(arrays | masks)
        )

    close(jax.jit(jax.value_and_grad(many))(arrays), jax.value_and_grad(one)(arrays))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("family", FUNCTIONS)
def test_what_is_not_finite_goes_no_further_than_a_start(family, reverse):
    """From the shard where it is to the first start after it, whichever shard has that, in its own columns; gradients too."""
    u = normal(4 * L, B, D, 3).at[L + 1, :, 1, 0].set(jnp.nan).at[L + 1, 1, 2, 1].set(jnp.inf)
    starts = jnp.zeros((4 * L, B), bool).at[jnp.array([3 * L - 2, 1, 2 * L, L]), jnp.arange(4)].set(True)
    given = (u[..., 1], u[..., 0]) if family == "linear_recurrence" else (u,)

    def one(*given):
        return FUNCTIONS[family](*given, starts=starts, reverse=reverse)

    def many(*given):
        run = functools.partial(PARALLEL[family], axis_name="i", reverse=reverse)
        specs = dict(mesh=mesh(4), in_specs=P("i"), out_specs=(P("i"), P()))
        return jax.shard_map(lambda given, starts: run(*given, starts=starts), **specs)(given, starts)

    def results(function):
        return *function(*given), jax.grad(lambda *given: (function(*given)[0] ** 2).sum())(*given)

    for found, wanted in zip(jax.jit(results, static_argnums=0)(many), jax.jit(results, static_argnums=0)(one), strict=True):
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))
        np.testing.assert_allclose(*(jnp.where(jnp.isfinite(a), a, 0) for a in (found, wanted)), rtol=1e-10, atol=1e-12)
        assert np.isfinite(wanted).any()


def test_a_factor_that_overflows_leaves_a_state_of_0():
    a, b = jnp.full((4 * L, B, D), 1e60), jnp.zeros((4 * L, B, D))
    run = functools.partial(cj.sequence_parallel_linear_recurrence, axis_name="i")
    h, c_last = jax.shard_map(run, mesh=mesh(4), in_specs=P("i"), out_specs=(P("i"), P()))(a, b)
    assert not h.any()
    assert not c_last.any()


WRONG_IN_A_SHARD: list[tuple[type[Exception], str, Any]] = [
    (ValueError, r"c0 has shape \(4,\); expected \(4, 4\)", lambda u, **i: cj.sequence_parallel_sru(u, c0=u[0, 0, :, 0], **i)),
    (TypeError, "c0 has dtype int64; allowed", lambda u, **i: cj.sequence_parallel_qrnn(u, c0=jnp.ones((B, D), int), **i)),
    (TypeError, "u must be an array of JAX's or NumPy's", lambda u, **i: cj.sequence_parallel_sru([u], **i)),
    (TypeError, "b must be an array of JAX's or NumPy's", lambda u, **i: cj.sequence_parallel_linear_recurrence(u, None, **i)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), WRONG_IN_A_SHARD, ids=[w[1][:20] for w in WRONG_IN_A_SHARD])
def test_what_is_wrong_in_a_shard_is_said_as_of_the_whole(kind, message, call):
    run = functools.partial(call, axis_name="i")
    with pytest.raises(kind, match=message):
        jax.shard_map(run, mesh=mesh(4), in_specs=P("i"), out_specs=(P("i"), P()))(normal(4 * L, B, D, 3))


def test_sru_v2_is_not_linear_in_c():
    u = normal(4 * L, B, D, 3)
    run = functools.partial(cj.sequence_parallel_sru, axis_name="i", weight_c=jnp.zeros((2, D)))
    with pytest.raises(ValueError, match=r"weight_c must be None.*not linear in c.*pipeline"):
        jax.shard_map(run, mesh=mesh(4), in_specs=P("i"), out_specs=(P("i"), P()))(u)


# ---- nothing there, nothing right ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_no_steps_and_rows_of_length_0(compiled):
    run = jax.jit if compiled else lambda f: f
    u, x, bias, c0 = normal(L, B, D, 3), normal(L, B, D), normal(2, D), normal(B, D)
    grad = run(jax.grad(lambda u, x, bias, c0: sum(a.sum() for a in cj.sru(u, x, bias=bias, weight_c=bias, c0=c0)), (0, 1, 2, 3)))
    of_u, of_x, of_bias, of_c0 = grad(u[:0], x[:0], bias, c0)
    assert of_u.shape == (0, B, D, 3)
    assert of_x.shape == (0, B, D)
    assert not of_bias.any()
    assert (of_c0 == 1).all()
    h, c_last = run(lambda u, c0: cj.sru(u, c0=c0))(u[:0], c0)
    assert h.shape == (0, B, D)
    assert np.array_equal(c_last, c0)

    pad = jnp.arange(L)[:, None] >= jnp.asarray([L, 0, 2, 0])  # two rows of nothing
    of = run(
        jax.value_and_grad(
            lambda u, bias: cj.sru(u * jnp.where(pad[..., None, None], jnp.nan, 1), bias=bias, mask_pad=pad)[0].sum(), 1
        )
    )
    value, of_bias = of(u, bias)
    assert np.isfinite(value)
    assert np.isfinite(of_bias).all()
    for empty in ((L, 0, D, 3), (L, B, 0, 3)):
        assert run(jax.grad(lambda u: cj.sru(u)[0].sum()))(jnp.ones(empty)).shape == empty


def test_no_steps_in_shards_of_time():
    u, c0 = normal(0, B, D, 3), normal(B, D)
    own = functools.partial(cj.sequence_parallel_sru, axis_name="i", starts=jnp.zeros((0, B), bool))
    shards = jax.shard_map(lambda u, c0: own(u, c0=c0), mesh=mesh(4), in_specs=(P("i"), P()), out_specs=(P("i"), P()))
    h, pull = jax.vjp(jax.jit(shards), u, c0)
    assert h[0].shape == (0, B, D)
    assert np.array_equal(h[1], c0)
    assert np.array_equal(pull(h)[1], c0)


WRONG: list[tuple[type[Exception], str, Any]] = [
    (ValueError, r"u has shape \(6, 4, 4\); expected \(L, B, D, 3\) or", lambda u, x: cj.sru(x)),
    (ValueError, r"x has shape \(5, 4, 4\); expected \(6, 4, 4\)", lambda u, x: cj.sru(u, x[1:])),
    (ValueError, r"bias has shape \(3, 4\); expected \(2, 4\) or \(8,\)", lambda u, x: cj.sru(u, bias=x[0, :3])),
    (TypeError, "x has dtype float32; allowed here: float64", lambda u, x: cj.sru(u, x.astype("float32"))),
    (TypeError, "u has dtype int64", lambda u, x: cj.sru(u.astype("int64"))),
    (TypeError, "mask_pad has dtype float64; allowed here: bool, uint8", lambda u, x: cj.sru(u, mask_pad=x[..., 0])),
    (TypeError, "u must be an array of JAX's or NumPy's, not list", lambda u, x: cj.sru([u])),
    (TypeError, "b must be an array of JAX's or NumPy's, not NoneType", lambda u, x: cj.linear_recurrence(x, None)),
    (TypeError, "scale_x must be an array", lambda u, x: cj.sru(u, x, scale_x=None)),
    (ValueError, "scale_x has shape", lambda u, x: cj.sru(u, x, scale_x=x)),
    (ValueError, "activation must be one of 'identity', 'tanh'", lambda u, x: cj.sru(u, activation="gelu")),
    (ValueError, "pooling must be one of", lambda u, x: cj.qrnn(u, pooling="o")),
    (ValueError, "form must be one of", lambda u, x: cj.linear_recurrence(x, x, form="sum")),
    (ValueError, "zoneout must be a number from 0 to 1", lambda u, x: cj.qrnn(u, zoneout=1.5)),
    (ValueError, "zoneout must be a number from 0 to 1, .* got True", lambda u, x: cj.qrnn(u, zoneout=True)),
    (ValueError, "save_every must be at least 1", lambda u, x: cj.sru(u, save_every=0)),
    (TypeError, "bidirectional must be a bool", lambda u, x: cj.sru(u, bidirectional=x[0, 0, 0] > 0)),
    (ValueError, "bidirectional needs an even D", lambda u, x: cj.sru(u[:, :, :3], bidirectional=True)),
    (ValueError, "x goes with k = 3", lambda u, x: cj.sru(jnp.concatenate([u, u[..., :1]], -1), x)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), WRONG, ids=[w[1][:30] for w in WRONG])
@pytest.mark.parametrize("transform", ["none", "jit", "grad", "vmap"])
def test_what_is_wrong_is_said_when_jax_traces(kind, message, call, transform):
    """In SPEC.md's words and of one example's shapes, not as an error within a compiled program."""
    u, x = normal(L, B, D, 3), normal(L, B, D)
    if transform == "grad":
        run = jax.grad(lambda u, x: call(u, x)[0].sum())
    elif transform == "vmap":
        run, u, x = jax.vmap(call), jnp.stack([u, u]), jnp.stack([x, x])
    else:
        run = jax.jit(call) if transform == "jit" else call
    with pytest.raises(kind, match=message):
        run(u, x)


@pytest.mark.parametrize(
    "transform", [jax.jit, jax.vmap, lambda f: jax.grad(lambda u: f(u).h.sum())], ids=["jit", "vmap", "grad"]
)
def test_a_core_function_sends_what_is_traced_here(transform):
    with pytest.raises(TypeError, match=r"u is a traced value .*; call cusru\.jax\.sru, qrnn or linear_recurrence"):
        transform(cusru.sru_forward)(normal(L, B, D, 3))


def test_arrays_that_are_bound_to_different_devices():
    here, there = jax.devices("cpu")[: mesh(2).size]
    u, x = jax.device_put(normal(L, B, D, 3), there), jax.device_put(normal(L, B, D), here)
    with pytest.raises(ValueError, match=f"x is on cpu:{here.id} and u on cpu:{there.id}; all arrays must share one device"):
        cj.sru(u, x)


@pytest.mark.parametrize("name", ["mask_c", "scale_x"])
def test_what_has_no_gradient_says_so(name):
    u, x = normal(L, B, D, 3), normal(L, B, D)
    value = normal(B, D) if name == "mask_c" else jnp.asarray(1.5)
    with pytest.raises(TypeError, match=rf"no gradient of {name}: pass jax.lax.stop_gradient\({name}\)"):
        jax.grad(lambda value: cj.sru(u, x, **{name: value})[0].sum())(value)
    jax.grad(lambda value: cj.sru(u * value.sum(), x, **{name: jax.lax.stop_gradient(value)})[0].sum())(value)


def test_derivatives_that_are_not_there_say_so():
    u = normal(L, B, D, 3)
    with pytest.raises(ValueError, match="save_every=None keeps no states"):
        jax.grad(lambda u: cj.sru(u, save_every=None)[0].sum())(u)
    for function, title in ((cj.sru, "SRU"), (cj.qrnn, "QRNN")):
        inner = jax.grad(lambda u, function=function: function(u)[0].sum())
        with pytest.raises(NotImplementedError, match=f"no derivative of the {title} recurrence's gradients"):
            jax.grad(lambda u, inner=inner: inner(u).sum())(u)
    for function in (lambda u: cj.sru(u), lambda u: cj.linear_recurrence(u[..., 0], u[..., 1])):
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(function, (u,), (u,))


def test_numpys_arrays_are_taken_and_their_dtype_is_jaxs():
    u = np.ones((L, B, D, 3), "f4")
    assert cj.sru(u)[0].dtype == jnp.float32
    with pytest.raises(TypeError, match="u has dtype"):
        cj.sru(np.full((L, B, D, 3), None))


# ---- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, dict(bidirectional=True, highway_bias=-1.0), dict(v1=True, rescale=False), dict(has_skip_term=False, use_tanh=True)],
)
@pytest.mark.parametrize("input_size", [8, 5])
def test_the_layer_is_torchs(input_size, options):
    torch = pytest.importorskip("torch", reason='needs torch: pip install "cusru[torch]"')
    from cusru.torch import SRUCell

    options = dict(options)
    cell = SRUCell(input_size, 8 if not options.get("bidirectional") else 4, **options).double()
    activation = "tanh" if options.pop("use_tanh", False) else "identity"
    layer = cj.SRU(input_size=input_size, hidden_size=cell.hidden_size, activation=activation, **options)
    cell.scale_x.fill_(layer.scale_x)  # in float64 too
    parameters = {n: jnp.asarray(a.detach().numpy()) for n, a in cell.state_dict().items() if n != "scale_x"}
    mine = layer.init(jax.random.key(0), jnp.float64)
    assert {n: a.shape for n, a in mine.items()} == {n: a.shape for n, a in parameters.items() if n != "weight_c" or not layer.v1}
    arrays = x, c0, pad, starts = normal(L, B, input_size), normal(B, 8), mask(L, B), mask(L, B, seed=1)
    h, c_last = layer.apply(parameters, x, c0, mask_pad=pad, starts=starts)
    expected = cell(*(torch.from_numpy(np.array(a)) for a in arrays))
    for found, wanted in zip((h, c_last), expected, strict=True):
        np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=0, atol=1e-12)


def test_the_layers_parameters_are_drawn_by_srus_rules():
    layer = cj.SRU(input_size=64, hidden_size=256, dropout=0.5, highway_bias=-2.0)
    parameters = jax.jit(layer.init)(jax.random.key(1))
    w = parameters["weight"].reshape(64, 256, 4)
    scale = (1 + 2 * np.exp(-2.0)) ** 0.5
    spread = np.asarray(w).std((0, 1)) * 8  # Var = 1 / input_size
    np.testing.assert_allclose(spread, [0.5**0.5, 0.5**0.5, 0.5**0.5, scale], rtol=0.03)
    assert layer.scale_x == scale
    assert (parameters["bias"][:256] == 0).all()
    assert (parameters["bias"][256:] == -2).all()
    assert parameters["weight"].dtype == jnp.float32
    assert layer.init(jax.random.key(1), jnp.bfloat16)["weight_c"].dtype == jnp.bfloat16


def test_the_layers_dropout_is_one_mask_for_all_steps():
    """Of a column's own, and on the gate, which lets the skip term through where it is 0."""
    layer = cj.SRU(input_size=D, hidden_size=D, dropout=0.5)
    parameters, x = layer.init(jax.random.key(0), jnp.float64), normal(L, B, D)
    h = layer.apply(parameters, x)[0]
    dropped = jax.jit(lambda key: layer.apply(parameters, x, key=key)[0])(jax.random.key(3))
    ratio = np.asarray((dropped - layer.scale_x * x) / (h - layer.scale_x * x)).round(9)
    assert set(np.unique(ratio)) == {0.0, 2.0}
    assert (ratio == ratio[:1]).all()
    assert len(np.unique(ratio[0], axis=0)) > 1


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("input_size must be an integer", dict(input_size=0)), ("hidden_size must be", dict(hidden_size=2.0)),
        ("dropout must be a probability", dict(dropout=1.0)), ("activation must be one of", dict(activation="gelu")),
        ("highway_bias must be a finite", dict(highway_bias=np.inf)), ("highway_bias must be", dict(highway_bias="no")),
        ("dropout must be", dict(dropout="0.1")), ("save_every must be at least 1", dict(save_every=0)),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_layer(message, options):
    with pytest.raises(ValueError, match=message):
        cj.SRU(**{"input_size": D, "hidden_size": D, **options})


def test_what_is_wrong_with_a_layers_arguments():
    layer = cj.SRU(input_size=D, hidden_size=D)
    parameters = layer.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"x has shape \(6, 4, 5\); expected \(L, B, input_size\), input_size = 4"):
        layer.apply(parameters, normal(L, B, 5, dtype="float32"))
    with pytest.raises(TypeError, match="x has dtype float64, and the parameters float32"):
        layer.apply(parameters, normal(L, B, D))
    with pytest.raises(ValueError, match=r"c0 has shape \(3, 4\); expected \(4, 4\)"):
        layer.apply(parameters, normal(L, B, D, dtype="float32"), normal(3, D, dtype="float32"))
    with pytest.raises(TypeError, match="x must be an array of JAX's or NumPy's, not list"):
        layer.apply(parameters, [1.0])
    del parameters["weight_c"]
    with pytest.raises(KeyError, match="weight_c"):
        layer.apply(parameters, normal(L, B, D, dtype="float32"))


def test_a_layer_of_v1_leaves_a_weight_c_that_it_is_given_as_it_is():
    layer = cj.SRU(input_size=D, hidden_size=D, v1=True)
    parameters = layer.init(jax.random.key(0), jnp.float64) | {"weight_c": normal(2 * D)}
    gradients = jax.grad(lambda parameters: layer.apply(parameters, normal(L, B, D))[0].sum())(parameters)
    assert not gradients["weight_c"].any()
    assert gradients["weight"].all()


# ---- the example -----------------------------------------------------------------------------------------------------


@pytest.fixture
def example():
    pytest.importorskip("flax", reason='needs flax: pip install "cusru[flax]"')
    return importlib.import_module("examples.jax_nnx")


def test_the_flax_module_is_the_layer(example):
    with jax.enable_x64(False):
        nnx = example.nnx
        module = example.SRU(D, 8, rngs=nnx.Rngs(0), bidirectional=True)
        state = nnx.state(module, nnx.Param)
        parameters = {n: a[...] for n, a in module.parameters.items()}
        assert {n: a.shape for n, a in parameters.items()} == {"weight": (D, 64), "bias": (32,), "weight_c": (32,)}
        assert len(jax.tree.leaves(state)) == 3
        x, c0, pad = normal(L, B, D, dtype="float32"), normal(B, 16, dtype="float32"), mask(L, B)
        close(module(x, c0, mask_pad=pad), module.layer.apply(parameters, x, c0, mask_pad=pad))
        grads = nnx.grad(lambda module: module(x, c0)[0].sum())(module)
        wanted = jax.grad(lambda parameters: module.layer.apply(parameters, x, c0)[0].sum())(parameters)
        close({n: grads["parameters"][n][...] for n in wanted}, wanted)


def test_the_flax_example_learns(example):
    with jax.enable_x64(False):
        losses = example.train(steps=200, length=10, batch=32, hidden_size=64, layers=2)
    assert np.mean(losses[:10]) > 0.1
    assert np.mean(losses[-20:]) < 0.02
