"""What torch.compile is told about cusru's functions, at the moment when it is loaded: to load it for that alone takes a second
or two, and most who import cusru.torch never compile."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_loaded(name: str, call: Callable[[], None]) -> None:
    """call(), now if a module of that name has been imported, else as soon as it has been."""
    if sys.modules.get(name) is not None:  # None: somebody has blocked it
        call()
    else:
        sys.meta_path.insert(0, _Watch(name, call))


class _Watch(MetaPathFinder):
    def __init__(self, name: str, call: Callable[[], None]) -> None:
        self.name, self.call, self.searching = name, call, False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)  # by the other finders
        finally:
            self.searching = False
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return None
        spec.loader = _Loader(spec.loader, self)
        return spec

    def loaded(self) -> None:
        if self in sys.meta_path:  # not told yet
            sys.meta_path.remove(self)
            self.call()


class _Loader(Loader):
    """The one that was found, which may be shared with other modules and is left as it is, and word of when it is done."""

    def __init__(self, found: Any, watch: _Watch) -> None:
        self.found, self.watch = found, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.found, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.found.create_module(spec) if hasattr(self.found, "create_module") else None

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.found
        if module.__spec__ is not None:
            module.__spec__.loader = self.found
        self.found.exec_module(module)
        self.watch.loaded()
