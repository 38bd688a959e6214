"""SRU in TensorFlow: cusru's forward and backward in tf.custom_gradient, and a small training loop on it.

    python examples/tensorflow_gradient.py                   # 200 steps; the loss falls from 0.53 to below 0.01
    python examples/tensorflow_gradient.py --function        # the same loop, its step in a tf.function

Needs `pip install ".[tensorflow]"`; on a GPU CuPy too (".[cuda13]" or ".[cuda12]"). `sru` below is made to be copied: the QRNN
and the linear recurrence go the same way, with their own names of arguments.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import tensorflow as tf

import cusru

GRADIENTS = cusru.Gradients._fields  # the inputs that have one: u, x, bias, weight_c, c0


def sru(
    u: Any, x: Any = None, *, bias: Any = None, weight_c: Any = None, c0: Any = None, mask_c: Any = None, mask_pad: Any = None,
    starts: Any = None, **options: Any,
) -> tuple[tf.Tensor, tf.Tensor]:  # fmt: skip
    """`cusru.sru_forward`, differentiable by u, x, bias, weight_c and c0.

    Args:
        u, x, bias, weight_c, c0, mask_c, mask_pad, starts: tensors, variables or what TensorFlow makes tensors of; shapes and
            dtypes are those of `cusru.sru_forward`.
        options: activation, candidate, scale_x and save_every (numbers), mask_target, bidirectional, reverse, as there.

    Returns:
        h: (L, B, D), u's dtype; and c_last: (B, D), float64 for float64 and float32 for the others.

    Raises:
        As `cusru.sru_forward`; within a tf.function TensorFlow's own error, which carries the text. NotImplementedError where the
        gradients are to be differentiated: cusru has no second derivative.

    Within a tf.function the two kernels' calls are tf.py_function, which runs them as they run here. XLA compiles no such call:
    leave jit_compile off (Keras: model.compile(jit_compile=False)).
    """
    given = dict(u=u, x=x, bias=bias, weight_c=weight_c, c0=c0, mask_c=mask_c, mask_pad=mask_pad, starts=starts)
    # Variables become the tensors that they hold, for which cusru asks; the tape sees them read.
    tensors = {name: tf.convert_to_tensor(a) for name, a in given.items() if a is not None}
    u, names = tensors["u"], [name for name in GRADIENTS if name in tensors]
    state = tf.float64 if u.dtype == tf.float64 else tf.float32

    def forward(*values: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return tuple(cusru.sru_forward(**dict(zip(tensors, values, strict=True)), **options))

    def backward(grad_h: tf.Tensor, grad_c_last: tf.Tensor, c: tf.Tensor, *values: tf.Tensor) -> tuple[tf.Tensor, ...]:
        g = cusru.sru_backward(grad_h, grad_c_last, c, **dict(zip(tensors, values, strict=True)), **options)
        return tuple(getattr(g, name) for name in names)

    @tf.custom_gradient
    def recurrence(*values: tf.Tensor) -> Any:
        h, c, c_last = eagerly(forward, values, [u.dtype, state, state], [u.shape[:3], None, u.shape[1:3]])
        dtypes, shapes = zip(*((tensors[name].dtype, tensors[name].shape) for name in names), strict=True)

        @tf.custom_gradient  # without it TensorFlow would take the gradients for constants, and the second derivative for 0
        def gradients(*kept: tf.Tensor) -> Any:
            return eagerly(backward, kept, dtypes, shapes), no_second_derivative

        def grad(grad_h: tf.Tensor, grad_c_last: tf.Tensor) -> list[tf.Tensor | None]:
            found = dict(zip(names, gradients(grad_h, grad_c_last, c, *values), strict=True))
            return [found.get(name) for name in tensors]  # None for the masks

        return (h, c_last), grad

    return recurrence(*tensors.values())


def eagerly(function: Any, inputs: Any, dtypes: Any, shapes: Any) -> Any:
    """function(*inputs), by tf.py_function where TensorFlow is tracing: a traced tensor has no memory that a kernel can read."""
    if tf.executing_eagerly():
        return function(*inputs)
    results = tf.py_function(function, inputs, dtypes)
    for result, shape in zip(results, shapes, strict=True):
        result.set_shape(shape)
    return tuple(results)


def no_second_derivative(*_: Any) -> Any:
    raise NotImplementedError("cusru has no derivative of the SRU recurrence's gradients")


# ---- a training loop ---------------------------------------------------------------------------------------------------


class Model(tf.Module):
    """Two numbers a step -> one number at the end: a dense layer, two layers of SRU, a dense layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        initial = tf.random.stateless_normal
        self.dense = tf.Variable(initial((2, width), seed=(0, 0)))
        self.weights = [tf.Variable(initial((width, 3 * width), seed=(0, i)) * width**-0.5) for i in (1, 2)]
        self.biases = [tf.Variable(tf.zeros((2, width))) for _ in self.weights]
        self.weights_c = [tf.Variable(tf.zeros((2, width))) for _ in self.weights]
        self.readout = tf.Variable(initial((width, 1), seed=(0, 3)) * width**-0.5)

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        """(L, B, 2) -> (B,)"""
        x = x @ self.dense
        for weight, bias, weight_c in zip(self.weights, self.biases, self.weights_c, strict=True):
            length, batch, width = x.shape
            u = tf.reshape(x @ weight, (length, batch, width, 3))  # one GEMM for all steps and the three projections
            x, _ = sru(u, x, bias=bias, weight_c=weight_c)
        return (x[-1] @ self.readout)[:, 0]


def examples(step: int, length: int, batch: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The adding problem (Hochreiter and Schmidhuber 1997): random numbers, of which one in each half is marked; the sum of these
    two. A guess that ignores the marks has a squared error of 1/6 at best."""
    values = tf.random.stateless_uniform((length, batch), seed=(step, 0))
    half = length // 2
    places = [tf.random.stateless_uniform((batch,), (step, i + 1), i * half, (i + 1) * half, tf.int32) for i in (0, 1)]
    marks = tf.add_n([tf.one_hot(place, length, axis=0) for place in places])
    return tf.stack([values, marks], axis=-1), tf.reduce_sum(values * marks, axis=0)


def train_step(model: Model, optimizer: tf.keras.optimizers.Optimizer, x: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(x) - target))
    variables = model.trainable_variables
    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    return loss


def train(steps: int, length: int = 40, batch: int = 32, width: int = 32, function: bool = False) -> list[float]:
    """The loss of each step."""
    model, optimizer = Model(width), tf.keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)
    step = functools.partial(train_step, model, optimizer)
    step, losses = tf.function(step) if function else step, []
    for number in range(steps):
        losses.append(float(step(*examples(number, length, batch))))
        if number % 50 == 0 or number == steps - 1:
            print(f"step {number + 1:4}   loss {losses[-1]:.4f}")
    return losses


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="default %(default)s")
    parser.add_argument("--function", action="store_true", help="run each step in a tf.function")
    options = parser.parse_args(arguments)
    train(options.steps, function=options.function)


if __name__ == "__main__":
    main()
