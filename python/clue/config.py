"""Settings: one frozen dataclass per stage. The command line, the TOML files and the help text all come from here."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from .errors import ClueError


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class DataSettings:
    """How records become token sequences."""

    chat: str = _option("auto", "use the tokenizer's chat template: auto (if it has one), on, off",
                        choices=("auto", "on", "off"))
    append_eos: bool = _option(True, "end every answer with the end-of-sequence token")
    max_length: int = _option(0, "longest sequence in tokens; 0 means the model's context")


@dataclass(frozen=True)
class LocalizeSettings:
    """How circuits are found and turned into a plan."""

    edges: float = _option(0.05, "share of all edges kept by each direction (Ns and Dn alike), in (0, 1]")
    granularity: str = _option("neuron", "what a node of an MLP is: the whole block, or each hidden neuron",
                               choices=("neuron", "block"))
    neurons: float = _option(0.10, "share of all MLP neurons kept by each direction, in (0, 1]")
    faithfulness: float = _option(0.0, "keep as few edges as reach this share of the model's target when the circuit runs"
                                  " alone, in (0, 1], instead of a share of all edges; 0 turns this off")
    confirm: int = _option(0, "check the AND and OR gates of this many receivers, strongest first, by exact patching; 0"
                           " checks none")
    target: str = _option("margin", "what is attributed: margin (answer token against the corrupted run's top token)"
                          " or logprob", choices=("margin", "logprob"))
    path: str = _option("half", "where gradients are taken between the clean and the corrupted prompt: half (Ns next to the"
                        " clean one, Dn next to the corrupted one) or full (both over the whole path, as EAP-IG does,"
                        " which cannot tell AND from OR)", choices=("half", "full"))
    path_steps: int = _option(2, "points on that path, an even number; 2 are the two prompts themselves, more also find"
                              " gates behind gates")
    norm: str = _option("exact", "gradient through the norms: exact Jacobian, or frozen scale",
                        choices=("exact", "frozen"))
    corruption: str = _option("auto", "where corrupted prompts come from: auto, given, subject, question",
                              choices=("auto", "given", "subject", "question"))
    semantics: str = _option("support", "reading of the gates: support (one-sided) or authors (each an equivalence)",
                             choices=("support", "authors"))
    weighting: str = _option("unit", "cost of a conflict: unit (the paper), or attribution (retain score of the node)",
                             choices=("unit", "attribution"))
    mode: str = _option("conflict", "what is minimised: conflict (nodes that forgetting and retention both need) or surgical"
                        " (edits: an edited node stops, and every retain output stays alive)",
                        choices=("conflict", "surgical"))
    stability: float = _option(0.0, "edit only nodes whose role holds in at least this share of samples of the scores, in"
                               " (0, 1]; 0 takes no samples")
    stability_samples: int = _option(20, "how often the scores are sampled")
    stability_noise: float = _option(0.1, "standard deviation of a sampled edge score, in units of the weakest score that"
                                     " is kept (neurons have standard errors of their own)")
    batch_size: int = _option(8, "pairs per forward and backward pass")
    stream: str = _option("auto", "run the model whole (never), or again layer by layer from the top down, which needs"
                          " little memory and one more forward pass (always); auto streams what would not fit",
                          choices=("auto", "always", "never"))
    limit: int = _option(0, "use at most this many pairs per set; 0 means all")
    tolerance: float = _option(0.0, "largest conservation gap accepted; 0 means 1e-3 (fp32 and finer) or 5e-2"
                               " (bf16, fp16)")


@dataclass(frozen=True)
class UnlearnSettings:
    """How the planned weights are trained."""

    objective: str = _option("npo", "what forgetting minimises: npo, ga (gradient ascent, without retention), graddiff (ga"
                             " with it), npo-kl, ga-kl (retention by KL divergence to the model before unlearning), simnpo,"
                             " wga, undial, or, which teach refusals, dpo and refusal",
                             choices=("npo", "graddiff", "ga", "npo-kl", "ga-kl", "simnpo", "dpo", "refusal", "undial",
                                      "wga"))
    stages: str = _option("joint", "two (forget weights first, then conflict weights, as in the paper) or joint",
                          choices=("two", "joint"))
    lr: float = _option(1e-4, "learning rate at the top of the schedule")
    steps: int = _option(200, "most optimizer steps, all stages together")
    forget_share: float = _option(0.2, "share of the steps given to the forget stage when stages = two")
    batch_size: int = _option(16, "forget records per step; as many retain records go with them")
    retain_weight: float = _option(1.0, "lambda: weight of the retain loss on conflict weights")
    beta: float = _option(0.1, "inverse temperature of npo, npo-kl and dpo")
    simnpo_beta: float = _option(2.5, "inverse temperature of simnpo, whose log-probabilities are means over tokens")
    simnpo_gamma: float = _option(0.0, "reward margin of simnpo")
    wga_alpha: float = _option(1.0, "wga weighs every token by its probability to this power; 0 is gradient ascent")
    undial_strength: float = _option(10.0, "undial lowers the answer token's logit by this much")
    refusals: str = _option("", "what dpo and refusal teach instead of the answer, one refusal per line; empty means a"
                            " built-in list")
    metric: bool = _option(True, "precondition the forget gradient of conflict weights by the retain set's Kronecker"
                           " curvature")
    damping: float = _option(0.02, "lambda of that preconditioner, relative to the factors' mean diagonal")
    weight_decay: float = _option(0.0, "decoupled weight decay, on planned weights only")
    clip: float = _option(1.0, "largest global gradient norm per optimizer step; 0 turns clipping off")
    warmup: int = _option(10, "linear warm-up steps of each stage; cosine decay to a tenth follows")
    floor: float = _option(0.15, "how far to forget: a record counts as forgotten, and is left alone, once its"
                           " length-normalised answer probability is at or below this, about what a model gives to"
                           " answers it never saw, and greedy decoding does not give the answer; training stops when"
                           " all are; 0 forgets without end")
    check_every: int = _option(5, "steps between looks at the whole forget set, to stop once all of it is forgotten")


@dataclass(frozen=True)
class EvaluateSettings:
    """What is measured, and on how much."""

    batch_size: int = _option(64, "records per forward pass")
    rouge: bool = _option(True, "generate answers and report ROUGE-L recall")
    rouge_limit: int = _option(200, "generate for at most this many records of a set; 0 means all")
    max_new_tokens: int = _option(200, "longest generated answer in tokens")
    min_k: float = _option(0.4, "share of the least likely answer tokens that min-k averages")
    bootstrap: int = _option(1000, "resamples behind each confidence interval; 0 leaves the interval out")


def check(settings: Any) -> None:
    """Raise :class:`ClueError` naming the first field of a settings dataclass whose value is out of range."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        choices = f.metadata.get("choices")
        if choices and value not in choices:
            raise ClueError(f"{f.name} = {value!r} is not one of {', '.join(choices)}")
        if f.name in {"edges", "neurons", "min_k"} and not 0.0 < value <= 1.0:
            raise ClueError(f"{f.name} = {value} must lie in (0, 1]")
        if f.name in {"faithfulness", "stability"} and value > 1.0:
            raise ClueError(f"{f.name} = {value} must lie in (0, 1], or be 0")
        if f.name == "path_steps" and (value < 2 or value % 2):
            raise ClueError(f"path_steps = {value} must be an even number, at least 2: half of the points for each direction")
        if f.name in {"beta", "simnpo_beta"} and not value > 0.0:
            raise ClueError(f"{f.name} = {value} must be greater than 0")
        if f.name in {"batch_size", "steps", "check_every", "max_new_tokens", "stability_samples"} and value < 1:
            raise ClueError(f"{f.name} = {value} must be at least 1")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not (0 <= value < float("inf")):
            raise ClueError(f"{f.name} = {value} must be finite and not negative")


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run besides its inputs: one group per stage, the seed, and where the model is run."""

    data: DataSettings = field(default_factory=DataSettings)
    localize: LocalizeSettings = field(default_factory=LocalizeSettings)
    unlearn: UnlearnSettings = field(default_factory=UnlearnSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    seed: int = _option(0, "seed of every random choice")
    device: str = _option("auto", "where the model runs: auto (CUDA if there is one), cpu, cuda",
                          choices=("auto", "cpu", "cuda"))
    dtype: str = _option("auto", "precision of the weights while they run: auto (as stored; float32 on a CPU), float32,"
                         " bfloat16", choices=("auto", "float32", "bfloat16"))

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, in the order of the fields; the inverse of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "settings",
                  base: Settings | None = None) -> Settings:
        """``base`` (the defaults when None) with ``values`` put over it.

        Raises :class:`ClueError` naming ``source`` and the key: it is unknown, or its value of a wrong type or range.
        """
        base = base or cls()
        changed: dict[str, Any] = {}
        for key, value in values.items():
            current = _known(base, key, source, key)
            if is_dataclass(current) and not isinstance(current, type):
                if not isinstance(value, Mapping):
                    raise ClueError(f"{source}: {key} must be a table of settings, got {value!r}")
                group = {k: _typed(_known(current, k, source, f"{key}.{k}"), v, source, f"{key}.{k}")
                         for k, v in value.items()}
                changed[key] = replace(current, **group)
            else:
                changed[key] = _typed(current, value, source, key)
        settings = replace(base, **changed)
        for part in (settings, settings.data, settings.localize, settings.unlearn, settings.evaluate):
            try:
                check(part)
            except ClueError as error:
                raise ClueError(f"{source}: {error}") from None
        return settings

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], *, base: Settings | None = None) -> Settings:
        """Read a TOML file: tables [data], [localize], [unlearn], [evaluate], and the keys seed, device, dtype."""
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ClueError(f"{path}: the settings file cannot be read ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ClueError(f"{path}: not a TOML file: {error}") from None
        return cls.from_dict(values, source=str(path), base=base)

    def to_toml(self) -> str:
        """The same settings as a TOML document that :meth:`from_toml` reads back."""
        values = self.to_dict()
        lines = [f"{key} = {_toml(value)}" for key, value in values.items() if not isinstance(value, dict)]
        for table, group in values.items():
            if isinstance(group, dict):
                lines += ["", f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in group.items())]
        return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    # As in JSON, apart from the escapes: TOML has no surrogate pairs, and wants DEL escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _known(settings: Any, key: str, source: str, name: str) -> Any:
    names = [f.name for f in fields(settings)]
    if key not in names:
        close = difflib.get_close_matches(key, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}"
        raise ClueError(f"{source}: there is no setting {name}; {hint}")
    return getattr(settings, key)


def _typed(current: Any, value: Any, source: str, name: str) -> Any:
    kind = type(current)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ClueError(f"{source}: {name} must be of type {kind.__name__}, got {value!r}")
    return value
