"""``import qconv`` teaches transformers to load what it has no loader for, without importing it.

Registering needs transformers and torch, which take seconds to import, so it waits until transformers' own registry of
quantizers is imported: ``AutoModelForCausalLM.from_pretrained`` does that.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
_REGISTER = "qconv.runtime.register"


def register_with_transformers() -> None:
    """Register now if transformers' registry is there, else as soon as it is imported."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    # By name, since every module of qconv imports the package, which must not be seen to import them.
    importlib.import_module(_REGISTER).register()


class _Finder(MetaPathFinder):
    """Finds the registry as everybody does, once, and has it executed by :class:`_Loader`."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Executes a module as its own loader does, then registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()
