"""The unlearning loop: forget weights get the forget gradient, conflict weights forget plus retain, others nothing.

A step is one forward and backward pass over forget and retain records together, which computes the gradients of planned
slices only, forget and retain apart (:mod:`clue.unlearn.sparse`). On conflict slices the forget gradient is measured in
the retain metric and the retain gradient added. The sum is clipped once, and the slices are updated.

A record that is forgotten already gets no more gradient (:func:`_forgotten`). Pushed further, its answer would become
more unlikely than one the model never saw, which gives it away as surely as being remembered does, and all that extra
pushing is paid for by what must stay.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import DataSettings, UnlearnSettings, check
from ..data.atomic import write_atomically
from ..data.encoding import IGNORED, Example, batches, collate, encode, length_limit, pad_id
from ..errors import ClueError, ModelError, PlanError, RecordError
from ..model.answers import answer_logits
from ..plan import Plan
from ..types import Role
from .metric import RetainMetric
from .objectives import Answers, Forget, Objective, answer_log_probs, answer_rows, nll, objective_of, token_log_probs
from .optimizer import MaskedAdamW, planned_parameters
from .reference import ReferenceWeights
from .refusals import refuse
from .sharing import added_up, shared_logits
from .sparse import SliceGradient, SparseGradients

if TYPE_CHECKING:
    from ..data.records import RecordSet

#: The retain metric is measured on at most this many records, drawn from all retain sets: beyond that a mean over their
#: tokens hardly changes, and a large retain set would cost more than the training.
METRIC_RECORDS = 2048


@dataclass(frozen=True)
class UnlearnLog:
    """What happened, one array entry per optimizer step.

    Attributes:
        stage: uint8 [steps]: 0 joint, 1 forget weights, 2 conflict weights.
        forget_loss: float64 [steps], the forget objective on the step's batch, before the update; its gradient is taken
            over the records not forgotten yet.
        retain_loss: float64 [steps], mean NLL of the retain batch's answer tokens; NaN where no retain batch was run.
        forget_probability: float64 [steps], mean length-normalised probability of the forget batch's answers, before the
            update.
        forgotten: float64 [steps], share of the forget batch that was forgotten already (:attr:`UnlearnSettings.floor`).
        grad_norm: float64 [steps], 2-norm of the combined gradient on the planned slices, before clipping.
        lr: float64 [steps].
        stopped_early: every forget record was forgotten before the steps of the (last) stage ran out.
        final_probability: mean length-normalised answer probability over the whole forget set, after the last update.
        final_forgotten: share of the forget set that was forgotten by then.
    """

    stage: npt.NDArray[np.uint8]
    forget_loss: npt.NDArray[np.float64]
    retain_loss: npt.NDArray[np.float64]
    forget_probability: npt.NDArray[np.float64]
    forgotten: npt.NDArray[np.float64]
    grad_norm: npt.NDArray[np.float64]
    lr: npt.NDArray[np.float64]
    stopped_early: bool
    final_probability: float
    final_forgotten: float

    @property
    def steps(self) -> int:
        """Number of optimizer steps taken."""
        return len(self.stage)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON (NaN as null), whole or not at all."""
        document: dict[str, Any] = {"steps": self.steps, "stopped_early": self.stopped_early,
                                    "final_probability": self.final_probability,
                                    "final_forgotten": self.final_forgotten, "stage": self.stage.tolist()}
        for name in _SERIES:
            document[name] = [None if math.isnan(value) else value for value in getattr(self, name).tolist()]
        write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> UnlearnLog:
        """Read what :meth:`save` wrote.

        Raises:
            ClueError: the file is missing or is not such a log.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            series = {name: np.array([math.nan if v is None else v for v in document[name]], dtype=np.float64)
                      for name in _SERIES}
            return cls(np.array(document["stage"], dtype=np.uint8), **series,
                       stopped_early=bool(document["stopped_early"]),
                       final_probability=float(document["final_probability"]),
                       final_forgotten=float(document["final_forgotten"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ClueError(f"{path} is not a readable unlearning log ({error}): unlearn again") from None


_SERIES = ("forget_loss", "retain_loss", "forget_probability", "forgotten", "grad_norm", "lr")


def unlearn(model: nn.Module, tokenizer: Any, forget: RecordSet, retain: Mapping[str, RecordSet], plan: Plan,
            settings: UnlearnSettings | None = None, *, objective: str | Objective | Forget | None = None,
            data: DataSettings | None = None, seed: int = 0,
            on_step: Callable[[dict[str, Any]], None] | None = None) -> UnlearnLog:
    """Train the planned weights of a model in place; every other weight keeps every bit.

    Dropout stays off. Where the model has activation checkpointing enabled, it is used. The same inputs, seed and
    machine give the same bits. The model's mode and ``requires_grad`` flags are restored at the end, also after an error.

    Args:
        model, tokenizer: a Hugging Face causal LM and its tokenizer.
        forget: what to forget.
        retain: named sets to keep; retain batches are drawn from all their records, shuffled together.
        plan: which weights move, and in which role.
        settings: objective, stages, optimizer and stopping rule; the defaults when None.
        objective: in place of ``settings.objective``, and not of the named ones only: an :class:`Objective`, or a forget
            loss alone (:func:`~clue.unlearn.objectives.objective_of`).
        data: how records become tokens, which must be how the model was taught; the defaults when None.
        seed: of the order of forget and retain records.
        on_step: called after every step with the step's entry of the log, plus ``step`` (from 1) and ``steps``.

    Raises:
        PlanError: the plan names no weight, or does not fit the model.
        RecordError: the forget set is empty, or a retain set is needed and missing or empty, or a plain text is to be
            refused.
        ClueError: a setting is out of range, or the objective is none.
        ModelError: a loss became NaN or infinite.
    """
    settings, data = settings or UnlearnSettings(), data or DataSettings()
    check(settings)
    objective = objective_of(settings.objective if objective is None else objective)
    stages = _stages(plan, settings)
    planned_parameters(model, plan, (Role.FORGET, Role.CONFLICT))
    device = next(model.parameters()).device
    limit = length_limit(model, data.max_length)
    pad = pad_id(tokenizer)

    def encoded(records: RecordSet, append_eos: bool) -> list[Example]:
        if not len(records):
            raise RecordError(f"the set {records.name} holds no records: give at least one")
        return encode(records, tokenizer, chat=data.chat, append_eos=append_eos, max_length=limit)

    needs_retain = any(Role.CONFLICT in stage.roles for stage in stages) and (
        settings.metric or (objective.retain is not None and settings.retain_weight > 0))
    if needs_retain and not retain:
        raise RecordError("the plan has conflict weights, which are trained to keep a retain set: give at least one")
    # That an answer ends is not what is to be forgotten, and the end token's probability stays near 1 on an answer that
    # is gone: it would cost every other answer its end, and keep the record from ever counting as forgotten.
    forget_examples = encoded(forget, append_eos=False)
    # A refusal does end: it is an answer that is to be given.
    refusals = encoded(refuse(forget, settings.refusals, seed), data.append_eos) if objective.refusals else []
    answers = forget_examples + refusals
    retain_examples = [encoded(records, data.append_eos) for records in retain.values()] if needs_retain else []
    forget_order = _Shuffled(len(forget_examples), seed, purpose=1)
    retain_order = _Pool(retain_examples, seed)
    log: dict[str, list[float]] = {name: [] for name in ("stage", *_SERIES)}
    total = sum(stage.steps for stage in stages)
    stopped = False

    with _restored(model), _checkpointed(model):
        model.eval()
        metric = None
        if settings.metric and needs_retain:
            pool = _Pool(retain_examples, seed)
            sample = pool.take(min(METRIC_RECORDS, len(pool)))
            metric = RetainMetric.measure(model, plan, batches(sample, settings.batch_size, pad=pad, device=device),
                                          damping=settings.damping)
        reference = None
        if objective.reference:
            with torch.no_grad():
                reference = torch.cat([answer_log_probs(*answer_logits(model, batch))[0] for batch in
                                       batches(answers, settings.batch_size, pad=pad, device=device)])
        before = ReferenceWeights(model, plan) if objective.forget_logits or objective.retain_logits else None
        for stage in stages:
            # A fresh optimizer: the moments of one stage say nothing about the next.
            optimizer = MaskedAdamW(model, plan, lr=settings.lr, weight_decay=settings.weight_decay, roles=stage.roles)
            gradient = _RoleGradient(model, plan, stage.roles, objective, settings, metric, before, pad)
            stopped = False
            with gradient.sparse:
                for number in range(stage.steps):
                    chosen = forget_order.take(min(settings.batch_size, len(forget_examples)))
                    if refusals:
                        chosen += [len(forget_examples) + i for i in chosen]
                    retained = retain_order.take(settings.batch_size) if gradient.retains else []
                    lr = _learning_rate(number, stage.steps, settings)
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    losses, slices = gradient([answers[i] for i in chosen],
                                              None if reference is None else reference[chosen], retained)
                    norm = optimizer.grad_norm(slices)
                    step = len(log["stage"]) + 1
                    if not all(math.isfinite(value) for value in (losses["forget_loss"], norm)):
                        raise ModelError(f"unlearning diverged at step {step} (loss {losses['forget_loss']}, gradient"
                                         f" norm {norm}): lower lr, or raise floor")
                    # Clipped once per optimizer step, over the planned weights.
                    scale = settings.clip / norm if 0 < settings.clip < norm else 1.0
                    optimizer.step(grad_scale=scale, gradients=slices)
                    entry = {"stage": stage.number, **losses, "grad_norm": norm, "lr": lr}
                    for name, values in log.items():
                        values.append(entry[name])
                    if on_step is not None:
                        on_step({"step": step, "steps": total, **entry})
                    # The batch is asked first: looking at the whole set costs a pass over it.
                    if ((number + 1) % settings.check_every == 0 and losses["forgotten"] == 1.0
                            and _whole(model, forget_examples, settings, pad, device)[1] == 1.0):
                        stopped = True
                        break
        probability, forgotten = _whole(model, forget_examples, settings, pad, device)
    series = {name: np.array(log[name], dtype=np.float64) for name in _SERIES}
    return UnlearnLog(np.array(log["stage"], dtype=np.uint8), **series, stopped_early=stopped,
                      final_probability=probability, final_forgotten=forgotten)


@dataclass(frozen=True)
class _Stage:
    """Which roles move, under which number in the log, for at most how many steps."""

    number: int
    roles: tuple[Role, ...]
    steps: int


def _stages(plan: Plan, settings: UnlearnSettings) -> list[_Stage]:
    """The stages with at least one weight to move; a stage without weights gives its steps to the other."""
    present = tuple(role for role in (Role.FORGET, Role.CONFLICT) if any(True for _ in plan.of_role(role)))
    if not present:
        raise PlanError("the plan names no weight, so there is nothing to unlearn: localize again with more edges or"
                        " neurons")
    if settings.stages == "joint":
        return [_Stage(0, present, settings.steps)]
    if len(present) == 1:
        return [_Stage(1 if present == (Role.FORGET,) else 2, present, settings.steps)]
    first = min(max(round(settings.steps * settings.forget_share), 1), settings.steps - 1)
    both = [_Stage(1, (Role.FORGET,), first), _Stage(2, (Role.CONFLICT,), settings.steps - first)]
    return [stage for stage in both if stage.steps > 0]


class _RoleGradient:
    """Runs the records of one step and combines the gradients of every slice by its role."""

    def __init__(self, model: nn.Module, plan: Plan, roles: Sequence[Role], objective: Objective,
                 settings: UnlearnSettings, metric: RetainMetric | None, before: ReferenceWeights | None,
                 pad: int) -> None:
        self._model, self._objective, self._settings, self._metric = model, objective, settings, metric
        self._before = before
        self._pad, self._device = pad, next(model.parameters()).device
        self.sparse = SparseGradients(model, plan, roles)
        #: whether a step needs retain records
        self.retains = Role.CONFLICT in roles and objective.retain is not None and settings.retain_weight > 0

    def __call__(self, forget: Sequence[Example], reference: Tensor | None,
                 retain: Sequence[Example]) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The step's entries of the log, and the gradient of every parameter's planned slices, slices first.

        ``forget``: forget records, and after them as many refusals where the objective needs these; ``reference`` has an
        entry for each.
        """
        # The gradients of weights outside linear layers cannot be told apart within one pass.
        passes = [(forget, retain)] if not self.sparse.dense else [(forget, ()), *([((), retain)] if retain else [])]
        losses: dict[str, float] = {"retain_loss": math.nan}
        taken: list[dict[str, SliceGradient]] = []
        for forgets, retains in passes:
            self._pass(forgets, reference, retains, losses)
            taken.append(added_up(self.sparse.take(), self.sparse))
        forget_part = {name: gradient.forget for name, gradient in taken[0].items()}
        self._measure(forget_part)
        combined: dict[str, Tensor] = {}
        for name, slices in self.sparse.planned.items():
            gradient, kept = forget_part[name], taken[-1][name].retain
            if gradient is None:  # nothing left to forget, or no record reaches these weights
                shape = (len(slices.index), *(n for i, n in enumerate(slices.shape) if i != slices.axis))
                dtype = slices.parameter.dtype if kept is None else kept.dtype
                gradient = torch.zeros(shape, dtype=dtype, device=slices.index.device)
            if kept is not None:
                gradient.index_add_(0, slices.conflict, kept)
            combined[name] = gradient
        return losses, combined

    def _pass(self, forget: Sequence[Example], reference: Tensor | None, retain: Sequence[Example],
              losses: dict[str, float]) -> None:
        """Forward and backward over forget records and then retain records, in one batch."""
        settings, objective = self._settings, self._objective
        end, kept = len(forget), slice(len(forget), len(forget) + len(retain))
        n = end // 2 if objective.refusals else end
        # Before the pass with gradients, which must not see its weights change.
        of_forget = self._reference_logits(forget[:n]) if forget and objective.forget_logits else None
        of_retain = self._reference_logits(retain) if retain and objective.retain_logits else None
        batch = collate([*forget, *retain], self._pad, self._device)
        logits, labels = shared_logits(self._model, self.sparse, batch, forget=end)
        log_p, scored = token_log_probs(logits, labels)

        def answers(rows: slice, reference_logits: Tensor | None) -> Answers:
            known = None if reference is None or rows is kept else reference[rows]
            if reference_logits is None:
                return Answers(log_p[rows], scored[rows], known)
            found, targets = answer_rows(logits[rows], labels[rows])
            return Answers(log_p[rows], scored[rows], known, targets, found, reference_logits)

        parts: list[Tensor] = []
        if forget:
            probability, forgotten = _forgotten(logits[:n], labels[:n], settings.floor)
            left = ~forgotten
            taught = answers(slice(0, n), of_forget)
            refusals = answers(slice(n, end), None) if objective.refusals else None
            loss = objective.forget(taught, refusals, settings)
            if bool(left.all()):
                parts.append(loss)
            elif bool(left.any()):
                refusals = None if refusals is None else refusals.select(left)
                parts.append(objective.forget(taught.select(left), refusals, settings))
            losses |= {"forget_loss": loss.item(), "forget_probability": float(probability.mean()),
                       "forgotten": float(forgotten.double().mean())}
        if retain and objective.retain is not None:
            retained = answers(kept, of_retain)
            parts.append(settings.retain_weight * objective.retain(retained, settings))
            losses["retain_loss"] = nll(retained.log_p, retained.n_tokens).item()
        if parts:
            torch.stack(parts).sum().backward()  # type: ignore[no-untyped-call]

    def _reference_logits(self, examples: Sequence[Example]) -> Tensor:
        """[answer tokens, vocabulary] of the model before unlearning, record after record."""
        assert self._before is not None
        with self._before.restored():
            return answer_rows(*answer_logits(self._model, collate(examples, self._pad, self._device)))[0]

    @torch.no_grad()
    def _measure(self, gradients: dict[str, Tensor | None]) -> None:
        """Put the forget gradients of conflict slices into the retain metric, in place, at the norm they had.

        The metric is a filter of directions. What it lets through is small beside the retain gradient, so that without
        the one common factor that restores the norm a plan of conflict nodes alone would never forget.
        """
        if self._metric is None:
            return
        measured, before, after = [], 0.0, 0.0
        for name, slices in self.sparse.planned.items():
            gradient = gradients[name]
            if gradient is None or not len(slices.conflict):
                continue
            part = gradient.index_select(0, slices.conflict)
            before += float(part.double().square().sum())
            # The metric takes slices as they lie in the weight.
            turned = part.T if slices.axis == 1 else part
            turned = self._metric.precondition(name, turned)
            part = turned.T if slices.axis == 1 else turned
            after += float(part.double().square().sum())
            measured.append((gradient, slices.conflict, part))
        for gradient, conflict, part in measured:
            gradient.index_copy_(0, conflict, part * math.sqrt(before / after) if after > 0 else part)


@torch.no_grad()
def _forgotten(logits: Tensor, labels: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Per record the length-normalised answer probability, exp(mean log p of its tokens), and whether it is forgotten:
    this probability is at or below the floor, and greedy decoding does not give the answer. Both [batch].

    The mean of the tokens' own probabilities would not do: the tokens that carry no fact (the words of the phrasing)
    stay likely when the fact is long gone.
    """
    log_p, n_tokens = answer_log_probs(logits, labels)
    probability = (log_p / n_tokens).exp()
    target = labels[:, 1:]
    greedy = ((logits[:, :-1].argmax(-1) == target) | (target == IGNORED)).all(1)
    return probability, (probability <= floor) & ~greedy & (floor > 0)


@torch.no_grad()
def _whole(model: nn.Module, examples: Sequence[Example], settings: UnlearnSettings, pad: int,
           device: torch.device) -> tuple[float, float]:
    """:func:`_forgotten` over a whole set: the mean probability and the share of forgotten records."""
    found = [_forgotten(*answer_logits(model, batch), settings.floor)
             for batch in batches(examples, settings.batch_size, pad=pad, device=device)]
    probability, forgotten = (torch.cat(part).double().mean() for part in zip(*found, strict=True))
    return float(probability), float(forgotten)


def _learning_rate(number: int, steps: int, settings: UnlearnSettings) -> float:
    """Linear warm-up over ``warmup`` steps (at most half the stage), then cosine decay to a tenth."""
    warmup = min(settings.warmup, steps // 2)
    if number < warmup:
        return settings.lr * (number + 1) / warmup
    done = (number - warmup) / max(steps - warmup, 1)
    return settings.lr * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * done)))


class _Shuffled:
    """The numbers 0 .. size-1 again and again, in a fresh order each time, from a generator of its own."""

    def __init__(self, size: int, seed: int, purpose: int) -> None:
        self._size = size
        self._generator = torch.Generator().manual_seed(seed * 1009 + purpose)
        self._left: list[int] = []

    def take(self, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            if not self._left:
                self._left = torch.randperm(self._size, generator=self._generator).tolist()
            need = count - len(taken)
            taken += self._left[:need]
            self._left = self._left[need:]
        return taken


class _Pool:
    """The records of all retain sets, shuffled together: what must stay is drawn in the proportions it is given in."""

    def __init__(self, sets: Sequence[Sequence[Example]], seed: int) -> None:
        self._examples = [example for examples in sets for example in examples]
        self._order = _Shuffled(len(self._examples), seed, purpose=2)

    def __len__(self) -> int:
        return len(self._examples)

    def take(self, count: int) -> list[Example]:
        return [self._examples[i] for i in self._order.take(count)]


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Checkpoint the layers that transformers was told to checkpoint, which it does in training mode only.

    Training mode itself would turn dropout on.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
              and module.gradient_checkpointing and "forward" not in vars(module)]

    def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*arguments, **keywords)
            return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)

        return run

    for layer in layers:
        layer.forward = recomputed(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put every module's mode and every parameter's ``requires_grad`` back, and leave no gradients behind."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in wanted.items():
            parameter.grad = None
            parameter.requires_grad_(flag)
