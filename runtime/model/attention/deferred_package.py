"""Packages whose own code runs when something of it is used: one module is imported without all the others.

Python runs a package's own code before that of any module in it. FlashInfer's imports 400 modules, which keeps the
interpreter busy for seconds. Its attention of prompts needs half of them.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any


def import_alone(package: str, module: str) -> ModuleType:
    """Import `package.module` without the package's own code, or with it if that fails.

    The code runs later if an attribute of the package is used that is none of its modules.
    """
    name = f"{package}.{module}"
    is_deferred = _defer(package)
    try:
        return importlib.import_module(name)
    except Exception:  # the ordinary import below works, or raises the error again
        if not is_deferred:
            raise
    for imported in [other for other in sys.modules if other == package or other.startswith(f"{package}.")]:
        del sys.modules[imported]
    return importlib.import_module(name)


def _defer(name: str) -> bool:
    """Put the package in place without running its code; return False if it has run or the package is missing."""
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return False
    package, loader, lock = importlib.util.module_from_spec(spec), spec.loader, threading.RLock()

    def find_attribute(attribute: str) -> Any:
        if importlib.util.find_spec(f"{name}.{attribute}") is not None:
            return importlib.import_module(f"{name}.{attribute}")
        with lock:
            if vars(package).get("__getattr__") is find_attribute:
                del package.__getattr__  # the code may define its own
                loader.exec_module(package)
        return getattr(package, attribute)

    package.__getattr__ = find_attribute  # type: ignore[method-assign]  # PEP 562
    sys.modules[name] = package
    return True
