"""What all sharing schemes have in common, and the states they give to the tasks."""

import pytest
import torch
from schemes import (
    INPUT,
    LENGTHS,
    TASKS,
    H,
    batch,
    every_batch,
    every_depth,
    every_direction,
    finals,
    gradients,
    unpacked,
)

from pymtl.sharing import CGC, SCHEMES, CrossStitch, HierarchicalSharing, MMoE, SharedPrivate, SoftSharing
from pymtl.states import States

EVERY = {
    "hard": {},
    "soft": {"weight": 0.1},
    "shared_private": {"adversarial": 0.1},
    "hierarchical": {},
    "cross_stitch": {},
    "mmoe": {},
    "cgc": {},
    "task_attention": {},
}
every_scheme = pytest.mark.parametrize("name", EVERY)


def test_every_scheme_is_tested():
    assert list(EVERY) == list(SCHEMES)


@every_scheme
@every_depth
@every_direction
def test_separate_directions_read_one_side_only(name, num_layers, bidirectional):
    """The claim is tight: where it is denied, a half does read the other side."""
    scheme = SCHEMES[name](TASKS, INPUT, H, num_layers, bidirectional).double().eval()
    data, sizes = batch([5])
    changed = data.detach().clone()
    changed[2] += 1
    before, after = (scheme(x, sizes).states for x in (data, changed))
    half = scheme.out_features // scheme.directions
    for task in TASKS:
        a, b = before[task].tokens, after[task].tokens
        same = torch.equal(a[:2, :half], b[:2, :half])
        if bidirectional:
            same = same and torch.equal(a[3:, half:], b[3:, half:])
        assert same == scheme.separates_directions(task)


@every_scheme
def test_dropout_is_between_layers_and_in_training_only(name):
    data, sizes = batch(dtype=torch.float32)
    for num_layers in (1, 2):
        levels = {"levels": dict.fromkeys(TASKS, num_layers)} if name == "hierarchical" else {}
        torch.manual_seed(0)
        scheme = SCHEMES[name](TASKS, INPUT, H, num_layers, dropout=0.5, **levels)
        torch.manual_seed(0)
        without = SCHEMES[name](TASKS, INPUT, H, num_layers, **levels)
        for task in TASKS:
            expected = without(data, sizes).states[task].tokens
            assert torch.equal(scheme.eval()(data, sizes).states[task].tokens, expected)
            assert torch.equal(scheme.train()(data, sizes).states[task].tokens, expected) == (num_layers == 1)


@every_scheme
def test_penalties_are_for_training_with_gradients(name):
    scheme = SCHEMES[name](TASKS, INPUT, H, **EVERY[name])
    data, sizes = batch(dtype=torch.float32)
    expected = {"soft": {"l2"}, "shared_private": {"orthogonality", "adversarial"}}.get(name, set())
    penalties = scheme.train()(data, sizes, ["a", "b"]).penalties
    assert set(penalties) == expected
    assert all(p.shape == () and p.requires_grad for p in penalties.values())
    assert scheme.eval()(data, sizes, ["a", "b"]).penalties == {}
    with torch.no_grad():
        assert scheme.train()(data, sizes, ["a", "b"]).penalties == {}


@pytest.mark.parametrize(("name", "option"), [("soft", "weight"), ("shared_private", "orthogonality")], ids=str)
def test_a_weight_of_zero_asks_for_no_penalty(name, option):
    data, sizes = batch(dtype=torch.float32)
    assert SCHEMES[name](TASKS, INPUT, H, **{option: 0})(data, sizes).penalties == {}


@every_scheme
def test_names_and_numbers_that_do_not_fit_are_refused(name):
    make = SCHEMES[name]
    refused = [
        (([], INPUT, H), {}, "tasks: expected at least one name"),
        ((["a", "a"], INPUT, H), {}, "tasks: expected at least one name, all different"),
        ((["a.b"], INPUT, H), {}, "tasks: .* got 'a.b'"),
        ((["a", ""], INPUT, H), {}, "tasks: .* got ''"),
        ((["a", "keys"], INPUT, H), {}, "tasks: .* got 'keys'"),
        ((TASKS, INPUT, H), {"dropout": 1.5}, "dropout: .* got 1.5"),
        ((TASKS, INPUT, H), {"dropout": float("nan")}, "dropout"),
        ((TASKS, INPUT, 0), {}, "hidden_size"),
    ]
    if name != "hierarchical":
        refused.append(((TASKS, INPUT, H), {"num_layers": 0}, "num_layers: .* got 0"))
    for arguments, options, message in refused:
        with pytest.raises(ValueError, match=message):
            make(*arguments, **options)


def test_a_hierarchy_has_as_many_layers_as_its_levels_ask_for():
    assert HierarchicalSharing(TASKS, INPUT, H, num_layers=0).num_layers == 3


@pytest.mark.parametrize("word", ["training", "_modules"])
@pytest.mark.parametrize("name", EVERY)
def test_a_task_called_as_what_modules_hold_is_refused(name, word):
    with pytest.raises(ValueError, match=f"tasks: expected names fit for modules, got '{word}'"):
        SCHEMES[name]([word, "b"], INPUT, H)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftSharing(TASKS, INPUT, H, penalty="l1"), "penalty: expected one of .*, got 'l1'"),
        (lambda: SoftSharing(TASKS, INPUT, H, weight=-1), "weight: .* got -1"),
        (lambda: SoftSharing(TASKS, INPUT, H, weight=float("nan")), "weight: .* got nan"),
        (lambda: SharedPrivate(TASKS, INPUT, H, orthogonality=-0.1), "orthogonality: .* got -0.1"),
        (lambda: SharedPrivate(TASKS, INPUT, H, adversarial=-0.1), "adversarial: .* got -0.1"),
        (lambda: SharedPrivate(["a", "shared"], INPUT, H), "tasks: expected other names than 'shared'"),
        (lambda: CGC(["a", "shared"], INPUT, H), "tasks: expected other names than 'shared'"),
        (lambda: CGC(TASKS, INPUT, H, num_experts=0), "num_experts: .* got 0"),
        (lambda: MMoE(TASKS, INPUT, H, num_experts=0), "num_experts: .* got 0"),
        (lambda: CrossStitch(TASKS, INPUT, H, self_weight=1.1), "self_weight: .* got 1.1"),
        (lambda: CrossStitch(TASKS, INPUT, H, self_weight=float("nan")), "self_weight: .* got nan"),
        (lambda: HierarchicalSharing(TASKS, INPUT, H, levels={"a": 1}), "levels: expected a level for each"),
        (lambda: HierarchicalSharing(TASKS, INPUT, H, levels={}), "levels: expected a level for each"),
        (lambda: HierarchicalSharing(["a"], INPUT, H, levels={"a": 1, "z": 2}), "levels: expected a level for each"),
        (lambda: HierarchicalSharing(["a", "b"], INPUT, H, levels={"a": 0, "b": 1}), "levels: .* from 1, got"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_scheme
def test_an_unknown_task_is_refused_by_name(name):
    scheme = SCHEMES[name](TASKS, INPUT, H)
    data, sizes = batch(dtype=torch.float32)
    with pytest.raises(KeyError, match=r"tasks: unknown task 'z', expected one of \['a', 'b', 'c'\]"):
        scheme(data, sizes, ["a", "z"])


# States.


@every_batch
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("trailing", [0, 2], ids=["", "trailing zeros"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_pooling_of_derived_states_is_that_of_each_sequence(lengths, directions, trailing, fused):
    data, sizes = batch(lengths, 6)
    sequences = unpacked(data, sizes)
    states = States(data, torch.cat([sizes, sizes.new_zeros(trailing)]), directions, fused=fused)
    expected = {
        "last": finals(sequences, directions),
        "mean": torch.stack([s.mean(0) for s in sequences]),
        "max": torch.stack([s.amax(0) for s in sequences]),
    }
    for kind, value in expected.items():
        if fused or trailing == 0 or kind == "last":
            torch.testing.assert_close(states.pooled(kind), value)
            torch.testing.assert_close(gradients([states.pooled(kind)], [data]), gradients([value], [data]))
            assert states.pooled(kind) is states.pooled(kind)
    assert torch.equal(states.rows(), torch.tensor([b for t in range(max(lengths)) for b in range(int(sizes[t]))]))


def test_a_given_final_state_is_kept_and_mapped_where_asked_for():
    data, sizes = batch(size=6)
    last = torch.randn(len(LENGTHS), 6, dtype=data.dtype)
    states = States.of(data, sizes, 2, last)
    assert states.pooled("last") is last
    assert len(states.tensors()) == 2
    both = states.map(lambda x: 2 * x, with_last=True)
    assert torch.equal(both.tokens, 2 * data)
    assert torch.equal(both.pooled("last"), 2 * last)
    tokens_only = states.map(lambda x: 2 * x, with_last=False)
    torch.testing.assert_close(tokens_only.pooled("last"), finals(unpacked(2 * data, sizes), 2))
    derived = States.of(data, sizes, 2)
    derived.pooled("last")
    assert len(derived.tensors()) == 1
