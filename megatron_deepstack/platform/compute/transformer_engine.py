"""Transformer Engine: whether it can be loaded, tried once, and the reason if it cannot.

A package that is installed may still fail to load: cuDNN is too old, its core library or a package that it needs is
missing. Megatron-Core tries to import it too and expects an ImportError at most, so an engine that fails in another
way would end the import of Megatron. After a failure here every later import of it is refused with ImportError, and
Megatron goes on as if it were not installed.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from functools import cache
from importlib.util import find_spec

_PACKAGE = "transformer_engine"
_MODULE = "transformer_engine.pytorch"


@cache
def engine_problem() -> str | None:
    """Why Transformer Engine cannot be used in this process; None if it can. Warns once where it is broken.

    Call it before Megatron-Core is imported (`adapt_megatron` does).

    Returns:
        A clause for a message: that the package is not installed, or what its import said.
    """
    if find_spec(_PACKAGE) is None:
        return "the package transformer_engine is not installed (pip install 'megatron-deepstack[gpu]')"
    try:
        importlib.import_module(_MODULE)
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        _refuse_further_imports()
        warnings.warn(
            f"Transformer Engine is installed and cannot be loaded; `model.layers: auto` takes local layers: {said}",
            RuntimeWarning,
            stacklevel=2,
        )
        return f"the package transformer_engine is installed and cannot be loaded: {said}"
    return None


def unavailable(question: str) -> str | None:
    """What Transformer Engine itself says against a feature on this GPU with this version of CUDA.

    Call it only where `engine_problem` found nothing.

    Args:
        question: Name of its function, such as `is_mxfp8_available`.

    Returns:
        Its reason; None if it is available, or if this version has no such function.
    """
    ask = getattr(importlib.import_module(_MODULE), question, None)
    if ask is None:
        return None
    available, reason = ask(return_reason=True)
    return None if available else str(reason).rstrip(". ")


def _refuse_further_imports() -> None:
    """None in `sys.modules` makes an import raise ModuleNotFoundError; half-loaded parts are dropped."""
    for name in [name for name in sys.modules if name.startswith(f"{_PACKAGE}.")]:
        del sys.modules[name]
    sys.modules[_PACKAGE] = None  # type: ignore[assignment]
    sys.modules[_MODULE] = None  # type: ignore[assignment]
