"""MaskedAdamW: AdamW on the planned slices of a model's weights, with state for these slices only.

The arithmetic is one native call per parameter (``clue._core.masked_adamw``, or ``clue._cuda`` for CUDA tensors), which
neither reads nor writes anything outside the slices: weight decay and momentum included.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..errors import ClueError, PlanError
from ..plan import Plan, require_plan
from ..types import Role
from ..weights import parameter_of
from .shards import Shard, add_up, local_part, memory_of, reshard, shard_of


def planned_parameters(model: nn.Module, plan: Plan, roles: Sequence[Role]) -> dict[str, nn.Parameter]:
    """The parameters with at least one slice of these roles, by planned name, in plan order.

    Names of parts of one parameter (see :mod:`clue.weights`) all lead to it.

    Raises:
        PlanError: the plan does not fit the model, or edits a tensor that the model uses under two names (tied
            embeddings) or in two parameters over one memory, where a planned slice would also change its other use.
        ClueError: ``roles`` are not roles.
    """
    if not isinstance(roles, Iterable) or not all(isinstance(role, Role) for role in roles):
        raise ClueError(f"roles = {roles!r} must be members of clue.Role: give (Role.FORGET,), (Role.CONFLICT,) or both")
    reshard(model)  # a name means the shard, not what a forward pass has gathered for a while
    require_plan(plan).check(model)
    found: dict[str, nn.Parameter] = {}
    names: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    for name in dict.fromkeys(s.parameter for s in plan.slices if s.role in roles):
        whole = parameter_of(name)
        twins = [other for other in names[id(parameters[whole])] if other != whole]
        if twins:
            raise PlanError(f"the plan edits {name}, which is tied to {twins[0]}: leave tied weights out of the plan")
        found[name] = parameters[whole]
    _check_memory(model, {parameter_of(name) for name in found})
    return found


def _check_memory(model: nn.Module, planned: Set[str]) -> None:
    """Refuse planned parameters that lie over another tensor of the model, as after ``b.weight = nn.Parameter(a.weight)``.
    Side by side in one storage they may lie, as those of a flattened model do."""
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    places = [(*place, name) for name, tensor in tensors.items() if (place := memory_of(tensor)) is not None]
    reaching = None  # of the tensors that begin earlier, the one that ends last: what overlaps any of them overlaps it
    for device, first, past, name in sorted(places, key=lambda place: (str(place[0]), place[1])):
        if reaching is not None and reaching[0] == device and first < reaching[1]:
            for one, other in ((name, reaching[2]), (reaching[2], name)):
                if one in planned:
                    raise PlanError(f"the plan edits {one}, which is tied to {other} (they lie in the same memory): leave tied"
                                    " weights out of the plan")
        if reaching is None or reaching[0] != device or past > reaching[1]:
            reaching = device, past, name


def planned_index(plan: Plan, name: str, roles: Sequence[Role]) -> tuple[int, npt.NDArray[np.int64]]:
    """The axis of a parameter's slices, and the sorted union of those of these roles, int64 [k]."""
    slices = [s for s in plan.slices if s.parameter == name and s.role in roles]
    return slices[0].axis, np.sort(np.concatenate([s.index for s in slices]))


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101, as ``torch.optim.AdamW``) restricted to the slices a plan names.

    Making one sets ``requires_grad`` on the planned parameters and clears it on every other parameter of the model, those of
    an earlier optimizer among them, which then refuses to step: one optimizer moves all roles.
    ``step`` reads ``parameter.grad`` on the slices, or takes the gradients of the slices alone
    (:class:`clue.unlearn.sparse.SparseGradients` computes no others). At small learning rates bf16 and fp16 weights
    rounded to nearest lose most updates, so their slices get a float32 master copy, which follows a model that is loaded again
    between two steps (what is written through ``parameter.data`` it does not see). Without it, at two thirds of the state,
    bf16 weights move by stochastic rounding (arXiv 1502.02551): up or down at random, right on average. The random numbers
    depend on the seed, the parameter, the step and the weight's place alone (of a sharded parameter: its place in the shard,
    and the shard's), so runs repeat and resume bit by bit.

    Make it before DistributedDataParallel wraps the model, which looks once at what requires a gradient. Of parameters sharded
    by ``fully_shard`` every process moves its part, and holds state for the planned slices in it only: make the optimizer after
    sharding, and save the state of each process.

    Args:
        model: the model whose weights move.
        plan: which of them.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``; decay touches planned weights only.
        roles: which of the plan's roles move.
        rounding: of bf16 weights, ``nearest`` (from a float32 master) or ``stochastic`` (without one).
        seed: of stochastic rounding.

    Raises:
        PlanError: the plan does not fit the model, edits tied weights, or names no weight of these roles.
        ClueError: a number out of range, roles that are none, or stochastic rounding of fp16 weights.
    """

    def __init__(self, model: nn.Module, plan: Plan, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0,
                 roles: Sequence[Role] = (Role.FORGET, Role.CONFLICT), rounding: str = "nearest", seed: int = 0) -> None:
        if not lr >= 0 or not eps >= 0 or not weight_decay >= 0 or not all(0 <= b < 1 for b in betas):
            raise ClueError(f"lr = {lr}, eps = {eps} and weight_decay = {weight_decay} must not be negative, and"
                            f" betas = {tuple(betas)} must lie in [0, 1)")
        if rounding not in ("nearest", "stochastic"):
            raise ClueError(f"rounding = {rounding!r} must be nearest or stochastic")
        planned = planned_parameters(model, plan, roles)
        if not planned:
            wanted = " or ".join(role.name.lower() for role in roles)
            raise PlanError(f"the plan names no {wanted} weight, so there is nothing to train: make a plan with larger"
                            " circuits")
        model.requires_grad_(False)
        #: parameter -> for it, or each planned part of it, what this process holds of its planned slices (the sorted
        #: union of all roles', on the parameter's device)
        self._planned: dict[nn.Parameter, list[Shard]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}  # of compact gradients
        self._model = weakref.ref(model)
        self._made: dict[nn.Parameter, tuple[str, torch.dtype, torch.device]] = {}  # its name, and as what it was met
        self._versions: dict[nn.Parameter, tuple[int, int]] = {}  # as the latest step, or loading a state, met it
        for name, parameter in planned.items():
            axis, union = planned_index(plan, name, roles)
            if rounding == "stochastic" and parameter.dtype == torch.float16:
                raise ClueError(f"{name} is in float16, and stochastic rounding is for bfloat16: convert the model, or"
                                " say rounding = nearest")
            parameter.requires_grad_(True)
            self._made[parameter] = parameter_of(name), parameter.dtype, parameter.device
            shard = shard_of(parameter, name, axis, torch.from_numpy(union).to(parameter.device))
            self._planned.setdefault(parameter, []).append(shard)
            self._shapes[name] = (len(union), *(n for i, n in enumerate(plan.shapes[name]) if i != axis))
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "rounding": rounding,
                    "seed": seed}
        super().__init__([{"params": list(self._planned), "planned": self._axes()}], defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer is made: its weights are those of its plan."""
        if self.param_groups:
            raise ClueError("add_param_group: MaskedAdamW moves its plan's weights alone: give other parameters to another"
                            " optimizer")
        super().add_param_group(param_group)

    def _axes(self) -> list[list[Any]]:
        """Name and axis of all planned weights, as a state says them."""
        return [[shard.name, shard.axis] for shards in self._planned.values() for shard in shards]

    def __getstate__(self) -> dict[str, Any]:
        """Refused: a copy would move the weights of this optimizer's model, or none."""
        raise ClueError("a MaskedAdamW cannot be copied or pickled: keep its state_dict(), make another for the other model,"
                        " and load it there")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of these, older states have some or none
            group.setdefault("rounding", "nearest")
            group.setdefault("seed", 0)
            group["planned"] = self._axes()

    def gradients(self) -> list[Tensor]:
        """The planned slices of every gradient there is: copies, [k, columns] for rows and [rows, k] for columns; of
        sharded parameters what this process holds of them."""
        return [slices for slices, _ in self._gradients()]

    def _gradients(self) -> list[tuple[Tensor, Tensor]]:
        """The planned slices of every gradient, and the gradient."""
        return [(shard.here(p.grad).index_select(shard.axis, shard.index) if len(shard.index) else
                 torch.zeros(0, device=shard.index.device), p.grad)
                for p, shards in self._planned.items() for shard in shards if p.grad is not None]

    def grad_norm(self, gradients: Mapping[str, Tensor] | None = None) -> float:
        """Global 2-norm of the gradient over the planned slices, accumulated in float64.

        ``gradients`` as for :meth:`step`; ``parameter.grad`` when None, in which case all processes that share sharded
        parameters must ask, and get the norm over all of them.
        """
        if gradients is None:
            squares = [(torch.linalg.vector_norm(slices, dtype=torch.float64).square(), gradient)
                       for slices, gradient in self._gradients()]
            return add_up(squares, next(iter(self._planned)).device) ** 0.5
        whole = [torch.linalg.vector_norm(gradient, dtype=torch.float64).square() for gradient in gradients.values()]
        return float(torch.stack(whole).sum().sqrt()) if whole else 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: float = 1.0,
             gradients: Mapping[str, Tensor] | None = None) -> Any:
        """One update of the planned slices; parameters without a gradient are left alone.

        Args:
            closure: re-evaluates the model and returns the loss.
            grad_scale: every gradient is multiplied by this first (for clipping, without a pass over the gradients).
            gradients: by parameter name the gradient of its planned slices alone, slices first: [k, length] for rows
                and columns alike, in the order of their sorted index, or [k]. ``parameter.grad`` is not looked at then.
                Of sharded parameters too it is the gradient of all slices, the same on every process.

        Raises:
            ClueError: a gradient belongs to a parameter that the plan does not name, or has another shape; the model was
                moved or converted after the optimizer was made, or a planned parameter without a gradient no longer requires
                one.
        """
        self._check_model()
        compact = self._checked(gradients)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if compact is None:
            self._check_trained()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                self._take_over(parameter)
                for shard in self._planned[parameter]:
                    if len(shard.index) == 0:  # they are in other processes
                        continue
                    if compact is not None:
                        grad = compact.get(shard.name)
                        grad = None if grad is None else shard.of_compact(grad)
                    else:
                        grad = None if parameter.grad is None else shard.here(parameter.grad)
                    if grad is None:
                        continue
                    weight, state = shard.here(parameter.detach()), self._state_of(parameter, shard.name)
                    if not state:
                        self._begin(weight, shard.axis, shard.index, state, group["rounding"])
                    state["step"] += 1
                    random = _random(weight.dtype, group["rounding"])
                    if grad.stride(-1) != 1:
                        grad = grad.contiguous()
                    if compact is not None and shard.axis == 1:
                        grad = grad.T
                    _kernel(parameter.device)(
                        weight, grad, state["exp_avg"], state["exp_avg_sq"], shard.index, shard.axis,
                        lr=float(group["lr"]), beta1=beta1, beta2=beta2, eps=group["eps"],
                        weight_decay=group["weight_decay"], step=int(state["step"]), grad_scale=grad_scale,
                        master=state.get("master"),
                        rounding_key=_rounding_key(group["seed"], shard.key, state["step"]) if random else None)
        return loss

    def _check_model(self) -> None:
        """Refuse to move weights that the model no longer uses, or that became others since the optimizer met them."""
        model = self._model()

        def moved(parameter: nn.Parameter, name: str) -> bool:
            path, _, own = name.rpartition(".")
            return model is not None and getattr(model.get_submodule(path), own) is not parameter

        if model is not None and any(moved(parameter, name) for parameter, (name, _, _) in self._made.items()):
            reshard(model)  # a forward pass may have gathered them
        for parameter, (name, dtype, device) in self._made.items():
            if moved(parameter, name):
                raise ClueError(f"{name} is no longer the tensor that this optimizer was made with: make the optimizer after"
                                " the model is moved, converted or sharded")
            if (parameter.dtype, parameter.device) != (dtype, device):
                raise ClueError(f"{name} was {_kind(dtype, device)} when the optimizer was made and now is"
                                f" {_kind(parameter.dtype, parameter.device)}: make the optimizer after moving or converting"
                                " the model")

    def _check_trained(self) -> None:
        """Refuse to leave weights as they are because someone froze them."""
        for parameter, (name, _, _) in self._made.items():
            if parameter.grad is None and not parameter.requires_grad:
                raise ClueError(f"{name} does not require a gradient any more, so this optimizer would leave it as it is:"
                                " another MaskedAdamW was made for the model (make one for all roles), or requires_grad was"
                                " cleared (set it again)")

    def _take_over(self, parameter: nn.Parameter) -> None:
        """Masters of weights that somebody else wrote since the latest step (``load_state_dict``, a delta) begin anew there,
        unless they still round to them. What the kernel writes does not count as a version of the memory."""
        version = _version(parameter)
        if self._versions.setdefault(parameter, version) == version:
            return
        self._versions[parameter] = version
        for shard in self._planned[parameter]:
            master = self._known_of(parameter, shard.name).get("master")
            if master is not None:
                weight = _slices(shard.here(parameter.detach()), shard.axis, shard.index)
                if not torch.equal(master.to(weight.dtype), weight):
                    master.copy_(weight)

    def _state_of(self, parameter: Tensor, name: str) -> dict[str, Any]:
        """The state of a parameter, or of one part of it."""
        state: dict[str, Any] = self.state[parameter]
        return state if parameter_of(name) == name else state.setdefault(name, {})  # type: ignore[no-any-return]

    def _known_of(self, parameter: Tensor, name: str) -> dict[str, Any]:
        """:meth:`_state_of`, which begins none."""
        state: dict[str, Any] = self.state.get(parameter, {})
        return state if parameter_of(name) == name else state.get(name, {})

    def slices(self) -> dict[str, dict[str, Tensor]]:
        """The state by planned name, tensors alone: those of ``state_dict``, the number of steps as one too."""
        found = {}
        for parameter, parts in self._planned.items():
            for shard in parts:
                if state := self._known_of(parameter, shard.name):
                    found[shard.name] = {key: torch.tensor(value) if key == "step" else value for key, value in state.items()}
        return found

    def restore_slices(self, slices: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from what :meth:`slices` said of an optimizer made with the same plan and roles.

        Raises:
            PlanError: the state belongs to other slices.
        """
        rounding = self.param_groups[0]["rounding"]
        for parameter, parts in self._planned.items():
            for shard in parts:
                if shard.name in slices:
                    state = self._state_of(parameter, shard.name)
                    state.update(self._continued(parameter, shard, slices[shard.name], rounding))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved ``state_dict`` of an optimizer made with the same plan and roles.

        The model may be in another dtype than the one it was saved with: masters are made where there are none, and
        dropped where none are needed.

        Raises:
            PlanError: the saved state belongs to other slices.
        """
        (own,), groups, saved = self.param_groups, state_dict["param_groups"], state_dict["state"]
        if [len(group["params"]) for group in groups] != [len(own["params"])] \
                or groups[0].get("planned", own["planned"]) != own["planned"]:
            raise PlanError("the saved optimizer state belongs to other slices: resume with the plan and the roles it was saved"
                            " with")
        rounding, states = groups[0].get("rounding", "nearest"), {}
        # What a state calls its parameters is told by its group: numbers, or names (torch.distributed.checkpoint).
        for key, parameter in zip(groups[0]["params"], own["params"], strict=True):
            shards = {shard.name: shard for shard in self._planned[parameter]}
            found = saved.get(key, {})
            if "exp_avg" in found:  # of the parameter itself
                found = {self._made[parameter][0]: found}
            if not all(isinstance(part, dict) and {"step", "index", "exp_avg", "exp_avg_sq"} <= part.keys()
                       for part in found.values()):
                raise PlanError("the saved optimizer state is not one of MaskedAdamW: resume with the optimizer that it was"
                                " saved by")
            for name, part in found.items():
                if name not in shards:
                    raise _foreign(name)
                states[parameter, name] = self._continued(parameter, shards[name], part, rounding)
        # torch would cast every tensor of a state to the parameter's dtype, which rounds the float32 moments and masters of
        # bf16 weights and turns the index into floats.
        super().load_state_dict({**state_dict, "state": {}})
        for (parameter, name), state in states.items():
            self._state_of(parameter, name).update(state)

    def _continued(self, parameter: nn.Parameter, shard: Shard, saved: Mapping[str, Any], rounding: str) -> dict[str, Any]:
        """A saved state of planned slices, as this optimizer holds it: of a new one's keys, shapes and dtypes.

        Raises:
            PlanError: the state belongs to other slices.
        """
        if not torch.equal(saved["index"].to(shard.index), shard.index):
            raise _foreign(shard.name)
        state: dict[str, Any] = {}
        self._begin(shard.here(parameter.detach()), shard.axis, shard.index, state, rounding)
        self._versions[parameter] = _version(parameter)
        state["step"] = int(saved["step"])
        for key in ("exp_avg", "exp_avg_sq", "master"):
            if key in state and key in saved:
                if saved[key].shape != state[key].shape:
                    raise _foreign(shard.name)
                state[key] = saved[key].detach().to(state[key], copy=True)
        return state

    def _checked(self, gradients: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
        """The gradients as they were given, if every one is of a planned parameter and has its slices' shape."""
        if gradients is None:
            return None
        for name, gradient in gradients.items():
            if name not in self._shapes:
                raise ClueError(f"gradients: {name} is not a parameter that this optimizer moves: give planned ones"
                                " only")
            if tuple(gradient.shape) != self._shapes[name]:
                raise ClueError(f"gradients: {name} must have shape {self._shapes[name]}, one row for each planned slice,"
                                f" got {tuple(gradient.shape)}")
        return gradients

    @staticmethod
    def _begin(weight: Tensor, axis: int, index: Tensor, state: dict[str, Any], rounding: str) -> None:
        slices = _slices(weight, axis, index)
        half = weight.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.float32 if half else weight.dtype
        state["step"] = 0
        state["index"] = index
        state["exp_avg"] = torch.zeros_like(slices, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(slices, dtype=dtype)
        if half and not _random(weight.dtype, rounding):
            state["master"] = slices.float()


def _slices(weight: Tensor, axis: int, index: Tensor) -> Tensor:
    """A copy of planned slices as a state has them: columns transposed, so that the state of one column is contiguous."""
    slices = weight.index_select(axis, index)
    return slices.T.contiguous() if axis == 1 else slices


def _version(parameter: Tensor) -> tuple[int, int]:
    """Another one after every operation of torch that writes to the parameter: a sharded one, or the part that is here."""
    return parameter._version, local_part(parameter)._version


def _random(dtype: torch.dtype, rounding: str) -> bool:
    """Whether weights of that dtype are rounded up or down at random."""
    return rounding == "stochastic" and dtype == torch.bfloat16


def _foreign(name: str) -> PlanError:
    return PlanError(f"the saved optimizer state of {name} belongs to other slices: resume with the plan it was saved with")


def _kind(dtype: torch.dtype, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} on {device}"


def _rounding_key(seed: int, name: str, step: int) -> int:
    """A number of its own, 64 bits, for every seed, parameter and step."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {name}".encode(), digest_size=8).digest(), "little")


def _kernel(device: torch.device) -> Callable[..., None]:
    if device.type == "cpu":
        from .. import _core

        kernel: Callable[..., None] = _core.masked_adamw
        return kernel
    if device.type != "cuda":
        raise ClueError(f"MaskedAdamW runs on cpu and cuda, the model is on {device.type}: move it to the CPU")
    try:
        from .. import _cuda
    except ImportError:
        raise ClueError("this CLUE was built without CUDA: move the model to the CPU, or build where nvcc is found"
                        ) from None
    kernel = _cuda.masked_adamw
    return kernel
