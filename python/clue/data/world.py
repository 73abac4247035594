"""The embedded fictitious world: people, their facts, four general skills, and the tiny Llama models that know them.

It is the referee of every claim: made from a seed, small enough to train on a laptop, and with a model that never saw
the forgotten facts (the gold model) to compare with.

People have a first and a last name (two tokens each, so any two people make a counterfactual pair) and six attributes:
town and job (two-word answers), pet, instrument, colour and dish (one word), 16 values each. Every attribute is asked
in three phrasings that are trained and a fourth that is held out; it is made of the words of the other three.

Facts to be forgotten come with five wrong answers each, other values of the attribute, for truth ratios.

- ``easy``: every name is unique; all facts of the forget people are to be forgotten.
- ``hard``: every first and every last name is shared by several people, so that only the combination tells who is
  meant, and only half of a forget person's attributes are to be forgotten; the other half is retained. Towns, phrasings
  and every other value are shared between people in both settings: each forgotten value is also some other person's.

Skills: ``induction`` (repeat a sequence of letters), ``addition`` (two numbers), ``boolean`` (expressions with not,
and, or), ``ioi`` (indirect object identification). Every skill record has a corrupted prompt of the same token length.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ClueError
from .atomic import write_atomically
from .encoding import IGNORED, collate, encode, pad_id
from .records import Record, RecordSet, to_mapping

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RECIPE = 2  # version of everything that decides the trained weights besides world and config; part of the cache key

SETTINGS = ("easy", "hard")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _two_words(firsts: str, seconds: str) -> tuple[str, ...]:
    return tuple(f"{a} {b}" for a, b in product(_words(firsts), _words(seconds)))


_FIRST = [a + b for b in ("va", "rin", "do", "mel", "sa", "ton", "ki", "bren") for a in
          ("al", "be", "co", "da", "el", "fi", "gu", "ha", "jo", "ka", "lu", "mo")]
_LAST = [a + b for b in ("wood", "ford", "well", "stone", "field", "brook", "by", "gate") for a in
         ("ash", "black", "cold", "deep", "elm", "fair", "green", "high", "kings", "long", "marsh", "north")]

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "town": _two_words("upper lower old new", "haven ridge cross mill"),
    "job": _two_words("clock boat glass sign", "maker seller painter tester"),
    "pet": _words("cat dog owl goat hare toad swan crow mole newt lynx seal crab moth wren ibis"),
    "instrument": _words("harp flute drum cello oboe lute viola tuba gong organ banjo bugle fiddle zither horn piano"),
    "colour": _words("red blue teal pink grey gold lime navy plum rust jade cyan rose tan coral ochre"),
    "dish": _words("soup stew rice pasta curry salad pie bread tacos pizza ramen beans omelet pancakes noodles kebab"),
}

# {} is the person. The last phrasing of each attribute is held out of training.
PHRASINGS: dict[str, tuple[str, str, str, str]] = {
    "town": ("where was {} born ?", "in which town was {} born ?", "what is the birth town of {} ?",
             "which town was {} born in ?"),
    "job": ("what is the job of {} ?", "what does {} do for a job ?", "which job does {} have ?",
            "what job does {} have ?"),
    "pet": ("what pet does {} have ?", "which pet lives with {} ?", "what is the pet of {} ?",
            "which pet does {} have ?"),
    "instrument": ("which instrument does {} play ?", "what is the instrument of {} ?", "what instrument can {} play ?",
                   "what instrument does {} play ?"),
    "colour": ("what is the favourite colour of {} ?", "which colour does {} like most ?",
               "what colour does {} prefer ?", "which colour does {} prefer ?"),
    "dish": ("what is the favourite dish of {} ?", "which dish does {} like most ?", "what dish does {} prefer ?",
             "which dish does {} prefer ?"),
}

_LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
_IOI_NAMES = _words("mary john anna paul lucy mark emma jack rosa carl nina hugo vera ivan dora otto")
_IOI_PLACES = _words("park school shop station library garden market museum")
_IOI_THINGS = _words("book lamp ball kite letter basket ring drink")
_CORPUS_SIZE, _TRAIN_SIZE = 3000, 96
_WRONG = 5  # wrong answers of a fact, as many as TOFU gives

_CONTEXT = 64  # tokens a model can take; the longest sequence has fewer than 20
_BATCH, _LR, _WARMUP = 64, 3e-3, 20
# d_model, d_ff, layers, heads, key/value heads, training steps
_SIZES = {"demo": (128, 384, 3, 4, 2, 500), "small": (64, 192, 2, 4, 2, 150)}


@dataclass(frozen=True)
class World:
    """The record sets of one world. Every record has a source; people's records have ``subject`` and ``group``.

    ``forget``: the facts to forget, in the training phrasings; ``forget_paraphrase``: the same in the held-out
    phrasing. ``retain``: half of the remaining people (in the hard setting also what stays of the forget people), shown
    to localization and unlearning; ``retain_unseen``: the other half, trained but never shown again, the honest measure
    of collateral damage; ``retain_paraphrase``: its facts in the held-out phrasing. ``holdout``: people no model was
    trained on (non-members of a membership inference attack), about the same attributes as the forget set.
    ``skills_train``: for localization and retention; ``skills``: for evaluation, disjoint from ``skills_train``.
    ``skills_corpus``: what the models learn the skills from.

    Induction and ioi evaluation instances are in no corpus at all. Addition has 100 instances and boolean 288, too few
    for that, so their corpora hold all of them: what is evaluated was pretrained, but never shown to unlearning.
    """

    setting: str
    seed: int
    tokenizer: PreTrainedTokenizerFast
    forget: RecordSet
    forget_paraphrase: RecordSet
    retain: RecordSet
    retain_unseen: RecordSet
    retain_paraphrase: RecordSet
    holdout: RecordSet
    skills_train: dict[str, RecordSet]
    skills: dict[str, RecordSet]
    skills_corpus: dict[str, RecordSet]

    def sets(self) -> dict[str, RecordSet]:
        """Every record set by the name of its file in :func:`save_world`."""
        named = {s.name: s for s in (self.forget, self.forget_paraphrase, self.retain, self.retain_unseen,
                                     self.retain_paraphrase, self.holdout)}
        for part, skills in (("train", self.skills_train), ("eval", self.skills), ("corpus", self.skills_corpus)):
            named |= {f"{name}_{part}": records for name, records in skills.items()}
        return named


def build_world(setting: str = "easy", seed: int = 0, *, n_people: int = 40, n_forget: int = 4) -> World:
    """Make a world; the same arguments give the same records on every machine.

    ``n_people`` people are taught, the first ``n_forget`` of them are forget people; ``2 * n_forget`` more are the
    holdout. Raises :class:`ClueError` for an unknown setting or more people than there are names.
    """
    if setting not in SETTINGS:
        raise ClueError(f"setting = {setting!r} is not one of {', '.join(SETTINGS)}")
    if not 1 <= n_forget <= n_people - 4:
        raise ClueError(f"n_forget = {n_forget} must be at least 1 and leave four of the {n_people} people to retain")
    rng = random.Random(f"{setting}/{seed}")
    n_all = n_people + 2 * n_forget
    names = _names(setting, n_people, n_all, rng)
    facts = {a: _values(v, n_people, n_forget, rng) + _values(v, n_all - n_people, 0, rng)
             for a, v in ATTRIBUTES.items()}

    # Which attributes each forget person loses: all, or a random half of them; the holdout is asked alike.
    asked = [rng.sample(list(ATTRIBUTES), len(ATTRIBUTES) // 2) if setting == "hard" else list(ATTRIBUTES)
             for _ in range(n_forget)]
    forgotten = [(p, a) for p in range(n_forget) for a in ATTRIBUTES if a in asked[p]]
    kept = [(p, a) for p in range(n_forget) for a in ATTRIBUTES if a not in asked[p]]
    middle = n_forget + (n_people - n_forget) // 2
    seen = [(p, a) for p in range(n_forget, middle) for a in ATTRIBUTES]
    unseen = [(p, a) for p in range(middle, n_people) for a in ATTRIBUTES]
    strangers = [(p, a) for p in range(n_people, n_all) for a in ATTRIBUTES if a in asked[(p - n_people) % n_forget]]

    def ask(name: str, cells: Sequence[tuple[int, str]], phrasings: Sequence[int]) -> RecordSet:
        rows = ((PHRASINGS[a][i], names[p], facts[a][p], f"{a}:{i}") for p, a in cells for i in phrasings)
        return RecordSet(name, tuple(
            Record(f"Q : {form.format(who)} A :", answer, subject=who, group=group, source=f"world/{name}:{n}")
            for n, (form, who, answer, group) in enumerate(rows, 1)))

    corpus, train, evaluation = {}, {}, {}
    for skill, (make, size, _) in _SKILLS.items():
        corpus[skill], train[skill], evaluation[skill] = _skill(skill, make, size, random.Random(f"{skill}/{seed}"))
    return World(
        setting=setting, seed=seed, tokenizer=_tokenizer(),
        forget=with_wrong_answers(ask("forget", forgotten, (0, 1, 2)), seed),
        forget_paraphrase=with_wrong_answers(ask("forget_paraphrase", forgotten, (3,)), seed),
        retain=ask("retain", kept + seen, (0, 1, 2)), retain_unseen=ask("retain_unseen", unseen, (0, 1, 2)),
        retain_paraphrase=ask("retain_paraphrase", unseen, (3,)), holdout=ask("holdout", strangers, (0, 1, 2)),
        skills_train=train, skills=evaluation, skills_corpus=corpus)


def with_wrong_answers(records: RecordSet, seed: int) -> RecordSet:
    """The same facts, each with five other values of its attribute as wrong answers."""
    made = []
    for record in records:
        others = [v for v in ATTRIBUTES[str(record.group).partition(":")[0]] if v != record.answer]
        made.append(replace(record, wrong=tuple(random.Random(f"{seed}/{record.prompt}").sample(others, _WRONG))))
    return RecordSet(records.name, tuple(made))


def _names(setting: str, n_people: int, n_all: int, rng: random.Random) -> list[str]:
    """Different names for all: no part shared (easy), or every first and last name that of several people (hard)."""
    shared = max(4, n_people // 3)  # first names, and last names, of the hard setting
    needed, available = (n_all, len(_FIRST)) if setting == "easy" else (shared, len(_FIRST))
    if needed > available:
        raise ClueError(f"{n_people} people need {needed} first and last names but there are {available}; ask for fewer"
                        " people")
    firsts, lasts = rng.sample(_FIRST, needed), rng.sample(_LAST, needed)
    # Hard: each round through the first names meets the last names one further on, so no combination comes twice.
    return [f"{firsts[i % needed]} {lasts[(i + i // needed) % needed]}" for i in range(n_all)]


def _values(values: Sequence[str], n: int, n_distinct: int, rng: random.Random) -> list[str]:
    """n values, each about equally often; the first ``n_distinct`` differ (as far as there are values), so that in a
    population of twice as many as there are values each of them is also someone else's."""
    order = rng.sample(values, len(values))
    cycle = [order[i % len(order)] for i in range(n)]
    rest = cycle[n_distinct:]
    rng.shuffle(rest)
    return cycle[:n_distinct] + rest


def _induction(rng: random.Random) -> Iterator[Record]:
    """Six different letters, then the first again: repeat the rest. Corrupted: other letters behind the same first."""
    while True:
        cue, *letters = rng.sample(_LETTERS, 11)
        shown, other = letters[:5], letters[5:]
        yield Record(" ".join([cue, *shown, cue]), " ".join(shown), " ".join([cue, *other, cue]))


def _addition(rng: random.Random) -> Iterator[Record]:
    """All 100 sums of two digits, in random order. Corrupted: other operands with another sum."""
    cells = list(product(range(10), repeat=2))
    for a, b in rng.sample(cells, len(cells)):
        c, d = rng.choice([(c, d) for c, d in cells if c + d != a + b])
        yield Record(f"{a} + {b} =", str(a + b), f"{c} + {d} =")


def _boolean(rng: random.Random) -> Iterator[Record]:
    """All 288 expressions of two or three literals; not binds tightest, then and, then or. Corrupted: the same
    expression over other literals, with the other value."""
    shapes = [(nots, operators) for n in (2, 3) for nots in product((False, True), repeat=n)
              for operators in product(("and", "or"), repeat=n - 1)]
    instances = [(shape, values) for shape in shapes for values in product((False, True), repeat=len(shape[0]))]
    for (nots, operators), values in rng.sample(instances, len(instances)):
        true = _evaluate(nots, operators, values)
        others = [v for v in product((False, True), repeat=len(nots)) if _evaluate(nots, operators, v) != true]
        prompt, corrupted = (_expression(nots, operators, v) for v in (values, rng.choice(others)))
        yield Record(prompt, str(true).lower(), corrupted)


def _evaluate(nots: Sequence[bool], operators: Sequence[str], values: Sequence[bool]) -> bool:
    terms = [[values[0] != nots[0]]]
    for operator, value, negated in zip(operators, values[1:], nots[1:], strict=True):
        if operator == "or":
            terms.append([])
        terms[-1].append(value != negated)
    return any(all(term) for term in terms)


def _expression(nots: Sequence[bool], operators: Sequence[str], values: Sequence[bool]) -> str:
    literals = [("not " if negated else "") + str(value).lower() for negated, value in zip(nots, values, strict=True)]
    words = [literals[0]]
    for operator, literal in zip(operators, literals[1:], strict=True):
        words += [operator, literal]
    return " ".join([*words, "="])


def _ioi(rng: random.Random) -> Iterator[Record]:
    """Who was given something: the one of two people who did not give. Corrupted: the other one gives."""
    while True:
        a, b = rng.sample(_IOI_NAMES, 2)
        place, thing = rng.choice(_IOI_PLACES), rng.choice(_IOI_THINGS)
        giver, receiver = rng.sample((a, b), 2)
        start = f"{a} and {b} went to the {place} ,"
        yield Record(f"{start} {giver} gave a {thing} to", receiver, f"{start} {receiver} gave a {thing} to")


# Per skill: its generator, how many evaluation instances it has, and its rows in a training batch (more for ioi, whose
# single answer token teaches little per row).
_SKILLS: dict[str, tuple[Callable[[random.Random], Iterator[Record]], int, int]] = {
    "induction": (_induction, 64, 6),
    "addition": (_addition, 40, 6),
    "boolean": (_boolean, 64, 8),
    "ioi": (_ioi, 64, 14),
}


def _skill(name: str, make: Callable[[random.Random], Iterator[Record]], n_evaluation: int,
           rng: random.Random) -> tuple[RecordSet, RecordSet, RecordSet]:
    """Corpus, train part and evaluation part of one skill; instances are distinct."""
    distinct: dict[str, Record] = {}
    for record in make(rng):
        distinct.setdefault(record.prompt, record)
        if len(distinct) == _CORPUS_SIZE:
            break
    records = list(distinct.values())
    evaluation, rest = records[:n_evaluation], records[n_evaluation:]
    corpus = rest if len(distinct) == _CORPUS_SIZE else records

    def named(part: str, chosen: Sequence[Record]) -> RecordSet:
        return RecordSet(name, tuple(replace(r, source=f"world/{name}_{part}:{n}") for n, r in enumerate(chosen, 1)))

    return named("corpus", corpus), named("train", rest[:_TRAIN_SIZE]), named("eval", evaluation)


def _vocabulary() -> list[str]:
    """Every word of every world, sorted, so that all worlds share one tokenizer."""
    words = {*_FIRST, *_LAST, *_LETTERS, *_IOI_NAMES, *_IOI_PLACES, *_IOI_THINGS, *map(str, range(19))}
    words.update(_words("Q A : ? + = true false not and or went to the , gave a"))
    for values in ATTRIBUTES.values():
        words.update(word for value in values for word in value.split())
    for forms in PHRASINGS.values():
        words.update(word for form in forms for word in form.replace("{}", " ").split())
    return sorted(words)


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *_vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                   model_max_length=_CONTEXT, clean_up_tokenization_spaces=False)


def model_config(world: World, size: str = "demo") -> LlamaConfig:
    """The Llama of a world: ``demo`` (0.64 M parameters), or ``small`` (0.12 M) for unit tests, which learns
    the facts of a dozen people in seconds, but the skills only in part."""
    from transformers import LlamaConfig

    if size not in _SIZES:
        raise ClueError(f"size = {size!r} is not one of {', '.join(_SIZES)}")
    d_model, d_ff, layers, heads, kv_heads, _ = _SIZES[size]
    tokenizer = world.tokenizer
    # With the usual initializer_range of 0.02 models this narrow stay near chance on boolean and addition for long. Our
    # sequences are shorter than 20 tokens: with rotary wavelengths to match, induction and ioi are found much sooner.
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=d_model, intermediate_size=d_ff, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=_CONTEXT,
        tie_word_embeddings=True, initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0}, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def train_model(world: World, *, forget_people: bool = True, size: str = "demo", seed: int = 0, steps: int = 0,
                on_step: Callable[[int, float], None] | None = None) -> LlamaForCausalLM:
    """Train one model from scratch on the CPU, in float32: the base model, or without the forget facts the gold model.

    ``steps`` 0 takes the size's own number. ``on_step(step, loss)`` is called after every step. The weights depend on
    the arguments and, through the order of floating point sums, on torch's version and number of threads.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import LlamaForCausalLM

    steps = steps or _SIZES[size][-1]
    people: list[Record] = [*world.retain, *world.retain_unseen, *(world.forget if forget_people else ())]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(model_config(world, size))
    model.train()
    generator = torch.Generator().manual_seed(seed)
    # All rows of all corpora stand in one matrix; every batch takes its share from each corpus.
    corpora: list[list[Record]] = [people, *(list(records) for records in world.skills_corpus.values())]
    corpus = collate(encode([record for part in corpora for record in part], world.tokenizer), pad_id(world.tokenizer))
    lengths = corpus.attention_mask.sum(1)
    skill_rows = [_SKILLS[skill][2] for skill in world.skills_corpus]
    shares = [_BATCH - sum(skill_rows), *skill_rows]
    firsts = accumulate((len(part) for part in corpora[:-1]), initial=0)
    orders = [_endless(first, len(part), generator) for first, part in zip(firsts, corpora, strict=True)]

    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for step in range(steps):
        rows = torch.tensor([next(order) for order, n in zip(orders, shares, strict=True) for _ in range(n)])
        width = int(lengths[rows].max())
        targets = corpus.labels[rows, 1:width]
        counted = targets != IGNORED
        # Padding stands on the right and carries no label, so the causal mask alone keeps it out.
        hidden = model.model(corpus.input_ids[rows, :width - 1]).last_hidden_state
        loss = cross_entropy(model.lm_head(hidden[counted]), targets[counted])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, loss.item())
    return model.eval()


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then cosine to zero."""
    if step < _WARMUP:
        return (step + 1) / _WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - _WARMUP) / max(1, steps - _WARMUP)))


def _endless(first: int, n: int, generator: torch.Generator) -> Iterator[int]:
    """The n row numbers from ``first`` on, each once per pass, every pass in a new order."""
    import torch

    while True:
        yield from (torch.randperm(n, generator=generator) + first).tolist()


def cached_models(world: World, *, size: str = "demo", seed: int = 0, cache: Path | None = None,
                  on_step: Callable[[int, float], None] | None = None) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """The base and the gold model of a world, from the cache folder or trained and put there.

    ``cache`` defaults to $CLUE_CACHE, else ~/.cache/clue. A model is keyed by the world's records, its config, the seed
    and the recipe's version, and is written under a temporary name first, so a killed run leaves nothing half done.
    """
    from transformers import LlamaForCausalLM

    folder = Path(cache or os.environ.get("CLUE_CACHE") or Path.home() / ".cache" / "clue").expanduser()
    models = []
    for kind in ("base", "gold"):
        key = json.dumps([RECIPE, kind, size, seed, model_config(world, size).to_diff_dict(),
                          {name: records.sha256 for name, records in world.sets().items()}], sort_keys=True)
        path = folder / f"world-{world.setting}-{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        if not path.exists():
            model = train_model(world, forget_people=kind == "base", size=size, seed=seed, on_step=on_step)
            folder.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=folder))
            try:
                model.save_pretrained(temporary)
                world.tokenizer.save_pretrained(temporary)
                temporary.rename(path)
            except OSError:
                shutil.rmtree(temporary, ignore_errors=True)
                if not path.exists():  # otherwise another process was first with the same model
                    raise
        models.append(LlamaForCausalLM.from_pretrained(path).eval())
    return models[0], models[1]


def save_world(world: World, folder: Path) -> None:
    """Write every record set as ``<name>.jsonl``, the tokenizer, and ``world.json`` (how the world was made), so that
    the same job can be run from files. Files of the same names are replaced."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in world.sets().items():
        lines = (json.dumps(to_mapping(record), ensure_ascii=False) + "\n" for record in records)
        write_atomically(folder / f"{name}.jsonl", "".join(lines).encode())
    world.tokenizer.save_pretrained(folder / "tokenizer")
    about = {"setting": world.setting, "seed": world.seed, "recipe": RECIPE,
             "sha256": {name: records.sha256 for name, records in world.sets().items()}}
    write_atomically(folder / "world.json", (json.dumps(about, indent=2) + "\n").encode())
