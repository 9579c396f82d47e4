"""A grid of variants, each trained with several seeds."""

import json

import pytest
import toy
from rich.console import Console
from toy import quiet

from pymtl.__main__ import main
from pymtl.commands.compare import _table, markdown
from pymtl.training import comparison
from pymtl.training.errors import ConfigError
from pymtl.training.grid import Variant, run_folder, variants
from pymtl.training.run import Run


def test_a_comparison_trains_the_grid_once_and_goes_on_where_it_stopped(tmp_path, capsys):
    toy.write_files(tmp_path)
    arguments = ["compare", str(tmp_path / "toy.toml"), "--over", "sharing=hard,soft", "--seeds", "2", "--single-task"]
    arguments += ["--out", str(tmp_path / "out"), "--set", "training.epochs=1", "--threads", "1", "--jobs", "2"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["variant"] for row in result["rows"]] == ["intent alone", "slots alone", "hard", "soft"]
    for row in result["rows"]:
        runs = [
            Run(path).read_scores() for path in sorted((tmp_path / "out" / row["variant"].replace(" ", "_")).iterdir())
        ]
        assert len(runs) == 2
        for name, value in row["scores"].items():
            assert value["mean"] == pytest.approx(sum(run[name] for run in runs) / 2)
        assert row["step_ms"]["mean"] > 0
    for name in ("compare.md", "compare.png"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    assert "delta" in printed
    # Again: nothing is trained anew, but for the run whose result is gone.
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*/state.pt")}
    (tmp_path / "out" / "soft" / "seed3" / "test.json").unlink()
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["rows"] == result["rows"]


def test_a_comparison_names_the_log_of_a_run_that_failed(tmp_path, capsys):
    toy.write_files(tmp_path)
    (tmp_path / "broken.jsonl").write_text("nothing\n")
    arguments = [
        "compare",
        str(tmp_path / "toy.toml"),
        "--seeds",
        "1",
        "--out",
        str(tmp_path / "out"),
        "--threads",
        "1",
    ]
    assert main([*arguments, "--over", "data.train=broken.jsonl"]) == 1
    assert "train.log" in capsys.readouterr().err
    assert main([*arguments, "--over", "data.train=missing.jsonl"]) == 1
    assert "missing.jsonl: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        ("sharing", "--over sharing: expected key=value,value"),
        ("sharing=hard,", "--over sharing=hard,: expected key=value,value"),
        ("sharing=hard,softer", "sharing: expected one of hard"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused_before_anything_is_trained(tmp_path, capsys, over, reason):
    toy.write_files(tmp_path)
    assert main(["compare", str(tmp_path / "toy.toml"), "--over", over, "--out", str(tmp_path / "out")]) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_values_of_a_grid_may_be_tables(tmp_path):
    path = toy.write_files(tmp_path)
    grid = variants(path, ['sharing={kind="soft",penalty="trace_norm"},hard', "model.hidden_size=4,8"], [], False)
    assert [variant.raw["sharing"] for variant in grid] == [{"kind": "soft", "penalty": "trace_norm"}] * 2 + [
        "hard"
    ] * 2
    with pytest.raises(ConfigError, match="variants all different"):
        variants(path, ["sharing=hard,hard"], [], False)


def alone(path, *settings):
    """The settings of intent and of slots by itself."""
    grid = variants(path, [], list(settings), True)
    return {variant.single: variant.raw for variant in grid if variant.single}


def test_a_task_alone_is_not_chosen_by_what_the_others_are(tmp_path):
    path = toy.write_files(tmp_path)
    settings = ("training.select_by=delta", "training.baseline={'intent/accuracy'=0.5,'slots/f1'=0.5}")
    found = alone(path, *settings)
    assert set(found) == {"intent", "slots"}
    for raw in found.values():
        assert raw["training"]["select_by"] == "mean"
        assert "baseline" not in raw["training"]


def test_a_task_alone_starts_from_what_it_has(tmp_path):
    path = toy.write_files(tmp_path)
    expected = {
        "{run='x'}": ({"run": "x"}, {"run": "x"}),
        "{run='x',parts=['encoder']}": ({"run": "x", "parts": ["encoder"]}, {"run": "x", "parts": ["encoder"]}),
        "{run='x',parts=['heads.slots','heads.intent.weight']}": (
            {"run": "x", "parts": ["heads.intent.weight"]},
            {"run": "x", "parts": ["heads.slots"]},
        ),
        "{run='x',parts=['heads.intent']}": ({"run": "x", "parts": ["heads.intent"]}, None),
    }
    for start, wanted in expected.items():
        found = alone(path, f"warm_start={start}")
        assert tuple(found[task].get("warm_start") for task in ("intent", "slots")) == wanted


def test_paths_of_a_comparison_are_relative_to_the_folder_of_its_data(tmp_path, capsys, monkeypatch):
    toy.write_files(tmp_path / "data")
    path = tmp_path / "toy.toml"
    path.write_text(toy.TOML)
    command = ["compare", str(path), "--out", str(tmp_path / "out"), "--seeds", "1"]
    assert main(command) == 1
    assert "train.jsonl: there is no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    planned = []

    def run_all(grid, *_):
        planned.extend(grid)
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "run_all", run_all)
    assert main([*command, "--single-task", "--data", str(tmp_path / "data")]) == 130
    assert [variant.raw["folder"] for variant in planned] == [str(tmp_path / "data")] * 3


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_a_missing_file_of_any_variant_is_named_before_anything_is_trained(tmp_path, capsys, name):
    path = toy.write_files(tmp_path)
    over = f"data.{name}={name}.jsonl,missing.jsonl"
    assert main(["compare", str(path), "--over", over, "--out", str(tmp_path / "out"), "--seeds", "1"]) == 1
    assert "missing.jsonl: there is no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_score_of_zero_is_nothing_to_be_relative_to(tmp_path):
    grid = [
        Variant("intent alone", {}, "intent"),
        Variant("slots alone", {}, "slots"),
        Variant("both", {}),
    ]
    scores = [{"intent/accuracy": 0.5}, {"slots/f1": 0.0}, {"intent/accuracy": 0.6, "slots/f1": 0.3}]
    for f1, delta in ((0.2, pytest.approx((0.2 + 0.5) / 2)), (0.0, None)):
        scores[1]["slots/f1"] = f1
        for variant, own in zip(grid, scores):
            run = Run(run_folder(tmp_path, variant, 0))
            run.folder.mkdir(parents=True, exist_ok=True)
            run.write_json("test.json", own)
            run.write_metrics([{"step_ms": 1.0, "seconds": 2.0, "selection": 0.5, "valid": own}])
        result = comparison.summary(grid, 1, tmp_path)
        found = result["rows"][-1]["delta"]
        assert (found and found["mean"]) == delta
        assert ("delta" in markdown(result).splitlines()[0]) == (delta is not None)


@pytest.mark.parametrize("width", [70, 124, 300])
def test_a_table_of_many_tasks_is_whole_on_a_narrow_terminal(width):
    heading = ["variant", *(f"task{i} accuracy" for i in range(9))]
    long = "sharing=shared_private balancing=equal_norm model.hidden_size=256 training.learning_rate=0.003"
    rows = [["both", *(f"{i}1.25 % ± 0.50 %" for i in range(9))], ["task8 alone", *[""] * 8, "99.75 % ± 0.25 %"]]
    rows.append([long, *[""] * 9])
    console = Console(width=width, record=True)
    console.print(_table(console, heading, rows, "Scores"))
    printed = console.export_text()
    for word in ("both", "task8 alone", *heading[1:], *filter(None, rows[0][1:] + rows[1][1:])):
        assert word in printed
    assert "…" not in printed
    letters = "".join(line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│"))
    assert long.replace(" ", "") in letters.replace(" ", "")


def test_runs_on_data_that_have_changed_are_not_taken_for_new_ones(tmp_path, fails):
    path = toy.write_files(tmp_path)
    argv = ("compare", path, "--over", "sharing=hard", "--seeds", 1, "--threads", 1, "--out", tmp_path / "out")
    quiet(*argv, "--set", "training.epochs=1")
    before = (tmp_path / "out" / "compare.json").read_text()
    toy.write_lines(tmp_path / "train.jsonl", toy.requests(50, seed=9))
    error = fails(*argv, "--set", "training.epochs=1")
    assert "was trained on other data: train.jsonl changed since: pass another --out" in error
    assert (tmp_path / "out" / "compare.json").read_text() == before


def test_a_run_that_fails_says_why(tmp_path, fails):
    path = toy.write_files(tmp_path)
    error = fails("compare", path, "--over", "data.limit=999", "--seeds", 1, "--out", tmp_path / "out")
    assert "expected at least data.limit = 999 labelled records, got 60" in error
