"""cusru.reference against finite differences, the naive oracle, the published sru package, and its own promises."""

import sys
import warnings

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cusru import reference

pytestmark = pytest.mark.filterwarnings("error")
DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
TENSORS = ("u", "x", "bias", "weight_c", "c0", "mask_c", "mask_pad")
GRADIENTS = ("u", "x", "bias", "weight_c", "c0")
OPTIONS = ("activation", "candidate", "scale_x", "mask_target", "bidirectional", "save_every")


def rounded(a, name):
    """As an array of the dtype: bfloat16 as its bits."""
    if a is None:
        return None
    return np.asarray(a).astype(ml_dtypes.bfloat16).view(np.uint16) if name == "bfloat16" else np.asarray(a).astype(DTYPES[name])


def make_case(
    rng,
    length,
    batch,
    dim,
    k=3,
    skip=True,
    bias=True,
    weight="static",
    c0=True,
    mask_c=True,
    pad=True,
    dtype="float64",
    param_dtype=None,
    gain=1.0,
    **options,
):
    """Random inputs and options: a dict with the names of the interface."""
    param = param_dtype or dtype

    def normal(*shape, dtype=dtype):
        return rounded(rng.standard_normal(shape), dtype)

    shapes = {"none": None, "static": (2, dim), "step": (length, batch, dim, 2)}
    weight_shape = shapes[weight]
    case = {
        "u": normal(length, batch, dim, k),
        "x": normal(length, batch, dim) if k == 3 and skip else None,
        "bias": normal(2, dim, dtype=param) if bias else None,
        "weight_c": None if weight_shape is None else rounded(gain * rng.standard_normal(weight_shape), param),
        "c0": normal(batch, dim, dtype=param) if c0 else None,
        "mask_c": rounded((rng.random((batch, dim)) < 0.7) / 0.7, param) if mask_c else None,
        "mask_pad": rng.random((length, batch)) < 0.3 if pad else None,
    }
    defaults = dict(zip(OPTIONS, ("identity", "identity", 1.0, "state", False, 1), strict=True))
    return case | defaults | options


def run_forward(case, save_every="same", layout=np.empty):
    options = {name: case[name] for name in OPTIONS}
    every = options["save_every"] = case["save_every"] if save_every == "same" else save_every
    length, batch, dim, _ = case["u"].shape
    state = reference.state_dtype(case["u"])
    out = {"h": layout((length, batch, dim), case["u"].dtype), "c_last": layout((batch, dim), state)}
    out["c"] = None if every is None else layout((-(-length // every), batch, dim), state)
    reference.forward(*(case[name] for name in TENSORS), **options, **out)
    return out


def run_backward(case, grad_h, grad_c_last, c, layout=np.empty, wanted=GRADIENTS):
    options = {name: case[name] for name in OPTIONS}
    asked = {n: case[n] is not None and n in wanted for n in GRADIENTS}
    out = {n: layout(case[n].shape, case[n].dtype) if asked[n] else None for n in GRADIENTS}
    reference.backward(
        grad_h, grad_c_last, c, *(case[name] for name in TENSORS), **options, **{f"grad_{n}": g for n, g in out.items()}
    )
    return out


def expect_forward(case):
    return oracle.forward(*(case[name] for name in TENSORS), **{name: case[name] for name in OPTIONS})


def expect_backward(case, grad_h, grad_c_last, states=None):
    options = {name: case[name] for name in OPTIONS}
    return oracle.backward(grad_h, grad_c_last, *(case[name] for name in TENSORS), **options, states=states)


def both(case, rng, dtype):
    """Runs both passes and checks them; returns the results."""
    out = run_forward(case)
    oracle.check(out, expect_forward(case), dtype)
    shape = case["u"].shape[:3]
    grad_h, grad_c_last = rounded(rng.standard_normal(shape), dtype), rounded(rng.standard_normal(shape[1:]), dtype)
    grads = run_backward(case, grad_h, grad_c_last, out["c"])
    held = [n for n, g in grads.items() if g is not None and g.dtype == reference.state_dtype(case["u"])]
    oracle.check(grads, expect_backward(case, grad_h, grad_c_last), dtype, held)
    states = run_forward(case, save_every=1)["c"]  # and strictly, for the states it has
    oracle.check(grads, expect_backward(case, grad_h, grad_c_last, states), dtype, held)
    return out, grads


def same_bits(a, b):
    for name, array in a.items():
        other = b[name]
        assert (array is None) == (other is None), name
        if array is not None:
            assert np.ascontiguousarray(array).tobytes() == np.ascontiguousarray(other).tobytes(), name


@st.composite
def cases(draw, dtype="float64", smooth=False, most=6):
    flag = st.booleans()
    bidirectional = draw(flag)
    batch, half = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    length = draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    state = "float64" if dtype == "float64" else "float32"
    case = make_case(
        rng,
        length,
        batch,
        2 * half if bidirectional else half,
        k=draw(st.sampled_from((3, 4))),
        skip=draw(flag),
        bias=draw(flag),
        weight=draw(st.sampled_from(("none", "static", "step"))),
        c0=draw(flag),
        mask_c=draw(flag),
        pad=draw(flag),
        dtype=dtype,
        param_dtype=draw(st.sampled_from((dtype, state))),
        activation=draw(st.sampled_from(("identity", "tanh", "relu", "selu"))),
        candidate=draw(st.sampled_from(("identity", "tanh"))),
        scale_x=draw(st.sampled_from((1.0, 1.7))),
        mask_target=draw(st.sampled_from(("state", "gate"))),
        bidirectional=bidirectional,
        save_every=draw(st.sampled_from((1, 2, 3, 7))),
    )
    return case, rng


# ----------------------------------------------------------------------------------------------------------------- right


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(cases())
def test_gradients_are_central_finite_differences(drawn):
    case, rng = drawn
    shape = case["u"].shape[:3]
    grad_h, grad_c_last = rng.standard_normal(shape), rng.standard_normal(shape[1:])
    grads = run_backward(case, grad_h, grad_c_last, run_forward(case)["c"])

    def loss(changed):
        out = run_forward(changed, save_every=None)
        return (out["h"] * grad_h).sum() + (out["c_last"] * grad_c_last).sum()

    all_c = np.concatenate([expect_forward(case)["all_c"].ravel(), [1.0]])
    if case["activation"] in ("relu", "selu") and abs(all_c).min() < 1e-4:
        return  # too near the kink for a difference
    for name, grad in grads.items():
        if grad is None:
            continue
        for index in {tuple(int(rng.integers(n)) for n in grad.shape) for _ in range(4)}:
            sides = []
            for step in (1e-5, -1e-5):
                changed = case | {name: case[name].copy()}
                changed[name][index] += step
                sides.append(loss(changed))
            assert grad[index] == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-6, abs=1e-7), (name, index)


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_oracle(dtype):
    @settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @given(cases(dtype=dtype, most=20))
    def run(drawn):
        case, rng = drawn
        both(case, rng, dtype)

    run()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(0, 2, 4), (3, 0, 4), (3, 2, 0), (1, 1, 2), (700, 1, 2), (40, 3, 1500), (5, 9, 300), (2, 1, 5000), (3, 1, 20000)]
)
@pytest.mark.parametrize("weight", ["none", "static"])
@pytest.mark.parametrize("cuts", [None, (1024, 2048)], ids=["its cuts", "small cuts"])
def test_shapes_that_tiles_and_blocks_cut_unevenly(cuts, shape, weight, dtype, monkeypatch):
    if cuts:  # those that it has are too large for most of these shapes
        monkeypatch.setattr(reference, "TILE_COLUMNS", cuts[0])
        monkeypatch.setattr(reference, "BLOCK_BYTES", cuts[1])
    rng = np.random.default_rng(1)
    case = make_case(rng, *shape, weight=weight, gain=0.3, dtype=dtype, bidirectional=True, activation="tanh", save_every=4)
    out, grads = both(case, rng, dtype)
    if shape[0] == 0:
        assert np.array_equal(oracle.widen(out["c_last"]), oracle.widen(case["c0"]))
        assert not grads["bias"].any()


@pytest.mark.parametrize("forget_bias", [7.0, 9.0])
@pytest.mark.parametrize("weight", ["none", "static"])
@pytest.mark.parametrize("save_every", [1, 16384])
def test_long_memory_keeps_the_tolerance(forget_bias, weight, save_every):
    """No error may compound over 16,384 steps. The inputs have a mean, or nothing could drift; the bound has no K in it."""
    rng = np.random.default_rng(2)
    case = make_case(rng, 16384, 2, 4, weight=weight, gain=0.01, mask_c=False, pad=False, dtype="float32", save_every=save_every)
    case["u"][..., 0] += 1
    case["bias"][0] = forget_bias
    out = run_forward(case)
    expected = expect_forward(case)
    grad_h, grad_c_last = (rng.standard_normal((16384, 2, 4)) + 1).astype(np.float32), np.ones((2, 4), np.float32)
    grads = run_backward(case, grad_h, grad_c_last, out["c"])
    wanted = expect_backward(case, grad_h, grad_c_last)
    for results in (expected, wanted):
        for name in results["amplification"]:
            results["amplification"][name] = 0
    print(oracle.check(out, expected, "float32"), oracle.check(grads, wanted, "float32"))


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 2e-5), (np.float64, 1e-12)])
def test_long_constant_parameter_sums(dtype, bound):
    """A million equal terms: a plain running sum in float32 would be off by a percent."""
    u = np.broadcast_to(np.array([0.3, 0.1, -0.2], dtype), (4000, 250, 1, 3))
    u64 = u[:1, :1].astype(np.float64)
    case = make_case(np.random.default_rng(0), 1, 1, 1, weight="none", c0=False, mask_c=False, pad=False) | {"u": u, "x": None}
    case["bias"] = np.zeros((2, 1), dtype)
    pads = np.zeros((4000, 250), bool)
    c = np.ones((4000, 250, 1), dtype) * dtype(0.7)
    grad_h = np.broadcast_to(dtype(1.1), (4000, 250, 1))
    grads = run_backward(case | {"mask_pad": pads}, grad_h, None, c)
    r = 1 / (1 + np.exp(-u64[0, 0, 0, 2]))
    term = float(dtype(1.1)) * float(dtype(0.7)) * r * (1 - r)
    assert abs(float(grads["bias"][1, 0]) / (term * 1e6) - 1) < bound


def test_small_forget_gates_keep_relative_accuracy():
    """With f = 1e-5 the carry gc * f and the state f * c0 are far below what they come from."""
    for weight in ("none", "static"):
        case = make_case(np.random.default_rng(3), 1, 4, 8, weight=weight, gain=0.1, mask_c=False, pad=False, dtype="float32")
        case["u"][..., 0], case["c0"] = case["u"][..., 0] * 0, case["c0"] * 100
        case["u"][..., 1] = -12
        case["bias"][0] = 0
        out, grads = run_forward(case), None
        np.testing.assert_allclose(out["c_last"], expect_forward(case)["c_last"], rtol=5e-6 if weight == "none" else 5e-5)
        grad_h = np.zeros((1, 4, 8), np.float32)
        grads = run_backward(case, grad_h, np.ones((4, 8), np.float32), out["c"])
        if weight == "none":
            np.testing.assert_allclose(grads["c0"], expect_backward(case, grad_h, np.ones((4, 8)))["c0"], rtol=5e-6)


@pytest.mark.parametrize("weight", ["none", "static"])
def test_a_shut_forget_gate_gives_the_candidate_whatever_the_state(weight):
    """c - z, which the other gates are computed with, would overflow."""
    case = make_case(np.random.default_rng(3), 1, 1, 4, weight=weight, mask_c=False, pad=False, dtype="float32")
    case["u"][..., 0], case["c0"] = -3e38, np.full((1, 4), 3e38, np.float32)
    case["u"][..., 1] = -30
    if weight == "static":
        case["weight_c"][...] = 0
    np.testing.assert_allclose(run_forward(case)["c_last"], -3e38, rtol=1e-6)


# ------------------------------------------------------------------------------------------------- the published package


@pytest.fixture(scope="module")
def sru_ops():
    reason = 'the published package is not here: pip install "cusru[peers]"'
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch", reason=reason)
        pytest.importorskip("sru", reason=reason)
        from sru import ops
    return ops


@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("k", "skip"), [(3, True), (3, False), (4, True)])
@pytest.mark.parametrize("weight", ["static", "step"])
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_the_published_package(sru_ops, activation, bidirectional, k, skip, weight, masked):
    import torch

    rng = np.random.default_rng(4)
    length, batch, dim = 9, 3, 8
    case = make_case(
        rng,
        length,
        batch,
        dim,
        k=k,
        skip=skip,
        weight=weight,
        mask_c=masked,
        pad=masked,
        activation=activation,
        scale_x=1.3,
        mask_target="gate",
        bidirectional=bidirectional,
        save_every=2,
    )
    hidden = dim // 2 if bidirectional else dim

    def run(dtype):
        given = {n: case[n] for n in TENSORS[:-1] if case[n] is not None}
        t = dict.fromkeys(TENSORS) | {n: torch.tensor(a, dtype=dtype, requires_grad=n != "mask_c") for n, a in given.items()}
        pad = None if case["mask_pad"] is None else torch.tensor(case["mask_pad"])
        shaped = t["x"] if t["x"] is not None else torch.zeros(length, batch, dim, dtype=dtype)
        flat = t["weight_c"].reshape(-1) if weight == "static" else t["weight_c"].reshape(length, batch, -1)
        args = (
            t["u"].reshape(length, batch, -1),
            shaped,
            flat,
            t["bias"].reshape(-1),
            t["c0"],
            int(activation == "tanh"),
            hidden,
            bidirectional,
            skip,
            torch.tensor([1.3], dtype=dtype),
            t["mask_c"],
            pad,
        )
        return t, sru_ops.elementwise_recurrence_naive(*args)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package warns of running on a CPU with gradients
        t, (h, c_last) = run(torch.float64)
    out = run_forward(case)
    np.testing.assert_allclose(out["h"], h.detach().numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(out["c_last"], c_last.detach().numpy(), rtol=1e-12, atol=1e-12)
    grad_h, grad_c_last = rng.standard_normal((length, batch, dim)), rng.standard_normal((batch, dim))
    torch.autograd.backward([h, c_last], [torch.from_numpy(grad_h), torch.from_numpy(grad_c_last)])
    for name, grad in run_backward(case, grad_h, grad_c_last, out["c"]).items():
        if grad is not None:
            np.testing.assert_allclose(grad, t[name].grad.numpy(), rtol=1e-12, atol=1e-12, err_msg=name)
    # Without gradients the package runs its compiled operator, which knows float32 alone, and (2.6.0) indexes a per-step weight_c
    # by the step and not by the time in a reversed column, unlike its own Python.
    if not masked and not (bidirectional and weight == "step"):
        with torch.no_grad():
            _, (h, c_last) = run(torch.float32)
        np.testing.assert_allclose(out["h"], h.numpy(), rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(out["c_last"], c_last.numpy(), rtol=2e-5, atol=2e-5)


# -------------------------------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", ["none", "static", "step"])
def test_every_save_every_gives_the_same_bits(weight, dtype):
    rng = np.random.default_rng(5)
    case = make_case(rng, 150, 3, 700, weight=weight, dtype=dtype, bidirectional=True, activation="selu")
    grad_h, grad_c_last = rounded(rng.standard_normal((150, 3, 700)), dtype), None
    one = run_forward(case)
    first = run_backward(case, grad_h, grad_c_last, one["c"])
    for every in (2, 7, 64, 149, 150, 1000):
        other = run_forward(case | {"save_every": every})
        same_bits({n: one[n] for n in ("h", "c_last")}, other)
        for j in range(len(other["c"])):
            np.testing.assert_array_equal(other["c"][j, :, :350], one["c"][min((j + 1) * every, 150) - 1, :, :350])
            np.testing.assert_array_equal(other["c"][j, :, 350:], one["c"][j * every, :, 350:])
        same_bits(first, run_backward(case | {"save_every": every}, grad_h, grad_c_last, other["c"]))
    same_bits({n: one[n] for n in ("h", "c_last")}, run_forward(case, save_every=None))


@pytest.mark.parametrize("every", [2, 32, 64, 1000])
def test_the_backward_runs_each_step_again_once(every, monkeypatch):
    rng = np.random.default_rng(6)
    case = make_case(rng, 150, 3, 700, dtype="float32", bidirectional=True, save_every=every)
    out, steps, run_states = run_forward(case), [], reference.run_states
    monkeypatch.setattr(reference, "run_states", lambda states, z, *rest: (steps.append(len(z)), run_states(states, z, *rest)))
    run_backward(case, out["h"], None, out["c"])
    assert sum(steps) == 2 * 150


def test_scratch_memory_is_kept_and_is_never_a_result(monkeypatch):
    monkeypatch.setattr(reference._Scratch, "kept", [])  # by the tests before: it may have room for all of this one's
    rng = np.random.default_rng(7)
    case = make_case(rng, 40, 3, 50, dtype="float32", save_every=7)
    out = run_forward(case)
    run_backward(case, out["h"], None, out["c"])
    (kept,) = reference._Scratch.kept
    monkeypatch.setattr(reference, "KEPT_BYTES", 1000)  # a call that wants more must not cost the next one its memory
    first, large = run_forward(case), make_case(rng, 40, 30, 500, dtype="float32", save_every=7)
    run_backward(large, run_forward(large)["h"], None, run_forward(large)["c"])
    assert [id(a) for a in reference._Scratch.kept] == [id(kept)]
    assert not any(np.shares_memory(a, kept) for a in out.values())
    same_bits(out, first)


def scattered(shape, dtype):
    """An empty array with its axes stored in reverse order, every other element, and time backward."""
    base = np.zeros(tuple(2 * n for n in shape[::-1]), dtype)
    return base.T[tuple(slice(None, None, 2) for _ in shape)][::-1]


def unaligned(shape, dtype):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.zeros(size + 1, np.uint8)[1:].view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [scattered, unaligned])
@pytest.mark.parametrize("weight", ["static", "step"])
def test_every_layout_gives_the_same_bits(layout, weight, dtype):
    rng = np.random.default_rng(6)
    options = {"bidirectional": True, "save_every": 5, "activation": "tanh", "candidate": "tanh"}
    case = make_case(rng, 33, 3, 70, k=4, weight=weight, dtype=dtype, **options)
    grad_h, grad_c_last = rounded(rng.standard_normal((33, 3, 70)), dtype), rounded(rng.standard_normal((3, 70)), dtype)
    out = run_forward(case)
    grads = run_backward(case, grad_h, grad_c_last, out["c"])

    def moved(a):
        if not isinstance(a, np.ndarray):
            return a
        b = layout(a.shape, a.dtype)
        b[...] = a
        b.flags.writeable = False
        return b

    other = {n: moved(a) for n, a in case.items()}
    same_bits(out, run_forward(other, layout=layout))
    same_bits(grads, run_backward(other, moved(grad_h), moved(grad_c_last), moved(out["c"]), layout=layout))


def test_stride_zero_inputs():
    rng = np.random.default_rng(7)
    case = make_case(rng, 20, 3, 8)
    thin = {"u": case["u"][:, :1], "x": case["x"][:1], "c0": case["c0"][:1], "mask_pad": case["mask_pad"][:, :1]}
    wide = case | {n: np.broadcast_to(a, case[n].shape) for n, a in thin.items()}
    full = case | {n: a.copy() for n, a in wide.items() if n in thin}
    grad_h = np.broadcast_to(np.float64(1), (20, 3, 8))
    out = run_forward(wide)
    same_bits(out, run_forward(full))
    same_bits(run_backward(full, grad_h.copy(), None, out["c"]), run_backward(full, grad_h, None, out["c"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", ["none", "static"])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0, 50.0, 200.0, 6e4, 1e30, np.inf, np.nan])
def test_extreme_values_are_silent(value, weight, dtype):
    rng = np.random.default_rng(8)
    for activation in ("identity", "tanh", "relu", "selu"):
        case = make_case(rng, 6, 2, 4, weight=weight, pad=False, activation=activation, mask_target="gate", candidate="tanh")
        with np.errstate(all="ignore"):
            for name in ("u", "x", "bias", "weight_c", "c0", "mask_c"):
                if case[name] is not None:
                    case[name] = rounded(case[name] * value, dtype)
            grad_h, grad_c_last = rounded(np.full((6, 2, 4), value), dtype), rounded(np.full((2, 4), -value), dtype)
        with np.errstate(all="raise"):
            out = run_forward(case)
            grads = run_backward(case, grad_h, grad_c_last, out["c"])
        if abs(value) <= 200:  # no sum overflows: nothing may become inf or NaN
            for name, a in (out | grads).items():
                assert a is None or np.isfinite(oracle.widen(a)).all() or (value == 200 and dtype == "float16"), name
        if np.isnan(value):
            assert np.isnan(oracle.widen(out["h"])).all()
            assert np.isnan(oracle.widen(grads["u"])[..., 1]).all()


@pytest.mark.parametrize("kept_elsewhere", [False, True])
@pytest.mark.parametrize("length", [1, 6])
def test_the_caller_s_errstate_stays(length, kept_elsewhere, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    case = make_case(np.random.default_rng(8), length, 2, 4, dtype="float32")
    if kept_elsewhere:  # than in a variable of the context
        monkeypatch.setattr(reference, "ERRSTATE", reference._Errstate())
    with np.errstate(divide="call", over="raise", under="warn", invalid="ignore", call=print):
        before = np.geterr(), np.geterrcall(), np.getbufsize()
        out = run_forward(case)
        run_backward(case, out["h"], None, out["c"])
        monkeypatch.setattr(reference, "gates", interrupted)
        for run in (lambda: run_forward(case), lambda: run_backward(case, out["h"], None, out["c"])):
            with pytest.raises(KeyboardInterrupt):
                run()
        assert (np.geterr(), np.geterrcall(), np.getbufsize()) == before


@pytest.mark.parametrize("activation", ["identity", "tanh", "relu", "selu"])
@pytest.mark.parametrize("weight", ["none", "static"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_value_stays_in_its_column(bad, weight, activation):
    rng = np.random.default_rng(9)
    clean = make_case(rng, 8, 3, 4, weight=weight, mask_c=False, pad=False, activation=activation, bidirectional=True)
    grad_h = rng.standard_normal((8, 3, 4))
    dirty = clean | {"u": clean["u"].copy()}
    dirty["u"][3, 1, 2, 0] = bad  # a reversed column: it reaches times 3, 2, 1, 0
    out, ref = run_forward(dirty), run_forward(clean)
    hit = np.zeros((8, 3, 4), bool)
    hit[:4, 1, 2] = True
    assert not np.isfinite(out["c"][hit]).any()
    for name in ("h", "c"):
        np.testing.assert_array_equal(out[name][~hit], ref[name][~hit])
    if np.isnan(bad):
        assert np.isnan(out["h"][hit]).all()
    grads, grads_ref = run_backward(dirty, grad_h, None, out["c"]), run_backward(clean, grad_h, None, ref["c"])
    column = np.zeros((3, 4), bool)
    column[1, 2] = True
    np.testing.assert_array_equal(grads["u"][:, ~column], grads_ref["u"][:, ~column])
    np.testing.assert_array_equal(np.delete(grads["bias"], 2, axis=1), np.delete(grads_ref["bias"], 2, axis=1))
    if np.isnan(bad):
        assert np.isnan(grads["bias"][:, 2]).all()
        oracle.check(grads, expect_backward(dirty, grad_h, None), "float64", ())


@pytest.mark.parametrize("weight", ["none", "static", "step"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e300])
def test_data_at_padding_does_not_matter(garbage, weight):
    rng = np.random.default_rng(10)
    case = make_case(rng, 12, 3, 4, weight=weight, activation="tanh", bidirectional=True, save_every=3)
    grad_h = rng.standard_normal((12, 3, 4))
    pad = case["mask_pad"]
    dirty = case | {n: case[n].copy() for n in ("u", "x", "weight_c") if case[n] is not None}
    for name in ("u", "x", "weight_c"):
        if dirty[name] is not None and dirty[name].ndim > 2:
            dirty[name][pad] = garbage
    dirty["mask_pad"] = pad.astype(np.uint8) * 7
    dirty_h = np.where(pad[:, :, None], garbage, grad_h)
    out, ref = run_forward(dirty), run_forward(case)
    same_bits(out, ref)
    assert not out["h"][pad].any()
    grads = run_backward(dirty, dirty_h, None, out["c"])
    same_bits(grads, run_backward(case, grad_h, None, ref["c"]))
    assert not grads["u"][pad].any()
    assert not grads["x"][pad].any()


def test_derivatives_at_kinks_and_in_saturation():
    c = np.array([0.0, -0.0, np.nan, 30.0, -30.0, 400.0, np.inf])
    np.testing.assert_array_equal(reference.slope("relu", c), [0, 0, np.nan, 1, 0, 1, 1])
    scale, alpha = oracle.SCALE, oracle.ALPHA
    selu = [scale * alpha, scale * alpha, np.nan, scale, scale * alpha * np.exp(-30.0), scale, scale]
    np.testing.assert_allclose(reference.slope("selu", c), selu, rtol=1e-14)
    np.testing.assert_allclose(reference.slope("tanh", c), [1, 1, np.nan, 4 * np.exp(-60), 4 * np.exp(-60), 0, 0], rtol=1e-14)


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan():
    rng = np.random.default_rng(11)
    around_inf, around_zero = np.arange(0x7F7F0000, 0x7F810000, 17), np.arange(0, 0x30000, 3)
    special = [0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0xFF800000]
    bits = np.concatenate([rng.integers(0, 2**32, 200_000), around_inf, around_zero, special]).astype(np.uint32)
    values = bits.view(np.float32)
    out = np.empty(values.shape, np.uint16)
    with np.errstate(all="ignore"):
        reference.narrow(values, out)
        expected = values.astype(ml_dtypes.bfloat16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(out[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(reference.widen(out, np.dtype(np.float32))[nan]).all()
    everything = np.arange(2**16, dtype=np.uint16)
    expected = everything.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(reference.widen(everything, np.dtype(np.float32)), expected)


# ----------------------------------------------------------------------------------------------- small problems, and parts


def bits(results):
    """By name; any NaN is as good as another, whose sign and payload IEEE 754 leaves open where two of them meet."""
    widened = {n: a if a is None or a.dtype != np.uint16 else oracle.widen(a) for n, a in results.items()}
    return {n: None if a is None else np.where(np.isnan(a), np.nan, a).tobytes() for n, a in widened.items()}


def with_cuts(monkeypatch):
    """As if the problem were one of several tiles, in borrowed memory; the cuts are the same."""
    monkeypatch.setattr(reference, "tiles", reference._cut)
    monkeypatch.setattr(reference, "SMALL_BYTES", -1)


WIDTHS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100)
HARD = (100.0, np.nan, np.inf, -np.inf)  # what some elements are multiplied by: gates saturate, sums overflow


@st.composite
def small_cases(draw, dtype, **fixed):
    """A case in some layout, and what its backward is given."""
    options = {
        "length": st.sampled_from((1, 1, 1, 2, 3, 20, 33)),
        "batch": st.sampled_from((1, 1, 2, 8)),
        "dim": st.sampled_from(WIDTHS),
        "bidirectional": st.booleans(),
        "k": st.sampled_from((3, 4)),
        "weight": st.sampled_from(("none", "static", "step")),
        "activation": st.sampled_from(("identity", "tanh", "relu", "selu")),
        "candidate": st.sampled_from(("identity", "tanh")),
        "scale_x": st.sampled_from((1.0, 1.7)),
        "mask_target": st.sampled_from(("state", "gate")),
        "save_every": st.sampled_from((1, 2, 7, 32)),
        "param_dtype": st.sampled_from((dtype, "float64" if dtype == "float64" else "float32")),
    } | dict.fromkeys(("skip", "bias", "c0", "mask_c", "pad"), st.booleans())
    chosen = {n: draw(s) for n, s in options.items()} | fixed
    chosen["bidirectional"] &= chosen["dim"] % 2 == 0
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    case = make_case(rng, chosen.pop("length"), chosen.pop("batch"), chosen.pop("dim"), dtype=dtype, **chosen)
    layout = draw(st.sampled_from((np.empty, scattered, unaligned)))
    factors, small_gates = draw(st.lists(st.sampled_from(HARD), max_size=2)), draw(st.booleans())
    for name in ("u", "x", "c0"):
        if case[name] is not None:
            values = oracle.widen(case[name]).astype(np.float64)
            for factor in factors:
                values[rng.random(values.shape) < 0.1] *= factor
            if name == "u":
                values[..., 1] -= 4 * small_gates
            case[name] = rounded(values, chosen["param_dtype"] if name == "c0" else dtype)
    shape = case["u"].shape[:3]
    case["grad_h"] = rounded(rng.standard_normal(shape), dtype)
    case["grad_c_last"] = rounded(rng.standard_normal(shape[1:]), dtype) if draw(st.booleans()) else None
    for name, a in case.items():
        if isinstance(a, np.ndarray):
            case[name] = layout(a.shape, a.dtype)
            case[name][...] = a
    return case


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_problem_has_the_bits_of_a_part_of_a_large_one(dtype, monkeypatch):
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(small_cases(dtype))
    def run(case):
        def results():
            out = run_forward(case)
            return bits(out | run_backward(case, case["grad_h"], case["grad_c_last"], out["c"]))

        small = results()
        with monkeypatch.context() as patch:
            with_cuts(patch)
            assert small == results()

    run()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_given_in_parts_has_the_bits_of_the_whole(dtype):
    """Parts of one step too, which know their state beforehand. (Of a parameter's gradient, a sum over steps, this is no law.)"""
    state = "float64" if dtype == "float64" else "float32"

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(small_cases(dtype, bidirectional=False), st.sampled_from((1, 1, 2, 5)))
    def run(case, steps):
        length, *plane = case["u"].shape[:3]
        # In the state's dtype, in which one part hands it to the next.
        case["c0"] = np.zeros(plane, state) if case["c0"] is None else rounded(oracle.widen(case["c0"]), state)
        by_step = [
            n for n, a in case.items() if isinstance(a, np.ndarray) and n != "grad_c_last" and len(a) == length and a.ndim > 2
        ]
        whole = run_forward(case | {"save_every": 1})
        gradients = run_backward(case | {"save_every": 1}, case["grad_h"], case["grad_c_last"], whole["c"])
        parts, outs = [], []
        for t in range(0, length, steps):
            part = case | {n: case[n][t : t + steps] for n in by_step}
            if outs:
                part["c0"] = outs[-1]["c_last"]
            if case["mask_pad"] is not None:
                part["mask_pad"] = case["mask_pad"][t : t + steps]
            parts.append(part)
            outs.append(run_forward(part))
        found = {"h": np.concatenate([out["h"] for out in outs]), "c_last": outs[-1]["c_last"]}
        assert bits(found) == bits({n: whole[n] for n in found})
        carry, of_parts = case["grad_c_last"], []
        for part, out in zip(reversed(parts), reversed(outs), strict=True):
            of_parts.insert(0, run_backward(part, part["grad_h"], carry, out["c"]))
            carry = of_parts[0]["c0"]
        found = {n: np.concatenate([g[n] for g in of_parts]) for n in GRADIENTS if n in by_step} | {"c0": carry}
        assert bits(found) == bits({n: gradients[n] for n in found})

    run()


@pytest.mark.parametrize("cut", [False, True], ids=["small", "cut"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_is_wanted_has_its_bits_whatever_else_is(dtype, cut, monkeypatch):
    if cut:
        with_cuts(monkeypatch)

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(small_cases(dtype), st.sets(st.sampled_from(GRADIENTS)))
    def run(case, wanted):
        out = run_forward(case)
        every = run_backward(case, case["grad_h"], case["grad_c_last"], out["c"])
        some = run_backward(case, case["grad_h"], case["grad_c_last"], out["c"], wanted=wanted)
        assert bits(some) == bits({n: a if n in wanted else None for n, a in every.items()})

    run()


def counted(run, name, monkeypatch):
    """Calls of Python's and C's functions in reference.<name>, and of NumPy's ufuncs, which a profiler does not see."""
    function, counts = getattr(reference, name), {"functions": 0, "ufuncs": 0}

    def profile(frame, event, argument):
        counts["functions"] += event in ("call", "c_call")

    def profiled(*args, **options):
        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            function(*args, **options)
        finally:
            sys.setprofile(before)

    def counting(ufunc):
        def call(*args):
            counts["ufuncs"] += 1
            return ufunc(*args)

        call.reduce = ufunc.reduce
        return call

    with monkeypatch.context() as patch:
        patch.setattr(reference, name, profiled)
        run()
    with monkeypatch.context() as patch:
        for ufunc in ("add", "divide", "exp", "less", "multiply", "negative", "subtract"):
            patch.setattr(reference, ufunc, counting(getattr(reference, ufunc)))
        run()
    return counts


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("wanted", [*GRADIENTS, "none"])
def test_what_no_wanted_gradient_needs_is_not_computed(wanted, length, monkeypatch):
    case = make_case(np.random.default_rng(12), length, 2, 4, candidate="tanh", pad=False)
    out, called = run_forward(case), []

    def ufuncs(names):
        return counted(lambda: run_backward(case, out["h"], None, out["c"], wanted=names), "backward", monkeypatch)["ufuncs"]

    everything, without = ufuncs(GRADIENTS), ufuncs(set(GRADIENTS) - {wanted})
    assert ufuncs({wanted}) < everything
    assert without < everything or wanted in ("none", "bias", "c0")  # which cost no ufunc that others do not need
    for name in ("run_carry", "slope", "with_block"):
        function = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *a, n=name, f=function: (called.append((n, a[0])), f(*a))[1])
    run_backward(case, out["h"], None, out["c"], wanted={wanted})
    names = [name for name, _ in called]
    assert ("run_carry" in names) == (wanted not in ("x", "none"))
    assert (("slope", "tanh") in [call for call in called if call[0] == "slope"]) == (wanted == "u")
    assert ("with_block" in names) == (wanted in ("bias", "weight_c"))


@pytest.mark.parametrize("save_every", [1, 32])
def test_one_step_costs_few_calls(save_every, monkeypatch):
    rng = np.random.default_rng(13)
    options = dict(mask_c=False, pad=False, dtype="float32", scale_x=1.3, save_every=save_every)
    case = make_case(rng, 1, 1, 512, gain=0.1, **options)
    case["bias"][0] = 9  # no small forget gate
    out = run_forward(case)
    forward = counted(lambda: run_forward(case), "forward", monkeypatch)
    backward = counted(lambda: run_backward(case, out["h"], out["c_last"], out["c"]), "backward", monkeypatch)
    reached = {"functions": (28, 62), "ufuncs": (15, 31)}
    for what, (of_forward, of_backward) in reached.items():
        assert 0 < forward[what] <= 1.5 * of_forward
        assert 0 < backward[what] <= 1.5 * of_backward


def test_steps_without_small_forget_gates_cost_few_calls(monkeypatch):
    """Seven ufuncs of the recurrence's own and no look at each gate, of 200 steps but for the last few."""
    case = make_case(np.random.default_rng(14), 200, 1, 64, gain=0.1, mask_c=False, pad=False, dtype="float32", save_every=None)
    case["bias"][0] = 9
    counts = counted(lambda: run_forward(case), "forward", monkeypatch)
    print(counts)
    assert 7 * 200 < counts["ufuncs"] < 7.25 * 200
    assert counts["functions"] < 200


@pytest.mark.parametrize("at", [0, 3, 4, 11, 12, 27, 28, 43, 44, 63])
@pytest.mark.parametrize("weight", ["static", "step"])
def test_a_small_forget_gate_is_found_wherever_it_is(at, weight, monkeypatch):
    """Also beside a NaN, at steps that are run without looking at first: the bits of a look at each."""
    case = make_case(np.random.default_rng(15), 64, 2, 8, weight=weight, gain=0.1, dtype="float32")
    case["bias"][0] = 2
    case["mask_pad"][at] = False
    case["u"][at, 1, 3, 1] = -12
    for nan in (None, 1, at, 60):
        if nan is not None:
            case["u"][nan, 0, 2] = np.nan
        with monkeypatch.context() as patch:
            quick = run_forward(case)
            patch.setattr(reference, "RARELY_SMALL", 0)
            assert bits(quick) == bits(run_forward(case))
        np.testing.assert_allclose(quick["c"][at], expect_forward(case)["c"][at], rtol=1e-5, atol=1e-6)


def long_case(dtype="float32", length=300, forget_bias=0.0, weight="none", **changes):
    """Of few columns, long enough for slices of time."""
    case = make_case(np.random.default_rng(16), length, 2, 4, weight=weight, gain=0.3, dtype=dtype, **changes)
    u = oracle.widen(case["u"]).astype(np.float64)
    u[..., 1] += forget_bias
    return case | {"u": rounded(u, dtype)}


def both_passes(case, save_every):
    grad_h, grad_c_last = case["u"][..., 0], case["u"][0, ..., 1]
    out = run_forward(case | {"save_every": save_every})
    return bits(out | run_backward(case | {"save_every": save_every}, grad_h, grad_c_last, out["c"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("forget_bias", [-4, 0, 3, 9])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("weight", ["none", "static"])
@pytest.mark.parametrize("value", [None, np.nan, np.inf])
def test_slices_of_time_have_the_bits_of_one_step_after_another(value, weight, pad, forget_bias, dtype, monkeypatch):
    """However many they are, and also where no forget gate ever brings two states together."""
    case = long_case(dtype, forget_bias=forget_bias, weight=weight, pad=pad, bidirectional=True, candidate="tanh")
    if value is not None:
        case["u"][[5, 150, 151], 1, [0, 1, 3], [0, 1, 0]] = rounded(value, dtype)
    for save_every in (1, 32):
        found = []
        for count in (0, 2, 9, 37):
            monkeypatch.setattr(reference, "slices", lambda a, _, count=count: count if len(a) > 2 * count else 0)
            found.append(both_passes(case, save_every))
        assert all(results == found[0] for results in found), save_every


def test_slices_are_cut_where_they_save_calls(monkeypatch):
    """Each pass then makes a third as many calls as there are steps at most; where memory is long, as many as without."""
    calls = {}
    for forget_bias in (0, 9):
        case = long_case(length=2000, forget_bias=forget_bias, pad=False)
        out = run_forward(case)
        passes = {
            "forward": lambda case=case: run_forward(case | {"save_every": None}),
            "backward": lambda case=case, out=out: run_backward(case, out["h"], None, out["c"]),
        }
        for name, run in passes.items():
            calls[name, forget_bias] = counted(run, name, monkeypatch)["ufuncs"]
    print(calls)
    for name in passes:
        assert 3 * 16 < calls[name, 0] < 2000 / 3
        assert 3 * 2000 < calls[name, 9] < 3.05 * 2000
