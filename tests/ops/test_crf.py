import itertools

import pytest
import torch
from parity import assert_parity, assert_same_bits
from samples import shifted, spread, transposed
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from pymtl import ops, reference

# lengths, longest first; classes; scale of the scores
CASES = [
    ((1,), 1, 1.0),
    ((1,), 5, 1.0),
    ((4,), 1, 1.0),
    ((3, 2, 1), 3, 1.0),
    ((5, 5, 5), 2, 10.0),
    ((9, 7, 7, 4, 1, 1), 17, 1.0),
    ((2, 1), 33, 1.0),
    ((12,) * 9, 72, 3.0),
    ((40, 3), 7, 30.0),
    ((6, 4), 8, 300.0),  # in log space
]
cased = pytest.mark.parametrize(("lengths", "classes", "scale"), CASES, ids=str)
NAMES = ("emissions", "start", "end", "transitions")


def sizes_of(lengths):
    return torch.tensor([sum(length > t for length in lengths) for t in range(lengths[0])])


def sample(lengths, classes, scale=1.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    tokens = sum(lengths)
    tags = torch.randint(0, classes, (tokens,), generator=generator)
    scores = (draw(tokens, classes), draw(classes), draw(classes), draw(classes, classes))
    return scores, sizes_of(lengths), tags, torch.randn(len(lengths), generator=generator, dtype=torch.float64)


def run(function, scores, batch_sizes, tags, seed):
    leaves = [score.detach().clone().requires_grad_() for score in scores]
    emissions, *others = leaves
    result = function(emissions, batch_sizes, tags, *others)
    gradients = torch.autograd.grad(result, leaves, seed.to(result.dtype), allow_unused=True, materialize_grads=True)
    return {"result": result.detach()} | {f"gradient of {name}": g for name, g in zip(NAMES, gradients)}


def paths(length, classes):
    return itertools.product(range(classes), repeat=length)


def score_of(path, emissions, start, end, transitions):
    total = start[path[0]] + end[path[-1]]
    for t, tag in enumerate(path):
        total = total + emissions[t, tag]
        if t > 0:
            total = total + transitions[path[t - 1], tag]
    return total


# Accuracy and derivatives.


@cased
@pytest.mark.parametrize("tagged", [True, False], ids=["tags", "log-partition"])
def test_float32_is_as_accurate_as_log_space(lengths, classes, scale, tagged, isa):
    scores, sizes, tags, seed = sample(lengths, classes, scale)
    tags = tags if tagged else None
    assert_parity(
        run(ops.crf, scores, sizes, tags, seed),
        run(reference.crf, scores, sizes, tags, seed),
        run(reference.crf, [s.double() for s in scores], sizes, tags, seed),
    )


@pytest.mark.parametrize(("length", "classes"), [(1, 1), (1, 4), (2, 3), (3, 3), (4, 2), (6, 2), (2, 9)])
@pytest.mark.parametrize("scale", [1.0, 40.0, 400.0])
def test_it_agrees_with_the_enumeration_of_all_paths(length, classes, scale, isa):
    (emissions, start, end, transitions), sizes, tags, _ = sample((length,), classes, scale, torch.float64)
    leaves = [t.requires_grad_() for t in (emissions, start, end, transitions)]
    every = torch.stack([score_of(path, *leaves) for path in paths(length, classes)])
    partition = torch.logsumexp(every, 0)
    expected = score_of(tags.tolist(), *leaves) - partition
    for given, truth in ((None, partition), (tags, expected)):
        ours = ops.crf(emissions, sizes, given, *leaves[1:])
        torch.testing.assert_close(ours[0], truth, rtol=1e-12, atol=1e-11)
        for a, b in zip(
            torch.autograd.grad(ours.sum(), leaves, retain_graph=True),
            torch.autograd.grad(truth, leaves, retain_graph=True, allow_unused=True, materialize_grads=True),
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    found, best = ops.crf_decode(emissions, sizes, *leaves[1:])
    torch.testing.assert_close(best[0], every.max(), rtol=1e-13, atol=0)
    torch.testing.assert_close(score_of(found.tolist(), *leaves), every.max(), rtol=1e-13, atol=0)


@cased
def test_the_reference_s_float64_and_ours_agree(lengths, classes, scale):
    scores, sizes, tags, seed = sample(lengths, classes, scale, torch.float64)
    ours, theirs = run(ops.crf, scores, sizes, tags, seed), run(reference.crf, scores, sizes, tags, seed)
    size = max(float(scores[0].abs().max()), 1.0) * lengths[0]
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-13 * size)


@pytest.mark.parametrize("lengths", [(1,), (4, 2, 1)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["probabilities", "log-space"])
@pytest.mark.parametrize("tagged", [True, False])
def test_gradcheck_and_gradgradcheck(lengths, scale, tagged):
    scores, sizes, tags, _ = sample(lengths, 3, 1.0, torch.float64)
    if scale > 1:
        scores[3][0, 1] += scale
    leaves = [score.requires_grad_() for score in scores]

    def function(emissions, *others):
        return ops.crf(emissions, sizes, tags if tagged else None, *others)

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("wanted", NAMES)
def test_gradients_where_asked_for(wanted):
    scores, sizes, tags, seed = sample((4, 3), 5)
    every = run(ops.crf, scores, sizes, tags, seed)
    leaves = {name: s.detach().clone().requires_grad_(name == wanted) for name, s in zip(NAMES, scores)}
    result = ops.crf(leaves["emissions"], sizes, tags, *(leaves[name] for name in NAMES[1:]))
    (gradient,) = torch.autograd.grad(result, leaves[wanted], seed.float())
    assert_same_bits({"gradient": gradient}, {"gradient": every[f"gradient of {wanted}"]})


@cased
def test_the_raw_op_gives_the_same_bits(lengths, classes, scale, dtype):
    scores, sizes, tags, seed = sample(lengths, classes, scale, dtype)
    raw = run(lambda *a: torch.ops.pymtl.crf(*a)[0], scores, sizes, tags, seed)
    assert_same_bits(raw, run(ops.crf, scores, sizes, tags, seed))


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
def test_opcheck(tagged, gradient, dtype):
    (emissions, *others), sizes, tags, seed = sample((4, 2, 1), 3, 1.0, dtype)
    leaves = [t.requires_grad_(gradient) for t in (emissions, *others)]
    tags = tags if tagged else None
    opcheck(torch.ops.pymtl.crf.default, (leaves[0], sizes, tags, *leaves[1:]))
    detached = [leaf.detach() for leaf in leaves]
    opcheck(torch.ops.pymtl.crf_decode.default, (detached[0], sizes, *detached[1:]))
    _, alphas, scales = torch.ops.pymtl.crf(detached[0], sizes, tags, *detached[1:])
    arguments = (seed.to(dtype), detached[0], sizes, tags, *detached[1:], alphas, scales)
    opcheck(torch.ops.pymtl.crf_backward.default, arguments)


# The same bits.


@cased
def test_a_sequence_gives_the_same_bits_alone_as_among_others(lengths, classes, scale, dtype, isa):
    scores, sizes, tags, _ = sample(lengths, classes, scale, dtype)
    emissions, *others = scores
    together = ops.crf(emissions, sizes, tags, *others)
    best, best_scores = ops.crf_decode(emissions, sizes, *others)
    starts = [0, *itertools.accumulate(sizes.tolist())]
    for row, length in enumerate(lengths):
        at = torch.tensor([starts[t] + row for t in range(length)])
        alone = torch.ones(length, dtype=torch.int64)
        assert_same_bits(
            {"result": ops.crf(emissions[at], alone, tags[at], *others)}, {"result": together[row : row + 1]}
        )
        path, score = ops.crf_decode(emissions[at], alone, *others)
        assert_same_bits({"path": path, "score": score}, {"path": best[at], "score": best_scores[row : row + 1]})


@cased
def test_any_number_of_threads_gives_the_same_bits(lengths, classes, scale, dtype, isa, threads):
    scores, sizes, tags, seed = sample(lengths, classes, scale, dtype)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(run(ops.crf, scores, sizes, tags, seed))
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


def test_runs_repeat_bit_for_bit(dtype, filled_memory):
    arguments = sample((9, 7, 7, 4, 1), 17, 1.0, dtype)
    expected = run(ops.crf, *arguments)
    for _ in range(9):
        assert_same_bits(run(ops.crf, *arguments), expected)
    filled_memory()
    assert_same_bits(run(ops.crf, *arguments), expected)


@pytest.mark.parametrize("layout", [spread, transposed, shifted])
def test_other_memory_layouts_give_the_same_bits(layout, dtype):
    scores, sizes, tags, _ = sample((9, 7, 1), 17, 1.0, dtype)
    views = [layout(score) for score in scores]
    ours = ops.crf(views[0], spread(sizes), spread(tags), *views[1:])
    assert_same_bits({"result": ours}, {"result": ops.crf(scores[0], sizes, tags, *scores[1:])})


# Decoding.


@cased
def test_decoding_finds_the_reference_s_path(lengths, classes, scale, dtype, isa):
    (emissions, *others), sizes, _, _ = sample(lengths, classes, scale, dtype)
    ours, theirs = ops.crf_decode(emissions, sizes, *others), reference.crf_decode(emissions, sizes, *others)
    assert torch.equal(ours[0], theirs[0])
    assert_same_bits({"scores": ours[1]}, {"scores": theirs[1]})


def test_among_equal_paths_the_lowest_tags_win(isa):
    sizes = torch.tensor([1, 1, 1])
    zeros = torch.zeros(20)
    path, score = ops.crf_decode(torch.zeros(3, 20), sizes, zeros, zeros, torch.zeros(20, 20))
    assert path.tolist() == [0, 0, 0]
    assert score.tolist() == [0.0]


# Ranges.


def test_a_path_far_below_the_others_is_not_lost(isa):
    # Tag 1 is e^-800 as likely as tag 0 until the last token forbids tag 0: scaled probabilities alone would say 0.
    emissions = torch.zeros(5, 2, dtype=torch.float64)
    emissions[:4, 1] = -200.0
    emissions[4, 0] = -torch.inf
    transitions = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]], dtype=torch.float64)
    zeros = torch.zeros(2, dtype=torch.float64)
    result = ops.crf(emissions, torch.ones(5, dtype=torch.int64), None, zeros, zeros, transitions)
    torch.testing.assert_close(result, torch.tensor([-800.0], dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["probabilities", "log-space"])
def test_forbidden_transitions_have_no_gradient_and_no_path(scale, isa):
    (emissions, start, end, transitions), sizes, tags, _ = sample((6, 5, 2), 4, 1.0, torch.float64)
    transitions[2, :] = -torch.inf
    transitions[1, 3] = -torch.inf
    start[3] = -torch.inf
    transitions[0, 1] += scale
    tags = torch.zeros_like(tags)
    ours = run(ops.crf, (emissions, start, end, transitions), sizes, tags, torch.ones(3))
    theirs = run(reference.crf, (emissions, start, end, transitions), sizes, tags, torch.ones(3))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-15 * (1 + scale))
    assert (ours["gradient of transitions"][2] == 0).all()
    path, _ = ops.crf_decode(emissions, sizes, start, end, transitions)
    starts = [0, *itertools.accumulate(sizes.tolist())]
    for t in range(1, 6):
        for row in range(int(sizes[t])):
            assert transitions[path[starts[t - 1] + row], path[starts[t] + row]] > -torch.inf


def test_a_sequence_that_no_path_allows_has_probability_zero(isa):
    scores, sizes, _, _ = sample((3,), 2, 1.0, torch.float64)
    scores[0][1] = -torch.inf
    assert ops.crf(scores[0], sizes, None, *scores[1:]).tolist() == [-torch.inf]


@pytest.mark.parametrize("where", NAMES)
def test_nan_propagates_to_its_own_sequences_only(where, isa):
    scores, sizes, tags, _ = sample((4, 3), 5)
    clean = ops.crf(scores[0], sizes, tags, *scores[1:])
    spoilt = [score.clone() for score in scores]
    spoilt[NAMES.index(where)].view(-1)[0] = torch.nan  # of the emissions: the first sequence's
    result = ops.crf(spoilt[0], sizes, tags, *spoilt[1:])
    assert result[0].isnan()
    if where == "emissions":
        assert_same_bits({"other": result[1:]}, {"other": clean[1:]})


def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(dtype):
    scores = [torch.zeros(s, dtype=dtype, requires_grad=True) for s in ((0, 3), (3,), (3,), (3, 3))]
    sizes, tags = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    result = ops.crf(scores[0], sizes, tags, *scores[1:])
    assert result.shape == (0,)
    for score, gradient in zip(scores, torch.autograd.grad(result.sum(), scores)):
        assert gradient.shape == score.shape
        assert not gradient.any()
    path, best = ops.crf_decode(scores[0].detach(), sizes, *(s.detach() for s in scores[1:]))
    assert path.shape == (0,)
    assert best.shape == (0,)


# Bad input.

REFUSED = [
    ({"emissions": torch.zeros(6)}, RuntimeError, r"emissions: expected \[tokens, classes\], got 1-D"),
    ({"emissions": torch.zeros(6, 0)}, RuntimeError, "emissions: expected at least one class, got none"),
    ({"emissions": torch.zeros(5, 3)}, RuntimeError, r"emissions: expected size \[6, 3\], got \[5, 3\]"),
    ({"emissions": torch.zeros(6, 3).half()}, RuntimeError, "emissions: expected dtype Float or Double, got Half"),
    ({"emissions": torch.zeros(6, 3).long()}, RuntimeError, "emissions: expected dtype Float or Double, got Long"),
    ({"batch_sizes": torch.tensor([1, 2, 3])}, RuntimeError, "batch_sizes: expected sizes that never increase"),
    ({"batch_sizes": torch.tensor([3, -1, 4])}, RuntimeError, "batch_sizes: expected sizes that never increase"),
    ({"batch_sizes": torch.tensor([3, 2, 1]).int()}, RuntimeError, "batch_sizes: expected dtype Long, got Int"),
    ({"start": torch.zeros(4)}, RuntimeError, r"start: expected size \[3\], got \[4\]"),
    ({"start": torch.zeros(3).double()}, RuntimeError, "start: expected dtype Float, got Double"),
    ({"end": torch.zeros(2)}, RuntimeError, r"end: expected size \[3\], got \[2\]"),
    ({"transitions": torch.zeros(3, 4)}, RuntimeError, r"transitions: expected size \[3, 3\], got \[3, 4\]"),
    ({"transitions": torch.zeros(3, 3, device="meta")}, RuntimeError, "transitions: expected .* CPU"),
    ({"tags": torch.zeros(5).long()}, RuntimeError, r"tags: expected size \[6\], got \[5\]"),
    ({"tags": torch.zeros(6).int()}, RuntimeError, "tags: expected dtype Long, got Int"),
    ({"tags": torch.tensor([0, 0, 0, 0, 3, 0])}, IndexError, "tags: expected classes from 0 to 2, got 3 at token 4"),
    ({"tags": torch.tensor([-1, 0, 0, 0, 0, 0])}, IndexError, "tags: expected classes from 0 to 2, got -1 at token 0"),
]


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED, ids=lambda v: "")
def test_bad_input_is_refused_by_name_and_values(changes, kind, message, gradient):
    (emissions, start, end, transitions), sizes, tags, _ = sample((3, 2, 1), 3)
    arguments = {
        "emissions": emissions.requires_grad_(gradient),
        "batch_sizes": sizes,
        "tags": tags,
        "start": start,
        "end": end,
        "transitions": transitions,
    }
    with pytest.raises(kind, match=message):
        ops.crf(**(arguments | changes))


def test_scales_that_are_all_but_lost_are_not_multiplied_away(dtype, isa):
    forbidden = -torch.inf
    transitions = torch.full((3, 3), forbidden, dtype=dtype)
    transitions[0, 0] = transitions[1, 1] = 0
    transitions[2, 2] = 199
    emissions = torch.zeros(5, 3, dtype=dtype)
    emissions[0, 1] = emissions[1, 1] = -149
    emissions[2, 1] = -40
    emissions[4] = torch.tensor([forbidden, -149, 0])
    start, end = torch.tensor([0, 0, forbidden], dtype=dtype), torch.zeros(3, dtype=dtype)
    partition = ops.crf(emissions, torch.ones(5, dtype=torch.int64), None, start, end, transitions)
    torch.testing.assert_close(partition, torch.tensor([-487.0], dtype=dtype))


@pytest.mark.parametrize("size", [1e3, 1e5, 1e9, 1e15, 1e20])
def test_gradients_of_large_scores_are_as_accurate_as_plain_ones(size, isa):
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        scores = [size * torch.randn(*shape, generator=generator) for shape in ((9, 4), (4,), (4,), (4, 4))]
        sizes, seed = torch.tensor([3, 2, 2, 1, 1]), torch.ones(3, dtype=torch.float64)
        exact = [score.double() for score in scores]
        found = run(ops.crf, scores, sizes, None, seed)
        assert_parity(
            found, run(reference.crf, scores, sizes, None, seed), run(reference.crf, exact, sizes, None, seed)
        )
        torch.testing.assert_close(found["gradient of emissions"].sum(1), torch.ones(9))


@pytest.mark.parametrize("values", [[torch.nan, -torch.inf], [torch.nan, torch.inf], [0.0, torch.nan]], ids=str)
def test_nan_is_never_lost(values, dtype):
    zeros = torch.zeros(2, dtype=dtype)
    emissions = torch.tensor([values, [0.0, 0.0]], dtype=dtype)
    transitions = torch.zeros(2, 2, dtype=dtype)
    steps = torch.ones(2, dtype=torch.int64)
    assert ops.crf(emissions, steps, None, zeros, zeros, transitions).isnan().all()
    transitions[0] = torch.tensor(values, dtype=dtype)
    assert ops.crf(torch.zeros(2, 2, dtype=dtype), steps, None, zeros, zeros, transitions).isnan().all()


def test_an_unreachable_class_has_finite_derivatives_of_any_order():
    scores, sizes, tags, _ = sample((3, 2), 3, dtype=torch.float64)
    scores[3][:, 0] = -torch.inf
    scores[1][0] = -torch.inf
    tags = tags.clamp(min=1)
    leaves = [score.clone().requires_grad_() for score in scores]
    for function in (ops.crf, reference.crf):
        first = torch.autograd.grad(function(leaves[0], sizes, tags, *leaves[1:]).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves[0])
        assert all(torch.isfinite(values).all() for values in (*first, *second))
