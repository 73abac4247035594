"""The unlearning loop: forget weights get the forget gradient, conflict weights forget plus retain, others nothing.

A step is one forward and backward pass over forget and retain records together, which computes the gradients of planned
slices only, forget and retain apart (:mod:`clue.unlearn.sparse`). The forget gradient is measured in the retain metric, and
on conflict slices the retain gradient is added (:mod:`clue.unlearn.role_gradient`). The sum is clipped once, and the slices
are updated. :mod:`clue.unlearn.schedule` says which roles move when; a step that is not finite moves nothing.

A record that is forgotten already gets no more gradient (:func:`~clue.unlearn.role_gradient.forgotten_now`). Pushed
further, its answer would become more unlikely than one the model never saw, which gives it away as surely as being
remembered does, and all that extra pushing is paid for by what must stay.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ..config import DataSettings, UnlearnSettings, check, check_seed
from ..data.encoding import Example, batches, encode, length_limit, pad_id
from ..data.records import read_sets
from ..errors import ClueError, ModelError, PlanError, RecordError
from ..model.anatomy import check_weights
from ..model.answers import answer_logits
from ..plan import Plan, require_plan
from ..processes import agreed
from ..provenance import fingerprint, unplanned
from ..types import Role
from .checkpoint import Checkpoint, identity
from .log import SERIES, UnlearnLog, reporting
from .metric import RetainMetric
from .objectives import Forget, Objective, answer_log_probs, objective_of, suited, token_log_probs
from .optimizer import MaskedAdamW, planned_parameters
from .reference import ReferenceWeights
from .refusals import refuse
from .role_gradient import RoleGradient, divergence_of, forgotten_now, forgotten_of
from .schedule import Pool, RetainWeight, Shuffled, Stage, learning_rate, stages_of
from .shards import is_sharded
from .tuning import NOTES, tune
from .twins import Twin, corrupted_twins, strangers

if TYPE_CHECKING:
    from ..data.records import RecordSet

#: The retain metric is measured on at most this many records, drawn from all retain sets: beyond that a mean over their
#: tokens hardly changes, and a large retain set would cost more than the training.
METRIC_RECORDS = 1024

#: The whole forget set's divergence from its strangers is looked at once a batch's is at most so many times what is wanted.
CLOSE = 1.5


def unlearn(model: nn.Module, tokenizer: Any, forget: Any, retain: Any, plan: Plan,
            settings: UnlearnSettings | None = None, *, objective: str | Objective | Forget | None = None,
            data: DataSettings | None = None, seed: int = 0, on_step: Callable[[dict[str, Any]], None] | None = None,
            progress: Callable[[str], None] | None = None, checkpoint: str | os.PathLike[str] | None = None,
            every: int = 0) -> UnlearnLog:
    """Train the planned weights of a model in place; every other weight keeps every bit.

    That is checked at the end, unless the model is sharded. Dropout stays off. Where the model has activation checkpointing
    enabled, it is used. The same inputs, seed and machine give the same bits. The model's mode and ``requires_grad`` flags
    are restored at the end, also after an error.

    Args:
        model, tokenizer: a Hugging Face causal LM and its tokenizer.
        forget: what to forget: a :class:`clue.RecordSet`, or what :func:`clue.read` makes one of.
        retain: what to keep, one such source or several by name; retain batches are drawn from all their records, shuffled
            together.
        plan: which weights move, and in which role.
        settings: objective, stages, optimizer and stopping rule; the defaults when None. With ``lr = 0``, the default,
            learning rate, retain weight and steps are chosen first, as :func:`clue.unlearn.tune` does.
        objective: in place of ``settings.objective``, and not of the named ones only: an :class:`Objective`, or a forget
            loss alone (:func:`~clue.unlearn.objectives.objective_of`).
        data: how records become tokens, which must be how the model was taught; the defaults when None.
        seed: of the order of forget and retain records, and of every other choice.
        on_step: called after every step with the step's entry of the log, plus ``step`` (from 1) and ``steps``; in trials
            also with the ``trial``'s number.
        progress: called with one line of text every :data:`~clue.unlearn.log.REPORT_EVERY` steps.
        checkpoint: a folder to keep the training's state in, made where it is missing: planned slices, moments, sampling,
            schedule and log; processes that share the training share it. Where it holds one, training goes on from there,
            given the model as it was before: on a CPU to the same bits as without the interruption. It stays there at the
            end; who made it removes it.
        every: steps between two checkpoints; 0 means one a minute, or less often where writing takes long. The last step is
            always kept where there is room for it, so that a model that could not be saved needs no training again.

    Returns:
        The :class:`clue.unlearn.UnlearnLog`: what every step saw, what was forgotten in the end, how many weights moved, and
        what the automatic settings are.

    Raises:
        PlanError: the plan names no weight, does not fit the model, or was made for other weights.
        OverlapError: a retain set shares records with the forget set.
        RecordError: a source cannot be read, the forget set is empty, or a retain set is needed and missing or empty, or a
            plain text is to be refused, or a record has no corrupted twin and the objective needs it.
        ClueError: a setting is out of range, or the objective is none.
        ModelError: loss or gradient were NaN or infinite in ``bad_steps`` steps running, or something else moved weights
            outside the plan meanwhile, or the model is compiled and the retain metric is to be measured.
        RunError: the checkpoint is damaged, or of a training with another model, plan, setting or record.
    """
    settings, data = settings or UnlearnSettings(), data or DataSettings()
    check(settings, UnlearnSettings)
    check(data, DataSettings)
    require_plan(plan)
    seed = check_seed(seed)
    if progress is not None:
        on_step = reporting(progress, settings.trials, on_step)
    if every < 0:
        raise ClueError(f"every = {every} must be the steps between two checkpoints, or 0")
    sets = read_sets(forget, retain, required=False)
    forget, retain = sets.pop("forget"), sets
    objective = suited(settings.objective if objective is None else objective, forget, retain)
    name = objective if isinstance(objective, str) else ""
    settings, objective = replace(settings, objective=name or settings.objective), objective_of(objective)
    if objective.retain is None and settings.retain_budget > 0:
        raise ClueError(f"retain_budget = {settings.retain_budget:g} holds a retain loss, and the objective"
                        f" {name or 'given'} has none: leave the budget out, or take graddiff or npo")
    planned = planned_parameters(model, plan, (Role.FORGET, Role.CONFLICT))
    plan = made_for(model, plan)
    if checkpoint is not None and any(map(is_sharded, planned.values())):
        raise ClueError("checkpoint: the model is sharded, and no process holds all of what would be in it: train without, or"
                        " a model that every process holds whole")
    tuning = None
    if settings.lr == 0:
        notes = None if checkpoint is None else Path(checkpoint) / NOTES
        tuning = tune(model, tokenizer, forget, retain, plan, settings, objective=objective, data=data, seed=seed,
                      on_step=on_step, notes=notes)
        settings = tuning.settings
    retains = objective.retain is not None and (settings.retain_weight > 0 or settings.retain_budget > 0)
    stages = stages_of(plan, settings, retains=retains)
    limit = length_limit(model, data.max_length)

    def encoded(records: RecordSet, append_eos: bool) -> list[Example]:
        if not len(records):
            raise RecordError(f"the set {records.name} holds no records: give at least one")
        return encode(records, tokenizer, chat=data.chat, append_eos=append_eos, max_length=limit)

    conflict = any(Role.CONFLICT in stage.roles for stage in stages)
    if conflict and (settings.metric or retains) and not retain:
        raise RecordError("the plan has conflict weights, which are trained to keep a retain set: give at least one")
    # That an answer ends is not what is to be forgotten, and the end token's probability stays near 1 on an answer that
    # is gone: it would cost every other answer its end, and keep the record from ever counting as forgotten.
    forget_examples = encoded(forget, append_eos=False)
    # A refusal does end: it is an answer that is to be given.
    refusals = encoded(refuse(forget, settings.refusals, seed), data.append_eos) if objective.refusals else []
    retain_examples = [encoded(records, data.append_eos) for records in retain.values()
                       if settings.metric or objective.twins or objective.towards or (conflict and retains)]
    twins: list[list[Twin]] = []
    if objective.twins or objective.towards:
        pool = Pool(retain_examples, seed)
        donors = pool.take(min(METRIC_RECORDS, len(pool))) if retain_examples else forget_examples
        if objective.twins:
            twins = corrupted_twins(forget_examples, donors, tokenizer, chat=data.chat, seed=seed)
        else:
            with restored(model):
                model.eval()
                people = [record for records in retain.values() for record in records] or list(forget)
                twins = strangers(forget_examples, donors, tokenizer, partial(_log_p, model, tokenizer, settings.batch_size),
                                  people=people, chat=data.chat, seed=seed, limit=limit, floor=settings.floor)
    keeper = None if checkpoint is None else Checkpoint(checkpoint, every=every, identity=identity(
        model, plan, settings, objective, seed, [forget_examples, refusals, *retain_examples]))
    training = _Training(model, plan, settings, objective, seed, forget_examples, refusals, twins, retain_examples,
                         pad_id(tokenizer), on_step, keeper)
    sharded = any(map(is_sharded, model.parameters()))
    others = {} if sharded else unplanned(model, plan)
    with restored(model), _checkpointed(model):
        model.eval()
        log = training.run(stages)
        changed = [] if sharded else [key for key, digest in unplanned(model, plan).items() if digest != others[key]]
        if changed:
            raise ModelError(f"{changed[0]} changed outside the plan while the model was trained"
                             + (f", and {len(changed) - 1} more did" if len(changed) > 1 else "")
                             + ": something else moves its weights (a hook, on_step, another optimizer); load the model again"
                               " and leave that out")
        return replace(log, objective=name, tuning=None if tuning is None else tuning.to_json())


def _log_p(model: nn.Module, tokenizer: Any, batch_size: int,
           examples: Sequence[Example]) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """Log-probabilities of every answer's tokens, [answer tokens] each."""
    device = next(model.parameters()).device
    found: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    with torch.no_grad():
        for batch in batches(examples, batch_size, pad=pad_id(tokenizer), device=device):
            log_p, scored = token_log_probs(*answer_logits(model, batch))
            found += [row[kept].double().cpu().numpy() for row, kept in zip(log_p, scored, strict=True)]
    return found


def made_for(model: nn.Module, plan: Plan) -> Plan:
    """The plan without its provenance, once it is known to be this model's, so that nothing downstream asks again: telling
    costs a pass over all weights. A plan that does not say, and a sharded model, are taken as they are.

    Raises:
        PlanError: it was made for other weights.
    """
    expected = plan.provenance.get("model", {}).get("fingerprint")
    if expected is not None and not any(map(is_sharded, model.parameters())) and fingerprint(model) != expected:
        raise PlanError("the plan was made for another model: its weights, or their dtype, are not those of this one. Localize"
                        " on this model (clue localize: into another folder, with -o); or, where it is the same one trained"
                        " further, say so: dataclasses.replace(plan, provenance={})")
    return replace(plan, provenance={})


@dataclass
class _Place:
    """Where a training is, besides its tensors: plain numbers, which a checkpoint keeps."""

    stage: int = 0  # index of the stage
    number: int = 0  # steps of it that are done, skipped ones too
    done: int = 0  # steps of all stages
    skipped: int = 0
    bad: int = 0  # how many of the latest steps were skipped, one after the other
    forgotten: float = 0.0  # share of the latest forget batch
    divergence: float = 0.0  # of the latest forget batch from its strangers
    measured: int = 0  # ``done`` when the retain metric was measured
    weight: float = 0.0  # of the retain loss
    average: float = math.nan  # what the retain budget is held against


class _Training:
    """One call of :func:`unlearn`: what it needs, and where it is."""

    def __init__(self, model: nn.Module, plan: Plan, settings: UnlearnSettings, objective: Objective, seed: int,
                 forget: Sequence[Example], refusals: Sequence[Example], twins: Sequence[Sequence[Twin]],
                 retain: Sequence[Sequence[Example]], pad: int,
                 on_step: Callable[[dict[str, Any]], None] | None, keeper: Checkpoint | None) -> None:
        self.model, self.plan, self.settings, self.objective, self.seed = model, plan, settings, objective, seed
        self.forget, self.answers, self.retain, self.pad = forget, [*forget, *refusals], retain, pad
        self.refusals, self.twins = bool(refusals), twins
        self.device = next(model.parameters()).device
        self.on_step, self.keeper = on_step, keeper
        self.taught, self.held_out = _parted(len(forget), settings.validation, seed)
        self.forget_order = Shuffled(len(self.taught), seed, purpose=1)
        self.retain_pool = Pool(retain, seed)
        self.log: dict[str, list[float]] = {name: [] for name in ("stage", *SERIES)}
        self.place = _Place()
        self.before = ReferenceWeights(model, plan)
        self.metric: RetainMetric | None = None
        self.at_metric: dict[str, Tensor] = {}  # the planned slices that the metric was measured at, unless the first

    def run(self, stages: Sequence[Stage]) -> UnlearnLog:
        """Train through the stages, from the checkpoint where there is one."""
        settings, place = self.settings, self.place
        reference = None
        if self.objective.reference:
            with torch.no_grad():
                reference = torch.cat([answer_log_probs(*answer_logits(self.model, batch))[0]
                                       for batch in self._batches(self.answers)])
        saved = None if self.keeper is None else self.keeper.load()
        weight = RetainWeight(settings, self._retain_loss() if settings.retain_budget > 0 and self.retain else None)
        place.weight, place.average = weight.value, weight.average  # a checkpoint may come before the first step that moves
        if saved is not None:
            self._restore(saved, weight, stages)
        stopped = False
        for index in range(place.stage, len(stages)):
            stage = stages[index]
            if index != place.stage:
                place.stage, place.number = index, 0
            if place.number == 0:  # every stage moves weights of its own, which the metric is of
                self._measure(stage)
            # A fresh optimizer: the moments of one stage say nothing about the next.
            optimizers = [MaskedAdamW(self.model, self.plan, lr=settings.lr, weight_decay=settings.weight_decay,
                                      roles=roles, rounding=settings.rounding, seed=self.seed)
                          for roles in stage.groups()]
            if saved is not None and index == saved.numbers["stage"]:
                for number, optimizer in enumerate(optimizers):
                    optimizer.restore_slices(saved.nested(f"optimizer/{number}"))
            stopped = place.number > 0 and self._done()  # a checkpoint may be of the very last step
            while place.number < stage.steps and not stopped:
                if self._metric_is_due():
                    self._measure(stage)
                gradient = RoleGradient(self.model, self.plan, stage.roles, self.objective, settings, self.metric,
                                        self.before, self.pad, self.seed)
                with gradient.sparse:
                    while place.number < stage.steps and not stopped and not self._metric_is_due():
                        self._step(stage, optimizers, gradient, reference, weight)
                        stopped = self._done()
                        last = stage is stages[-1] and (stopped or place.number == stage.steps)
                        if self.keeper is not None and self.keeper.due(last):
                            # Without room for the last one there may still be room for the model that is now saved.
                            with suppress(OSError) if last else nullcontext():
                                self.keeper.save(vars(place), self._tensors(optimizers))
        return self._finished(stopped)

    def _step(self, stage: Stage, optimizers: Sequence[MaskedAdamW], gradient: RoleGradient, reference: Tensor | None,
              weight: RetainWeight) -> None:
        """One optimizer step, or none where loss or gradient are not finite."""
        settings, place = self.settings, self.place
        turn = stage.turns[place.number % len(stage.turns)]
        chosen: list[int] = []
        twins: list[Twin] = []
        if turn.forget:
            chosen = [self.taught[i] for i in self.forget_order.take(min(settings.batch_size, len(self.taught)))]
            twins = [self.twins[i][(place.done + i) % len(self.twins[i])] for i in chosen] if self.twins else []
            if self.refusals:
                chosen += [len(self.forget) + i for i in chosen]
        retained = self.retain_pool.take(settings.batch_size) if turn.retain else []
        lr = learning_rate(place.number, stage.steps, settings)
        used = weight.value
        losses, slices = gradient([self.answers[i] for i in chosen], None if reference is None else reference[chosen],
                                  retained, used, twins)
        moving = [(optimizer, part) for optimizer, roles in zip(optimizers, stage.groups(), strict=True)
                  if (part := gradient.part(slices, roles)) and set(roles) <= set(turn.roles)]
        norm = math.hypot(*(optimizer.grad_norm(part) for optimizer, part in moving))
        place.number, place.done = place.number + 1, place.done + 1
        if not all(math.isfinite(value) for value in (norm, losses["forget_loss"] if turn.forget else 0.0,
                                                      losses["retain_loss"] if turn.retain else 0.0)):
            place.skipped, place.bad = place.skipped + 1, place.bad + 1
            if place.bad >= settings.bad_steps:
                if place.done == place.bad:  # not one step went well
                    check_weights(self.model)
                raise ModelError(f"unlearning diverged at step {place.done}: forget loss {losses['forget_loss']}, retain"
                                 f" loss {losses['retain_loss']}, gradient norm {norm} in the last of {place.bad} steps"
                                 " running that were not finite: lower lr, or raise floor")
            return
        place.bad = 0
        # Clipped once per optimizer step, over the planned weights.
        scale = settings.clip / norm if 0 < settings.clip < norm else 1.0
        for optimizer, part in moving:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step(grad_scale=scale, gradients=part)
        weight.observe(losses["retain_loss"])
        place.weight, place.average = weight.value, weight.average
        if turn.forget:
            place.forgotten, place.divergence = losses["forgotten"], losses["divergence"]
        entry = {"stage": stage.number, **losses, "grad_norm": norm, "lr": lr, "retain_weight": used}
        for name, values in self.log.items():
            values.append(entry[name])
        if self.on_step is not None:
            self.on_step({"step": len(self.log["stage"]), "steps": settings.steps, **entry})

    def _done(self) -> bool:
        """Whether there is nothing left to do in this stage, looked at every few steps."""
        settings = self.settings
        if self.place.number % settings.check_every:
            return False
        # The batch is asked first: looking at the whole set costs a pass over it.
        if agreed(self.place.forgotten) == 1.0 and self._gone() and self._near():
            return True
        return bool(self.held_out) and self._whole(self.held_out)[0] <= settings.forget_target and self._near()

    @torch.no_grad()
    def _gone(self) -> bool:
        """Whether all forget records that are trained on are forgotten; the first batch with one that is not ends the look,
        for all processes at once: a sharded model is run by all of them or by none."""
        batches = self._batches([self.forget[i] for i in self.taught])
        return all(agreed(float(forgotten_now(*answer_logits(self.model, batch), self.settings.floor)[1].all())) == 1.0
                   for batch in batches)

    def _near(self) -> bool:
        """Whether the forget records are as those of strangers, where the objective goes there."""
        if self.objective.towards is None:
            return True
        near = self.settings.stranger_near
        if agreed(self.place.divergence) > CLOSE * near:
            return False
        size = self.settings.batch_size
        parts = [self.taught[start:start + size] for start in range(0, len(self.taught), size)]
        records = (([self.forget[i] for i in part], [self.twins[i][0] for i in part]) for part in parts)
        return agreed(divergence_of(self.model, self.before, records, self.pad)) <= near

    def _metric_is_due(self) -> bool:
        every, place = self.settings.metric_every, self.place
        return self.metric is not None and every > 0 and place.done - place.measured >= every

    def _measure(self, stage: Stage) -> None:
        """Measure the retain metric of a stage's weights on the model as it is, always on the same records."""
        if not self.settings.metric or not self.retain:
            return
        pool = Pool(self.retain, self.seed)
        sample = pool.take(min(METRIC_RECORDS, len(pool)))
        self.metric = RetainMetric.measure(self.model, self.plan, self._batches(sample), damping=self.settings.damping,
                                           roles=stage.roles, exact_width=self.settings.metric_width,
                                           rank=self.settings.metric_rank)
        self.at_metric, self.place.measured = self.before.kept() if self.place.done else {}, self.place.done

    @torch.no_grad()
    def _retain_loss(self) -> float:
        """Nats per answer token of the retain records, a sample of them where there are many."""
        pool = Pool(self.retain, self.seed)
        found = [answer_log_probs(*answer_logits(self.model, batch))
                 for batch in self._batches(pool.take(min(METRIC_RECORDS, len(pool))))]
        return -float(sum(log_p.double().sum() for log_p, _ in found) / sum(n.sum() for _, n in found))

    def _batches(self, examples: Sequence[Example]) -> Iterator[Any]:
        return batches(examples, self.settings.batch_size, pad=self.pad, device=self.device)

    def _whole(self, chosen: Sequence[int]) -> tuple[float, float]:
        probability, forgotten = forgotten_of(self.model, self._batches([self.forget[i] for i in chosen]), self.settings.floor)
        return agreed(probability), agreed(forgotten)  # processes that decide otherwise would wait for each other for ever

    def _tensors(self, optimizers: Sequence[MaskedAdamW]) -> dict[str, Any]:
        """Everything that a checkpoint keeps besides :class:`_Place`."""
        return {"weights": self.before.now(), "metric": self.at_metric,
                "optimizer": {str(number): optimizer.slices() for number, optimizer in enumerate(optimizers)},
                "forget": self.forget_order.state(), "retain": self.retain_pool.order.state(),
                "log": {name: torch.tensor(values, dtype=torch.float64) for name, values in self.log.items()}}

    def _restore(self, saved: Any, weight: RetainWeight, stages: Sequence[Stage]) -> None:
        """Put the model and everything else where the checkpoint says, but for the optimizer."""
        at_metric = saved.tensors_of("metric")
        if at_metric:
            self.before.put(at_metric)
        self._measure(stages[saved.numbers["stage"]])
        self.at_metric = at_metric
        self.before.put(saved.tensors_of("weights"))
        self.forget_order.restore(saved.tensors_of("forget"))
        self.retain_pool.order.restore(saved.tensors_of("retain"))
        self.log = {name: values.tolist() for name, values in saved.tensors_of("log").items()}
        vars(self.place).update(saved.numbers)
        weight.value, weight.average = self.place.weight, self.place.average

    def _finished(self, stopped: bool) -> UnlearnLog:
        probability, forgotten = self._whole(range(len(self.forget)))
        validation = self._whole(self.held_out)[0] if self.held_out else math.nan
        series: dict[str, Any] = {name: np.array(self.log[name], dtype=np.float64) for name in SERIES}
        return UnlearnLog(np.array(self.log["stage"], dtype=np.uint8), **series, stopped_early=stopped,
                          final_probability=probability, final_forgotten=forgotten, final_validation=validation,
                          skipped=self.place.skipped, planned=self.plan.weights_changed, moved=self.before.moved())


def _parted(count: int, validation: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the forget records to train on, and of those held out; each side gets at least one.

    Raises:
        RecordError: there is one record only, and some are to be held out.
    """
    if not validation:
        return list(range(count)), []
    if count < 2:
        raise RecordError("validation holds forget records out of the training, and there is one only: set validation = 0")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1009 + 4)).tolist()
    held = min(max(round(validation * count), 1), count - 1)
    return sorted(order[held:]), sorted(order[:held])


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
            return recompute(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)

        return run

    for layer in layers:
        layer.forward = recomputed(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
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
