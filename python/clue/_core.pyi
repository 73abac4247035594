"""Types of the native core: arguments are checked natively, with errors that name the argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# Logic (csrc/logic)

_Edges = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.uint8]]

def cadical_version() -> str: ...
def assign(
    n_nodes: int,
    editable: npt.NDArray[np.uint8],
    forget: list[_Edges],
    retain: list[_Edges],
    weights: npt.NDArray[np.int64],
    risk: npt.NDArray[np.int64],
    reach: npt.NDArray[np.int64],
    semantics: str,
    time_limit: float,
) -> dict[str, Any]: ...
