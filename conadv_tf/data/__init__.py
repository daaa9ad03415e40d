"""Data: sources, decoding, augmentation, exact evaluation, and the importer of image folders."""

import importlib
from typing import Any

# Public names, and the modules that have them: imported when first used (PEP 562). They take TensorFlow with them,
# which the tools' --help does without.
_HOMES = {"ImageData": "pipeline", "check_source": "datasets", "load": "datasets"}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
