"""Laws that hold for the recurrence whatever it computes: each test is one, its name says which, and it runs on every backend.

The problems are those of strategies.PANEL and AFFINE_PANEL, rows of the covering lists in which every dtype, skip, activation,
candidate and kind of weight_c occurs, every pooling, every form and every kind of a; and an SRU of sequences laid end to end.
"""

import functools
import itertools
import warnings

import numpy as np
import oracle
import pytest
import strategies
from conftest import GRADIENTS
from strategies import AFFINE_COVERING, AFFINE_PANEL, DTYPES, LAYOUTS, PANEL, STARTED, arranged, np_dtype, state_of, typical

import cusru

pytestmark = pytest.mark.filterwarnings("error")

PER_STEP = ("u", "x", "weight_c", "mask_pad", "grad_h", "a", "b", "starts", "zoneout")  # weight_c and a: if they have its axes
MASKS = ("mask_pad", "starts", "zoneout")


def of_rows(*rows):
    return pytest.mark.parametrize("row", [row for row in rows if {*row[:2]} & {*DTYPES}], ids="-".join)


on_the_panel = of_rows(*PANEL)  # of SRU
on_every_panel = of_rows(*PANEL, STARTED, *AFFINE_PANEL)
in_float64 = of_rows(*(row for row in (*strategies.COVERING, STARTED, *AFFINE_COVERING) if "float64" in row))


def assert_same(actual, expected, what=""):
    """Bitwise."""
    for name, a, b in zip(actual._fields, actual, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_array_equal(_bits(a), _bits(b), err_msg=f"{name} {what}")


def _bits(a):
    return np.ascontiguousarray(a).view(f"u{a.itemsize}")


def is_per_step(name, a):
    return name in PER_STEP and a.ndim >= {"weight_c": 4, "a": 3}.get(name, 0)


def is_summed(name, a):
    """Over the batch too."""
    return (name in ("bias", "weight_c") and a.ndim <= 2) or (name == "a" and a.ndim == 1)


def of_columns(name, a, columns):
    return a.take(columns, axis=2 if a.ndim > 2 else -1)


def gradients_of(problem):
    return [name for name in GRADIENTS[problem.family]._fields if problem.inputs[name] is not None]


def in_time(problem, function):
    """With function(array) for every array that has a time axis."""
    return problem.map_arrays(lambda name, a: function(a) if is_per_step(name, a) else a)


# ---- time -------------------------------------------------------------------------------------------------------------


@on_every_panel
@pytest.mark.parametrize("at", [0, 1, 18, 36, 37])
def test_splitting_time_and_carrying_the_state_gives_the_whole(backend, row, at):
    whole = typical(row, starts="none")
    parts = [in_time(whole, lambda a, s=s: a[s]) for s in (slice(0, at), slice(at, None))]
    half = whole.shape[2] // 2  # from here on time runs backward, and the second part comes first

    def halves(forward_columns, reversed_columns):
        return np.concatenate([forward_columns[:, :half], reversed_columns[:, half:]], axis=1)

    c0, gcl, state = whole.inputs["c0"], whole.grad_c_last, np_dtype(state_of(whole.dtype))
    late = backend.forward(parts[1])
    early = backend.forward(starts_early := parts[0].replace(c0=halves(c0, late.c_last)))
    late = backend.forward(starts_late := parts[1].replace(c0=halves(early.c_last, c0)))
    whole_output = {"h": np.concatenate([early.h, late.h]), "c_last": halves(late.c_last, early.c_last)}
    oracle.check(whole_output, whole.expected_forward(), whole.dtype)

    late_g = backend.backward(starts_late, late.c)
    early_g = backend.backward(starts_early, early.c, grad_c_last=halves(late_g.c0, gcl))
    late_g = backend.backward(starts_late, late.c, grad_c_last=halves(gcl, early_g.c0))
    gradients = {"c0": halves(early_g.c0, late_g.c0)}
    for name in gradients_of(whole):
        a, b = getattr(early_g, name), getattr(late_g, name)
        if name != "c0":
            gradients[name] = np.concatenate([a, b]) if is_per_step(name, a) else a + b
    held_in_state = [n for n, a in gradients.items() if a.dtype == state]
    oracle.check(gradients, whole.expected_backward(), whole.dtype, held_in_state)


@on_every_panel
@pytest.mark.parametrize(("length", "every"), [(37, None), (37, 1), (64, 16), (70, 2)])
def test_reversed_columns_are_forward_ones_on_flipped_time(backend, row, length, every):
    """Bit for bit, but where time is split and the last saved block is short: slices begin where states are saved."""
    problem = typical(row, length=length)
    problem = problem.replace(save_every=every or problem.inputs["save_every"])
    if (pad := problem.inputs["mask_pad"]) is not None:
        problem = problem.replace(mask_pad=pad | pad[::-1])
    if (starts := problem.inputs["starts"]) is not None:  # one mask for both: where a column begins anew, of either kind
        starts = np.array(starts)
        starts[0] = 0
        starts[1:] |= starts[:0:-1]
        problem = problem.replace(starts=starts)
    half = problem.shape[2] // 2

    def flip(a):
        a = np.array(a)
        a[:, :, half:] = a[::-1, :, half:]
        return a

    flipped = problem.map_arrays(lambda name, a: flip(a) if is_per_step(name, a) and name not in ("mask_pad", "starts") else a)
    flipped = flipped.replace(bidirectional=False)
    (output, gradients), (output_f, gradients_f) = backend.both(problem), backend.both(flipped)
    output_f = output_f._replace(h=flip(output_f.h), c=None)
    steps = {n: flip(a) for n, a in gradients_f._asdict().items() if a is not None and is_per_step(n, a)}
    if backend.splits and length % problem.inputs["save_every"]:
        oracle.check(output_f, problem.expected_forward(), problem.dtype, ["c_last"])
        problem.check(gradients_f._replace(**steps), problem.expected_backward())
        problem.check(output, problem.expected_forward())
        problem.check(gradients, problem.expected_backward())
        return
    assert_same(output._replace(c=None), output_f)
    assert_same(gradients, gradients_f._replace(**steps))


@on_every_panel
@pytest.mark.parametrize("extra", [1, 40])
def test_appended_padding_changes_nothing(backend, row, extra):
    problem = typical(row, padding="none").replace(mask_pad=np.zeros((37, 3), bool))

    def longer(name, a):
        rest = name == "mask_pad" if name in MASKS else np.nan
        return np.concatenate([a, np.full((extra, *a.shape[1:]), rest, a.dtype)]) if is_per_step(name, a) else a

    padded = problem.map_arrays(longer)
    output, gradients = backend.both(padded)
    assert not output.h[37:].any()
    steps = {n: a[:37] for n, a in gradients._asdict().items() if a is not None and is_per_step(n, a)}
    assert not any(getattr(gradients, n)[37:].any() for n in steps)
    oracle.check({"h": output.h[:37], "c_last": output.c_last}, problem.expected_forward(), problem.dtype)
    problem.check(gradients._replace(**steps), problem.expected_backward())


@on_every_panel
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_data_at_padded_steps_is_never_used(backend, row, garbage):
    problem = typical(row, padding="scattered")
    pad = problem.inputs["mask_pad"] != 0
    assert pad.any()

    def spoiled(name, a):
        if not is_per_step(name, a) or name in ("mask_pad", "starts"):
            return a
        a = np.array(a)
        a[pad] = True if name == "zoneout" else garbage
        return a

    for a, b in zip(backend.both(problem.map_arrays(spoiled)), backend.both(problem), strict=True):
        assert_same(a, b)


# ---- columns, and what is not finite ----------------------------------------------------------------------------------


def plant(problem, name, value, t, b, d, k=0):
    """The value in one place of one input, in the memory layout it has."""
    a = problem.grad_h if name == "grad_h" else problem.grad_c_last if name == "grad_c_last" else problem.inputs[name]
    a = np.array(a)
    if a.ndim == 4:
        a[t, b, d, k] = value
    elif is_per_step(name, a):
        a[t, b, d] = value
    elif name in ("bias", "weight_c"):
        a[k, d] = value
    else:
        a[(b, d)[-a.ndim :]] = value
    return problem.replace(**{name: a})


def planted(row, value, **changes):
    """(name, problem with the value in one input, where) for each input and each of its gates."""
    problem = typical(row, padding="none", **changes)
    arrays = problem.arrays | {"grad_h": problem.grad_h, "grad_c_last": problem.grad_c_last}
    where = {"t": 17, "b": 1}
    for name, a in arrays.items():
        if a is None or name in MASKS:
            continue
        gates = a.shape[3] if a.ndim == 4 else 2 if name in ("bias", "weight_c") else 1
        for k in range(gates):
            for d in (5, 13):  # a forward column and a reversed one
                yield name, plant(problem, name, value, **where, d=d, k=k), where | {"d": d}


def without_column(results, b, d):
    """Results with the column zeroed; b None: of every batch."""
    b = slice(None) if b is None else b

    def blank(name, a):
        a = np.array(a)
        if is_summed(name, a):
            a[..., d] = 0
        elif a.ndim > 2:
            a[:, b, d] = 0
        else:
            a[b, d] = 0
        return a

    return type(results)(*(None if a is None else blank(n, a) for n, a in results._asdict().items()))


@on_every_panel
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_column_does_not_see_its_neighbours(backend, row, value):
    clean = backend.both(typical(row, padding="none"))
    for name, problem, where in planted(row, value):
        b = None if name in problem.inputs and is_summed(name, problem.inputs[name]) else where["b"]
        for results, of_clean in zip(backend.both(problem), clean, strict=True):
            assert_same(without_column(results, b, where["d"]), without_column(of_clean, b, where["d"]), name)


@on_every_panel
def test_a_non_finite_value_does_not_reach_steps_processed_before(backend, row):
    clean, clean_g = backend.both(typical(row, padding="none", reverse=False))
    for name, problem, where in planted(row, np.nan, reverse=False):
        t, b, d = where.values()
        forward, every = d < 8, problem.inputs["save_every"]
        if name not in ("grad_h", "grad_c_last") and is_per_step(name, problem.inputs[name]):
            got = backend.forward(problem)
            steps = slice(0, t) if forward else slice(t + 1, None)
            blocks = slice(0, t // every) if forward else slice(t // every + 1, None)
            assert np.isnan(got.h[t, b, d].astype(float)) or problem.inputs.get("zoneout") is not None  # then f is not looked at
            assert_same(
                cusru.Output(got.h[steps, b, d], got.c[blocks, b, d], None),
                cusru.Output(clean.h[steps, b, d], clean.c[blocks, b, d], None),
                name,
            )
        if name == "grad_h":
            got = backend.backward(problem, clean.c)
            steps = slice(t + 1, None) if forward else slice(0, t)
            for gradient in gradients_of(problem):
                one, of_clean = getattr(got, gradient), getattr(clean_g, gradient)
                if is_per_step(gradient, one):
                    assert np.isnan(one[t, b, d].astype(float)).any() or (gradient == "x")
                    np.testing.assert_array_equal(_bits(one[steps, b, d]), _bits(of_clean[steps, b, d]))


@pytest.mark.parametrize("activation", ["identity", "tanh", "relu", "selu"])
@pytest.mark.parametrize("candidate", ["identity", "tanh"])
def test_a_nan_is_never_swallowed(backend, activation, candidate):
    # Wherever the equations in float64 give a NaN.
    rows = [row for row in strategies.COVERING if row[2:4] == (activation, candidate) and row[0] in DTYPES]
    assert_no_nan_is_swallowed(backend, rows)


@pytest.mark.parametrize("family", ["qrnn", "linear_recurrence"])
def test_a_nan_is_never_swallowed_by_what_is_affine(backend, family):
    assert_no_nan_is_swallowed(backend, [row for row in AFFINE_PANEL if row[0] == family and row[1] in DTYPES])


def assert_no_nan_is_swallowed(backend, rows):
    for row in rows:
        for name, problem, _ in planted(row, np.nan):
            output, gradients = backend.both(problem)
            for results, wanted in ((output, problem.expected_forward()), (gradients, problem.expected_backward())):
                for result, got in results._asdict().items():
                    if got is not None:
                        swallowed = np.isnan(wanted[result]) & ~np.isnan(got.astype(float))
                        assert not swallowed.any(), f"{name} -> {result}{np.argwhere(swallowed)[0]}, {row}"


EXTREME = {"float64": 1e300, "float32": 1e38, "float16": 65504.0, "bfloat16": 1e38}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", ["none", "column"])
def test_extreme_sigmoid_arguments_are_finite_and_silent(backend, dtype, weight):
    row = (dtype, "x", "identity", "tanh", weight, "scalar", "saved")
    problem = typical(row, width=4, length=4, layout_u="compact", bias=None)
    extreme = EXTREME[dtype]
    gates = np.array([[f, r] for f in (-extreme, -100, 100, extreme) for r in (-extreme, -100, 100, extreme)])
    u = np.array(problem.inputs["u"])
    u[:, 0, :, 1:] = gates.reshape(4, 4, 2).astype(u.dtype)
    assert_finite_silent_and_right(backend, problem.replace(u=u))


@of_rows(*(row for row in AFFINE_COVERING if row[0] == "qrnn"))
@pytest.mark.parametrize("gate", ["forget", "update"])
def test_extreme_arguments_of_the_pooling_are_finite_and_silent(backend, row, gate):
    problem = typical(row, gate=gate)
    extreme = EXTREME[problem.dtype]
    u = problem.inputs["u"]
    values = np.random.default_rng(0).choice([-extreme, -100, -1, 1, 100, extreme], u.shape)
    assert_finite_silent_and_right(backend, problem.replace(u=values.astype(u.dtype)))


def assert_finite_silent_and_right(backend, problem):
    with warnings.catch_warnings(), np.errstate(all="warn"):
        warnings.simplefilter("error")
        output, gradients = backend.both(problem)
    for a in (*output, *gradients):
        assert a is None or np.isfinite(a.astype(float)).all()
    problem.check(output, problem.expected_forward())
    problem.check(gradients, problem.expected_backward())


# ---- memory -----------------------------------------------------------------------------------------------------------


@on_every_panel
def test_every_memory_layout_gives_the_same_bits(backend, row):
    problem = typical(row, layout="compact", layout_u="compact")
    wanted = backend.both(problem)
    first, *others = problem.arrays
    for layout in LAYOUTS:
        for chosen in ((first,), (*others, "grad_h", "grad_c_last"), (first, *others, "grad_h", "grad_c_last")):
            moved = problem.map_arrays(lambda name, a, chosen=chosen, layout=layout: arranged(a, layout) if name in chosen else a)
            output = backend.forward(moved)
            c = arranged(output.c, layout) if "grad_h" in chosen else output.c
            for got, want in zip((output, backend.backward(moved, c)), wanted, strict=True):
                assert_same(got, want, f"{layout} {chosen}")
    for a, b in zip(backend.planned_for(132).both(problem), wanted, strict=True):  # never more than a column to a thread
        assert_same(a, b)


@on_every_panel
def test_a_stride_of_zero_is_that_value_at_every_index(backend, row):
    problem = typical(row, layout="compact", layout_u="compact")
    for axis in range(3):

        def spread(name, a, axis=axis):
            return np.broadcast_to(a.take([0], axis), a.shape) if a.ndim > axis else a

        broadcast = problem.map_arrays(spread)
        written_out = broadcast.map_arrays(lambda name, a: np.array(a))
        for a, b in zip(backend.both(broadcast), backend.both(written_out), strict=True):
            assert_same(a, b)


def test_offsets_go_beyond_two_to_the_31_elements(backend):
    stride = 2**30 + 8  # elements between steps, three of which are taken; untouched pages take no memory
    if backend.name == "gpu":
        pytest.skip("test_gpu.py has a problem of this size")
    problem = typical(
        ("float16", "x", "identity", "identity", "none", "scalar", "saved"), length=4, batch=1, width=4, layout_u="compact"
    )
    try:
        room = np.zeros(3 * stride + 64, np.float16)
    except MemoryError as error:
        pytest.skip(str(error))
    u = np.lib.stride_tricks.as_strided(room, problem.inputs["u"].shape, (2 * stride, 24, 6, 2))
    u[...] = problem.inputs["u"]
    for a, b in zip(backend.both(problem.replace(u=u)), backend.both(problem), strict=True):
        assert_same(a, b)


# ---- repetition, saved states -----------------------------------------------------------------------------------------


@on_every_panel
def test_two_runs_give_the_same_bits(backend, row, monkeypatch):
    problem = typical(row, batch=5, length=70)
    first = backend.both(problem)
    if backend.name == "simulator":  # another order of warps and blocks, other poison
        monkeypatch.setattr("cusru.simulator.seed", 12345)
    for a, b in zip(backend.both(problem), first, strict=True):
        assert_same(a, b)


@on_every_panel
def test_every_save_every_gives_the_same_gradients_and_consistent_states(backend, row):
    problem = typical(row, length=70, bias=3.0, reverse=False)
    length, half = 70, 8
    every_state = backend.forward(problem, save_every=1)
    wanted = backend.backward(problem, every_state.c, save_every=1)
    if backend.splits:  # slices begin where states are saved, so that bits may depend on it
        every_state, wanted = None, problem.expected_backward()
    for every in (2, 7, 31, 32, 33, 64, 69, 70, 75):
        output = backend.forward(problem, save_every=every)
        if backend.splits:
            problem.replace(save_every=every).check(output, problem.replace(save_every=every).expected_forward())
            problem.check(backend.backward(problem, output.c, save_every=every), wanted)
            continue
        ends = [min((j + 1) * every, length) - 1 for j in range(len(output.c))]
        begins = [j * every for j in range(len(output.c))]
        states = np.concatenate([every_state.c[ends][:, :, :half], every_state.c[begins][:, :, half:]], axis=2)
        assert_same(output, every_state._replace(c=states), every)
        assert_same(backend.backward(problem, output.c, save_every=every), wanted, every)
    if not backend.splits:
        assert_same(backend.forward(problem, save_every=None), every_state._replace(c=None))


@on_every_panel
@pytest.mark.parametrize("reverse", [False, True])
def test_what_lies_between_saved_states_is_walked_from_them_step_by_step(backend, row, reverse):
    """As the backward walks it that finds these states again: bit for bit, wherever time may be split. But a saved state itself
    need not be the end of that walk; then h is that state's."""
    problem = typical(row, length=70, bias=3.0, reverse=reverse)
    half = 8
    ahead = np.arange(16) < half
    ahead = ~ahead if reverse else ahead
    for every in (2, 7, 8, 16, 32):
        output, blocks = backend.forward(problem, save_every=every), -(-70 // every)
        for j in range(blocks):
            begin, end = j * every, min((j + 1) * every, 70)
            part = in_time(problem, lambda a, begin=begin, end=end: np.array(a[begin:end]))
            c0 = problem.inputs["c0"].astype(output.c.dtype)
            before = np.where(ahead, output.c[j - 1] if j else c0, output.c[j + 1] if j + 1 < blocks else c0)
            if (starts := problem.inputs["starts"]) is not None and end < 70:  # a reversed column starts after the next's start
                before = np.where(~ahead & (starts[end] != 0)[:, None], 0, before).astype(before.dtype)
            walked = backend.by_turns().forward(part.replace(c0=before), save_every=None)
            inner = np.ones((end - begin, 16), bool)
            inner[-1, ahead] = inner[0, ~ahead] = not backend.splits
            h = np.where(inner[:, None], output.h[begin:end], walked.h)
            np.testing.assert_array_equal(_bits(h), _bits(walked.h), err_msg=f"{every} {j}")


@of_rows(
    ("float32", "x", "identity", "identity", "column", "wide_packed", "recompute"),
    ("float16", "none", "tanh", "identity", "none", "wide_packed", "recompute"),
    ("float64", "x", "identity", "tanh", "step", "wide_packed", "recompute"),
    ("qrnn", "float32", "fo", "zoned", "wide_packed", "recompute", "starts"),
    ("linear_recurrence", "bfloat16", "blend", "step", "wide_packed", "recompute", "none"),
)
def test_whole_tiles_have_the_bits_of_those_that_are_cut(backend, row):
    """Of 32 threads' columns in each direction: so a GPU's whole tiles go straight, as those of the panel's 16 columns do not.
    Saved blocks shorter than a tile, those that begin within a group of four steps, and whole ones; one warp a block, several."""
    problem = typical(row, length=70, width=128, batch=2)
    if backend.splits:
        some = np.r_[:12, 64:76]  # cut everywhere
        cut = problem.map_arrays(lambda name, a: a if name in ("mask_pad", "starts") else np.array(of_columns(name, a, some)))
        for multiprocessors, every in itertools.product((0, 132), (1, 3, 10, 32)):
            planned = backend.planned_for(multiprocessors)
            for results, of_cut in zip(planned.both(problem, save_every=every), planned.both(cut, save_every=every), strict=True):
                chosen = {n: a if a is None else of_columns(n, a, some) for n, a in results._asdict().items()}
                assert_same(type(results)(**chosen), of_cut, (multiprocessors, every))
        return
    every_state = backend.forward(problem, save_every=1)
    wanted = backend.backward(problem, every_state.c, save_every=1)
    for multiprocessors in (0, 132):
        planned = backend.planned_for(multiprocessors)
        for every in (1, 3, 10, 32, 64):
            output = planned.forward(problem, save_every=every)
            assert_same(output._replace(c=None), every_state._replace(c=None), (multiprocessors, every))
            assert_same(planned.backward(problem, output.c, save_every=every), wanted, (multiprocessors, every))


# ---- sequences laid end to end, and the other direction ---------------------------------------------------------------


@on_every_panel
@pytest.mark.parametrize("reverse", [False, True])
def test_sequences_laid_end_to_end_are_the_pieces_run_by_themselves(backend, row, reverse):
    """The first knows c0, but for one that starts at the first step; the last processed leaves c_last. Reversed columns take the
    pieces from the last to the first, and do not look at starts[0]."""
    cuts = [0, 1, 9, 10, 31, 37]
    whole = typical(row, starts="none", reverse=reverse)
    half, state = whole.shape[2] // 2, np_dtype(state_of(whole.dtype))
    ahead = np.arange(whole.shape[2]) < half  # columns that run forward in time
    ahead = ~ahead if reverse else ahead
    for first in (False, True):
        starts = np.zeros(whole.shape[:2], np.uint8)
        starts[cuts[1:-1]] = 7
        starts[0] = first
        output, gradients = backend.both(whole.replace(starts=starts))
        found, found_g = {"h": [], "c_last": np.zeros(whole.shape[1:], state)}, {n: [] for n in gradients_of(whole)}
        for i, (begin, end) in enumerate(itertools.pairwise(cuts)):
            is_first, is_last = i == 0, i == len(cuts) - 2
            sees_c0, leaves = np.where(ahead, is_first and not first, is_last), np.where(ahead, is_last, is_first)
            part = in_time(whole, lambda a, begin=begin, end=end: a[begin:end])
            part = part.replace(
                c0=np.where(sees_c0, whole.inputs["c0"], 0).astype(whole.inputs["c0"].dtype),
                grad_c_last=np.where(leaves, whole.grad_c_last, 0).astype(whole.grad_c_last.dtype),
            )
            one, one_g = backend.both(part)
            found["h"].append(one.h)
            found["c_last"] += np.where(leaves, one.c_last, 0)
            for name in found_g:
                g = getattr(one_g, name)
                found_g[name].append(np.where(sees_c0, g, 0) if name == "c0" else g)
        expected = whole.replace(starts=starts).expected_backward()
        whole.replace(starts=starts).check(gradients, expected)
        if backend.splits:  # its slices and the pieces' begin at different steps
            whole.replace(starts=starts).check(output, whole.replace(starts=starts).expected_forward())
            continue
        assert_same(output._replace(c=None), cusru.Output(np.concatenate(found["h"]), None, found["c_last"]))
        for name, parts in found_g.items():
            g = getattr(gradients, name)
            if is_per_step(name, g):
                np.testing.assert_array_equal(_bits(g), _bits(np.concatenate(parts)), err_msg=name)
            elif name == "c0":
                np.testing.assert_array_equal(g, sum(parts))
            else:
                total = {name: sum(p.astype(float) for p in parts)}
                oracle.check(total, expected, whole.dtype, [name] if g.dtype == state else ())


@on_every_panel
def test_starts_of_zeros_are_none_bit_for_bit(backend, row):
    absent = typical(row, starts="none")
    for got, want in zip(
        backend.both(absent.replace(starts=np.zeros(absent.shape[:2], bool))), backend.both(absent), strict=True
    ):
        assert_same(got, want)


@on_every_panel
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nothing_comes_across_a_start(backend, row, value):
    """Neither state nor gradient, not even one that is not finite."""
    problem = typical(row, starts="none", padding="none", reverse=False)
    starts = np.zeros(problem.shape[:2], bool)
    starts[18] = True
    problem = problem.replace(starts=starts)

    def spoiled(name, a):
        if not is_per_step(name, a) or name in MASKS:
            return np.full_like(a, value) if name in ("c0", "grad_c_last") else a
        a = np.array(a)
        a[:18] = value
        return a

    output, gradients = backend.both(problem)
    half = problem.shape[2] // 2
    spoiled_output = backend.forward(problem.map_arrays(spoiled))
    assert_same(
        cusru.Output(spoiled_output.h[18:, :, :half], None, spoiled_output.c_last[:, :half]),
        cusru.Output(output.h[18:, :, :half], None, output.c_last[:, :half]),
    )
    # A gradient crosses the start from neither side.
    late = problem.map_arrays(
        lambda name, a: np.concatenate([np.array(a[:18]), np.full_like(a[18:], value)]) if name == "grad_h" else a
    )
    late_g = backend.backward(late, output.c)
    for name in gradients_of(problem):
        g = getattr(gradients, name)
        if is_per_step(name, g):
            np.testing.assert_array_equal(_bits(getattr(late_g, name)[:18, :, :half]), _bits(g[:18, :, :half]), err_msg=name)


@on_every_panel
def test_reverse_is_time_flipped_and_with_two_directions_the_halves_change_places(backend, row):
    problem = typical(row, reverse=False)
    if (starts := problem.inputs["starts"]) is not None:
        starts = np.array(starts)
        starts[0] = 0  # a reversed column does not look at it
        problem = problem.replace(starts=starts)
    half = problem.shape[2] // 2

    def flipped(name, a):
        if name == "starts":
            return np.concatenate([np.zeros_like(a[:1]), a[:0:-1]])
        return np.ascontiguousarray(a[::-1]) if name == "h" or is_per_step(name, a) else a

    def exchanged(name, a):
        return a if name in ("mask_pad", "starts") else np.roll(a, half, 2 if a.ndim > 3 else -1)

    output, gradients = backend.both(problem, save_every=1)
    for change in (flipped, exchanged):
        got = backend.both(problem.map_arrays(change).replace(reverse=True), save_every=1)
        for results, wanted in zip(got, (output, gradients), strict=True):
            back = {n: a if a is None else change(n, a) for n, a in results._asdict().items() if n != "c"}
            drop_c = {"c": None} if "c" in results._fields else {}
            assert_same(results._replace(**back, **drop_c), wanted._replace(**drop_c), change.__name__)


# ---- algebra ----------------------------------------------------------------------------------------------------------


@of_rows(
    ("float64", "x", "identity", "identity", "none", "scalar", "saved"),
    *(row for row in AFFINE_COVERING if row[1] == "float64"),
)
def test_without_weight_c_and_activation_the_forward_is_affine_in_c0(backend, row):
    problem = typical(row, bias=3.0, reach="near_1", starts="none")
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 16))
    at_a, at_b, at_0, at_sum = (backend.forward(problem, c0=c0) for c0 in (a, b, 0 * a, a + b))
    for of_a, of_b, of_0, of_sum in zip(at_a, at_b, at_0, at_sum, strict=True):
        size = sum(abs(part).max() for part in (of_a, of_b, of_0))
        np.testing.assert_allclose(of_a + of_b - of_0, of_sum, rtol=0, atol=1e-14 * size)
        assert abs(of_a - of_0).max() > 1e-3


@in_float64
def test_the_backward_is_linear_in_the_gradients_it_is_given(backend, row):
    problem = typical(row)
    other = typical(row, seed=5)
    c = backend.forward(problem).c

    def gradients(scale, other_scale):
        return backend.backward(
            problem,
            c,
            grad_h=scale * problem.grad_h + other_scale * other.grad_h,
            grad_c_last=scale * problem.grad_c_last + other_scale * other.grad_c_last,
        )

    of_both = zip(GRADIENTS[problem.family]._fields, gradients(1, 0), gradients(0, 1), gradients(2, -3), strict=True)
    for name, a, b, both in of_both:
        if a is not None:
            over = 0 if is_per_step(name, a) else None
            size = 2 * abs(a).max(axis=over) + 3 * abs(b).max(axis=over)
            assert (abs(2 * a - 3 * b - both) <= 1e-12 * size).all(), name


@in_float64
def test_gradients_are_central_finite_differences(backend, row):
    problem = typical(row, layout="compact")
    rng = np.random.default_rng(1)

    def loss(**changes):
        output = backend.forward(problem, **changes)
        return (output.h * problem.grad_h).sum() + (output.c_last * problem.grad_c_last).sum()

    _, gradients = backend.both(problem)
    for name, gradient in gradients._asdict().items():
        if gradient is None:
            continue
        a, step = problem.inputs[name], 1e-6
        direction = rng.standard_normal(a.shape)
        difference = (loss(**{name: a + step * direction}) - loss(**{name: a - step * direction})) / (2 * step)
        assert difference == pytest.approx((gradient * direction).sum(), rel=0, abs=2e-8 * abs(gradient * direction).sum()), name


@on_the_panel
def test_a_weight_c_of_zeros_is_no_weight_c(backend, row):
    absent = typical((*row[:4], "none", *row[5:]))
    zeros = absent.replace(weight_c=np.zeros((2, 16), np_dtype(state_of(absent.dtype))))
    output, gradients = backend.both(zeros)
    absent.check(output, absent.expected_forward())
    absent.check(gradients._replace(weight_c=None), absent.expected_backward())


@on_every_panel
def test_a_mask_pad_of_zeros_is_no_mask_pad_bit_for_bit(backend, row):
    """Though on a GPU they are two kernels."""
    absent = typical(row, padding="none")
    zeros = absent.replace(mask_pad=np.zeros(absent.shape[:2], bool))
    for got, want in zip(backend.both(zeros), backend.both(absent), strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_a_tanh_candidate_and_no_skip_it_is_the_qrnns_fo_pooling(backend, dtype):
    problem = typical((dtype, "none", "identity", "tanh", "none", "scalar", "saved"), bidirectional=False, padding="none",
                      mask_c=None, bias=None, c0=False)  # fmt: skip
    z, f, o = np.moveaxis(problem.inputs["u"].astype(np.float64), 3, 0)
    z, f, o = np.tanh(z), 1 / (1 + np.exp(-f)), 1 / (1 + np.exp(-o))
    c, h = np.zeros(z.shape[1:]), np.empty_like(z)
    for t in range(len(z)):
        c = f[t] * c + (1 - f[t]) * z[t]
        h[t] = o[t] * c
    got = backend.forward(problem)
    assert (abs(got.h.astype(float) - h) <= oracle.TOLERANCE[dtype] * abs(h).max(axis=0)).all()
    assert (abs(got.c_last - c) <= oracle.TOLERANCE[state_of(dtype)]).all()


# ---- extremes of size -------------------------------------------------------------------------------------------------


@on_every_panel
@pytest.mark.parametrize("empty", ["length", "batch", "width"])
@pytest.mark.parametrize("c0", [True, False], ids=["c0", "no c0"])
def test_a_size_of_zero(backend, row, empty, c0):
    problem = typical(row, c0=c0, padding="lengths", reverse=False, **{empty: 0})
    output, gradients = backend.both(problem)
    problem.check(output, problem.expected_forward())  # shapes and dtypes
    problem.check(gradients, problem.expected_backward())
    if empty == "length":
        np.testing.assert_array_equal(output.c_last, problem.inputs["c0"] if c0 else 0)
        if c0:
            np.testing.assert_array_equal(gradients.c0, problem.grad_c_last)
            assert not backend.backward(problem, output.c, grad_c_last=None).c0.any()
    for name in ("bias", "weight_c", "a"):
        a = getattr(gradients, name, None)
        assert a is None or not a.any()


@functools.cache
def _long(kind):
    row = {
        "none": ("float32", "x", "identity", "identity", "none", "scalar", "saved"),
        "column": ("float32", "x", "identity", "identity", "column", "scalar", "saved"),
        "fo": ("qrnn", "float32", "fo", "plain", "scalar", "saved", "none"),
        "blend": ("linear_recurrence", "float32", "blend", "step", "scalar", "saved", "none"),
    }[kind]
    problem = typical(row, length=16384, batch=1, width=8, layout_u="compact", padding="none", mask_c=None)
    # The state stays small, c0 with it: a large one would excuse, as the largest magnitude, what is lost later.
    problem = problem.replace(c0=np.zeros_like(problem.inputs["c0"]))
    if "bias" in problem.inputs:
        bias = np.array(problem.inputs["bias"])
        bias[0] = [7, 9] * 4
        problem = problem.replace(bias=bias)
    elif kind == "fo":
        u = np.array(problem.inputs["u"])
        u[..., 1] += [7, 9] * 4
        problem = problem.replace(u=u)
    else:
        taken = oracle.sigmoid(np.random.default_rng(0).standard_normal(problem.shape) - [7, 9] * 4)
        problem = problem.replace(a=taken.astype("f4"))
    return problem, problem.expected_forward(), problem.expected_backward()


@pytest.mark.parametrize("kind", ["none", "column", "fo", "blend"])
@pytest.mark.parametrize("every", [1, 64])
def test_long_saturated_sequences_keep_the_bound(backend, kind, every):
    problem, forward, backward = _long(kind)
    problem = problem.replace(save_every=every)
    output, gradients = backend.both(problem)
    oracle.check(output._replace(c=None), forward, "float32")
    problem.check(gradients, backward)


# ---- what reviews found -----------------------------------------------------------------------------------------------


def call(backend, **inputs):
    """Forward and backward of inputs that no strategy draws."""
    of_backward = {name: inputs.pop(name, None) for name in ("grad_h", "grad_c_last")}
    output = backend._call(cusru.sru_forward, cusru.Output, (), inputs, None)
    given = inputs | of_backward | {"c": output.c}
    return output, backend._call(cusru.sru_backward, cusru.Gradients, (), given, None)


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_the_skip_has_no_gradient_at_a_padded_step_whatever_scale_x(backend, scale):
    ones = np.ones((2, 1, 2), "f4")
    pad = np.array([[1], [0]], np.uint8)
    _, gradients = call(backend, u=np.ones((2, 1, 2, 3), "f4"), x=ones, mask_pad=pad, scale_x=scale, grad_h=ones)
    assert not gradients.x[0].any()


def test_a_saturated_reset_gate_passes_no_gradient_however_large(backend):
    u = np.zeros((2, 1, 2, 4), "f4")
    u[..., 2], u[..., 3] = 200, 1e20
    large = np.full((2, 1, 2), 1e20, "f4")
    _, gradients = call(backend, u=u, weight_c=np.ones((2, 2), "f4"), c0=np.zeros((1, 2), "f4"), grad_h=large)
    assert not gradients.u[..., 2].any()
    np.testing.assert_allclose(gradients.c0, 7.5e19, rtol=2e-5)


def test_a_parameter_gradient_that_overflows_is_infinite(backend):
    u = np.zeros((3, 1, 2, 3), "f4")
    u[..., 0] = 40
    _, gradients = call(backend, u=u, bias=np.zeros((2, 2), "f4"), grad_h=np.full((3, 1, 2), 1e38, "f4"))
    np.testing.assert_array_equal(gradients.bias, [[-np.inf] * 2, [np.inf] * 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_and_candidates_up_to_half_the_largest_number_are_right(backend, dtype):
    """Their difference is then the largest number, and finite."""
    state = np_dtype(state_of(dtype))
    u = np.zeros((3, 2, 6, 3), np_dtype(dtype))
    u[..., 0] = np.array([0.5, -0.5]).reshape(2, 1) * oracle.LARGEST[dtype]
    u[..., 1] = [-30, -2, 0, 2.2, 5, 30]
    c0 = np.full((2, 6), 0.5 * np.finfo(state).max, state) * np.array([[-1], [1]], state)
    grad_h = np.full((3, 2, 6), 1e-3, u.dtype)
    output, gradients = call(backend, u=u, c0=c0, grad_h=grad_h)
    assert np.isfinite(output.c).all()
    assert np.isfinite(gradients.c0).all()
    oracle.check(output, oracle.forward(u, c0=c0), dtype)
    oracle.check(gradients, oracle.backward(grad_h, None, u, c0=c0), dtype, ("c0",))


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize(
    ("activation", "slope"), [("identity", 1), ("tanh", 1), ("relu", 0), ("selu", oracle.SCALE * oracle.ALPHA)]
)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_the_slope_of_an_activation_at_exactly_zero(backend, activation, slope, dtype, zero):
    """relu's is 0 and selu's that of its left side, as torch has them."""
    u, c0 = np.zeros((1, 1, 4, 3), dtype), np.full((1, 4), zero, dtype)
    u[..., 0] = zero
    output, gradients = call(backend, u=u, c0=c0, activation=activation, grad_h=np.ones((1, 1, 4), dtype))
    assert not output.c.any()
    for gradient in (gradients.u[0, :, :, 0], gradients.c0):  # through r = f = 1/2
        np.testing.assert_allclose(gradient, slope / 4, rtol=1e-6, atol=0)


def test_subnormal_numbers_of_float64_are_kept(backend):
    u = np.zeros((1, 1, 4, 3))
    u[..., 0] = 4e-310
    output, gradients = call(backend, u=u, bias=np.zeros((2, 4)), grad_h=np.full((1, 1, 4), 4e-310))
    np.testing.assert_allclose(output.c, 2e-310, rtol=1e-12)
    np.testing.assert_allclose(output.h, 1e-310, rtol=1e-12)
    np.testing.assert_allclose(gradients.u[..., 0], 1e-310, rtol=1e-12)
    _, gradients = call(backend, u=u + np.eye(3)[0], bias=np.zeros((2, 4)), grad_h=np.full((1, 1, 4), 4e-310))
    np.testing.assert_allclose(gradients.bias, [[-0.5e-310] * 4, [0.5e-310] * 4], rtol=1e-12)


@pytest.mark.parametrize(
    ("length", "batch", "width"),
    [(16 * 400, 1, 1), (16 * 400, 1, 4), (32, 16 * 400, 1)],
    ids=["over many blocks", "over a long block", "over the batch"],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_no_small_terms_of_a_parameter_gradient_are_lost_beside_a_large_one(backend, length, batch, width, sign, monkeypatch):
    """32 of them together are less than half a unit in the last place of that one: a plain sum would stand still."""
    if width == 1:
        monkeypatch.setattr("cusru.reference.BLOCK_BYTES", 64)  # 16 steps of one column
    u, grad_h = np.zeros((length, batch, width, 3), "f4"), np.full((length, batch, width), 2.0**-30, "f4")
    u[::2, ..., 0], u[1::2, ..., 0] = 1, -1  # so that c is a third of either sign, and either gate's terms have one sign
    grad_h[[0, -1], :16] = 1  # what is summed first, upwards or downwards, and in each warp of the kernel that adds up the rows
    grad_h[1::2] *= sign
    output, gradients = call(backend, u=u, bias=np.zeros((2, width), "f4"), weight_c=np.zeros((2, width), "f4"), grad_h=grad_h)
    before = np.concatenate([np.zeros((1, batch, width), "f4"), output.c[:-1]])
    for j in (0, 1):
        terms = gradients.u[..., j + 1].astype(float)
        for got, of_each in ((gradients.bias[j], terms), (gradients.weight_c[j], terms * before)):
            assert (abs(got - of_each.sum(axis=(0, 1))) <= 1e-6 * abs(of_each).sum(axis=(0, 1))).all(), j


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ["identity", "tanh", "relu", "selu"])
@pytest.mark.parametrize("candidate", ["identity", "tanh"])
def test_activations_and_candidates_keep_their_accuracy_near_0(backend, dtype, activation, candidate):
    """Each column has values of one size, by which its errors are measured."""
    u = np.zeros((2, 2, 8, 3), dtype)
    u[..., 0] = np.array([[-0.9], [0.9]]) * 0.2 ** np.arange(8)
    grad_h = np.full((2, 2, 8), 0.5, dtype)
    options = {"activation": activation, "candidate": candidate}
    output, gradients = call(backend, u=u, grad_h=grad_h, **options)
    oracle.check(output, oracle.forward(u, **options), dtype)
    oracle.check(gradients, oracle.backward(grad_h, None, u, **options), dtype)


@pytest.mark.parametrize(("dtype", "bound"), [("f4", 5e-6), ("f8", 1e-13)])
@pytest.mark.parametrize("weight", ["none", "zeros"])
def test_what_a_forget_gate_leaves_of_the_state_and_its_gradient_keeps_its_accuracy(backend, dtype, bound, weight):
    """However small it is next to what it was, or however near."""
    u = np.zeros((1, 1, 40, 3), dtype)
    u[..., 1] = np.linspace(-20, 20, 40)
    ones, zeros = np.ones((1, 40), dtype), np.zeros((1, 1, 40), dtype)
    options = {} if weight == "none" else {"weight_c": np.zeros((2, 40), dtype)}
    output, gradients = call(backend, u=u, c0=ones, grad_h=zeros, grad_c_last=ones, **options)
    f = 1 / (1 + np.exp(-u[0, :, :, 1].astype(float)))
    np.testing.assert_allclose(output.c_last, f, rtol=bound)
    np.testing.assert_allclose(gradients.c0, f, rtol=bound)
    np.testing.assert_allclose(gradients.u[0, ..., 0], 1 / (1 + np.exp(u[0, :, :, 1].astype(float))), rtol=bound)


@pytest.mark.parametrize(("dtype", "bound"), [("f4", 5e-6), ("f8", 1e-13)])
@pytest.mark.parametrize("mask_target", ["state", "gate"])
def test_what_a_reset_gate_leaves_of_the_skip_keeps_its_accuracy(backend, dtype, bound, mask_target):
    """1 - r, and 1 - m * r where m is 1, with r as near to 1 as it may be."""
    u = np.zeros((1, 1, 40, 3), dtype)
    u[..., 2] = np.linspace(-20, 20, 40)
    ones = np.ones((1, 1, 40), dtype)
    output, gradients = call(backend, u=u, x=ones, mask_c=ones[0], mask_target=mask_target, grad_h=ones)
    left = 1 / (1 + np.exp(u[..., 2].astype(float)))
    np.testing.assert_allclose(output.h, left, rtol=bound)
    np.testing.assert_allclose(gradients.x, left, rtol=bound)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("activation", ["identity", "tanh", "relu", "selu"])
def test_an_activation_passes_a_nan_of_the_state_on(backend, activation, dtype):
    """Its slope too, where no weight_c brings the NaN to the gates."""
    u = np.zeros((3, 1, 2, 3), dtype)
    u[1, ..., 0] = np.nan
    grad_h = np.ones((3, 1, 2), dtype)
    output, gradients = call(backend, u=u, activation=activation, grad_h=grad_h)
    assert np.isnan(output.h[1:]).all()
    wanted = oracle.backward(grad_h, None, u, activation=activation)["u"]
    assert np.isnan(wanted).any()
    np.testing.assert_array_equal(np.isnan(gradients.u), np.isnan(wanted))
