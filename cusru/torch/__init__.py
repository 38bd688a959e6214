"""cusru in PyTorch: the recurrence as a differentiable function, and drop-ins for the sru package's modules."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from cusru.torch.modules import SRU, SRUCell
from cusru.torch.operator import sru

__all__ = ["SRU", "SRUCell", "install_as_sru", "sru"]

_SRU_VERSION = "2.6.0"  # the one whose interface these are


def install_as_sru() -> None:
    """Make `import sru` find these classes: for third-party code that imports it, and for models that were pickled whole.

    Registers the modules `sru` and `sru.modules`, with SRU, SRUCell and `__version__` = "2.6.0". Call it before anything
    imports sru; a second call does nothing.

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
    package, modules = ModuleType("sru", install_as_sru.__doc__), ModuleType("sru.modules")
    for module in (package, modules):
        module.__spec__ = ModuleSpec(module.__name__, None, origin=__name__, is_package=module is package)
        module.SRU, module.SRUCell = SRU, SRUCell  # type: ignore[attr-defined]
    package.__path__ = []
    package.__version__ = _SRU_VERSION  # type: ignore[attr-defined]
    package.modules = modules  # type: ignore[attr-defined]
    sys.modules |= {"sru": package, "sru.modules": modules}
