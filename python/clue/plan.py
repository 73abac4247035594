"""Plan: the role of every node, and the slice of every weight that may change. The only thing unlearning knows.

A plan is data. It saves to ``plan.json`` (readable) and ``plan.safetensors`` (arrays), both byte-identical for equal
plans, and reloads on another machine. :func:`verify` compares two saved models bit by bit and says whether exactly
the planned weights changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .data.atomic import replacing
from .errors import DeltaError, ModelError, PlanError
from .saved_model import ModelInMemory, SavedModel, compared
from .types import NodeKind, Role
from .values import ByValue
from .weights import flat_name, is_flat, parameter_of, shape_of, weight_of

if TYPE_CHECKING:
    import torch

    from .circuit.graph import Graph
    from .model.anatomy import Anatomy

FORMAT = 1
_ROLES = (Role.FORGET, Role.CONFLICT)


@dataclass(frozen=True, eq=False)
class Slice(ByValue):
    """The rows or columns of one weight that share a role, or single weights of it.

    Attributes:
        parameter: name in ``model.state_dict()``, or of one matrix of a stack there; with ``[:]`` at its end it means the
            weight as one row of numbers, so that a slice is a single weight (see :mod:`clue.weights`).
        axis: 0 when ``index`` names rows (entries, for a bias; weights, where the name ends in ``[:]``), 1 when it names
            columns.
        role: ``FORGET`` or ``CONFLICT``.
        index: int64 [k], sorted and unique.
    """

    parameter: str
    axis: int
    role: Role
    index: npt.NDArray[np.int64]

    def weights(self, shape: Sequence[int]) -> int:
        """How many scalar weights this slice covers in a parameter of that shape."""
        other = int(np.prod(shape)) // int(shape[self.axis]) if len(shape) else 0
        return len(self.index) * other


@dataclass(frozen=True, eq=False)
class Plan(ByValue):
    """Which nodes play which role, and which weights therefore move.

    Attributes:
        nodes: names of the nodes, in graph order.
        role: uint8 [nodes], values of :class:`clue.types.Role`.
        slices: at most one per parameter and role; a parameter's slices share their axis and are disjoint.
        shapes: shape of every parameter that has a slice.
        provenance: model fingerprint, data hashes, settings, versions; nothing that differs between two equal runs.
    """

    nodes: tuple[str, ...]
    role: npt.NDArray[np.uint8]
    slices: tuple[Slice, ...]
    shapes: Mapping[str, tuple[int, ...]]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.nodes) != len(self.role):
            raise PlanError(f"a plan needs one role per node, got {len(self.nodes)} nodes and {len(self.role)} roles")
        if self.role.dtype != np.uint8 or self.role.max(initial=0) > max(Role):
            raise PlanError(f"a plan's roles must be uint8, values of clue.Role (at most {max(Role):d}), got {self.role.dtype}"
                            f" up to {self.role.max(initial=0)}")
        seen: dict[str, Slice] = {}
        for s in self.slices:
            if s.role not in _ROLES:
                raise PlanError(f"plan slice of {s.parameter} ({s.role!r}): only forget and conflict weights may move")
            where = f"plan slice of {s.parameter} ({Role(s.role).name.lower()})"
            shape = self.shapes.get(s.parameter)
            if shape is None or not 0 <= s.axis < len(shape):
                raise PlanError(f"{where}: the plan does not say its shape, or axis {s.axis} is not one of it")
            if not isinstance(s.index, np.ndarray) or s.index.dtype != np.int64:
                kind = s.index.dtype if isinstance(s.index, np.ndarray) else type(s.index).__name__
                raise PlanError(f"{where}: the index must be an int64 array, got {kind}: np.asarray(index, dtype=np.int64)")
            if s.index.ndim != 1 or len(s.index) == 0 or np.any(np.diff(s.index) <= 0):
                raise PlanError(f"{where}: the index must be sorted, unique and not empty")
            if s.index[0] < 0 or s.index[-1] >= shape[s.axis]:
                off = int(s.index[0] if s.index[0] < 0 else s.index[-1])
                raise PlanError(f"{where}: index {off} is outside 0..{shape[s.axis] - 1}")
            other = seen.get(s.parameter)
            if other is not None and (other.axis != s.axis or other.role == s.role):
                raise PlanError(f"{where}: one slice per role and one axis per parameter, found two")
            if other is not None and len(np.intersect1d(other.index, s.index)):
                raise PlanError(f"{where}: {len(np.intersect1d(other.index, s.index))} of its slices are forget and"
                                " conflict at once")
            seen[s.parameter] = s
        for name in seen:
            for whole in (parameter_of(name), flat_name(parameter_of(name)), weight_of(name)):
                if whole != name and whole in seen:
                    raise PlanError(f"the plan names both {whole} and {name}, which is a part of it")

    def __repr__(self) -> str:
        roles = ", ".join(f"{count} {role}" for role, count in self.counts().items())
        return (f"<Plan: {self.weights_changed} weights of {len(set(map(parameter_of, self.parameters())))} parameters;"
                f" {len(self.nodes)} nodes, {roles}>")

    def counts(self) -> dict[str, int]:
        """Number of nodes per role."""
        return {role.name.lower(): int(np.count_nonzero(self.role == role))
                for role in (Role.FORGET, Role.CONFLICT, Role.RETAIN, Role.FREE)}

    @property
    def weights_changed(self) -> int:
        """Number of scalar weights that may change."""
        return sum(s.weights(self.shapes[s.parameter]) for s in self.slices)

    def parameters(self) -> list[str]:
        """Names of the parameters that have at least one planned weight, in plan order."""
        return list(dict.fromkeys(s.parameter for s in self.slices))

    def of_role(self, role: Role) -> Iterator[Slice]:
        """The slices of one role."""
        return (s for s in self.slices if s.role == role)

    def check(self, model: torch.nn.Module) -> None:
        """Raise :class:`PlanError` unless every planned parameter is in the model with the planned shape."""
        if hasattr(model, "_orig_mod"):
            raise PlanError("the model is one of torch.compile, which names every weight anew: give the model inside,"
                            " model._orig_mod")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in self.parameters():
            shape = shape_of(parameters, name)
            if shape is None and shape_of(parameters, f"module.{name}") is not None:
                raise PlanError(f"the model is wrapped ({type(model).__name__}), which names every weight anew: give the model"
                                " inside, model.module")
            if shape is None:
                raise PlanError(f"the plan edits {name}, which this model does not have: it was made for another model")
            if shape != tuple(self.shapes[name]):
                raise PlanError(f"the plan edits {name} of shape {tuple(self.shapes[name])}, this model's is {shape}:"
                                " it was made for another model")
            if is_flat(name) and not parameters[parameter_of(name)].is_contiguous():
                raise PlanError(f"the plan edits single weights of {weight_of(name)}, which does not lie in memory row by"
                                " row: copy it with .contiguous() first")

    def verify(self, before: Model, after: Model) -> Verification:
        """:func:`verify` of two models against this plan."""
        return verify(before, after, self)

    def mask(self, parameter: str, roles: Sequence[Role] = _ROLES) -> npt.NDArray[np.bool_]:
        """Boolean mask of the planned name's shape: true where a weight of one of these roles may change."""
        shape = self.shapes[parameter]
        mask = np.zeros(shape, dtype=bool)
        for s in self.slices:
            if s.parameter == parameter and s.role in roles:
                mask[(slice(None),) * s.axis + (s.index,)] = True
        return mask

    @classmethod
    def of_roles(cls, body: Anatomy, graph: Graph, role: npt.NDArray[np.uint8], provenance: Mapping[str, Any]) -> Plan:
        """Map forget and conflict nodes to the slices of the weights they own.

        Args:
            graph: of this model.
            role: uint8 [nodes], values of :class:`clue.types.Role`.

        Raises:
            ModelError: a planned weight is tied to another one.
        """
        found: dict[tuple[str, Role], list[npt.NDArray[np.int64]]] = {}
        axes: dict[str, int] = {}
        for node in np.flatnonzero((role == Role.FORGET) | (role == Role.CONFLICT)):
            kind = NodeKind(graph.kind[node])
            for parameter, axis, index in body.slices(kind, int(graph.layer[node]), int(graph.index[node])):
                axes[parameter] = axis
                found.setdefault((parameter, Role(role[node])), []).append(index)
        slices = tuple(Slice(parameter, axes[parameter], chosen, np.unique(np.concatenate(index)))
                       for (parameter, chosen), index in sorted(found.items(), key=lambda item: item[0]))
        parameters = dict(body.model.named_parameters())
        shapes = {name: shape for name in sorted(axes) if (shape := shape_of(parameters, name)) is not None}
        tied = [s.parameter for s in slices if s.parameter not in shapes]
        if tied:
            raise ModelError(f"{tied[0]} shares its storage with another weight of this model: untie them before"
                             " localizing")
        return cls(graph.names, role, slices, shapes, dict(provenance))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``plan.json`` and ``plan.safetensors`` into a folder; where that fails, a plan that was there stays.

        Raises:
            PlanError: the provenance holds what JSON cannot say.
        """
        from safetensors.numpy import save

        folder = Path(folder)
        arrays = {"role": np.ascontiguousarray(self.role, dtype=np.uint8)}
        for i, s in enumerate(self.slices):
            # Single weights may be a fifth of a model: one bit for each in the file, not eight bytes for each chosen.
            arrays[f"slice.{i}"] = (np.packbits(self.mask(s.parameter, (s.role,))) if is_flat(s.parameter) else
                                    np.ascontiguousarray(s.index, dtype=np.int64))
        document = {
            "format": FORMAT,
            "counts": self.counts(),
            "weights_changed": self.weights_changed,
            "slices": [{"parameter": s.parameter, "axis": s.axis, "role": s.role.name.lower(), "count": len(s.index)}
                       for s in self.slices],
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "provenance": dict(self.provenance),
            "nodes": list(self.nodes),
        }
        try:
            text = json.dumps(document, indent=1, sort_keys=True, default=_plain) + "\n"
        except (TypeError, ValueError) as error:
            raise PlanError(f"the plan's provenance cannot be written ({error}): give it numbers, texts, lists and dicts of"
                            " them") from None
        folder.mkdir(parents=True, exist_ok=True)
        # Both are written before either gets its name.
        with replacing(folder / "plan.safetensors") as binary, replacing(folder / "plan.json") as readable:
            binary.write_bytes(save(arrays))
            readable.write_text(text)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Plan:
        """Read a plan from the folder that holds it, or from a run directory (its ``plan`` stage)."""
        from safetensors.numpy import load_file

        folder = Path(folder)
        if not (folder / "plan.json").exists() and (folder / "plan" / "plan.json").exists():
            folder = folder / "plan"
        try:
            document = json.loads((folder / "plan.json").read_text())
            arrays = load_file(folder / "plan.safetensors")
        except FileNotFoundError as error:
            raise PlanError(f"{folder} holds no plan ({Path(error.filename or folder).name} is missing):"
                            " make one with `clue localize`") from None
        except Exception as error:
            raise PlanError(f"the plan in {folder} is damaged ({error}): make it again with `clue localize`") from None
        try:
            if document["format"] != FORMAT:
                raise PlanError(f"the plan in {folder} has format {document['format']}, this version reads {FORMAT}")
            shapes = {name: tuple(shape) for name, shape in document["shapes"].items()}
            for name, shape in shapes.items():
                if not all(type(size) is int and 0 < size < 2**48 for size in shape):
                    raise ValueError(f"{name} cannot have the shape {shape}")
            for i, s in enumerate(document["slices"]):
                if is_flat(s["parameter"]):
                    bits = np.unpackbits(arrays[f"slice.{i}"], count=shapes[s["parameter"]][0])
                    arrays[f"slice.{i}"] = np.flatnonzero(bits).astype(np.int64)
            slices = tuple(Slice(s["parameter"], int(s["axis"]), Role[s["role"].upper()], arrays[f"slice.{i}"])
                           for i, s in enumerate(document["slices"]))
            return cls(tuple(document["nodes"]), arrays["role"], slices, shapes, document["provenance"])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise PlanError(f"the plan in {folder} is damaged ({error!r}): make it again with `clue localize`") from None


def _plain(value: Any) -> Any:
    """A number of NumPy's as one that JSON knows."""
    if isinstance(value, np.number | np.bool_):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no type of JSON's")


def require_plan(given: Any) -> Plan:
    """What was given, if it is a plan; :class:`PlanError` otherwise."""
    if not isinstance(given, Plan):
        raise PlanError(f"plan is a {type(given).__name__}: give a Plan, from clue.localize or Plan.load")
    return given


@dataclass(frozen=True)
class Verification:
    """What a bit-by-bit comparison of two models found.

    Attributes:
        planned: scalar weights the plan names; ``changed`` of them differ.
        outside: (parameter, count) of weights that differ although no plan names them; every expert counts as a
            parameter of its own.
    """

    planned: int
    changed: int
    outside: tuple[tuple[str, int], ...]

    @property
    def ok(self) -> bool:
        """True when nothing outside the plan changed."""
        return not self.outside

    def __str__(self) -> str:
        if self.ok:
            return f"exact: {self.changed} of {self.planned} planned weights changed, and not a bit of any other"
        total = sum(count for _, count in self.outside)
        worst = ", ".join(f"{name} ({count})" for name, count in self.outside[:3])
        more = f" and {len(self.outside) - 3} more" if len(self.outside) > 3 else ""
        return f"NOT exact: {total} weights outside the plan changed, in {worst}{more}"


#: A folder with a saved model, or a model in memory.
Model: TypeAlias = "str | os.PathLike[str] | torch.nn.Module"


def verify(before: Model, after: Model, plan: Plan) -> Verification:
    """Compare two models, saved ones (folders of safetensors files) or such in memory, bit by bit against a plan.

    Tensors are compared as raw bytes, so NaNs, signed zeros and every dtype count as what they are. Of a model in memory they
    are its parameters, and of a folder that is compared with it the same: give ``copy.deepcopy(model)`` from before as
    ``before``.

    Raises:
        PlanError: a folder holds no safetensors weights, a model in memory is sharded over processes, or the two models do
            not have the same tensors.
    """
    (before, old), (after, new) = _open(before, "the model before"), _open(after, "the model after")
    names, lacking = compared(old, new)
    if lacking:
        raise PlanError(f"{before} and {after} do not hold the same tensors (for example {lacking[0]}):"
                        " they are not two versions of one model")
    planned = {weight_of(name): name for name in plan.parameters()}
    missing = [name for name in planned if name not in names]
    if missing:
        raise PlanError(f"the plan edits {missing[0]}, which {before} does not hold: it was made for another model")
    changed = 0
    outside: list[tuple[str, int]] = []
    for name in sorted(names):
        a, b = old.bits(name), new.bits(name)
        if a.shape != b.shape:
            raise PlanError(f"{name} has shape {a.shape} in {before} and {b.shape} in {after}: they are not two versions of one"
                            " model")
        if old.dtype(name) != new.dtype(name):
            raise PlanError(f"{name} is {old.dtype(name)} in {before} and {new.dtype(name)} in {after}, so their bits cannot be"
                            " compared: save the original in the dtype that was trained in, and compare with that")
        differs = a != b
        if name in planned:
            mask = plan.mask(planned[name])
            differs = differs.reshape(-1) if is_flat(planned[name]) else differs
            if mask.shape != differs.shape:
                raise PlanError(f"{name} has shape {differs.shape} in {before}, the plan says {mask.shape}")
            changed += int(np.count_nonzero(differs & mask))
            differs &= ~mask
        if count := int(np.count_nonzero(differs)):
            outside.append((name, count))
    return Verification(plan.weights_changed, changed, tuple(outside))


def _open(model: Model, name: str) -> tuple[str, SavedModel | ModelInMemory]:
    """What errors call it, and its weights."""
    try:
        if not isinstance(model, str | os.PathLike):
            return name, ModelInMemory(model)
        return os.fspath(model), SavedModel(model)
    except DeltaError as error:
        raise PlanError(str(error)) from None
