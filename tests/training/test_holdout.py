"""Records held out to validate on."""

import json
import os
import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymtl.training import config as configuration
from pymtl.training.data import read_all
from pymtl.training.errors import DataError
from pymtl.training.holdout import stratified

SETS = st.lists(st.frozensets(st.sampled_from("abcdef"), max_size=3), min_size=1, max_size=40)


def counts(strata, indices):
    return Counter(label for i in indices for label in strata[i])


@settings(max_examples=200, deadline=None)
@given(strata=SETS, data=st.data())
def test_the_count_is_exact_and_the_indices_rise(strata, data):
    count, seed = data.draw(st.integers(1, len(strata))), data.draw(st.integers(0, 99))
    chosen = stratified(strata, count, seed)
    assert len(chosen) == count
    assert chosen == sorted(set(chosen))
    assert 0 <= chosen[0] <= chosen[-1] < len(strata)
    assert chosen == stratified(strata, count, seed)


@settings(max_examples=300, deadline=None)
@given(strata=SETS, data=st.data())
def test_the_last_record_of_a_label_is_not_taken_while_others_can_be(strata, data):
    count = data.draw(st.integers(1, len(strata)))
    chosen = set(stratified(strata, count, data.draw(st.integers(0, 99))))
    left = counts(strata, set(range(len(strata))) - chosen)
    if all(left[label] > 0 for labels in strata for label in labels):
        return
    # A label has no record left: then no other choice of one record instead of one that was taken would keep them all.
    free = [i for i in range(len(strata)) if i not in chosen and all(left[label] > 1 for label in strata[i])]
    assert free == []


@settings(max_examples=200, deadline=None)
@given(labels=st.lists(st.sampled_from("aaaabbc"), min_size=10, max_size=60), seed=st.integers(0, 99))
def test_each_class_is_held_out_as_often_as_all_records_are(labels, seed):
    strata = [frozenset(label) for label in labels]
    count = max(3, round(0.25 * len(labels)))
    held = counts(strata, stratified(strata, count, seed))
    for label, total in counts(strata, range(len(strata))).items():
        assert abs(held[label] - count / len(labels) * total) < 2
        assert 1 <= held[label] < total or total == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_class_with_four_examples_of_two_hundred_is_held_out(seed):
    strata = [frozenset({"rare"} if i % 50 == 7 else {"often" if i % 3 else "other"}) for i in range(200)]
    chosen = stratified(strata, 20, seed)
    held = counts(strata, chosen)
    assert len(chosen) == 20
    assert held["rare"] in (1, 2)
    assert abs(held["often"] - 0.1 * 130) <= 1
    assert abs(held["other"] - 0.1 * 66) <= 1


def test_different_seeds_choose_differently():
    strata = [frozenset("ab"[i % 2]) for i in range(100)]
    assert len({tuple(stratified(strata, 10, seed)) for seed in range(10)}) == 10


def test_labels_with_a_single_record_stay_in_training():
    strata = [frozenset({f"only {i}"}) if i < 50 else frozenset({"often"}) for i in range(60)]
    for seed in range(20):
        assert all(i >= 50 for i in stratified(strata, 9, seed))


def test_where_every_record_is_the_last_of_a_label_the_count_is_kept_all_the_same():
    assert len(stratified([frozenset({i}) for i in range(10)], 4, 0)) == 4


@pytest.mark.parametrize("rare", [4, 20, 40])
def test_the_rarest_label_of_several_tasks_is_held_out_as_often_as_all_records(rare):
    rng = random.Random(0)
    strata = [
        frozenset(
            {("tags", "rare" if i % (400 // rare) == 0 else "O"), *((f"task {k}", rng.randrange(4)) for k in "ab")}
        )
        for i in range(400)
    ]
    for seed in range(20):
        held = counts(strata, stratified(strata, 40, seed))["tags", "rare"]
        assert max(1, rare // 10 - 1) <= held <= rare // 10 + 2


@pytest.mark.parametrize("strata", [[frozenset()] * 20, [frozenset()] * 10 + [frozenset("a")] * 10])
def test_records_without_labels_are_held_out_too(strata):
    assert len(stratified(strata, 5, 0)) == 5


def test_the_choice_does_not_depend_on_the_process():
    code = (
        "from pymtl.training.holdout import stratified\n"
        "print(stratified([frozenset({('t', 'abcdefg'[i % 7]), ('u', 'xyz'[i % 3])}) for i in range(90)], 9, 5))"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    ]
    assert found[0] == found[1]


# Of a configuration


@pytest.fixture
def read(tmp_path):
    def read(records, tasks=None, seed=0, **data):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
        tasks = tasks or {"mood": {"kind": "classification"}}
        raw = {"data": {"train": "a.jsonl", **data}, "tasks": tasks, "seed": seed, "folder": str(tmp_path)}
        return read_all(configuration.parse(raw, "c.toml"))

    return read


def moods(records):
    return Counter(record.labels["mood"] for record in records[""])


@pytest.mark.parametrize("seed", range(20))
def test_a_rare_class_is_validated_on_by_every_seed(read, seed):
    sets = read([{"text": f"w{i}", "mood": "rare" if i % 50 == 0 else "often"} for i in range(200)], seed=seed)
    assert moods(sets.valid)["rare"] in (1, 2)
    assert moods(sets.valid).total() == 20
    assert moods(sets.train) + moods(sets.valid) == {"rare": 4, "often": 196}


@pytest.mark.parametrize(("total", "share", "count"), [(30, 0.1, 3), (10, 0.01, 1), (10, 0.5, 5), (17, 0.3, 5)])
def test_the_share_says_how_many_are_held_out(read, total, share, count):
    sets = read([{"text": f"w{i}", "mood": "xy"[i % 2]} for i in range(total)], holdout=share)
    assert len(sets.valid[""]) == count
    assert len(sets.train[""]) == total - count
    texts = [record.tokens[0] for record in sets.train[""] + sets.valid[""]]
    assert sorted(texts) == sorted(f"w{i}" for i in range(total))
    assert [t for t in (f"w{i}" for i in range(total)) if t in {r.tokens[0] for r in sets.train[""]}] == [
        record.tokens[0] for record in sets.train[""]
    ]


@pytest.mark.parametrize("kind", ["tagging", "multilabel"])
def test_rare_tags_and_rare_ones_of_several_labels_are_held_out(read, kind):
    rare, often = (["B-rare"], ["B-often"]) if kind == "tagging" else (["rare"], ["often"])
    records = [{"text": f"w{i}", "t": rare if i in (11, 50) else often} for i in range(60)]
    for seed in range(10):
        sets = read(records, {"t": {"kind": kind}}, seed)
        assert sum(record.labels["t"] == rare for record in sets.valid[""]) == 1


def test_the_only_record_of_a_class_is_trained_on(read):
    records = [{"text": f"w{i}", "mood": f"only {i}" if i < 30 else "often"} for i in range(40)]
    for seed in range(10):
        assert moods(read(records, seed=seed).valid) == {"often": 4}


def test_numbers_are_held_out_by_chance_alone(read):
    records = [{"text": f"w{i}", "score": i} for i in range(30)]
    sets = read(records, {"score": {"kind": "regression"}})
    assert len(sets.valid[""]) == 3


def test_a_single_record_cannot_be_both(read):
    with pytest.raises(DataError, match=r"a\.jsonl: expected records to train on and others to hold out, got 0 and 1"):
        read([{"text": "a", "mood": "x"}])
