"""What a comparison trains, and what it says of the runs."""

import json
import subprocess
import warnings
from contextlib import nullcontext, suppress
from itertools import product
from pathlib import Path

import pytest
import toy
from scipy import stats

from pymtl.commands.compare import markdown
from pymtl.training import comparison
from pymtl.training import config as configuration
from pymtl.training.errors import ConfigError, RunError
from pymtl.training.grid import Variant, run_folder, variants
from pymtl.training.plots import comparison_plot
from pymtl.training.run import Run

LANGUAGE = """
[tasks.words]
kind = "language_model"
auxiliary = true
"""


@pytest.fixture
def path(tmp_path):
    """Two tasks, and an auxiliary one that needs no labels."""
    toy.write_lines(tmp_path / "more.jsonl", toy.requests(5, 9))
    toml = toy.TOML.replace('test = "test.jsonl"', 'test = "test.jsonl"\nunlabelled = "more.jsonl"')
    return toy.write_files(tmp_path, toml + LANGUAGE)


def tasks_of(grid):
    return {variant.label: list(variant.raw["tasks"]) for variant in grid}


# What is trained.


def test_a_value_of_tasks_is_a_subset_of_them(path):
    grid = variants(path, ["tasks=intent,slots + intent,intent+words+slots"], [], False)
    expected = {"intent": ["intent"], "slots + intent": ["intent", "slots"]}
    assert tasks_of(grid) == expected | {"intent+words+slots": ["intent", "slots", "words"]}
    assert [variant.raw["data"].get("unlabelled") for variant in grid] == [None, None, "more.jsonl"]
    assert [variant.single for variant in grid] == [None] * 3


@pytest.mark.parametrize("value", ["intent+mood", "mood", "intent+", "intent;slots"])
def test_an_unknown_task_is_refused_with_the_known_ones(path, value):
    with pytest.raises(ConfigError, match="intent, slots, words"):
        variants(path, [f"tasks={value},intent"], [], False)


def test_auxiliary_tasks_by_themselves_are_refused(path):
    with pytest.raises(ConfigError, match="expected at least one task that is not auxiliary"):
        variants(path, ["tasks=words,intent"], [], False)


def test_the_data_of_tasks_left_out_are_left_out(tmp_path):
    tasks = toy.TOML.replace('\n[tasks.intent]\nkind = "classification"\n', "").replace("[data]", "[datasets.one]")
    tasks = tasks.replace('kind = "tagging"', 'kind = "tagging"\ndataset = "one"')
    other = tasks[tasks.index("[datasets.one]") : tasks.index("[tasks")].replace("one", "two")
    more = '\n[tasks.intent]\nkind = "classification"\ndataset = "two"\n' + LANGUAGE + 'dataset = "two"\n'
    path = toy.write_files(tmp_path, tasks + other + 'unlabelled = "train.jsonl"\n' + more)
    grid = variants(path, ["tasks=slots,slots+intent,intent+words"], [], True)
    found = {variant.name: {k: "unlabelled" in v for k, v in variant.raw["datasets"].items()} for variant in grid}
    assert found == {
        "slots": {"one": False},
        "slots+intent": {"one": False, "two": False},
        "intent+words": {"two": True},
        "slots alone": {"one": False},
        "intent alone": {"two": False},
    }


def test_tasks_alone_are_trained_with_each_setting_that_does_not_join_tasks(path):
    over = ["sharing=hard,soft", "data.limit=10,20", "balancing=ew,equal_norm", "model.hidden_size=4,8"]
    grid = variants(path, over, [], True)
    assert len([variant for variant in grid if variant.single is None]) == 16
    alone = [variant for variant in grid if variant.single is not None]
    numbers = list(product((10, 20), (4, 8)))
    assert [v.name for v in alone] == [f"{t} alone {a} {b}" for t in ("intent", "slots") for a, b in numbers]
    for variant in alone:
        assert list(variant.raw["tasks"]) == [variant.single]
        assert (variant.raw["data"]["limit"], variant.raw["model"]["hidden_size"]) in numbers
        assert variant.settings == {
            "data.limit": str(variant.raw["data"]["limit"]),
            "model.hidden_size": str(variant.raw["model"]["hidden_size"]),
        }
        assert variant.raw["sharing"] == "hard"
        assert configuration.parse(variant.raw, "").balancing.kind == "ew"
        assert "unlabelled" not in variant.raw["data"]


def test_a_task_alone_counts_in_full_and_waits_for_no_other(path):
    settings = ["tasks.slots.after=intent", "tasks.slots.weight=0.1", "balancing=uw"]
    (raw,) = (v.raw for v in variants(path, [], settings, True) if v.single == "slots")
    assert raw["tasks"] == {"slots": {"kind": "tagging", "weight": 1.0, "auxiliary": False}}


def test_every_variant_and_task_alone_tries_every_value_of_tune(path):
    tune = ["training.learning_rate=0.01,0.1", "model.dropout=0.0,0.3"]
    grid = variants(path, ["sharing=hard,soft"], [], True, None, tune)
    choices = list(product((0.01, 0.1), (0.0, 0.3)))
    for name in ("hard", "soft", "intent alone", "slots alone"):
        raws = [variant.raw for variant in grid if variant.name == name]
        assert [(raw["training"]["learning_rate"], raw["model"]["dropout"]) for raw in raws] == choices
    assert len(grid) == 16
    folders = [run_folder(Path("out"), variant, seed) for variant in grid for seed in range(2)]
    assert len(set(folders)) == 32


@pytest.mark.parametrize("key", ["sharing=hard,soft", "balancing=ew,uw", "tasks=intent,slots", "sharing.weight=1,2"])
def test_what_joins_tasks_cannot_be_tuned(path, key):
    with pytest.raises(ConfigError, match=r"--tune (sharing|balancing|tasks)\S*: .* take --over"):
        variants(path, [], [], True, None, [key])


@pytest.mark.parametrize(
    ("over", "tune"),
    [
        (["sharing=hard", "sharing=soft"], []),
        (["model.hidden_size=4,8"], ["model.hidden_size=16,32"]),
        ([], ["model.hidden_size=4", "model.hidden_size=8"]),
    ],
    ids=["over", "over and tune", "tune"],
)
def test_one_setting_given_twice_is_refused(path, over, tune):
    with pytest.raises(ConfigError):
        variants(path, over, [], False, None, tune)


# Training it.


class Trains:
    """In the place of ``subprocess``: writes what a run leaves, and remembers what was asked for."""

    STDOUT = subprocess.STDOUT

    def __init__(self, fails_at=None):
        self.asked, self.fails_at = [], fails_at

    def run(self, command, **_):
        folder = Path(command[command.index("--run") + 1])
        self.asked.append((folder.parent.name, folder.name, "--resume" in command))
        (folder / "state.pt").touch()
        if len(self.asked) == self.fails_at:
            return subprocess.CompletedProcess(command, 1)
        plan = json.loads((folder / "plan.json").read_text())
        Run(folder).write_json("test.json", {"intent/accuracy": plan["model"]["hidden_size"] / 10})
        return subprocess.CompletedProcess(command, 0)


def train(grid, out, monkeypatch, fails_at=None):
    trains = Trains(fails_at)
    monkeypatch.setattr(comparison, "subprocess", trains)
    with nullcontext() if fails_at is None else pytest.raises(RunError, match=r"train\.log"):
        list(comparison.run_all(grid, 2, out, 1, 1))
    return trains.asked


def test_an_interrupted_comparison_goes_on_with_what_is_missing(path, tmp_path, monkeypatch):
    grid = variants(path, ["model.hidden_size=4,8"], [], False)
    first = train(grid, tmp_path / "out", monkeypatch, fails_at=2)
    assert first[:2] == [("4", "seed3", False), ("8", "seed3", False)]
    second = train(grid, tmp_path / "out", monkeypatch)
    assert second[0] == ("8", "seed3", True)
    assert {run[:2] for run in first + second} == set(product(("4", "8"), ("seed3", "seed4")))
    assert train(grid, tmp_path / "out", monkeypatch) == []
    more = variants(path, ["model.hidden_size=4,8,16"], [], False)
    assert {run[0] for run in train(more, tmp_path / "out", monkeypatch)} == {"16"}


def test_a_folder_of_a_comparison_with_other_settings_is_refused(path, tmp_path, monkeypatch):
    train(variants(path, ["model.hidden_size=4,8"], [], False), tmp_path / "out", monkeypatch)
    for over, settings in (("model.embedding_dim=4", []), ("model.hidden_size=8", ["training.epochs=9"])):
        with pytest.raises(RunError, match=r"holds another comparison, in which '[48]' has other settings"):
            list(comparison.run_all(variants(path, [over], settings, False), 2, tmp_path / "out", 1, 1))


def test_no_run_of_an_earlier_comparison_stands_in_for_another(path, tmp_path, monkeypatch):
    (tmp_path / "few").mkdir()
    for name in ("few/train.jsonl", "few_train.jsonl"):
        toy.write_lines(tmp_path / name, toy.requests(9, len(name)))
    train(variants(path, ["data.train=few/train.jsonl"], [], False), tmp_path / "out", monkeypatch)
    other = variants(path, ["data.train=few_train.jsonl"], [], False)
    with suppress(RunError):  # it may be refused, too
        assert train(other, tmp_path / "out", monkeypatch) != []


# What the runs say.


def finish(folder, variant, scores, selections=(0.5,), seed=0):
    """A run folder as training leaves it."""
    run = Run(run_folder(folder, variant, seed))
    run.folder.mkdir(parents=True, exist_ok=True)
    run.write_json("test.json", scores)
    epochs = [{"step_ms": 1.5, "seconds": 2.0, "selection": value, "valid": scores} for value in selections]
    run.write_metrics(epochs)


def summary_of(folder, scores, settings=None, alone_settings=None):
    """Of a joint variant and its tasks alone, from the scores of each seed: ``{task's score: (joint, alone)}``."""
    grid = [Variant("both", {}, None, settings or {})]
    for name, (_, alone) in scores.items():
        grid.append(Variant(f"{name.partition('/')[0]} alone", {}, name.partition("/")[0], alone_settings or {}))
        for seed, value in enumerate(alone):
            finish(folder, grid[-1], {name: value}, seed=seed)
    seeds = len(next(iter(scores.values()))[0])
    for seed in range(seeds):
        finish(folder, grid[0], {name: joint[seed] for name, (joint, _) in scores.items()}, seed=seed)
    return comparison.summary(grid, seeds, folder)


def test_changes_are_paired_by_seed_with_students_interval(tmp_path):
    joint, alone = [0.80, 0.70, 0.91], [0.78, 0.69, 0.86]
    row = summary_of(tmp_path, {"mood/accuracy": (joint, alone)})["rows"][-1]
    differences = [a - b for a, b in zip(joint, alone)]
    interval = stats.t.interval(0.95, 2, sum(differences) / 3, stats.sem(differences))
    assert row["changes"] == {
        "mood/accuracy": {
            "mean": pytest.approx(0.08 / 3),
            "low": pytest.approx(interval[0]),
            "high": pytest.approx(interval[1]),
        }
    }
    assert interval[1] - row["changes"]["mood/accuracy"]["mean"] == pytest.approx(4.3027 * 0.0208167 / 3**0.5, 1e-4)
    base = sum(alone) / 3
    assert row["delta"]["mean"] == pytest.approx(sum(j / base - 1 for j in joint) / 3)


def test_one_seed_has_no_interval(tmp_path):
    result = summary_of(tmp_path, {"mood/accuracy": ([0.8], [0.7])})
    assert result["rows"][-1]["changes"]["mood/accuracy"] == {"mean": pytest.approx(0.1), "low": None, "high": None}
    assert "| both | +10.00 |" in markdown(result)


@pytest.mark.parametrize(("alone", "said"), [([0.7, 0.6], "+10.00 |"), ([0.8, 0.7], "+0.00 |")])
def test_seeds_that_all_agree_are_no_evidence_and_no_warning(tmp_path, alone, said):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert said in markdown(summary_of(tmp_path, {"mood/accuracy": ([0.8, 0.7], alone)}))


def test_methods_that_would_change_the_sharing_too_are_not_compared(path):
    with pytest.raises(ConfigError, match="--set sharing=hard"):
        variants(path, ["balancing=equal_norm,gradnorm"], ["sharing=auto"], False)
    grid = variants(path, ["balancing=equal_norm,gradnorm"], ["sharing=hard"], False)
    assert [variant.raw["sharing"] for variant in grid] == ["hard", "hard"]


def test_a_plan_says_what_the_configuration_leaves_open(path):
    grid = variants(path, ["model.hidden_size=4,8"], ["sharing=auto", "balancing=auto"], True)
    assert {(v.single is None, v.raw["sharing"], v.raw["balancing"]) for v in grid} == {
        (True, "shared_private", "equal_norm"),
        (False, "hard", "ew"),
    }


def test_delta_and_words_know_which_scores_are_better_lower(tmp_path):
    scores = {
        "mood/accuracy": ([0.9, 0.92], [0.7, 0.73]),
        "notes/perplexity": ([90.0, 91.0], [100.0, 102.0]),
        "more/perplexity": ([120.0, 121.0], [100.0, 102.0]),
        "price/r2": ([-0.2, -0.21], [-0.1, -0.12]),
        "tags/f1": ([0.5, 0.7], [0.7, 0.5]),
    }
    result = summary_of(tmp_path, scores)
    row = result["rows"][-1]
    relative = [0.195 / 0.715, 10.5 / 101, -19.5 / 101, -0.095 / 0.11, 0.0]
    assert row["delta"]["mean"] == pytest.approx(sum(relative) / 5)
    changes = markdown(result).splitlines()[-1].strip("| ").split(" | ")
    assert changes[0] == "both"
    assert [cell.split()[-1] for cell in changes[1:]] == ["better", "better", "worse", "worse", "even"]
    assert [cell.split()[0] for cell in changes[1:]] == ["+19.50", "-10.50", "+19.50", "-0.10", "+0.00"]
    assert changes[4] == "-0.10 [-0.16, -0.03] worse"


def test_the_tables_have_a_row_for_each_variant_and_a_cell_for_each_score(tmp_path):
    result = summary_of(tmp_path, {"mood/accuracy": ([0.8, 0.7], [0.7, 0.5]), "price/r2": ([0.75, 0.5], [0.25, 0.5])})
    assert markdown(result).splitlines() == [
        "| variant | mood accuracy | price r2 | delta | ms a step | s a run |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| mood alone | 60.00 % ± 14.14 % |  |  | 1.50 | 2 |",
        "| price alone |  | 0.375 ± 0.177 |  | 1.50 | 2 |",
        "| both | 75.00 % ± 7.07 % | 0.625 ± 0.177 | +45.83 % ± 29.46 % | 1.50 | 2 |",
        "",
        "Change from each task alone (of shares in points), with the interval that holds it with 95 % confidence:",
        "",
        "| variant | mood accuracy | price r2 |",
        "| --- | ---: | ---: |",
        "| both | +15.00 [-48.53, +78.53] even | +0.25 [-2.93, +3.43] even |",
    ]


def test_of_tuned_variants_the_one_with_the_best_mean_in_validation_counts(tmp_path):
    rates = ("0.01", "0.1", "1.0")
    selections = {"0.01": [(0.2, 0.6), (0.5,)], "0.1": [(0.7, 0.1), (0.6,)], "1.0": [(0.9,), (0.0, 0.1)]}
    grid = [Variant("hard", {}, None, {"sharing": "hard"}, {"training.learning_rate": rate}) for rate in rates]
    for variant, rate in zip(grid, rates):
        for seed, own in enumerate(selections[rate]):
            finish(tmp_path, variant, {"mood/accuracy": 0.9 - float(rate) / 10, "mood/macro_f1": 0.1}, own, seed)
    result = comparison.summary(grid, 2, tmp_path)
    (row,) = result["rows"]
    assert (row["tuned"], row["selection"]) == ({"training.learning_rate": "0.1"}, pytest.approx(0.65))
    assert row["scores"] == {"mood/accuracy": {"mean": pytest.approx(0.89), "std": 0.0}}
    assert "| hard | learning_rate=0.1 | 89.00 % ± 0.00 % |" in markdown(result)


def learning_curve(folder, values, key="data.limit"):
    """Together and alone at each value of a setting; alone is better by what the value says."""
    grid = [Variant(f"hard {v}", {}, None, {"sharing": "hard", key: v}) for v in values]
    grid += [Variant(f"mood alone {v}", {}, "mood", {key: v}) for v in values]
    for variant in grid:
        score = 0.5 if variant.single is None else 0.5 + 0.1 * values.index(variant.settings[key])
        finish(folder, variant, {"mood/accuracy": score})
    return comparison.summary(grid, 1, folder)


def test_a_variant_is_compared_with_tasks_alone_of_its_settings(tmp_path):
    rows = [row for row in learning_curve(tmp_path, ["10", "30", "100"])["rows"] if row["single"] is None]
    assert [row["changes"]["mood/accuracy"]["mean"] for row in rows] == pytest.approx([0.0, -0.1, -0.2])


def drawn(result):
    """The figure's panels, and their lines by label."""
    axes = comparison_plot(result).axes
    return axes, [{line.get_label(): line.get_xydata().tolist() for line in each.lines} for each in axes]


@pytest.mark.parametrize(("values", "scale"), [(["10", "1e2", "30"], "log"), (["10", "20", "30.5"], "linear")])
def test_a_setting_of_three_numbers_is_drawn_as_curves(tmp_path, values, scale):
    (axes,), (lines,) = drawn(learning_curve(tmp_path, values))
    numbers = sorted(map(float, values))
    assert {label: [x for x, _ in points] for label, points in lines.items()} == {
        "together hard": numbers,
        "mood alone": numbers,
    }
    assert [y for _, y in lines["together hard"]] == [0.5] * 3
    assert (axes.get_xscale(), axes.get_xlabel()) == (scale, "data.limit")
    assert axes.get_title() == "mood accuracy, mean and one standard deviation"


@pytest.mark.parametrize("values", [["10", "30"], ["hard", "soft", "mmoe"], ["10", "30", "true"]])
def test_other_settings_are_drawn_as_points(tmp_path, values):
    (axes,), _ = drawn(learning_curve(tmp_path, values))
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"hard {value}" for value in values]
    (points,) = axes.containers
    assert points[0].get_xdata().tolist() == [0.5] * len(values)


def test_a_task_alone_stands_beside_the_variants_that_have_it(tmp_path):
    names = {"a": "mood/accuracy", "b": "topic/accuracy"}
    grid = [Variant(f"$ {name}", {}, None, {"tasks": name}) for name in names]
    grid += [Variant(f"{task} alone", {}, task, {}) for task in ("mood", "topic")]
    for variant, name in zip(grid, [*names.values()] * 2):
        finish(tmp_path, variant, {name: 0.5})
    result = comparison.summary(grid, 1, tmp_path)
    assert [row.get("alone") for row in result["rows"]] == [None, None, *({n: row_of(0.5)} for n in names.values())]
    axes, _ = drawn(result)
    lines = [each for panel in axes for each in panel.collections if each.get_label() == "alone"]
    assert [each.get_segments()[0].tolist() for each in lines] == [
        [[0.5, -0.5], [0.5, 0.5]],
        [[0.5, -1.5], [0.5, -0.5]],
    ]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == [r"\$ a", r"\$ b"]  # no formula


def row_of(score):
    return {"mean": score, "std": 0.0}


def test_curves_have_one_colour_in_all_panels(tmp_path):
    sizes, limits = ["8", "16"], ["10", "20", "30"]
    grid = [
        Variant(f"{size} {n}", {}, None, {"tasks.mood.decoder_size": size, "data.limit": n})
        for size in sizes
        for n in limits
    ]
    grid += [
        Variant(f"mood alone {size} {n}", {}, "mood", {"tasks.mood.decoder_size": size, "data.limit": n})
        for size in sizes
        for n in limits
    ]
    grid += [Variant(f"topic alone {n}", {}, "topic", {"data.limit": n}) for n in limits]
    for variant in grid:
        finish(
            tmp_path, variant, {f"{task}/accuracy": 0.5 for task in ("mood", "topic") if variant.single in (None, task)}
        )
    axes, _ = drawn(comparison.summary(grid, 1, tmp_path))
    mood, topic = ({line.get_label(): line.get_color() for line in panel.lines} for panel in axes)
    assert list(mood) == ["mood alone 8", "mood alone 16", "together 8", "together 16"]
    assert len({mood["mood alone 8"], mood["mood alone 16"]}) == 2
    assert topic == {"topic alone": "grey", **{label: mood[label] for label in ("together 8", "together 16")}}


def test_beside_a_point_stands_the_task_alone_of_the_same_settings(tmp_path):
    (axes,), _ = drawn(learning_curve(tmp_path, ["10", "30"]))
    (lines,) = (each for each in axes.collections if each.get_label() == "alone")
    assert [each.tolist() for each in lines.get_segments()] == [[[0.5, -0.5], [0.5, 0.5]], [[0.6, -1.5], [0.6, -0.5]]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["alone"]
