"""cusru in PyTorch: the recurrences as differentiable functions, and drop-ins for the modules of sru and of torchqrnn."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from cusru.torch.functions import linear_recurrence, qrnn, sru
from cusru.torch.legacy import PAGE
from cusru.torch.modules import SRU, SRUCell
from cusru.torch.sequence_parallel import sequence_parallel_linear_recurrence, sequence_parallel_qrnn, sequence_parallel_sru
from cusru.torch.srupp import SRUpp, SRUppAttention, SRUppCell, SRUppProjectedLinear
from cusru.torch.torchqrnn import QRNN, ForgetMult, QRNNLayer

__all__ = [
    "QRNN", "SRU", "ForgetMult", "QRNNLayer", "SRUCell", "SRUpp", "SRUppAttention", "SRUppCell", "SRUppProjectedLinear",
    "install_as_sru", "install_as_torchqrnn", "linear_recurrence", "qrnn", "sequence_parallel_linear_recurrence",
    "sequence_parallel_qrnn", "sequence_parallel_sru", "sru",
]  # fmt: skip

_SRU_VERSION = "2.6.0"  # the one whose interface these are


def install_as_sru() -> None:
    """Make `import sru` find these classes: for third-party code that imports it, and for models that were pickled whole.

    Registers the modules `sru`, `sru.modules` and `sru.version`, with SRU, SRUCell and `__version__` = "2.6.0"; and, unless a
    module of that name is imported already, `cuda_functional`, with the SRU and SRUCell of 2017 (`cusru.torch.classic`). What
    else sru has is refused with an ImportError that says what to do. Call it before anything imports sru; a second call does
    nothing.

    Raises:
        RuntimeError: the real sru package is imported already.
    """
    ours = sys.modules.get("sru")
    if getattr(ours, "SRU", None) is SRU:
        return
    if ours is not None or "sru.modules" in sys.modules:
        where = getattr(ours, "__file__", None) or "unknown"
        raise RuntimeError(
            f"the sru package is imported already (from {where}), and objects of its classes may exist: call "
            "cusru.torch.install_as_sru() before anything imports sru"
        )
    package, modules, version = (_module(name) for name in ("sru", "sru.modules", "sru.version"))
    package.__dict__.update(
        SRU=SRU, SRUCell=SRUCell, SRUpp=SRUpp, SRUppCell=SRUppCell,
        modules=modules, version=version, __version__=_SRU_VERSION, __path__=[], __getattr__=_not_in_sru,
    )  # fmt: skip
    modules.__dict__.update(SRU=SRU, SRUCell=SRUCell, SRUpp=SRUpp, SRUppCell=SRUppCell, __getattr__=_not_in_sru)
    modules.__dict__.update(SRUppAttention=SRUppAttention, SRUppProjectedLinear=SRUppProjectedLinear)
    version.__dict__.update(__version__=_SRU_VERSION)
    sys.modules |= {"sru": package, "sru.modules": modules, "sru.version": version}
    sys.meta_path.append(_Refused())
    if "cuda_functional" not in sys.modules:
        from cusru.torch import classic

        original = _module("cuda_functional")
        original.__dict__.update(SRU=classic.SRU, SRUCell=classic.SRUCell, __getattr__=_not_in_cuda_functional)
        sys.modules["cuda_functional"] = original


def install_as_torchqrnn() -> None:
    """Make `import torchqrnn` find QRNN, QRNNLayer and ForgetMult: for code that imports it, and for models pickled whole.

    Registers the modules `torchqrnn`, `torchqrnn.qrnn` and `torchqrnn.forget_mult`. Call it before anything imports torchqrnn; a
    second call does nothing. (fastai's QRNN: see `cusru.torch.fastai`.)

    Raises:
        RuntimeError: the real torchqrnn package is imported already.
    """
    ours = sys.modules.get("torchqrnn")
    if getattr(ours, "QRNN", None) is QRNN:
        return
    if ours is not None:
        where = getattr(ours, "__file__", None) or "unknown"
        raise RuntimeError(
            f"the torchqrnn package is imported already (from {where}), and objects of its classes may exist: call "
            "cusru.torch.install_as_torchqrnn() before anything imports torchqrnn"
        )
    package, layers, forget_mult = (_module(name) for name in ("torchqrnn", "torchqrnn.qrnn", "torchqrnn.forget_mult"))
    layers.__dict__.update(QRNN=QRNN, QRNNLayer=QRNNLayer, ForgetMult=ForgetMult)
    forget_mult.__dict__.update(ForgetMult=ForgetMult, CPUForgetMult=ForgetMult, GPUForgetMult=ForgetMult)
    package.__dict__.update(
        QRNN=QRNN, QRNNLayer=QRNNLayer, ForgetMult=ForgetMult, qrnn=layers, forget_mult=forget_mult, __path__=[]
    )
    sys.modules |= {"torchqrnn": package, "torchqrnn.qrnn": layers, "torchqrnn.forget_mult": forget_mult}


def _module(name: str) -> ModuleType:
    module = ModuleType(name, f"cusru.torch, in the place of {name}.")
    module.__spec__ = ModuleSpec(name, None, origin=__name__, is_package=name in ("sru", "torchqrnn"))
    return module


# ImportErrors, and no AttributeErrors, whose text `from sru import ...` and pickle put their own in the place of.


def _not_in_sru(name: str) -> Any:
    raise AttributeError(f"cusru.torch, in the place of the sru package {_SRU_VERSION}, has no {name} ({PAGE})")


def _not_in_cuda_functional(name: str) -> Any:
    if name.startswith("SRU_"):
        raise ImportError(f"{name}: call cusru.torch.sru in its place ({PAGE})", name="cuda_functional")
    raise AttributeError(f"cusru.torch, in the place of cuda_functional, has no {name} ({PAGE})")


class _Refused(MetaPathFinder):
    """The last on sys.meta_path: it says what became of the modules of sru that are not there."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if not name.startswith("sru.") or getattr(sys.modules.get("sru"), "SRU", None) is not SRU:
            return
        what = "it is left out"
        if name in ("sru.ops", "sru.cuda_functional"):
            what = "call cusru.torch.sru in the place of its functions"
        elif name == "sru.sru_functional":
            what = "for a model that sru 2.0 to 2.3 saved whole, save its state dict with that version"
        # without its name, by which `from sru import ops` would take it for a mere absence
        raise ModuleNotFoundError(f"{name} is not in cusru.torch, which stands in for sru here: {what} ({PAGE})")
