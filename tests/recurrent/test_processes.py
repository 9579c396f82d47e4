"""Modules called from many threads and processes, in chunks, and within what wraps a module's call."""

import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import workers
from modules import (
    KINDS,
    in_double,
    input_of,
    like,
    named,
    ours_of,
    pair,
    run,
    seeds_for,
    states_of,
    tuple_of,
    with_gradients,
)
from parity import assert_parity, assert_same_bits
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import pymtl

DEEP = {"num_layers": 2, "bidirectional": True}
every_kind = pytest.mark.parametrize("kind", KINDS)
frozen_or_not = pytest.mark.parametrize("frozen", [False, True], ids=["ordinary", "frozen"])


def evaluated(kind, *sizes, frozen=False, **options):
    module = ours_of(kind, *sizes, **options).eval()
    return pymtl.freeze(module) if frozen else module


# Threads.


def at_once(count, function):
    """Results of ``function(i)`` for each of ``count`` threads that start together."""
    barrier = threading.Barrier(count)

    def start(i):
        barrier.wait(timeout=60)
        return function(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


@frozen_or_not
@pytest.mark.parametrize("each", [1, 2], ids=["one thread each", "two threads each"])
@every_kind
def test_eight_threads_at_once_each_get_the_right_bits(kind, each, frozen, threads):
    module = evaluated(kind, 24, 40, frozen=frozen, **DEEP)
    inputs = [torch.randn(3 + 7 * i % 20, 1 + 5 * i % 17, 24) for i in range(8)]
    expected = [run(module, x) for x in inputs]
    threads(each)

    def call(i):
        return [run(module, inputs[(i + turn) % 8]) for turn in range(16)]

    for i, results in enumerate(at_once(8, call)):
        for turn, found in enumerate(results):
            assert_same_bits(found, expected[(i + turn) % 8])


@every_kind
def test_eight_threads_that_train_and_infer_with_one_module_do_not_disturb_each_other(kind):
    module = ours_of(kind, 9, 19, **DEEP)
    inputs = [torch.randn(3 + i, 1 + i, 9) for i in range(8)]

    def gradients(i):
        x = inputs[i].clone().requires_grad_()
        output, _ = module(x)
        leaves = {"input": x, **dict(module.named_parameters())}
        return dict(zip(leaves, torch.autograd.grad(output.square().sum(), list(leaves.values()))))

    def call(i):
        return [gradients(i) if i % 2 else run(module, inputs[i]) for _ in range(8)]

    expected = [call(i)[0] for i in range(8)]
    for i, results in enumerate(at_once(8, call)):
        for found in results:
            assert_same_bits(found, expected[i])


@every_kind
def test_threads_that_freeze_and_unfreeze_do_not_change_the_bits_of_others(kind):
    module = evaluated(kind, 9, 19, **DEEP)
    x = input_of(module)
    expected = run(module, x)

    def call(i):
        results = []
        for _ in range(30):
            if i < 2:
                pymtl.freeze(module)
                pymtl.unfreeze(module)
            else:
                results.append(run(module, x))
        return results

    for results in at_once(6, call):
        for found in results:
            assert_same_bits(found, expected)


@every_kind
def test_every_number_of_threads_gives_the_same_bits(kind, threads):
    module = evaluated(kind, 40, 72, **DEEP)
    x = torch.randn(30, 24, 40)
    threads(1)
    expected = with_gradients(module, x)
    for count in (1, 2, 4):
        threads(count)
        found = with_gradients(module, x)
        results = named(*module(x))
        assert_same_bits({name: found[name] for name in results}, {name: expected[name] for name in results})
        assert_same_bits(run(pymtl.freeze(module), x), {name: expected[name] for name in results})
        assert torch.get_num_threads() == count
        assert_same_bits(with_gradients(module, x), found)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_no_more_threads_run_than_torch_was_told():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, workers.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    one, two, four = map(int, done.stdout.split())
    assert two == one + 1
    assert two < four <= one + 3


# Processes.


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN relu"])
def test_workers_of_a_data_loader_run_modules(kind, start, threads):
    threads(2)
    module = evaluated(kind, 24, 64, frozen=start == "fork", **DEEP)
    sequences = [torch.randn(3 + i, 1 + i % 3, 24) for i in range(8)]
    with_gradients(module, torch.randn(40, 32, 24))
    expected = [run(module, x)["output"] for x in sequences]
    loader = DataLoader(
        workers.Encoded(module, sequences),
        batch_size=None,
        num_workers=2,
        multiprocessing_context=start,
        timeout=60,
    )
    found = list(loader)
    assert [index for index, _, _ in found] == list(range(8))
    assert os.getpid() not in {process for _, _, process in found}
    for (index, output, _), x in zip(found, expected):
        assert_same_bits({index: output}, {index: x})
    assert_same_bits({"after": run(module, sequences[0])["output"]}, {"after": expected[0]})


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("way", workers.WAYS)
def test_two_processes_get_the_gradients_of_one(way, tmp_path):
    x, lengths = torch.randn(6, 4, 5), torch.tensor([6, 2, 5, 3])
    model = workers.Encoder()
    arguments = (2, way, tmp_path / "rendezvous", model.state_dict(), x, lengths, tmp_path)
    for attempt in range(3):  # on a busy machine gloo sometimes waits for ever, with torch's own modules too
        arguments = (2, way, tmp_path / f"rendezvous{attempt}", *arguments[3:])
        processes = torch.multiprocessing.spawn(workers.train_a_share, arguments, nprocs=2, join=False)
        try:
            if any(processes.join(timeout=60) for _ in range(2)):
                break
        finally:
            for process in processes.processes:
                process.kill()
    else:
        pytest.fail("the processes did not end, three times")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    def gradients(model, x):
        model(x, lengths).mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    exact = workers.Encoder(torch.float64)
    exact.load_state_dict(model.state_dict())
    assert first.pop("kinds.GRU.weight_hh_l0") is second.pop("kinds.GRU.weight_hh_l0") is None
    assert_same_bits(first, second)
    assert_parity(first, gradients(model, x), gradients(exact, x.double()))


@frozen_or_not
@every_kind
def test_a_forked_process_infers_on_two_threads(kind, frozen, threads):
    threads(2)
    module = evaluated(kind, 64, 128, frozen=frozen, **DEEP)
    x = torch.randn(40, 8, 64)
    expected = run(module, x)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # rather than wait for OpenMP's threads, which a forked process does not have
        found = run(module, x)
        # torch.equal would wait for them.
        os._exit(
            int(any(found[name].numpy().tobytes() != wanted.numpy().tobytes() for name, wanted in expected.items()))
        )
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert_same_bits(run(module, x), expected)


# Chunks.


def in_chunks(module, x, sizes, hx=None):
    outputs = []
    for chunk in x.split(sizes, 1 if module.batch_first else 0):
        output, hx = module(chunk, hx)
        outputs.append(output)
    return torch.cat(outputs, 1 if module.batch_first else 0), hx


def cuts_of(steps):
    generator = random.Random(5)
    cuts = [[1] * steps, [steps - 1, 1], [1, steps - 1], [steps // 2, steps - steps // 2]]
    for _ in range(4):
        sizes = []
        while sum(sizes) < steps:
            sizes.append(generator.randint(1, min(9, steps - sum(sizes))))
        cuts.append(sizes)
    return cuts


@frozen_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layers", [1, 3])
@every_kind
def test_chunks_of_any_sizes_with_carried_states_give_the_bits_of_the_whole(kind, layers, dtype, frozen):
    for sizes, batches, batch_first in (((9, 19), (1, 3), False), ((40, 64), (1, 8, 17), True)):
        options = {"num_layers": layers, "dtype": dtype, "batch_first": batch_first}
        module = evaluated(kind, *sizes, frozen=frozen, **options)
        for batch in batches:
            x, hx = input_of(module, batch, steps=30), states_of(module, batch)
            expected = {None: run(module, x), "given": run(module, x, hx)}
            for cut in cuts_of(30):
                with torch.no_grad():
                    assert_same_bits(named(*in_chunks(module, x, cut)), expected[None])
                    assert_same_bits(named(*in_chunks(module, x, cut, hx)), expected["given"])


@every_kind
def test_a_sequence_fed_token_by_token_gives_the_bits_it_has_in_a_ragged_batch(kind):
    module = evaluated(kind, 9, 19, frozen=True, num_layers=2)
    sequences = [torch.randn(length, 9) for length in (7, 1, 12, 4)]
    with torch.no_grad():
        output, state = module(pack_sequence(sequences, enforce_sorted=False))
        together = named(pad_packed_sequence(output)[0], state)
        for b, sequence in enumerate(sequences):
            alone = named(*in_chunks(module, sequence, 1))
            expected = {name: result[:, b] for name, result in together.items()}
            assert_same_bits(alone, expected | {"output": expected["output"][: len(sequence)]})


@pytest.mark.parametrize("layers", [1, 3])
@every_kind
def test_chunks_in_training_give_the_bits_of_the_whole_and_gradients_as_accurate_as_torchs(kind, layers):
    ours, theirs = pair(kind, 9, 19, num_layers=layers)
    x, hx = input_of(ours, steps=12), states_of(ours)
    whole = named(*ours(x, hx))
    for cut in ([1] * 12, [5, 7], [1, 3, 8]):

        def call(module, x, hx, cut=cut):
            return in_chunks(module, x, cut, hx)

        found = with_gradients(ours, x, hx, call=call)
        assert_same_bits({name: found[name] for name in whole}, whole)
        truth = with_gradients(in_double(theirs), x, hx, dtype=torch.float64)
        assert_parity(found, with_gradients(theirs, x, hx), truth)


# What wraps a call.


@pytest.mark.parametrize("options", [{}, {**DEEP, "dropout": 0.3}], ids=["plain", "deep"])
@every_kind
def test_deterministic_algorithms_and_filled_memory_change_nothing(kind, options, filled_memory):
    module = ours_of(kind, 9, 19, **options)
    x, hx, lengths = input_of(module, 5), states_of(module, 5), [6, 1, 4, 2, 6]

    def results():
        by_lengths = with_gradients(module, x, hx, call=lambda m, *args: m(*args, lengths=lengths))
        frozen = run(pymtl.freeze(module.eval()), x, hx)
        return [with_gradients(module.train(), x, hx), by_lengths, run(module.eval(), x, hx), frozen]

    expected = results()
    filled_memory()
    assert torch.are_deterministic_algorithms_enabled()
    module.train()
    for found, before in zip(results(), expected):
        assert_same_bits(found, before)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {**DEEP, "dropout": 0.3}], ids=["plain", "deep"])
@pytest.mark.parametrize("lengths", [None, [6, 1, 4]], ids=["dense", "lengths"])
@every_kind
def test_checkpointing_gives_the_same_gradients(kind, options, lengths, use_reentrant):
    module = ours_of(kind, 5, 7, **options)
    x, hx = input_of(module), states_of(module)

    def plain(module, x, hx):
        return module(x, hx, lengths=lengths)

    def again(module, x, hx):
        def flat(x, *states):
            output, state = plain(module, x, like(hx, states))
            return output, *tuple_of(state)

        output, *state = checkpoint(flat, x, *tuple_of(hx), use_reentrant=use_reentrant)
        return output, like(hx, state)

    def gradients(call):
        module.zero_grad()
        leaves = {"input": x.clone().requires_grad_()}
        leaves |= {f"state {i}": s.clone().requires_grad_() for i, s in enumerate(tuple_of(hx))}
        torch.manual_seed(3)
        results = named(*call(module, leaves["input"], like(hx, list(leaves.values())[1:])))
        sum(result.square().sum() for result in results.values()).backward()
        return results | {name: leaf.grad for name, leaf in (leaves | dict(module.named_parameters())).items()}

    assert_same_bits(gradients(again), gradients(plain))


WANTED = {
    "nothing but the input": ["input"],
    "one matrix": ["weight_hh_l0"],
    "one bias of the second layer": ["bias_hh_l1"],
    "the second layer": [f"{name}_l1" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")],
    "one direction": ["weight_ih_l0_reverse", "weight_hh_l0_reverse"],
    "the initial states": ["h0", "c0"],
}


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@every_kind
def test_gradients_go_only_where_they_are_wanted_with_the_bits_they_have_among_all(kind, wanted):
    module = ours_of(kind, 5, 7, **DEEP)
    x, hx = input_of(module), states_of(module)
    expected = with_gradients(module, x, hx)
    wanted = [name for name in wanted if f"gradient of {name}" in expected]
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in wanted)
    found = with_gradients(module, x, hx, only=wanted)
    assert_same_bits(found, {name: expected[name] for name in found})
    assert {name for name in found if name.startswith("gradient")} == {f"gradient of {name}" for name in wanted}
    given = x.clone().requires_grad_("input" in wanted)
    output, _ = module(given, like(hx, [s.requires_grad_("h0" in wanted) for s in tuple_of(hx)]))
    output.sum().backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None} <= set(wanted)
    assert (given.grad is not None) == ("input" in wanted)


@every_kind
def test_a_module_without_wanted_gradients_records_none(kind):
    module = ours_of(kind, 5, 7, **DEEP).requires_grad_(False)
    x = input_of(module)
    output, state = module(x)
    assert not output.requires_grad
    assert not any(s.requires_grad for s in tuple_of(state))
    output, _ = module(x.requires_grad_())
    output.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("options", [{}, {**DEEP, "dropout": 0.3}], ids=["plain", "deep"])
@every_kind
def test_a_retained_graph_gives_the_same_gradients_again_and_a_freed_one_refuses(kind, options):
    module = ours_of(kind, 5, 7, **options)
    x = input_of(module).requires_grad_()
    leaves = {"input": x, **dict(module.named_parameters())}
    loss = module(x)[0].square().sum()
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)))
    assert_same_bits(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), retain_graph=True))), expected)
    loss.backward()
    assert_same_bits({name: leaf.grad for name, leaf in leaves.items()}, expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@every_kind
def test_gradients_add_up_over_calls(kind):
    module = ours_of(kind, 5, 7, **DEEP)
    x, y = input_of(module), input_of(module)
    first, second = ({n: g for n, g in with_gradients(module, z).items() if n.endswith(("l0", "l1"))} for z in (x, y))
    for z in (x, y):
        results = named(*module(z))
        seeds = [seed.to(results[name].dtype) for name, seed in seeds_for(results).items()]
        torch.autograd.backward(list(results.values()), seeds)
    parameters = {f"gradient of {n}": p.grad for n, p in module.named_parameters() if n.endswith(("l0", "l1"))}
    assert_same_bits(parameters, {name: first[name] + second[name] for name in parameters})


# Hooks.


@pytest.mark.parametrize("with_lengths", [False, True], ids=["dense", "lengths"])
@every_kind
def test_hooks_see_and_change_what_they_see_and_change_of_torchs_module(kind, with_lengths):
    outcomes = []
    for module in pair(kind, 5, 7, dtype=torch.float64, **DEEP):
        log = []

        def before(_, args, log=log):
            log.append(("before", len(args)))
            return tuple(2 * x for x in args)

        def after(_, args, results, log=log):
            log.append(("after", len(args), len(results), len(tuple_of(results[1]))))
            return 3 * results[0], results[1]

        def before_backward(_, gradients, log=log):
            log.append(("before backward", [g is None or g.shape for g in gradients]))

        def after_backward(_, of_input, of_output, log=log):
            log.append(("after backward", [g.shape for g in of_input], [g is None or g.shape for g in of_output]))
            return tuple(5 * g for g in of_input)

        handles = [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after),
            module.register_full_backward_pre_hook(before_backward),
            module.register_full_backward_hook(after_backward),
        ]
        torch.manual_seed(0)
        x = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
        for _ in range(2):
            ours = with_lengths and isinstance(module, pymtl.recurrent.Recurrent)
            output, _ = module(x, lengths=[6, 6, 6]) if ours else module(x)
            output.square().sum().backward()
            log.append(x.grad.clone())
            for handle in handles:
                handle.remove()
        outcomes.append(log)
    ours, theirs = outcomes
    assert len(ours) == 6
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b)
        else:
            assert a == b


@every_kind
def test_forward_hooks_see_a_packed_sequence_as_it_came(kind):
    module = ours_of(kind, 5, 7, **DEEP)
    packed = pack_sequence([torch.randn(length, 5) for length in (2, 5, 1)], enforce_sorted=False)
    expected, seen = run(module, packed), []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module.register_forward_hook(lambda _, args, results: seen.append(results))
    output, state = module(packed)
    assert seen[0] is packed
    assert seen[1][0] is output
    assert_same_bits(named(output, state), expected)


@every_kind
def test_hooks_with_keywords_may_give_the_lengths(kind):
    module = ours_of(kind, 5, 7, **DEEP)
    x = input_of(module)
    expected = run(module, x, lengths=[6, 2, 3])
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "lengths": [6, 2, 3]}), with_kwargs=True
    )
    assert_same_bits(run(module, x), expected)
    handle.remove()
    assert not torch.equal(run(module, x)["output"], expected["output"])


@every_kind
def test_hooks_of_tensors_run_in_backward(kind):
    module = ours_of(kind, 5, 7, **DEEP)
    x = input_of(module).requires_grad_()
    calls = []
    module.weight_hh_l0.register_hook(lambda g: calls.append("weight") or 2 * g)
    module.bias_ih_l1.register_post_accumulate_grad_hook(lambda p: calls.append("bias"))
    expected = dict(zip(("x", "w"), torch.autograd.grad(module(x)[0].sum(), [x, module.weight_hh_l0])))
    calls.clear()
    output, _ = module(x)
    output.retain_grad()
    output.sum().backward()
    assert sorted(calls) == ["bias", "weight"]
    assert_same_bits({"x": x.grad, "w": module.weight_hh_l0.grad}, expected)
    assert torch.equal(output.grad, torch.ones_like(output))
