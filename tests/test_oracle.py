"""The oracle by which all else is judged: its gradients are finite differences of its outputs, whatever the options, and its
sequences laid end to end are those run by themselves."""

import dataclasses
import random

import numpy as np
import pytest
import strategies

SMOOTH = {"activation": ("identity", "tanh", "selu")}  # relu has a kink, across which no difference says anything


def drawn(family, seed):
    """A small problem in float64 with any options."""
    only = dict(dtype="float64", length=(3, 5, 9), batch=(1, 3), width=(2, 4), layout="compact", layout_u="compact",
                starts=("none", "scattered", "first", "all"), magnitude="normal", broadcast="none")  # fmt: skip
    only |= SMOOTH if family == "sru" else {}
    return strategies.build_any(strategies.random_choice(random.Random(f"{family} {seed}"), None, family, **only))


@pytest.mark.parametrize("family", strategies.FAMILIES)
def test_gradients_are_central_finite_differences_of_the_outputs(family):
    for seed in range(60):
        problem = drawn(family, seed)
        gradients, rng = problem.expected_backward(), np.random.default_rng(seed)
        step = 1e-5  # a smaller one would leave mostly the rounding of the two losses, where a loss is small beside its terms

        def loss(problem):
            output = problem.expected_forward()
            of_last = 0 if problem.grad_c_last is None else (output["c_last"] * problem.grad_c_last).sum()
            return (output["h"] * problem.grad_h).sum() + of_last

        for name, gradient in gradients.items():
            if name in ("magnitude", "amplification") or gradient is None:
                continue
            a = problem.inputs[name]
            terms = gradient.reshape(a.shape) * (direction := rng.standard_normal(a.shape))
            ahead, behind = (loss(problem.replace(**{name: a + sign * step * direction})) for sign in (1, -1))
            difference, size = (ahead - behind) / (2 * step), abs(terms).sum() + 1e-2 * abs(ahead)
            assert difference == pytest.approx(terms.sum(), rel=0, abs=1e-7 * size), f"{name} of {problem}"


@pytest.mark.parametrize("family", strategies.FAMILIES)
def test_sequences_laid_end_to_end_are_those_run_by_themselves(family):
    for seed in range(20):
        problem = drawn(family, seed)
        length, batch, _ = problem.shape
        starts = np.zeros((length, batch), bool)
        starts[1] = True
        inputs = problem.inputs | {"starts": None, "bidirectional": False, "reverse": False, "save_every": 1}

        def part(s, c0, problem=problem, inputs=inputs):
            own = {n: a[s] if has_time(n, a) else a for n, a in inputs.items()}
            return dataclasses.replace(problem, inputs=own | {"c0": c0}).expected_forward()

        early, late = part(slice(1), inputs["c0"]), part(slice(1, None), None)
        whole = dataclasses.replace(problem, inputs=inputs | {"starts": starts}).expected_forward()
        np.testing.assert_array_equal(whole["h"], np.concatenate([early["h"], late["h"]]))
        np.testing.assert_array_equal(whole["c_last"], late["c_last"])


def has_time(name, a):
    return isinstance(a, np.ndarray) and a.ndim >= {"u": 4, "weight_c": 4, "mask_pad": 2}.get(name, 3)
