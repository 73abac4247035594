"""Packages that are also the function they are named after: ``clue.unlearn(...)`` and ``clue.evaluate(...)``.

Whoever asks such a package for help means the function: it is described first, and its parameters are the package's.
"""

from __future__ import annotations

import sys
from inspect import Signature, getdoc, signature
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def _function(self) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._function()(*arguments, **keywords)

    @property
    def __signature__(self) -> Signature:
        return signature(self._function())

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        function = self._function()
        return f"{function.__name__}(...): {getdoc(function)}\n\nThe package. {vars(self)['__doc__']}"


def make_callable(package: str) -> None:
    """Let the package of this name, which is being imported, be called."""
    sys.modules[package].__class__ = _CallablePackage
