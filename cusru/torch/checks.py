"""What the modules ask of their arguments; errors name the argument."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor, nn

from cusru.dlpack import check_torch
from cusru.problem import check_flag, check_rate, check_size
from cusru.torch.operator import type_name

# ---- of a constructor ------------------------------------------------------------------------------------------------


def flags(**given: Any) -> list[bool]:
    return [check_flag(name, value) for name, value in given.items()]


def integer(name: str, value: Any) -> int:
    """As a Python int: torch.compile takes no NumPy one for a constant."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type_name(value)}") from None


def number(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {type_name(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value!r}")
    return value if isinstance(value, int | float) else float(value)


def bound(name: str, value: Any) -> float:
    if number(name, value) < 0:
        raise ValueError(f"{name} must be at least 0; got {value}")
    return number(name, value)


size, probability = check_size, check_rate


# ---- of a call -------------------------------------------------------------------------------------------------------


def tensors(input: Any, c0: Any, mask_pad: Any = None, starts: Any = None, names: tuple[str, str] = ("input", "c0")) -> None:
    """names: what the caller calls the first two."""
    if _are_plain(input, c0, mask_pad, starts):
        return
    for name, a in ((names[0], input), (names[1], c0), ("mask_pad", mask_pad), ("starts", starts)):
        if not isinstance(a, Tensor) and (a is not None or name == names[0]):
            raise TypeError(f"{name} must be a torch.Tensor, not {type_name(a)}")
        if a is not None and not torch.compiler.is_compiling():
            check_torch(a, name)


def inputs(
    cell: nn.Module, input: Tensor, c0: Tensor | None, mask_pad: Tensor | None = None, is_own: bool = True,
    starts: Tensor | None = None, names: tuple[str, str] = ("input", "c0"),
) -> None:  # fmt: skip
    """What torch's own errors would not name; `is_own`: the cell's own weight is what input meets. Parameters are looked at where
    they are plain: one that a parametrisation or a wrapper computes is not computed for this. names: of input and c0."""
    bias, weight = cell._parameters.get("bias"), cell._parameters.get("weight")
    if (
        bias is not None
        and _are_plain(input, c0, mask_pad, starts, bias.device)
        and (weight is None or input.dtype is weight.dtype)
        and (not is_own or input.is_floating_point())
        and (c0 is None or c0.is_floating_point())
    ):
        return
    tensors(input, c0, mask_pad, starts, names)
    device, where = (input.device, names[0]) if bias is None else (bias.device, "the parameters")
    for name, a in ((names[0], input), (names[1], c0), ("mask_pad", mask_pad), ("starts", starts)):
        if a is not None and a.device != device:
            raise ValueError(f"{name} is on {a.device}, and {where} on {device}")
    for name, a in ((names[0], input if is_own else None), (names[1], c0)):
        if a is not None and not a.is_floating_point():
            raise TypeError(f"{name} has dtype {a.dtype}; expected a floating-point one")
    autocast = input.device.type != "meta" and torch.is_autocast_enabled(input.device.type)
    if weight is not None and input.dtype != weight.dtype and not autocast:
        raise TypeError(f"{names[0]} has dtype {input.dtype}, and the parameters {weight.dtype}")


def projected(linear: nn.Module, input: Tensor, **others: Tensor | None) -> None:
    """What `linear` is to take, and tensors that come with it."""
    for name, a in {"input": input, **others}.items():
        if not isinstance(a, Tensor) and (a is not None or name == "input"):
            raise TypeError(f"{name} must be a torch.Tensor, not {type_name(a)}")
        if a is None or torch.compiler.is_compiling():
            continue
        check_torch(a, name)
        if a.device != input.device:
            raise ValueError(f"{name} is on {a.device}, and the input on {input.device}")
    weight = linear._parameters.get("weight")
    if weight is None or (input.dtype == weight.dtype and input.device == weight.device):
        return
    if input.device != weight.device:
        raise ValueError(f"input is on {input.device}, and the parameters on {weight.device}")
    if not (input.device.type != "meta" and torch.is_autocast_enabled(input.device.type) and input.is_floating_point()):
        raise TypeError(f"input has dtype {input.dtype}, and the parameters {weight.dtype}")


def _are_plain(input: Any, c0: Any, mask_pad: Any, starts: Any, device: torch.device | None = None) -> bool:
    """Whether there is nothing to say of them: answered in less time than it takes to name what is wrong, for it is asked at each
    layer and step."""
    if torch.compiler.is_compiling():
        return False
    for a in (input, c0, mask_pad, starts):
        if a is not None and not (
            isinstance(a, Tensor)
            and a.layout is _STRIDED
            and not (a.is_neg() or a.is_conj())
            and (device is None or a.device == device)
        ):
            return False
    return input is not None


_STRIDED = torch.strided
