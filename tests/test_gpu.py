"""On a CUDA device: the table's full-size cases against the oracle, and a problem of more than 2^31 elements.

What else holds on a GPU is in test_properties.py and test_laws.py, whose tests run there too.
"""

import numpy as np
import oracle
import pytest
import strategies
from conftest import missing, to_host

import cusru
from benchmarks import cases
from cusru.__main__ import Gpu

REASON = missing("gpu")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=REASON or "")]
COLUMNS = 2048  # that the oracle, which is slow, looks at


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(c, d, id=f"{c.name}-{d}") for c in cases.BENCHMARKS for d in c.dtypes],
)
def test_the_cases_of_the_table(case, dtype):
    """Full size on the device; a slice of the batch, all of its columns and times, against the oracle."""
    import cupy

    device = Gpu(cupy)
    inputs = cases.make(case, dtype, put=device.put)
    grad_h, grad_c_last = cases.make_gradients(case, dtype, put=device.put)
    output = cusru.sru_forward(**inputs)
    gradients = cusru.sru_backward(grad_h, grad_c_last, output.c, **inputs)

    some = slice(case.B - max(1, min(case.B, COLUMNS // case.D)), None)
    batch_axis = {"c0": 0, "mask_c": 0, "c_last": 0, "grad_c_last": 0}

    def part(name, a):
        if not hasattr(a, "get"):
            return a
        if name not in ("bias", "weight_c") or a.ndim == 4:
            a = a[some] if batch_axis.get(name) == 0 else a[:, some]
        return to_host(a)

    problem = strategies.Problem(
        {"case": case.name},
        {n: part(n, a) for n, a in inputs.items()},
        part("grad_h", grad_h),
        part("grad_c_last", grad_c_last),
        dtype,
        0,
    )
    problem.check(cusru.Output(*(part(n, a) for n, a in output._asdict().items())), problem.expected_forward())
    summed_over_the_batch = dict(bias=None, weight_c=None if case.weight_c == "column" else gradients.weight_c)
    expected = problem.expected_backward()
    results = {n: part(n, a) for n, a in gradients._replace(**summed_over_the_batch)._asdict().items() if a is not None}
    held_in_state = [n for n, a in results.items() if a.dtype == strategies.state_of(dtype)]
    oracle.check(results, expected, dtype, held_in_state)


def test_more_than_two_to_the_31_elements():
    case = cases.Case("huge", 8, 5600, 16384, skip="none", save_every=8)
    assert case.elements * case.k > 2**31
    import cupy

    if cupy.cuda.runtime.memGetInfo()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    u = cupy.asarray(np.random.default_rng(0).standard_normal((8, 1, 64, 3)).astype("float16"))
    whole = cupy.zeros((case.L, case.B, case.D, case.k), "float16")
    whole[:, -1:, -64:] = u
    output, wanted = cusru.sru_forward(whole, save_every=8), cusru.sru_forward(u, save_every=8)
    grad_h = cupy.zeros(output.h.shape, "float16")
    grad_h[:, -1:, -64:] = wanted.h
    got = cusru.sru_backward(grad_h, None, output.c, whole, save_every=8).u[:, -1:, -64:]
    expected = oracle.backward(wanted.h.get(), None, u.get(), save_every=8)
    oracle.check({"h": output.h[:, -1:, -64:].get()}, oracle.forward(u.get()), "float16")
    oracle.check({"u": got.get()}, expected, "float16")
    assert not output.h[:, :-1].any()
