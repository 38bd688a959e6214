"""Any problem, on any backend: the results are the oracle's within its bounds, and `out=` is respected."""

import numpy as np
import pytest
import strategies

from benchmarks import cases
from cusru import specialisation

pytestmark = pytest.mark.filterwarnings("error")


def same(a, b):
    """Bitwise, None included."""
    return all((x is None and y is None) or x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def some(source):
    """Of save_every: the backward needs states."""
    return tuple(s for s in strategies.fields(source.row)["save_every"] if s)


def test_the_covering_lists_hold_every_pair_of_options():
    values = (
        specialisation.TYPES, specialisation.SKIPS, specialisation.ACTIVATIONS, specialisation.CANDIDATES, specialisation.WEIGHTS,
        strategies.ACCESS, ("saved", "recompute"),
    )  # fmt: skip
    possible = {(i, a, j, b) for i in range(7) for j in range(i) for a in values[i] for b in values[j]}
    impossible = {(5, "packed", 1, skip) for skip in ("none", "x")}
    impossible |= {(4, "step_state", 0, dtype) for dtype in ("float64", "float32")}
    for rows in (strategies.COVERING, strategies.SECOND_COVERING):
        assert possible - {(i, r[i], j, r[j]) for r in rows for i in range(7) for j in range(i)} == impossible


@pytest.mark.parametrize("family", strategies.FREE_AFFINE)
def test_the_covering_list_of_what_is_affine_holds_every_value_of_every_option(family):
    free = strategies.FREE_AFFINE[family]
    of_family = (free["pooling"], ("plain", "zoned")) if family == "qrnn" else (free["form"], free["a"])
    # b is read as u is where its k values lie side by side, and has no planes.
    access = set(strategies.ACCESS) - (set() if family == "qrnn" else {"packed", "wide_planar"})
    wanted = cases.DTYPES, *of_family, access, ("saved", "recompute"), ("none", "padding", "starts")
    rows = [row[1:] for row in strategies.AFFINE_COVERING if row[0] == family]
    assert [set(values) for values in zip(*rows, strict=True)] == [set(values) for values in wanted]


def test_forward_agrees_with_the_oracle(source):
    def check(backend, problem):
        problem.check(backend.forward(problem), problem.expected_forward())

    source.for_all(check)


def test_backward_agrees_with_the_oracle(source):
    def check(backend, problem):
        _, gradients = backend.both(problem)
        problem.check(gradients, problem.expected_backward(backend.forward(problem, save_every=1).c))

    source.for_all(check, save_every=some(source))


def test_out_of_any_layout_gets_the_same_bits_and_nothing_around_it_is_written(source):
    # Vectors are kept where the row asks for them; the layouts that break them up fall to the scalar rows.
    layouts = tuple(strategies.LAYOUTS) if source.row is None or "scalar" in source.row else strategies.ALIGNED

    def check(backend, problem):
        rng = np.random.default_rng(problem.choice["seed"])

        def fresh(results):
            return [None if a is None else strategies.scratch(a.shape, a.dtype, rng.choice(layouts)) for a in results]

        output, gradients = backend.both(problem)
        outs = fresh(output), fresh(gradients)
        returned = backend.forward(problem, out=outs[0]), backend.backward(problem, output.c, out=outs[1])
        for wanted, given, got in zip((output, gradients), outs, returned, strict=True):
            assert all(a is b for a, b in zip(given, got, strict=True))
            assert same(wanted, got)
            assert all(a is None or strategies.untouched_around(a) for a in given)

    source.for_all(check, save_every=some(source))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, d) for c in cases.SMALL for d in c.dtypes if d in strategies.DTYPES],
    ids=lambda p: getattr(p, "name", p),
)
def test_the_small_cases_of_the_table(backend, case, dtype):
    problem = strategies.of_case(case, dtype)
    output, gradients = backend.both(problem)
    problem.check(output, problem.expected_forward())
    problem.check(gradients, problem.expected_backward(backend.forward(problem, save_every=1).c))
