"""What the versions 2.0 to 2.3 and 3.0 of the sru package name otherwise than 2.6.0: arguments, parameters, submodules."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, cast

import numpy as np
from torch import Tensor, nn

from cusru.problem import check_flag

P = ParamSpec("P")
PAGE = "docs/migrating-from-sru.md"

# An old name, and what that argument is called here; where a class has the old name itself, that one is meant.
_RENAMED = {
    "n_in": "input_size",  # SRUCell up to 2.1.7
    "n_out": "hidden_size",
    "n_proj": "projection_size",  # SRU up to 2.1.7
    "projection_size": "n_proj",  # SRUCell from 3.0 on
    "transform_module": "custom_m",  # from 3.0 on
}
_ACTIVATIONS = {"use_relu": (2, "relu"), "use_selu": (3, "selu")}  # the numbers are sru's
# What cannot be had, and what to do. Switched off, each is accepted.
_GONE = {
    "weight_norm": "normalise the weight once, weight * (gain / weight.norm(2, dim=0)), and load it as weight",
    "is_input_normalized": "it only made initial values smaller: leave it out, or multiply weight_c and the gates' columns of "
    "weight by 0.1",
    "custom_u": "pass a module that returns U, or U and V, as custom_m",
    "custom_v": "pass a module that returns U and V as custom_m",
}


def takes_old_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """An __init__ that also takes, by keyword, the arguments of the sru package's other versions."""
    known = frozenset(inspect.signature(init).parameters)

    @functools.wraps(init)  # help() and inspect.signature show the present arguments
    def __init__(*args: Any, **kwargs: Any) -> None:
        old = {name: kwargs.pop(name) for name in [*kwargs] if name not in known}
        activations = []
        for name, value in old.items():
            if name in _ACTIVATIONS:
                activations += [name] * check_flag(name, value)
            elif name in _GONE:
                refuse(name, value, _GONE[name])
            else:
                new = _RENAMED.get(name, name)
                if new in kwargs:
                    raise TypeError(f"{name} and {new} are one argument: give {new} alone")
                kwargs[new] = value
        init(*args, **kwargs)
        if activations:
            set_activation(args[0], activations)

    return cast(Callable[P, None], __init__)


def refuse(name: str, value: Any, what_to_do: str) -> None:
    """Raise ValueError unless the value is one that switches the argument off: None, False or 0."""
    if value is None or (isinstance(value, bool | np.bool_ | int | float) and not value):
        return
    shown = value if isinstance(value, bool | int | float | str) else type(value).__name__
    raise ValueError(f"{name}={shown} is not supported: {what_to_do} ({PAGE})")


def set_activation(module: Any, activations: list[str]) -> None:
    """Of an SRU or SRUCell that was built without these: "use_relu" or "use_selu"."""
    cells = getattr(module, "rnn_lst", [module])
    activations = ["use_tanh"] * bool(cells[0].activation_type) + activations
    if len(activations) > 1:
        raise ValueError(f"{' and '.join(activations)} exclude one another: give one")
    for cell in cells:
        cell.activation_type, cell.activation = _ACTIVATIONS[activations[0]]


# ---- the weight in 3.0 ----------------------------------------------------------------------------------------------------


def rename_weights(cell: Any, state_dict: dict[str, Any], prefix: str) -> str:
    """Give the weights that 3.0 keeps in transform_module, transposed, their present names and shapes, in `state_dict`.

    Returns what the user should know, or "".
    """
    inner = f"{prefix}transform_module."
    theirs = {key[len(inner) :]: state_dict.pop(key) for key in [*state_dict] if key.startswith(inner)}
    if cell.custom_m is not None:
        state_dict.update({f"{prefix}custom_m.{name}": value for name, value in theirs.items()})
    elif set(theirs) == {"weight"}:
        state_dict[f"{prefix}weight"] = _transposed(theirs["weight"])
    elif set(theirs) == {"0.weight", "1.weight"}:
        first, second = (_transposed(theirs[f"{i}.weight"]) for i in range(2))
        if cell.weight_proj is None:
            # 3.0 has projections that are no narrower than what they connect; the constructor here leaves them out.
            state_dict[f"{prefix}weight"] = first @ second
            return (
                f"{prefix}weight is the product of transform_module.0.weight and .1.weight: this cell has no projection. "
                "Outputs are the same; training is not that of two factors"
            )
        state_dict[f"{prefix}weight_proj"], state_dict[f"{prefix}weight"] = first, second
    elif theirs:
        state_dict.update({inner + name: value for name, value in theirs.items()})
        return (
            f"{inner[:-1]} is no plain weight but has {', '.join(theirs)}: build the model with custom_m=a module such as that "
            "was, and they load"
        )
    return ""


def warn_of_load(module: nn.Module, names: Iterable[str], state_dict: dict[str, Any], prefix: str, more: str = "") -> None:
    """Say which of the parameters are not in the state dict. Whether it was to be strict is not known here."""
    missing = [prefix + name for name in names if prefix + name not in state_dict]
    if missing:
        verbs = ("is not", "keeps the values it had") if len(missing) == 1 else ("are not", "keep the values they had")
        kept = f"{', '.join(missing)} {verbs[0]} in the state dict, and {verbs[1]}: random ones, unless loaded before"
        more = kept + (more and f"; {more}")
    if more:
        warnings.warn(f"{type(module).__name__}: {more} ({PAGE})", stacklevel=1)


def adopt_transform_module(cell: Any) -> None:
    """What 3.0 pickled as transform_module, as weight and weight_proj; or, where it is another module, as custom_m."""
    transform = cell._modules.pop("transform_module")
    linears = [transform]
    if cell.projection_size and type(transform) is nn.Sequential and not _has_hooks(transform):
        linears = list(transform)
    if len(linears) != (2 if cell.projection_size else 1) or not all(map(_is_plain, linears)):
        cell.custom_m = transform
        return
    cell.custom_m = cell.weight_proj = None
    others = dict(cell._parameters)
    cell._parameters.clear()  # so that they come in the order of a cell that is built here
    for name, linear in zip(["weight_proj", "weight"][-len(linears) :], linears, strict=True):
        cell.__dict__.pop(name, None)
        setattr(cell, name, nn.Parameter(_transposed(linear.weight), requires_grad=linear.weight.requires_grad))
    cell._parameters.update(others)


def _is_plain(module: nn.Module) -> bool:
    """A weight and no more; not one with a bias, a hook, or a weight that is computed from others."""
    weight = module._parameters.get("weight")
    return type(module) is nn.Linear and weight is not None and module.bias is None and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _transposed(weight: Any) -> Any:
    return weight.detach().t().contiguous() if isinstance(weight, Tensor) and weight.dim() == 2 else weight
