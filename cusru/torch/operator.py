"""The recurrences as differentiable operators of torch, and what torch's transforms need to know about them: `functions.py`
names their arguments.

Plain tensors, where nobody but autograd looks, go a straight way (`_Straight`), to `call.py` at once. For all others there are
three layers, each for those above it. The operators `torch.ops.cusru.sru_forward`, `sru_backward` and so on let torch own the
memory: they allocate results and workspace and hand them to cusru's public functions; export, compile and script see these
alone. The autograd functions around them add what an operator lacks: a rule for vmap, and errors instead of silent
zeros for the derivatives that are not there. A `Recurrence` is what the layers know of one family.

The operators are defined by `torch.library.Library`, not by `custom_op`, whose first call loads torch._dynamo; what that has to
know of cusru it is told when somebody else loads it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import cusru
from cusru import call, dlpack, problem
from cusru.arguments import (
    BACKWARD,
    FORWARD,
    GRADIENTS,
    INPUTS,
    LINEAR_BACKWARD,
    LINEAR_FORWARD,
    MASK,
    QRNN_BACKWARD,
    QRNN_FORWARD,
    Operator,
)
from cusru.problem import Options
from cusru.torch.compiler import when_loaded

_FEW = 48 << 10  # values of u: their states, 64 KB in float32, are kept rather than recomputed, whatever save_every says
SAVE_EVERY = 32  # by default: states are then 0.4% of the bytes that a float32 training step moves

Results = tuple[Tensor, Tensor]


class Recurrence:
    """One family: the arguments of its operators in torch, in their order."""

    def __init__(self, forward: Operator, backward: Operator, tensors: tuple[str, ...], number: str | None = None) -> None:
        """tensors: of the schema, by slot; starts comes last, with a default, as it came to be later. number: the name of what
        forward.number is where it is no tensor."""
        self.forward, self.backward, self.tensors = forward, backward, tensors
        self.family, self.number = forward.family, number
        options = [(number, "float")] if number else []
        options += [(choice, "str") for choice in forward.choices] + [("bidirectional", "bool"), ("save_every", "int")]
        self.options = dict(options)
        public = tuple(forward.public(slot) for slot in tensors)
        self.names = (*public, *self.options, "starts", "reverse")
        self.tensor_names = (*public, "starts")
        self.of_backward = ("grad_h", "grad_c_last", "c")
        self.results = tuple(forward.public(slot.removeprefix("grad_")) for slot in backward.results)  # that have a gradient
        self.without_gradient = tuple(  # though they might have one
            slot for slot in tensors if f"grad_{slot}" not in GRADIENTS and forward.arrays[slot].dtype != MASK
        )
        self.slots = [INPUTS.index(slot) for slot in (*tensors, "starts")]
        self.count = max(self.slots) + 1  # of slots
        self.number_slot = INPUTS.index(forward.number) if forward.number else None
        self.composite: Callable[..., tuple[Tensor | None, ...]] | None = None  # its gradients by differentiable operations

    def op(self, direction: str) -> Any:
        return getattr(torch.ops.cusru, f"{self.family}_{direction}")

    def by_slot(self, given: dict[str, Any]) -> tuple[Any, ...]:
        values: list[Any] = [None] * self.count
        for name, slot in zip(self.tensor_names, self.slots, strict=True):
            values[slot] = given[name]
        return tuple(values)

    def arguments(self, by_slot: Sequence[Any], options: Options) -> tuple[Any, ...]:
        """Of the operators."""
        *tensors, starts = [by_slot[slot] for slot in self.slots]
        number = []
        if self.number_slot is not None:
            value, default = by_slot[self.number_slot], 1.0 if self.number == "scale" else 0.0
            if value is not None and not isinstance(value, Tensor):
                tensors[self.slots.index(self.number_slot)], default = None, float(value)
            number = [default]
        every = options.save_every or 0
        return (*tensors, *number, *options.choices, options.bidirectional, every, starts, options.reverse)

    def complete(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """With starts and reverse, which torch leaves out where they are their defaults."""
        return (*arguments, *(None, False)[len(arguments) - len(self.names) + 2 :])

    def named(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """An operator's arguments as those of cusru's functions; its save_every = 0 stands for None."""
        given = dict(zip(self.names, self.complete(arguments), strict=True))
        if self.number:
            number, name = given.pop(self.number), self.forward.public(self.forward.number or "")
            if given[name] is None:
                given[name] = number
        given["save_every"] = given["save_every"] or None
        return given

    def first(self, given: dict[str, Any]) -> Tensor:
        return given[self.forward.public("u")]


SRU = Recurrence(FORWARD, BACKWARD, tuple(slot for slot in FORWARD.inputs if slot != "starts"), "scale")
QRNN = Recurrence(QRNN_FORWARD, QRNN_BACKWARD, ("u", "c0", "mask_pad", "zoneout"), "p")
LINEAR = Recurrence(LINEAR_FORWARD, LINEAR_BACKWARD, ("weight_c", "u", "c0", "mask_pad"))
_FAMILIES = {one.family: one for one in (SRU, QRNN, LINEAR)}


def run(family: str, inputs: tuple[Any, ...], options: Options) -> Results:
    """The tensors by slot."""
    results = _straight(family, inputs, options)
    return _run_with_care(family, inputs, options) if results is None else results


def _run_with_care(family: str, inputs: tuple[Any, ...], options: Options) -> Results:
    one = _FAMILIES[family]
    arguments = arguments_with_care(one, inputs, options)
    traced = torch.jit.is_tracing()
    if (traced or torch.compiler.is_compiling()) and torch.onnx.is_in_onnx_export():
        from cusru.torch import onnx

        with untraced():
            check_without_memory(one, "forward", one.named(arguments))
        h, _, c_last = getattr(onnx, f"{family}_forward")(*arguments)
    elif traced:  # a trace is saved with operators only
        h, _, c_last = one.op("forward")(*arguments)
    else:
        h, _, c_last = _Forward.apply(family, *arguments)
    return h, c_last


def arguments_with_care(one: Recurrence, inputs: tuple[Any, ...], options: Options) -> tuple[Any, ...]:
    """Of the operators, after the checks that are torch's own."""
    family = one.family
    given = {name: inputs[slot] for name, slot in zip(one.tensor_names, one.slots, strict=True)}
    number: Any = None
    if one.number:
        name = one.forward.public(one.forward.number or "")
        value = given[name]
        if family == "qrnn" and not isinstance(value, torch.SymFloat | torch.SymInt):
            problem.check_probability(name, value)
        if problem.is_number(name, value) or isinstance(value, torch.SymFloat | torch.SymInt):
            number, given[name] = float(value), None
        elif not isinstance(value, Tensor) and (value is not None or family == "sru"):
            what = "of one element" if family == "sru" else "of bool or uint8"
            raise TypeError(f"{name} must be a number or a tensor {what}, not {type_name(value)}")
    first = one.forward.public("u")
    required = [one.forward.public(slot) for slot in one.forward.required]
    for name in (first, *(name for name in given if name != first)):
        value = given[name]
        if isinstance(value, Tensor):
            if name != "scale_x":  # whose one element is read whatever it is
                dlpack.check_torch(value, name)  # torch's own wrappers would stumble over a sparse one
        elif value is not None or name in required:
            raise TypeError(f"{name} must be a torch.Tensor, not {type_name(value)}")
    wanted = [n for n, a in given.items() if a is not None and a.requires_grad] if torch.is_grad_enabled() else []
    for name in one.without_gradient:
        if name in wanted:
            raise TypeError(_NO_GRADIENT.format(name))
    problem.check_choices(one.forward, options.choices)
    every = problem.check_save_every(options.save_every)
    options = Options(
        options.choices, problem.check_flag("bidirectional", options.bidirectional), every or 0,
        problem.check_flag("reverse", options.reverse),
    )  # fmt: skip
    if every is None and wanted:
        raise ValueError("save_every=None keeps no states, and the backward needs them: give 1 or more, or use torch.no_grad()")
    by_slot = list(one.by_slot(given))
    if number is not None and one.number_slot is not None:
        by_slot[one.number_slot] = number
    return one.arguments(by_slot, options)


# ---- the straight way ----------------------------------------------------------------------------------------------


class _Unusual(Exception):
    """The tensors are to be looked at with care."""


def _straight(family: str, inputs: tuple[Any, ...], options: Options) -> Results | None:
    """For plain tensors where nobody but autograd looks: no dispatch, no second look. None where anything is unusual or wrong."""
    kind, every = type(inputs[0]), options.save_every
    if (kind is not Tensor and kind is not Parameter) or (every is not None and (type(every) is not int or every < 1)):
        return None
    one = _FAMILIES[family]
    try:
        if torch.is_grad_enabled():
            recorded = [slot for slot, a in enumerate(inputs) if isinstance(a, Tensor) and a.requires_grad]
            if recorded:
                if every is None or recorded[-1] >= len(GRADIENTS) or dlpack.watched_by_torch():
                    return None
                return _Straight.apply(family, options, *inputs)  # type: ignore[no-any-return]
        h, _, c_last = _run(one.forward, inputs, Options(options[0], options[1], None, options[3]))  # states are for a backward
        return h, c_last
    except _Unusual:
        return None


def _run(
    operator: Operator, inputs: tuple[Any, ...], options: Options, unwanted: tuple[str, ...] = (), out: Any = None
) -> list[Any]:
    found = call.look(operator, inputs, options, out, like_inputs=True, unwanted=unwanted)
    results = None if found is None else call.start(found)
    if results is None:
        raise _Unusual
    return results


def run_forward(one: Recurrence, inputs: tuple[Any, ...], options: Options) -> tuple[Tensor, Tensor | None, Tensor]:
    """h, c, c_last and no graph of them, of inputs that have been looked at."""
    try:
        h, c, c_last = _run(one.forward, inputs, options)
    except _Unusual:
        h, c, c_last = one.op("forward")(*one.arguments(inputs, options))
        c = c[:-1] if options.save_every else None
    return h, c, c_last


def run_backward(
    one: Recurrence, inputs: tuple[Any, ...], options: Options, c: Tensor, grad_h: Tensor, grad_c_last: Tensor | None,
    wanted: Container[str],
) -> dict[str, Tensor | None]:  # fmt: skip
    """Likewise, the gradients by their slots."""
    padded = (*inputs, *(None,) * (len(INPUTS) - one.count), None, c, None, grad_h, grad_c_last)
    unwanted = tuple([slot for slot in one.backward.results if slot not in wanted])
    found: Sequence[Tensor | None]
    try:
        found = _run(one.backward, padded, options, unwanted)
    except _Unusual:
        saved = torch.cat([c, torch.zeros_like(c[:1])])
        found = _of_backward(one, grad_h, grad_c_last, saved, one.arguments(inputs, options), one.op("backward"))
    return dict(zip(one.backward.results, found, strict=True))


class _Straight(torch.autograd.Function):
    """What `_Forward` and `_Backward` do, without what they do for torch's transforms, in which it is not called."""

    @staticmethod
    def forward(ctx: Any, family: str, options: Options, *inputs: Any) -> Results:
        one = _FAMILIES[family]
        ctx.as_operator = _somebody_takes_what_is_saved()
        if ctx.as_operator:
            c = _new_states(inputs[0], options.save_every)
            c[-1].zero_()
            h, _, c_last = _run(one.forward, inputs, options, out=(None, c[:-1], None))
        else:
            if inputs[0].numel() <= _FEW:
                options = Options(options[0], options[1], 1, options[3])  # no bit depends on it
            h, c, c_last = _run(one.forward, inputs, options)
        ctx.number = None
        if one.number_slot is not None and not isinstance(inputs[one.number_slot], Tensor):
            ctx.number = inputs[one.number_slot]
            inputs = (*inputs[: one.number_slot], None, *inputs[one.number_slot + 1 :])
        ctx.save_for_backward(c, *inputs)
        ctx.one, ctx.options = one, options
        ctx.set_materialize_grads(False)
        return h, c_last

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_c_last: Tensor | None) -> tuple[Any, ...]:
        one: Recurrence = ctx.one
        if grad_h is None and grad_c_last is None:
            return (None,) * (2 + one.count)
        saved, *tensors = ctx.saved_tensors
        c = saved[:-1] if ctx.as_operator else saved
        u = tensors[0]
        if grad_h is None:
            grad_h = u.new_zeros(()).expand(u.shape[:3])
        inputs = list(tensors)
        if ctx.number is not None and one.number_slot is not None:
            inputs[one.number_slot] = ctx.number
        wanted = dict(zip(GRADIENTS, ctx.needs_input_grad[2:], strict=False))
        gradients: dict[str, Any] = dict.fromkeys(GRADIENTS)
        if not torch.is_grad_enabled():  # else there is to be a graph of this
            unwanted = tuple([slot for slot in one.backward.results if not wanted[slot]])
            padded = (*inputs, *(None,) * (len(INPUTS) - one.count), None, c, None, grad_h, grad_c_last)
            try:
                found = _run(one.backward, padded, ctx.options, unwanted)
                gradients |= zip(one.backward.results, found, strict=True)
                return (None, None, *_by_slot(one, gradients))
            except _Unusual:
                pass
        if not ctx.as_operator:
            saved = torch.cat([c, torch.zeros_like(c[:1])])
        found = _of_backward(one, grad_h, grad_c_last, saved, one.arguments(inputs, ctx.options), _Backward.apply)
        gradients |= zip(one.backward.results, found, strict=True)
        return (None, None, *_by_slot(one, gradients))


def _by_slot(one: Recurrence, gradients: dict[str, Any]) -> list[Any]:
    """Of the inputs."""
    return [gradients[GRADIENTS[slot]] if slot < len(GRADIENTS) else None for slot in range(one.count)]


def _somebody_takes_what_is_saved() -> bool:
    """For the backward. Who compares it, as checkpointing does, is to find what the operator saves, which may run next time."""
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return ask is None or ask(True) is not None


_NO_GRADIENT = "{0} requires grad, and cusru has no gradient for it: pass {0}.detach()"


def type_name(value: Any) -> str:
    """For messages."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


@contextmanager
def untraced() -> Iterator[None]:
    """Within it torch.jit.trace does not look, and sizes are numbers: those it sees are traced, and to compare them warns."""
    state = torch._C._get_tracing_state()
    if state is None:
        yield
        return
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def sizes_of(a: Tensor) -> list[int]:
    """Its shape in numbers, in a trace too."""
    with untraced():
        return list(a.shape)


# ---- the operators: torch owns the memory --------------------------------------------------------------------------


def _new_states(u: Tensor, save_every: int) -> Tensor:
    """One row more than is used, for torch.export specialises a size that is 1 in its example."""
    length, batch, width = u.shape[:3]
    blocks = -(-length // save_every) if save_every else 0
    return u.new_empty((blocks + 1, batch, width), dtype=state_dtype(u))


def state_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _new_outputs(u: Tensor, save_every: int) -> tuple[Tensor, Tensor, Tensor]:
    # its axes in the order of u's: a batch-first u makes a batch-first h
    h = torch.empty_like(u.select(-1, 0) if u.dim() == 4 else u)
    return h, _new_states(u, save_every), u.new_empty(u.shape[1:3], dtype=state_dtype(u))


def _new_gradients(first: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """An empty tensor stands for None, which an operator cannot return."""
    return tuple(first.new_empty(0) if a is None else torch.empty_like(a) for a in tensors)


def _workspace(one: Recurrence, direction: str, given: dict[str, Any]) -> Tensor | None:
    """None on a CPU, where NumPy takes none. To ask for its size is to check the arguments, so this comes before all else; on a
    CPU cusru's own call checks them, but for what would keep the results from being allocated."""
    u = one.first(given)
    if u.is_cpu and u.dim() == len(one.forward.arrays["u"].shapes[0]) and u.layout is torch.strided:
        return None
    name = direction if one.family == "sru" else f"{one.family}_{direction}"
    return u.new_empty(cusru.workspace_size(name, **given), dtype=torch.uint8)


def _forward(one: Recurrence, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = one.named(arguments)
    workspace = _workspace(one, "forward", given)
    every = given["save_every"]
    h, c, c_last = _new_outputs(one.first(given), every or 0)
    c[-1].zero_()  # an operator's results must be the same each time
    out = (h, c[:-1] if every else None, c_last)
    getattr(cusru, one.forward.name)(**given, out=out, workspace=workspace)
    return h, c, c_last


def _backward(
    one: Recurrence, grad_h: Tensor, grad_c_last: Tensor | None, c: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    given = one.named(arguments)
    workspace = _workspace(one, "backward", given)
    wanted = [given[name] for name in one.results]
    gradients = _new_gradients(one.first(given), wanted)
    out = [None if a is None else g for a, g in zip(wanted, gradients, strict=True)]
    getattr(cusru, one.backward.name)(grad_h, grad_c_last, c[:-1], **given, out=out, workspace=workspace)
    return gradients


def _forward_without_memory(one: Recurrence, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = one.named(arguments)
    check_without_memory(one, "forward", given)
    return _new_outputs(one.first(given), given["save_every"] or 0)


def _backward_without_memory(
    one: Recurrence, grad_h: Tensor, grad_c_last: Tensor | None, c: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    given = one.named(arguments)
    check_without_memory(one, "backward", given | dict(grad_h=grad_h, grad_c_last=grad_c_last, c=c[:-1]))
    return _new_gradients(one.first(given), [given[name] for name in one.results])


def check_without_memory(one: Recurrence, direction: str, arguments: dict[str, Any]) -> None:
    """The checks of cusru's functions for tensors of a tracer, which have all that is looked at but memory."""
    operator = one.forward if direction == "forward" else one.backward
    described = {n: _describe(n, a) if isinstance(a, Tensor) else a for n, a in arguments.items()}
    choices = tuple(described[name] for name in operator.choices)
    options = Options(choices, described["bidirectional"], described["save_every"], described["reverse"])
    inputs = {slot: described[operator.public(slot)] for slot in operator.inputs if operator.public(slot) in described}
    problem.check(operator, inputs, options, 0)


def _describe(name: str, a: Tensor) -> dlpack.Array:
    device = ("meta", 0) if a.device.type == "meta" else dlpack.device_of(a, name)
    dlpack.check_torch(a, name)
    dtype = str(a.dtype).removeprefix("torch.")
    return dlpack.Array(name, 0, tuple(a.shape), a.stride(), dtype, device, False, "torch", None, a)


# ---- autograd ------------------------------------------------------------------------------------------------------


def _keep(one: Recurrence, ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    arguments = one.complete(arguments)
    is_tensor = [name in one.tensor_names for name in one.names]
    ctx.save_for_backward(output[1], *[a for a, yes in zip(arguments, is_tensor, strict=True) if yes])
    ctx.others = [a for a, yes in zip(arguments, is_tensor, strict=True) if not yes]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _gradients(
    one: Recurrence, ctx: Any, needed: Sequence[bool], backward: Any, grad_h: Tensor | None, grad_c_last: Tensor | None
) -> tuple[Any, ...]:
    """Of an operator's arguments."""
    for name, is_needed in zip(one.names, needed, strict=False):
        if is_needed and name in one.without_gradient:  # unseen before where vmap hides it
            raise TypeError(_NO_GRADIENT.format(name))
    if grad_h is None and grad_c_last is None:
        return (None,) * len(one.names)
    c, *tensors = ctx.saved_tensors
    tensors, others = iter(tensors), iter(ctx.others)
    arguments = tuple([next(tensors if name in one.tensor_names else others) for name in one.names])
    if grad_h is None:
        u = one.first(one.named(arguments))
        grad_h = u.new_zeros(()).expand(u.shape[:3])
    gradients = dict(zip(one.results, _of_backward(one, grad_h, grad_c_last, c, arguments, backward), strict=True))
    return tuple([gradients.get(name) for name in one.names])


def _of_backward(
    one: Recurrence, grad_h: Tensor, grad_c_last: Tensor | None, c: Tensor, arguments: tuple[Any, ...], backward: Any
) -> list[Tensor | None]:
    """In the order of one.results; None for the gradient of an input that is absent, which an operator cannot return."""
    given = one.named(arguments)
    if one.composite is not None and torch.is_grad_enabled():  # there is to be a graph of them
        found = one.composite(grad_h, grad_c_last, **given)
    elif backward == _Backward.apply:
        found = backward(one.family, grad_h, grad_c_last, c, *arguments)
    else:
        found = backward(grad_h, grad_c_last, c, *arguments)
    return [None if given[name] is None else g for name, g in zip(one.results, found, strict=True)]


_NO_JVP = "cusru has no forward-mode derivative of the {} recurrence: use reverse mode (backward, torch.func.grad or vjp)"
_NO_DOUBLE_BACKWARD = (
    "cusru has no derivative of the {} recurrence's gradients (double backward, create_graph=True, torch.func.hessian)"
)
_TITLES = {"sru": "SRU", "qrnn": "QRNN", "linear_recurrence": "linear"}


class _Forward(torch.autograd.Function):
    """An operator with a rule for vmap, which a custom operator's own autograd has not."""

    @staticmethod
    def forward(family: str, *arguments: Any) -> Any:
        return _FAMILIES[family].op("forward")(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.one = _FAMILIES[inputs[0]]
        _keep(ctx.one, ctx, inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, _: None, grad_c_last: Tensor | None) -> tuple[Any, ...]:
        return (None, *_gradients(ctx.one, ctx, ctx.needs_input_grad[1:], _Backward.apply, grad_h, grad_c_last))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], family: str, *arguments: Any) -> Any:
        one = _FAMILIES[family]
        return _vmap(one, _Forward, one.names, one.forward.results, info.batch_size, in_dims[1:], arguments)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_JVP.format(_TITLES[ctx.one.family]))


class _Backward(torch.autograd.Function):
    """Likewise; its own derivative is an error."""

    @staticmethod
    def forward(family: str, *arguments: Any) -> Any:
        return _FAMILIES[family].op("backward")(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.family = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(_NO_DOUBLE_BACKWARD.format(_TITLES[ctx.family]))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], family: str, *arguments: Any) -> Any:
        one = _FAMILIES[family]
        return _vmap(one, _Backward, (*one.of_backward, *one.names), one.results, info.batch_size, in_dims[1:], arguments)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_JVP.format(_TITLES[ctx.family]))


# ---- vmap ----------------------------------------------------------------------------------------------------------


def _vmap(
    one: Recurrence, function: Any, names: tuple[str, ...], results: tuple[str, ...], size: int,
    in_dims: tuple[int | None, ...], arguments: Any,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:  # fmt: skip
    """`size` problems as one of `size` times the columns, for a column has its own parameters and its own gradients of them.
    Padding, starts and scale_x are shared by all columns: where they differ, the problems run one after the other."""
    values, dims = dict(zip(names, arguments, strict=True)), dict(zip(names, in_dims, strict=True))
    if function is _Forward and size:  # the caller knows the sizes of one problem
        each = tuple(a if d is None else a.select(d, 0) for a, d in zip(arguments, in_dims, strict=True))
        check_without_memory(one, "forward", one.named(each))
    shared = ("mask_pad", "starts", "scale_x")
    if any(dims.get(name) is not None for name in shared):
        apart = [
            function.apply(one.family, *(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)))
            for i in range(size)
        ]
        return tuple(torch.stack(same) for same in zip(*apart, strict=True)), (0,) * len(results)

    rank = {n: a.ndim - (dims[n] is not None) for n, a in values.items() if isinstance(a, Tensor)}
    flat = {n for n, r in rank.items() if r == 1 and one.family == "sru"}  # (2*D,)
    directions = 2 if values["bidirectional"] else 1
    first = one.forward.public("u")
    width = [n for i, n in enumerate(values[first].shape) if i != dims[first]][2] // directions
    for name in rank.keys() - set(shared):
        a = values[name]
        a = a.unsqueeze(0).expand(size, *a.shape) if dims[name] is None else a.movedim(dims[name], 0)
        if name in flat:
            a = a.unflatten(1, (2, a.shape[1] // 2))
        values[name] = _fold(a, _axis(rank[name]), directions)
    outputs, out_dims = [], []
    for name, a in zip(results, function.apply(one.family, *values.values()), strict=True):
        absent = name in values and values[name] is None  # and so is its gradient
        if not absent:
            a = _unfold(a, _axis(rank.get(name)), size, directions, width)
            if name in flat:
                a = a.flatten(1)
        outputs.append(a)
        out_dims.append(None if absent else 0)
    return tuple(outputs), tuple(out_dims)


def _axis(rank: int | None) -> int:
    """Of the columns: u and a weight_c per step have one more axis behind."""
    return -2 if rank == 4 else -1


def _fold(a: Tensor, axis: int, directions: int) -> Tensor:
    """(size, ..., D, ...) -> (..., size * D, ...), where D is (directions, width) and becomes (directions, size, width)."""
    a = a.unflatten(axis, (directions, a.shape[axis] // directions)).movedim(0, axis - 1)
    return a.flatten(axis - 2 + a.ndim, axis + a.ndim)


def _unfold(a: Tensor, axis: int, size: int, directions: int, width: int) -> Tensor:
    """The reverse of _fold."""
    a = a.unflatten(axis, (directions, size, width)).movedim(axis - 1, 0)
    return a.flatten(axis - 1 + a.ndim, axis + a.ndim)


# ---- telling torch -------------------------------------------------------------------------------------------------


def _library() -> torch.library.Library:
    """The one that holds the operators. The namespace keeps it, so that to import cusru again, after it was removed from
    sys.modules, replaces them: torch would refuse a second definition."""
    namespace = torch.ops.cusru
    if (earlier := vars(namespace).get("_library")) is not None:
        earlier._destroy()
    namespace._library = torch.library.Library("cusru", "DEF")
    return namespace._library


def _define(library: torch.library.Library, one: Recurrence) -> None:
    """The autograd is for those who call the operator itself: TorchScript, and graphs that were exported."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _keep(one, ctx, inputs, output)

    def backward(ctx: Any, grad_h: Tensor | None, _: None, grad_c_last: Tensor | None) -> tuple[Any, ...]:
        return _gradients(one, ctx, ctx.needs_input_grad, one.op("backward"), grad_h, grad_c_last)

    def keep_family(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.family = one.family

    passes: Any = (
        (one.forward, (), functools.partial(_forward, one), functools.partial(_forward_without_memory, one), backward, keep),
        (
            one.backward, one.of_backward, functools.partial(_backward, one), functools.partial(_backward_without_memory, one),
            _Backward.backward, keep_family,
        ),
    )  # fmt: skip
    as_traced = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)  # newer: torch's own default
    for operator, before, kernel, without_memory, derivative, setup_context in passes:
        required = {operator.public(slot) for slot in operator.required}
        tensors = (*before, *one.tensor_names[:-1])
        arguments = [f"Tensor{'' if a in required else '?'} {a}" for a in tensors]
        arguments += [f"{kind} {option}" for option, kind in one.options.items()]
        arguments += ["Tensor? starts=None", "bool reverse=False"]  # later than programs that were saved
        schema = f"{operator.name}({', '.join(arguments)}) -> ({', '.join(['Tensor'] * len(operator.results))})"
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag, as_traced))
        _KERNELS[operator.name] = kernel
        library.impl(operator.name, functools.partial(_run_kernel, operator.name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"cusru::{operator.name}", without_memory, lib=library)
        torch.library.register_autograd(f"cusru::{operator.name}", derivative, setup_context=setup_context, lib=library)


_KERNELS: dict[str, Callable[..., Any]] = {}


def _run_kernel(name: str, *arguments: Any) -> Any:
    return _KERNELS[name](*arguments)


def _tell_dynamo() -> None:
    # A compiled function that calls backward() itself would have dynamo compile this, and fail; ...
    for function in (_Forward, _Straight):
        function.backward = staticmethod(torch.compiler.disable(function.backward))  # type: ignore[method-assign]
    for name, kernel in _KERNELS.items():  # ... and these, where they run within a frame that it has skipped.
        _KERNELS[name] = torch.compiler.disable(kernel)


def _tell_torch() -> None:
    library = _library()
    for one in _FAMILIES.values():
        _define(library, one)
    for rules in (_Forward, _Backward):  # else Function.apply calls inspect.signature each time
        rules.forward.__signature__ = inspect.signature(rules.forward)  # type: ignore[attr-defined]
    when_loaded("torch._dynamo", _tell_dynamo)


_tell_torch()
