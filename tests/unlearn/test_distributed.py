"""Two processes train what one process trains: DistributedDataParallel, FSDP2, and CLUE's own loop under either.

Starting processes is the expensive part, so one program goes through all of it. It asserts what must hold in each process,
and prints digests of all weights, which must be the same in both.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import run

PROGRAM = """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from tests.unlearn.distributed import *

    family = sys.argv[1]
    rows = [0, 2] if rank == 0 else [1, 3, 4]
    model, plan = model_and_plan(family)
    before = whole(copy.deepcopy(model))
    dense, slices, loops = reference(family)

    def fresh(sharded):
        model, _ = model_and_plan(family)
        if sharded:
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        return model

    def check(model, expected):
        compare(whole(model), expected, before, plan)
        print(digest(whole(model)))

    # Ordinary gradients, of which DistributedDataParallel and FSDP2 take the mean over processes.
    for sharded in (False, True):
        model = fresh(sharded)
        optimizer = MaskedAdamW(model, plan, lr=1e-2, weight_decay=0.1)
        trained = model if sharded else DistributedDataParallel(model)
        for _ in range(STEPS):
            loss_of(trained, rows).backward()
            print(optimizer.grad_norm())
            optimizer.step()
            optimizer.zero_grad()
        check(model, dense)
    total = torch.tensor([held(optimizer)])
    assert 0 < int(total) < 2 * plan.weights_changed
    dist.all_reduce(total)
    assert int(total) == 2 * plan.weights_changed  # every planned weight's state is in one process alone
    again = MaskedAdamW(model, plan, lr=1e-2, weight_decay=0.1)
    again.load_state_dict(optimizer.state_dict())
    assert held(again) == held(optimizer)
    named = MaskedAdamW(model, plan, lr=1e-2, weight_decay=0.1)
    partly = StateDictOptions(strict=False)  # a process may hold none of a parameter's planned slices
    set_optimizer_state_dict(model, named, get_optimizer_state_dict(model, optimizer, options=partly), options=partly)
    for name, state in optimizer.slices().items():
        assert all(torch.equal(value, named.slices()[name][key]) for key, value in state.items()), name

    # A forward pass without a backward one leaves the outermost module's weights gathered.
    model = fresh(True)
    outer = MaskedAdamW(model, norm_plan(model), lr=1e-2)
    loss_of(model, rows).backward()
    with torch.no_grad():
        loss_of(model, rows)
    outer.step()
    changed = [name for name, weight in whole(model).items() if not torch.equal(weight, before[name])]
    assert changed == ["model.norm.weight"], changed

    # Loaded again between two steps, a sharded model in bf16 stays as it was loaded, not as the masters were.
    model = model_and_plan(family)[0].bfloat16()
    fully_shard(model)
    start = {name: weight.clone() for name, weight in whole(model).items()}
    outer = MaskedAdamW(model, norm_plan(model), lr=1e-2)
    kept = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    for lr in (1e-2, 0.0):
        loss_of(model, rows).backward()
        outer.param_groups[0]["lr"] = lr
        outer.step()
        outer.zero_grad()
        assert torch.equal(whole(model)["model.norm.weight"], start["model.norm.weight"]) == (lr == 0)
        model.load_state_dict(kept)

    # Gradients of slices, added up; nothing else is ever computed.
    for sharded in (False, True):
        model = fresh(sharded)
        optimizer = train_sparsely(model, plan, rows)
        check(model, slices)
        assert all(p.grad is None for p in model.parameters())
        assert (held(optimizer) < 2 * plan.weights_changed) == sharded

    # CLUE's own loop: objectives of log-probabilities, and of whole distributions next to the model before.
    for objective, sharded in (("npo", False), ("npo", True), ("npo-stranger", True), ("npo-kl", True)):
        model = fresh(sharded)
        mine = unlearned(model, plan, objective)
        if objective in loops:
            loop, log = loops[objective]
            check(model, loop)
            for name in ("forget_loss", "retain_loss", "forget_probability", "divergence", "grad_norm"):
                torch.testing.assert_close(torch.tensor(getattr(mine, name)), torch.tensor(getattr(log, name)),
                                           rtol=1e-3, atol=1e-4, equal_nan=True)
        print(mine.forget_loss.tolist(), mine.final_probability, digest(whole(model)))
        moved = sum(int((whole(model)[name] != weight).sum()) for name, weight in before.items())
        assert mine.moved == moved > 0, (mine.moved, moved)
"""

#: One of the processes computes with two threads, and so rounds otherwise.
ALIKE = """
    from torch.distributed.fsdp import fully_shard
    from tests.unlearn.distributed import *
    from clue.data.encoding import batches, encode
    from clue.unlearn import RetainMetric

    torch.set_num_threads(1 + rank)
    model, plan = model_and_plan("llama/biased")
    examples = encode(records("retain", RETAIN), build_tokenizer(), append_eos=False)
    made = lambda: batches(examples, 3, pad=0, device="cpu")  # two batches of 3 and 1 records, of which each runs one
    for width in (2048, 8):
        found = RetainMetric.measure(model, plan, made(), damping=0.1, exact_width=width, rank=4)
        metric.place, curvature.place, together = lambda: (0, 1), lambda: (0, 1), metric.place
        alone = RetainMetric.measure(model, plan, made(), damping=0.1, exact_width=width, rank=4)
        metric.place = curvature.place = together
        for name, pair in found._sides.items():
            for mine, theirs in zip(pair, alone._sides[name], strict=True):
                assert (mine is None) == (theirs is None)
                if mine is None:
                    continue
                step = torch.randn(mine.tensors()[0].shape[0], 3, generator=torch.Generator().manual_seed(0))
                torch.testing.assert_close(mine.apply(step, left=True), theirs.apply(step, left=True), atol=2e-3, rtol=1e-2)
                print(digest({str(i): tensor for i, tensor in enumerate(mine.tensors())}))
    torch.set_num_threads(1)

    # Nothing chosen: the learning rate is tried out, also where the model is sharded.
    for sharded in (False, True):
        model, _ = model_and_plan("llama/biased")
        if sharded:
            fully_shard(model)
        log = unlearned(model, plan, "npo-stranger", {"lr": 0.0, "trials": 2, "floor": 0.03, "check_every": 2})
        print(log.lr.tolist(), log.steps, digest(whole(model)))

    # Where one finds a record forgotten and the other does not, both look at the same batches, and end together.
    from clue.unlearn import loop
    told, looks = loop.forgotten_now, []
    loop.forgotten_now = lambda *given: looks.append(1) or (told(*given)[0], told(*given)[1] ^ bool(rank))
    for sharded in (False, True):
        model, _ = model_and_plan("llama/biased")
        if sharded:
            fully_shard(model)
        log = unlearned(model, plan, "ga", {"floor": 0.999, "batch_size": 1, "check_every": 1})
        assert log.stopped_early and len(looks) == 3 * log.steps * (1 + sharded), (log, looks)
        print(log.steps, len(looks))
"""


RESUMED = """
    from pathlib import Path
    import pytest
    from torch.distributed.fsdp import fully_shard
    from tests.unlearn.distributed import *
    from clue.errors import ClueError, RunError

    folder = Path(sys.argv[1])
    model, plan = model_and_plan("llama/biased")
    log = unlearned(model, plan, "npo")
    expected = digest(whole(model))

    def stop(entry):
        if entry["step"] == 2:
            raise KeyboardInterrupt  # in all processes after the same step

    again, _ = model_and_plan("llama/biased")
    with pytest.raises(KeyboardInterrupt):
        unlearned(again, plan, "npo", checkpoint=folder, every=1, on_step=stop)
    assert [file.name for file in folder.iterdir()] == ["training.safetensors"]
    dist.barrier()
    steps = []
    again, _ = model_and_plan("llama/biased")
    mine = unlearned(again, plan, "npo", checkpoint=folder, every=1, on_step=lambda entry: steps.append(entry["step"]))
    assert steps[0] == 2 and digest(whole(again)) == expected
    assert mine.forget_loss.tolist() == log.forget_loss.tolist()

    sharded, _ = model_and_plan("llama/biased")
    fully_shard(sharded)
    with pytest.raises(ClueError, match="checkpoint: the model is sharded"):
        unlearned(sharded, plan, "npo", checkpoint=folder)
    dist.barrier()
    # A checkpoint that the first process alone sees is refused by the others.
    from clue.unlearn.checkpoint import Checkpoint
    keeper = Checkpoint(folder if rank == 0 else folder / "elsewhere", every=1, identity={})
    if rank == 0:
        assert keeper.load() is not None  # an empty identity suits any training
    else:
        with pytest.raises(RunError, match="is not the same for all processes: put the run into a folder"):
            keeper.load()
    """


def test_processes_go_on_together_from_one_checkpoint(tmp_path: Path) -> None:
    run(RESUMED, str(tmp_path))


@pytest.mark.parametrize("family", ["llama/biased", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_two_processes_train_what_one_does(family: str) -> None:
    printed = run(PROGRAM, family)
    assert printed[0] == printed[1]
    assert printed[0].count("\n") == 6 + 2 + 2 + 3 + 4


def test_processes_share_the_metric_and_choose_alike() -> None:
    printed = run(ALIKE)
    assert printed[0] == printed[1] and printed[0].count("\n") > 10
