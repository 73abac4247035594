"""Candidates: the matrices of a model's layers, which are all that a baseline may choose from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from ..errors import ModelError
from ..weights import part_name, view_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..model.anatomy import Anatomy


@dataclass(frozen=True, eq=False)
class Matrix:
    """One linear map of a layer; fused projections are one matrix, every expert's are matrices of their own.

    Attributes:
        name: in ``model.state_dict()``, or of a matrix of a stack there (:mod:`clue.weights`).
        module: the linear layer, or the module that keeps all experts.
        parameter: the weight, or the stack.
        transposed: the matrix is kept as [d_in, d_out].
        expert: number of the routed expert; ``None`` in a plain linear layer.
    """

    name: str
    module: nn.Module
    parameter: nn.Parameter
    transposed: bool
    expert: int | None = None

    @property
    def weight(self) -> Tensor:
        """As it is kept: [d_out, d_in], or [d_in, d_out] where it is transposed."""
        return view_of(self.parameter.detach(), self.name)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of :attr:`weight`."""
        rows, columns = self.weight.shape
        return int(rows), int(columns)

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.weight.numel()

    @property
    def axis(self) -> int:
        """Along which axis of :attr:`weight` the outputs lie."""
        return 1 if self.transposed else 0


def candidates(body: Anatomy) -> tuple[Matrix, ...]:
    """Every matrix of every layer once, bottom layer first.

    Raises:
        ModelError: one of them is tied to another weight of the model, or does not lie in memory row by row.
    """
    found: dict[str, Matrix] = {}
    for layer in body.layers:
        shared = layer.experts.shared if layer.experts is not None else None
        projections = [layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down]
        projections += [] if shared is None else [shared.gate, shared.up, shared.down]
        for projection in projections:
            if projection is not None:
                parameter = cast("nn.Parameter", projection.module.weight)
                found[projection.name] = Matrix(projection.name, projection.module, parameter, projection.transposed)
        if layer.experts is not None:
            for number in range(layer.experts.count):
                for kind in ("gate_up_proj", "down_proj"):
                    name = part_name(f"{layer.experts.name}.{kind}", number)
                    parameter = cast("nn.Parameter", getattr(layer.experts.module, kind))
                    found[name] = Matrix(name, layer.experts.module, parameter, False, number)
    names: dict[int, set[str]] = {}
    for name, parameter in body.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    for matrix in found.values():
        if len(names[id(matrix.parameter)]) > 1:
            raise ModelError(f"{matrix.name} shares its storage with another weight of this model: untie them before"
                             " localizing")
        if not matrix.parameter.is_contiguous():
            raise ModelError(f"{matrix.name} does not lie in memory row by row: copy it with .contiguous() first")
    return tuple(found.values())
