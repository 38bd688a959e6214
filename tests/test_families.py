"""The QRNN's pooling and the linear recurrence: what is theirs alone, cases that users of other packages reported, and bad input.
The laws that they share with SRU are in test_laws.py."""

import numpy as np
import oracle
import pytest
import strategies
from conftest import Backend
from strategies import AFFINE_COVERING, AFFINE_PANEL, DTYPES, np_dtype, state_of, typical
from test_laws import assert_same, of_rows

import cusru
from cusru import reference_affine

pytestmark = pytest.mark.filterwarnings("error")
RNG = np.random.default_rng(0)

of_the_qrnn = of_rows(*(row for row in AFFINE_COVERING if row[0] == "qrnn"))
of_linear = of_rows(*(row for row in AFFINE_COVERING if row[0] == "linear_recurrence"))


def linear(backend, a, b, grad_h=None, grad_c_last=None, save_every=1, **options):
    """Forward, and backward if a gradient is given."""
    problem = strategies.Problem({}, dict(a=a, b=b, save_every=save_every, **options), grad_h, grad_c_last, b.dtype.name, 132,
                                 "linear_recurrence")  # fmt: skip
    output = backend.forward(problem)
    return output, None if grad_h is None else backend.backward(problem, output.c)


def column(*values, dtype="f4"):
    return np.array(values, dtype).reshape(-1, 1, 1)


# ---- cases from public reports, each with its right value --------------------------------------------------------------


@pytest.mark.parametrize("save_every", [1, 3])
def test_a_forget_mult_by_hand(backend, save_every):
    f, x = column(0.25, 0.25, 0.5, 0.4), column(0.75, 0.5, 0.9, 0.8)
    c0 = np.full((1, 1), 2, "f4")
    output, g = linear(backend, f, x, np.ones_like(x), form="blend", c0=c0, save_every=save_every)
    np.testing.assert_allclose(output.h.ravel(), [1.6875, 1.390625, 1.1453125, 1.0071875], rtol=1e-6)
    np.testing.assert_allclose(g.a.ravel(), [-2.9375, -2.1375, -0.785, -0.3453125], rtol=1e-6)
    np.testing.assert_allclose(g.b.ravel(), [0.5875, 0.45, 0.8, 0.4], rtol=1e-6)
    np.testing.assert_allclose(g.c0.ravel(), [1.7625], rtol=1e-6)


@pytest.mark.parametrize("form", ["affine", "complement", "blend"])
def test_gates_of_exactly_0_and_1_keep_or_take_exactly_and_have_finite_gradients(backend, form):
    a, b = column(0, 1, 0, 0, 1, 1), column(0.1, 0.7, 1e-8, 3, 1e8, 0.3)
    output, g = linear(backend, a, b, np.ones_like(b), form=form, c0=np.full((1, 1), 1 / 3, "f4"))
    c, states = np.float32(1 / 3), []
    for x, y in zip(a.ravel(), b.ravel(), strict=True):
        kept = c if (x == 1) == (form == "affine") else np.float32(0)
        c = kept + (y if form != "blend" or x == 1 else np.float32(0))
        states.append(c)
    np.testing.assert_array_equal(output.h.ravel(), np.array(states, "f4"))
    assert all(np.isfinite(one).all() for one in g)


def test_one_step_of_a_decay(backend):
    output, _ = linear(backend, column(0.75), column(0.2), c0=np.full((1, 1), -1, "f4"))
    np.testing.assert_allclose(output.h, -0.55, rtol=1e-6)


def test_an_episode_that_begins_anew(backend):
    half, ones = np.array([0.5], "f4"), column(1, 1, 1)
    starts, c0 = np.array([[0], [1], [0]], np.uint8), np.full((1, 1), 8, "f4")
    output, g = linear(backend, half, ones, ones, starts=starts, c0=c0)
    np.testing.assert_array_equal(output.h.ravel(), [5, 1, 1.5])
    np.testing.assert_array_equal(g.c0, 0.5)


@pytest.mark.skipif(strategies.BFLOAT16 is None, reason="needs ml_dtypes")
@pytest.mark.parametrize("kind", ["step", "column"])
def test_a_count_to_5000_in_bfloat16_is_exact(backend, kind):
    b = np.ones((5000, 1, 2), strategies.BFLOAT16)
    a = b if kind == "step" else b[0, 0]
    output, _ = linear(backend, a, b)
    assert output.c_last.dtype == np.float32
    np.testing.assert_array_equal(output.c_last, 5000)


@pytest.mark.parametrize("length", [33, 65, 1000])
@pytest.mark.parametrize("save_every", [1, 32])
def test_a_gradient_of_the_last_state_alone(backend, length, save_every):
    """Of c_last, the product of all decays: none of them is exactly 1, nor do they vanish."""
    rng = np.random.default_rng(length)
    a = (1 - 0.01 * rng.random((length, 2, 3))).astype("f8")
    b, c0 = rng.standard_normal((length, 2, 3)), rng.standard_normal((2, 3))
    zeros, ones = np.zeros_like(b), np.ones((2, 3))
    output, g = linear(backend, a, b, zeros, ones, c0=c0, save_every=save_every)
    after = np.concatenate([np.cumprod(a[:0:-1], 0)[::-1], ones[None]])  # of the later steps
    states = np.empty_like(b)
    c = c0
    for t in range(length):
        states[t], c = c, a[t] * c + b[t]
    np.testing.assert_allclose(output.c_last, c, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(g.b, after, rtol=1e-11)
    np.testing.assert_allclose(g.a, after * states, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(g.c0, after[0] * a[0], rtol=1e-11)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_negative_decays_and_none_are_exact(backend, dtype):
    a, b = column(-1, -0.5, 0, -2, dtype=dtype), column(1, 3, 7, 0.25, dtype=dtype)
    output, g = linear(backend, a, b, np.ones_like(b), c0=np.full((1, 1), 4, dtype))
    np.testing.assert_array_equal(output.h.ravel(), [-3, 4.5, 7, -13.75])
    np.testing.assert_array_equal(g.c0, [[-1 * (1 + -0.5 * (1 + 0))]])
    np.testing.assert_array_equal(g.a.ravel(), [0.5 * 4, -3, -4.5, 7])


@pytest.mark.parametrize(("dtype", "tolerance"), [("f4", 1e-6), ("f8", 1e-14)])
def test_a_complement_near_0_keeps_its_digits_in_the_gradients(backend, dtype, tolerance):
    """RG-LRU's a = -expm1(log decay). In float32 1 - 1e-9 is 1, and its derivative by the logarithm would be a mere rounding."""
    log_decay = -np.logspace(-9, -3, 7).astype(dtype)
    a, b = -np.expm1(log_decay), np.zeros((1, 1, 7), dtype)
    b[:] = a * 3  # so that c grows from 0 by what is taken in
    output, g = linear(backend, a, b, np.ones_like(b), form="complement", c0=np.zeros((1, 7), dtype))
    np.testing.assert_allclose(output.c_last[0], 3 * -np.expm1(log_decay.astype(float)), rtol=tolerance)
    output, g = linear(backend, a, b, np.ones_like(b), form="complement", c0=np.ones((1, 7), dtype))
    np.testing.assert_array_equal(g.a, -1)
    np.testing.assert_allclose(g.c0[0], np.exp(log_decay.astype(float)), rtol=tolerance)


# ---- the QRNN's switches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("every", [1, 7])
def test_fo_pooling_is_sru_with_a_tanh_candidate_and_no_skip(backend, dtype, every):
    row = ("qrnn", dtype, "fo", "plain", "scalar", "saved", "starts")
    qrnn = typical(row, zoneout=None, save_every=every, reverse=False, padding="scattered")
    shared = {n: a for n, a in qrnn.inputs.items() if n not in ("pooling", "gate", "zoneout")}
    sru = strategies.Problem({}, dict(shared, candidate="tanh", scale_x=1.0), qrnn.grad_h, qrnn.grad_c_last, dtype, 132)
    output, gradients = backend.both(sru)
    assert oracle.check(output, qrnn.expected_forward(), dtype) > 0
    held = [n for n, a in (("c0", gradients.c0),) if a.dtype == np_dtype(state_of(dtype))]
    oracle.check({"u": gradients.u, "c0": gradients.c0}, qrnn.expected_backward(), dtype, held)
    got, got_g = backend.both(qrnn)
    sru_oracle = strategies.Problem({}, sru.inputs, qrnn.grad_h, qrnn.grad_c_last, dtype, 132)
    oracle.check(got, sru_oracle.expected_forward(), dtype)
    oracle.check(got_g, sru_oracle.expected_backward(), dtype, held)


@of_the_qrnn
def test_an_update_gate_is_a_forget_gate_of_the_negative_bit_for_bit(backend, row):
    forget = typical(row, gate="forget")
    u = np.array(forget.inputs["u"])
    u[..., 1] = -u[..., 1]
    update = forget.replace(u=u, gate="update")
    (output, g), (wanted, of_forget) = backend.both(update), backend.both(forget)
    assert_same(output, wanted)
    gu = np.array(g.u)
    gu[..., 1] = -gu[..., 1]
    np.testing.assert_array_equal(gu, of_forget.u)  # by value: the negative of 0 is 0
    np.testing.assert_array_equal(g.c0, of_forget.c0)


@of_the_qrnn
def test_zoneout_of_0_and_of_nowhere_is_none_bit_for_bit(backend, row):
    problem = typical(row)
    wanted = backend.both(problem.replace(zoneout=None))
    for nothing in (0.0, 0, np.float32(0), np.zeros(problem.shape, bool)):
        for got, want in zip(backend.both(problem.replace(zoneout=nothing)), wanted, strict=True):
            assert_same(got, want, repr(nothing)[:20])


@of_the_qrnn
@pytest.mark.parametrize("everywhere", [False, True], ids=["1", "everywhere"])
def test_zoneout_of_1_freezes_the_state(backend, row, everywhere):
    problem = typical(row, starts="none")
    problem = problem.replace(zoneout=np.ones(problem.shape, np.uint8) if everywhere else 1)
    output, g = backend.both(problem)
    state = problem.inputs["c0"].astype(output.c.dtype)
    np.testing.assert_array_equal(output.c, np.broadcast_to(state, output.c.shape))
    np.testing.assert_array_equal(output.c_last, state)
    assert not g.u[..., :2].any()  # neither candidate nor forget gate


@pytest.mark.parametrize(("dtype", "bound"), [("f4", 2e-6), ("f8", 1e-13)])
@pytest.mark.parametrize("p", [1e-9, 0.9999, 1 - 1e-7, 1 - 1e-12])
def test_what_a_zoneout_near_1_takes_in_keeps_its_digits(backend, dtype, bound, p):
    """1 - p of the number that was given: p in float32 would have lost it."""
    u, ones = np.full((1, 1, 3, 4), 0.5, dtype), np.ones((1, 1, 3), dtype)
    given = dict(u=u, pooling="ifo", gate="forget", zoneout=p, save_every=1)
    output, g = backend.both(strategies.Problem({}, given, ones, None, np.dtype(dtype).name, 132, "qrnn"))
    f, z = 1 / (1 + np.exp(-0.5)), np.tanh(0.5)
    np.testing.assert_allclose(output.c_last, np.full((1, 3), (1 - p) * f * z), rtol=bound)
    of_u = np.array([(1 - p) * f * f * (1 - z * z), 0, (1 - p) * f * z * f * (1 - f), f * z * (1 - p) * f * (1 - f)])
    np.testing.assert_allclose(g.u[0, 0], np.broadcast_to(of_u, (3, 4)), rtol=bound)


def test_zoneout_by_a_mask_is_what_it_is_by_expectation(backend):
    """Where f is 1 with probability p: the expected update is that of evaluation, over many columns."""
    rng, n, p = np.random.default_rng(0), 20000, 0.3
    u = np.broadcast_to(np.array([0.8, 0.4, 0, 0.5]), (1, 1, n, 4))
    c0 = np.full((1, n), 0.5)
    for pooling, k in (("fo", 3), ("ifo", 4)):

        def run(zoneout, u=u[..., :k], pooling=pooling):
            given = dict(u=u, pooling=pooling, gate="forget", c0=c0, zoneout=zoneout, save_every=1)
            return backend.forward(strategies.Problem({}, given, None, None, "float64", 132, "qrnn")).c_last

        mean = run(rng.random((1, 1, n)) < p).mean()
        spread = abs(run(0.0) - run(1.0)).max() * (p * (1 - p) / n) ** 0.5
        assert abs(mean - run(p)[0, 0]) < 5 * spread
        assert abs(run(p)[0, 0] - run(0.0)[0, 0]) > 20 * spread


@pytest.mark.parametrize(("dtype", "bound"), [("f4", 5e-6), ("f8", 1e-13)])
@pytest.mark.parametrize("gate", ["forget", "update"])
@pytest.mark.parametrize("pooling", ["f", "fo", "ifo"])
def test_what_a_gate_leaves_of_the_state_and_its_gradient_keeps_its_accuracy(backend, dtype, bound, gate, pooling):
    """However small it is next to what it was, or however near."""
    k = {"f": 2, "fo": 3, "ifo": 4}[pooling]
    u = np.zeros((1, 1, 40, k), dtype)
    u[..., 1] = np.linspace(-20, 20, 40)
    ones, zeros = np.ones((1, 40), dtype), np.zeros((1, 1, 40), dtype)
    given = dict(u=u, pooling=pooling, gate=gate, c0=ones, save_every=1)
    output, g = backend.both(strategies.Problem({}, given, zeros, ones, np.dtype(dtype).name, 132, "qrnn"))
    f = 1 / (1 + np.exp(-u[0, :, :, 1].astype(float) * (1 if gate == "forget" else -1)))
    np.testing.assert_allclose(output.c_last, f, rtol=bound)
    np.testing.assert_allclose(g.c0, f, rtol=bound)


# ---- the linear recurrence's a and h -----------------------------------------------------------------------------------


@of_linear
def test_an_a_that_is_the_same_at_every_step_is_the_one_written_out(backend, row):
    problem = typical(row)
    given = problem.inputs["a"]
    if given.ndim == 3:
        given = np.array(given[0] if row[2] == "blend" else given[0, 0])
    short, whole = problem.replace(a=given), problem.replace(a=np.array(np.broadcast_to(given, problem.shape)))
    (output, g), (wanted, of_whole) = backend.both(short), backend.both(whole)
    assert_same(output, wanted)
    assert_same(g._replace(a=None), of_whole._replace(a=None))
    short.check(g, short.expected_backward())
    whole.check(of_whole, whole.expected_backward())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("form", ["affine", "complement", "blend"])
def test_h_holds_the_states_and_serves_the_backward(backend, dtype, form):
    row = ("linear_recurrence", dtype, form, "step", "scalar", "saved", "starts")
    problem = typical(row, padding="none")
    output, g = backend.both(problem)
    without = backend.forward(problem, save_every=None)
    assert without.c is None
    np.testing.assert_array_equal(without.h, output.c)
    assert_same(backend.backward(problem, without.h), g)


@pytest.mark.parametrize("summed", ["batch", "column"])
def test_no_small_terms_of_a_gradient_of_a_are_lost_beside_a_large_one(backend, summed):
    """Sixty thousand terms of 2^-24 each beside one of 1: a plain sum in float32 would stand still."""
    length, batch = 2000, 33
    b, grad_h = np.zeros((length, batch, 2), "f4"), np.full((length, batch, 2), 2.0**-24, "f4")
    grad_h[-1, 0] = 1  # what is summed first
    a = np.zeros((batch, 2) if summed == "batch" else 2, "f4")
    b[...] = 1
    _, g = linear(backend, a, b, grad_h, form="affine", c0=np.ones((batch, 2), "f4"))
    terms = grad_h.astype(float)
    np.testing.assert_allclose(g.a, terms.sum(0) if summed == "batch" else terms.sum((0, 1)), rtol=1e-6)


# ---- NumPy's slices of time --------------------------------------------------------------------------------------------


@of_rows(*AFFINE_COVERING)
@pytest.mark.parametrize("reach", ["gate", "near_1", "any", "exact"])
def test_slices_of_time_have_the_bits_of_one_step_after_another(row, reach, monkeypatch):
    """However many they are, also where states never come together, grow, or are not finite."""
    for value in (None, np.nan, np.inf):
        problem = typical(row, length=300, batch=2, width=4, reach=reach, bias=3.0)
        u = np.array(problem.inputs[lead := "u" if "u" in problem.inputs else "b"])
        if value is not None:
            u[[5, 150, 151], 1, [0, 1, 3]] = value
        problem, found = problem.replace(**{lead: u}), []
        for count in (0, 2, 9, 37):
            monkeypatch.setattr(reference_affine, "slices", lambda a, _, count=count: count if len(a) > 2 * count else 0)
            found.append(Backend("numpy").both(problem))
        for results in found[1:]:
            for got, want in zip(results, found[0], strict=True):
                assert_same(got, want, repr(value))


# ---- workspace ---------------------------------------------------------------------------------------------------------


@of_rows(*AFFINE_PANEL)
@pytest.mark.parametrize("save_every", [1, 100])
def test_a_workspace_of_the_size_that_is_said_serves(backend, row, save_every):
    if backend.name == "gpu":
        pytest.skip("the workspace is an array of the host's here")
    problem = typical(row, length=150, save_every=save_every)
    given = {n: a for n, a in problem.inputs.items() if n not in ("a", "b", "u")}
    first = [problem.inputs[n] for n in ("a", "b", "u") if n in problem.inputs]
    output, g = backend.both(problem)
    for direction, wanted in (("forward", output), ("backward", g)):
        with backend.selected():
            size = cusru.workspace_size(f"{problem.family}_{direction}", *first, **given)
        workspace = np.full(size, 0xAB, np.uint8)
        got = backend.forward(problem, workspace=workspace) if direction == "forward" else backend.backward(
            problem, output.c, workspace=workspace
        )  # fmt: skip
        assert_same(got, wanted, direction)


def test_workspace_size_names_the_functions():
    u = np.zeros((3, 2, 4, 3), "f4")
    assert cusru.workspace_size("qrnn_forward", u) == cusru.workspace_size("forward", u=u) == 0
    a, b = np.zeros(4, "f4"), np.zeros((200, 64, 4), "f4")
    assert cusru.workspace_size("linear_recurrence_backward", a, b) >= 64 * 4 * 4  # a partial sum for each row
    assert cusru.workspace_size("linear_recurrence_backward", np.zeros((64, 4), "f4"), b) == 0
    with pytest.raises(ValueError, match=r"direction must be one of 'forward', .*'linear_recurrence_backward'"):
        cusru.workspace_size("linear_forward", a, b)
    with pytest.raises(TypeError, match="pooling"):
        cusru.workspace_size("forward", u, pooling="fo")


# ---- bad input ---------------------------------------------------------------------------------------------------------

U, A, B, C0 = np.zeros((4, 2, 6, 3), "f4"), np.zeros((4, 2, 6), "f4"), np.zeros((4, 2, 6), "f4"), np.zeros((2, 6), "f4")

BAD = {
    "pooling": ("qrnn", dict(pooling="fifo"), ValueError, "pooling must be one of 'f', 'fo', 'ifo'; got 'fifo'"),
    "gate": ("qrnn", dict(gate="keep"), ValueError, "gate must be one of 'forget', 'update'"),
    "k of f": ("qrnn", dict(pooling="f"), ValueError, r"u has shape \(4, 2, 6, 3\); expected \(L, B, D, 2\) for pooling='f'"),
    "k of ifo": ("qrnn", dict(pooling="ifo"), ValueError, r"expected \(L, B, D, 4\)"),
    "rank of u": ("qrnn", dict(u=U[0]), ValueError, r"u has shape \(2, 6, 3\)"),
    "zoneout True": ("qrnn", dict(zoneout=True), ValueError, "zoneout must be a number from 0 to 1.*got True"),
    "zoneout below": ("qrnn", dict(zoneout=-0.1), ValueError, "zoneout must be a number from 0 to 1"),
    "zoneout above": ("qrnn", dict(zoneout=1.5), ValueError, "zoneout must be a number from 0 to 1"),
    "zoneout nan": ("qrnn", dict(zoneout=float("nan")), ValueError, "zoneout must be a number from 0 to 1"),
    "zoneout's shape": (
        "qrnn",
        dict(zoneout=np.zeros((4, 2), bool)),
        ValueError,
        r"zoneout has shape \(4, 2\); expected \(4, 2, 6\)",
    ),
    "zoneout's dtype": ("qrnn", dict(zoneout=A), TypeError, "zoneout has dtype float32; allowed.* bool"),
    "zoneout's type": ("qrnn", dict(zoneout="often"), TypeError, "zoneout"),
    "form": ("linear", dict(form="convex"), ValueError, "form must be one of 'affine', 'complement', 'blend'"),
    "rank of b": ("linear", dict(b=U), ValueError, r"b has shape \(4, 2, 6, 3\); expected \(L, B, D\)"),
    "shape of a": ("linear", dict(a=A[1:]), ValueError, r"a has shape \(3, 2, 6\); expected \(4, 2, 6\) or \(2, 6\) or \(6,\)"),
    "shape of a, columns": ("linear", dict(a=np.zeros(5, "f4")), ValueError, r"a has shape \(5,\)"),
    "dtype of a": ("linear", dict(a=A.astype("f8")), TypeError, "a has dtype float64"),
    "dtype of b": ("linear", dict(b=B.astype("i4")), TypeError, "b has dtype int32"),
    "a None": ("linear", dict(a=None), TypeError, "a .*None"),
    "c0": ("linear", dict(c0=C0[1:]), ValueError, r"c0 has shape \(1, 6\); expected \(2, 6\)"),
    "starts' shape": ("linear", dict(starts=np.zeros((2, 4), bool)), ValueError, r"starts has shape \(2, 4\); expected \(4, 2\)"),
    "starts' dtype": ("sru", dict(starts=np.zeros((4, 2), "i4")), TypeError, "starts has dtype int32"),
    "reverse": ("sru", dict(reverse="yes"), TypeError, "reverse must be a bool, or 0 or 1; got 'yes'"),
    "reverse of the qrnn": ("qrnn", dict(reverse=2), TypeError, "reverse must be a bool"),
    "odd D": (
        "linear",
        dict(a=A[..., :5], b=B[..., :5], bidirectional=True),
        ValueError,
        "bidirectional needs an even D.* b has shape",
    ),
    "save_every": ("qrnn", dict(save_every=0), ValueError, "save_every must be at least 1"),
    "no array": ("linear", dict(b=[1.0]), TypeError, "b .*list"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_bad_input_is_refused_and_nothing_is_written(case, direction):
    family, changes, error, words = BAD[case]
    own = {"sru": dict(u=U), "qrnn": dict(u=U), "linear": dict(a=A, b=B)}[family] | changes
    name = {"linear": "linear_recurrence"}.get(family, family)
    results = {"sru": 5, "qrnn": 2, "linear": 3}[family]
    grads = (A, None, A)
    if direction == "forward":
        out = [np.full((4, 2, 6), 7, "f4"), np.full((4, 2, 6), 7, "f4"), np.full((2, 6), 7, "f4")]
        run = lambda: getattr(cusru, f"{name}_forward")(**own, out=out)  # noqa: E731
    else:
        out = [np.full((4, 2, 6, 3) if family != "linear" else (4, 2, 6), 7, "f4"), *[None] * (results - 1)]
        run = lambda: getattr(cusru, f"{name}_backward")(*grads, **own, out=out)  # noqa: E731
    with pytest.raises(error, match=words):
        run()
    assert all(a is None or (a == 7).all() for a in out)


def test_out_names_its_members_by_the_callers_names():
    with pytest.raises(ValueError, match=r"out has 2 members; expected 3 \(a, b, c0\)"):
        cusru.linear_recurrence_backward(A, None, A, A, B, out=(None, None))
    with pytest.raises(ValueError, match=r"out\.b has shape \(4, 2\)"):
        cusru.linear_recurrence_backward(A, None, A, A, B, out=(None, np.zeros((4, 2), "f4"), None))
    with pytest.raises(ValueError, match=r"out\.a overlaps a"):
        cusru.linear_recurrence_backward(A.copy(), None, A.copy(), A, B, out=(A, None, None))
    with pytest.raises(ValueError, match=r"c has shape .*ceil"):
        cusru.linear_recurrence_backward(A, None, A[:2], A, B)
    with pytest.raises(ValueError, match="c is None"):
        cusru.qrnn_backward(A, None, None, U)


def test_out_comes_back_in_the_order_of_the_gradients():
    a, b = RNG.standard_normal((2, 4, 2, 6))
    c0, grad_h = RNG.standard_normal((2, 6)), RNG.standard_normal((4, 2, 6))
    output = cusru.linear_recurrence_forward(a, b, c0=c0)
    wanted = cusru.linear_recurrence_backward(grad_h, None, output.c, a, b, c0=c0)
    out = [np.empty_like(x) for x in (a, b, c0)]
    got = cusru.linear_recurrence_backward(grad_h, None, output.c, a, b, c0=c0, out=out)
    assert all(x is y for x, y in zip(got, out, strict=True))
    assert_same(got, wanted)
    assert wanted.a.shape == a.shape
    assert wanted._fields == ("a", "b", "c0")
