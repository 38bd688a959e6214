"""`examples/tensorflow_gradient.py`: cusru in TensorFlow's autograd, eagerly and within a tf.function."""

import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import strategies

import cusru

tf = pytest.importorskip("tensorflow", reason='needs tensorflow: pip install "cusru[tensorflow]"')

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import tensorflow_gradient  # noqa: E402
from tensorflow_gradient import sru  # noqa: E402

ROWS = {row[0]: row for row in (strategies.COVERING[3], strategies.COVERING[7], strategies.COVERING[10], strategies.COVERING[18])}


@pytest.fixture(params=["eager", "function"])
def call(request):
    """call(function, *tensors), as it stands or within a tf.function."""
    return (lambda function, *tensors: tf.function(function)(*tensors)) if request.param == "function" else lambda f, *a: f(*a)


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize(
    "changes", [{}, dict(weight="column", starts="scattered", mask_c=None, padding="none", c0=False)], ids=["masks", "starts"]
)
def test_outputs_and_gradients_are_those_of_the_equations(call, dtype, changes):
    """Of every input that has a gradient, with those around it that have none, against the oracle of the tests."""
    problem = strategies.typical(ROWS[dtype], **changes)
    arrays = {name: tf.constant(a) for name, a in problem.arrays.items()}
    options = {name: value for name, value in problem.inputs.items() if name not in arrays and value is not None}
    names = [name for name in cusru.Gradients._fields if name in arrays]

    def both(grad_h, grad_c_last, *values):
        given = dict(zip(arrays, values, strict=True))
        with tf.GradientTape() as tape:
            tape.watch([given[name] for name in names])
            results = sru(**given, **options)
        gradients = tape.gradient(results, [given[name] for name in names], output_gradients=[grad_h, grad_c_last])
        return results, gradients

    grads = [tf.constant(problem.grad_h), tf.cast(problem.grad_c_last, strategies.state_of(dtype))]
    problem = problem.replace(grad_c_last=grads[1].numpy())
    (h, c_last), found = call(both, *grads, *arrays.values())
    assert (h.dtype.name, c_last.dtype.name) == (dtype, strategies.state_of(dtype))
    oracle.check({"h": h.numpy(), "c_last": c_last.numpy()}, problem.expected_forward(), dtype)
    gradients = dict.fromkeys(cusru.Gradients._fields) | {name: a.numpy() for name, a in zip(names, found, strict=True)}
    problem.check(cusru.Gradients(**gradients), problem.expected_backward())


def normal(*shape):
    return tf.random.stateless_normal(shape, seed=(0, len(shape)), dtype=tf.float64)


def test_variables_learn_and_a_result_that_is_not_used_has_no_gradient(call):
    u, bias, c0 = tf.Variable(normal(9, 2, 4, 3)), tf.Variable(normal(2, 4)), tf.Variable(normal(2, 4))

    def gradients():
        with tf.GradientTape() as tape:
            _, c_last = sru(u, bias=bias, c0=c0)
            loss = tf.reduce_sum(c_last)
        return tape.gradient(loss, [u, bias, c0])

    found = call(gradients)
    arrays = [a.numpy() for a in (u, bias, c0)]
    c = cusru.sru_forward(arrays[0], bias=arrays[1], c0=arrays[2]).c
    zeros, ones = np.zeros((9, 2, 4)), np.ones((2, 4))
    expected = cusru.sru_backward(zeros, ones, c, arrays[0], bias=arrays[1], c0=arrays[2])
    for a, b in zip(found, (expected.u, expected.bias, expected.c0), strict=True):
        np.testing.assert_array_equal(a.numpy(), b)


def test_shapes_are_known_where_tensorflow_traces():
    @tf.function(input_signature=[tf.TensorSpec((None, 3, 4, 3), tf.float16)])
    def traced(u):
        h, c_last = sru(u)
        assert (h.dtype, c_last.dtype) == (tf.float16, tf.float32)
        assert (h.shape.as_list(), c_last.shape.as_list()) == ([None, 3, 4], [3, 4])
        return h

    for length in (5, 7):
        assert traced(tf.ones((length, 3, 4, 3), tf.float16)).shape == (length, 3, 4)


def test_what_is_refused_is_named(call):
    u = normal(9, 2, 4, 3)
    with pytest.raises(
        (ValueError, tf.errors.InvalidArgumentError), match=r"bias has shape \(2, 5\); expected \(2, 4\) or \(8,\)"
    ):
        call(lambda u: sru(u, bias=tf.zeros((2, 5), tf.float64)), u)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=r"activation must be one of 'identity'"):
        call(lambda u: sru(u, activation="gelu"), u)
    with pytest.raises((TypeError, tf.errors.InvalidArgumentError), match="x has dtype float32; allowed here: float64"):
        call(lambda u: sru(u, tf.zeros((9, 2, 4))), u)


def test_a_second_derivative_is_refused_and_not_zero(call):
    def second(u):
        with tf.GradientTape() as outer:
            outer.watch(u)
            with tf.GradientTape() as inner:
                inner.watch(u)
                loss = tf.reduce_sum(sru(u)[0])
            norm = tf.reduce_sum(tf.square(inner.gradient(loss, u)))
        return outer.gradient(norm, u)

    with pytest.raises(NotImplementedError, match="no derivative of the SRU recurrence's gradients"):
        call(second, normal(9, 2, 4, 3))


@pytest.mark.parametrize("autograph", [False, True])
def test_a_traced_tensor_is_refused_by_the_kernels_own_functions(autograph, caplog):
    """In as many words by autograph, which would warn of each line that it cannot rewrite."""
    with pytest.raises(TypeError, match=r"u is a traced value \(.*SymbolicTensor\)"):
        tf.function(lambda u: cusru.sru_forward(u), autograph=autograph)(normal(9, 2, 4, 3))
    assert not caplog.records


def test_the_loss_falls_below_what_ignoring_the_marks_can_reach():
    """To less than half of it, and by the same steps within a tf.function."""
    losses, traced = (tensorflow_gradient.train(60, function=function) for function in (False, True))
    assert losses[0] > 1 / 6 > 2 * np.mean(losses[-5:])
    np.testing.assert_allclose(traced, losses, rtol=1e-2)
