# SPDX-License-Identifier: Apache-2.0
"""gibbs_ext under other libraries' interfaces: each module needs the package of the same name.

Modules are imported when they are first used, as by ``gibbs_ext.interop.dimod.BlockGibbsSampler``.
"""

import importlib
from types import ModuleType

_MODULES = ("dimod", "sklearn")


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
