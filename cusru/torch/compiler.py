"""What torch.compile is told about cusru's functions, at the moment when it is loaded: to load it for that alone takes a second
or two, and most who import cusru.torch never compile."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_loaded(name: str, call: Callable[[], None]) -> None:
    """call(), now if a module of that name has been imported, else as soon as it has been."""
    if name in sys.modules:
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
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_call(module: ModuleType) -> None:
            load(module)
            if self in sys.meta_path:  # not told yet
                sys.meta_path.remove(self)
                self.call()

        spec.loader.exec_module = load_and_call  # type: ignore[method-assign]
        return spec
