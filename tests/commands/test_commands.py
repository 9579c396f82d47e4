"""The command line."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import toy
from parity import assert_same_bits

from pymtl.__main__ import COMMANDS, main
from pymtl.serving.answers import mark_spans
from pymtl.training.run import Run

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"
DONE = [
    "README.md",
    "config.json",
    "curves.png",
    "metrics.jsonl",
    "model.safetensors",
    "run.json",
    "state.pt",
    "test.json",
    "vocabulary.json",
]


def quiet(*argv):
    """Runs a command; its exit status and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main([str(word) for word in argv])
    return status, printed.getvalue()


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    """A configuration of all kinds of task, with its data."""
    return toy.write_files(tmp_path_factory.mktemp("data"), toy.TOML + toy.ALL_KINDS)


@pytest.fixture(scope="module")
def trained(toml, tmp_path_factory):
    """A run folder, and what training printed."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    more = ("--set", "training.epochs=20", "--set", "training.patience=20")
    status, printed = quiet("train", toml, "--run", folder, *more)
    assert status == 0
    return folder, printed


def shell(*argv, **options):
    """Runs the installed program in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "pymtl", *map(str, argv)],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Whoever runs the tests in the background may have it ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
        **options,
    )


# Help and arguments


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: pymtl {command}")
    if command in ("train", "predict", "bench"):
        assert f"examples:\n  pymtl {command}" in printed


def test_the_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"\n    {command} " in printed for command in COMMANDS)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fit"],
        ["train"],
        ["train", "c.toml", "--resume", "--overwrite"],
        ["train", "c.toml", "--backend", "keras"],
        ["bench", "--seconds", "long"],
    ],
)
def test_bad_arguments_exit_with_2_and_a_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: pymtl" in capsys.readouterr().err


# train


def test_train_writes_the_run_folder_and_prints_its_progress_and_test_scores(trained):
    folder, printed = trained
    assert sorted(path.name for path in folder.iterdir()) == DONE
    assert (folder / "curves.png").read_bytes().startswith(PNG)
    scores = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    shares = {"intent/accuracy", "intent/macro_f1", "slots/f1", "topics/f1", "exact_match"}
    assert set(scores) == shares | {"politeness/r2", "politeness/pearson", "politeness/spearman"}
    assert scores["intent/accuracy"] >= 0.9
    assert "60 sentences to train on, 20 to validate" in printed
    assert "Test set, 20 sentences" in printed
    for name, value in scores.items():
        assert name.replace("/", " ") in printed
        assert (f"{100 * value:.2f} %" if name in shares else f"{value:.3f}") in printed
    assert str(folder) in printed
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(Run(folder).load_state()["epochs"])
    assert f"{json.loads(lines[-1])['loss']['total']:.4f}" in printed
    assert " best" in printed


def test_train_with_the_reference_backend_is_another_way_to_the_same(toml, tmp_path):
    runs = {}
    for backend in ("pymtl", "reference"):
        arguments = ("--set", "training.epochs=1", "--set", "model.dropout=0")
        assert quiet("train", toml, "--run", tmp_path / backend, "--backend", backend, *arguments)[0] == 0
        runs[backend] = Run(tmp_path / backend).read_metrics()[0]["loss"]
    assert runs["pymtl"] == pytest.approx(runs["reference"], rel=1e-4)
    assert Run(tmp_path / "reference").load()[2] == "reference"


def test_train_without_a_test_set_prints_no_test_scores(tmp_path):
    path = toy.write_files(tmp_path, toy.TOML.replace('test = "test.jsonl"', ""))
    status, printed = quiet("train", path, "--run", tmp_path / "run", "--set", "training.epochs=1")
    assert status == 0
    assert "Test set" not in printed
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [n for n in DONE if n != "test.json"]


def test_the_run_folder_is_named_after_the_configuration_unless_said_otherwise(toml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert quiet("train", toml, "--set", "training.epochs=1")[0] == 0
    assert sorted(path.name for path in (tmp_path / "runs" / "toy").iterdir()) == DONE


def test_the_printed_run_folder_is_literal_whatever_its_name(toml, tmp_path):
    folder = tmp_path / "a[bold]b"
    assert str(folder) in quiet("train", toml, "--run", folder, "--set", "training.epochs=1")[1]


def test_an_existing_run_is_refused_without_resume_or_overwrite(toml, trained, fails):
    folder, _ = trained
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "holds a run already: pass --resume, --overwrite" in fails("train", toml, "--run", folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_overwrite_replaces_a_run(toml, tmp_path):
    arguments = ("train", toml, "--run", tmp_path / "run", "--set")
    assert quiet(*arguments, "training.epochs=2")[0] == 0
    assert quiet(*arguments, "training.epochs=1", "--overwrite")[0] == 0
    assert len(Run(tmp_path / "run").read_metrics()) == 1


def test_resume_goes_on_to_the_same_weights_as_a_run_in_one_go(toml, tmp_path):
    for name, epochs in (("whole", (4,)), ("parts", (2, 4))):
        for k, last in enumerate(epochs):
            more = ["--resume"] if k else []
            assert quiet("train", toml, "--run", tmp_path / name, "--set", f"training.epochs={last}", *more)[0] == 0
    whole, parts = (Run(tmp_path / name) for name in ("whole", "parts"))
    assert_same_bits(whole.load_model()[0].model.state_dict(), parts.load_model()[0].model.state_dict())
    assert_same_bits(whole.load_state()["model"], parts.load_state()["model"])
    assert toy.timeless(whole.read_metrics()) == toy.timeless(parts.read_metrics())
    assert whole.read_json("test.json") == parts.read_json("test.json")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--set", "model.hidden_size=9"], "another configuration"),
        (["--set", "seed=9"], "another configuration"),
        (["--set", "tasks.intent.weight=0.5"], "another configuration"),
        (["--backend", "reference"], "was trained with --backend pymtl, not reference"),
    ],
)
def test_resume_of_another_configuration_or_backend_is_refused(toml, trained, fails, arguments, reason):
    assert reason in fails("train", toml, "--run", trained[0], "--resume", *arguments)


def test_resume_with_another_learning_rate_uses_it_or_is_refused(toml, tmp_path):
    folder, other = tmp_path / "run", ("--resume", "--set", "training.learning_rate=1e-9")
    assert quiet("train", toml, "--run", folder, "--set", "training.epochs=1")[0] == 0
    before = Run(folder).load_state()["model"]
    status, _ = quiet("train", toml, "--run", folder, "--set", "training.epochs=2", *other)
    if status == 0:
        for name, p in Run(folder).load_state()["model"].items():
            torch.testing.assert_close(p, before[name], rtol=0, atol=1e-6)


def test_the_configuration_in_the_run_folder_is_that_of_the_resumed_run(toml, tmp_path):
    for arguments in (["training.epochs=1"], ["training.epochs=2", "--resume"]):
        assert quiet("train", toml, "--run", tmp_path / "run", "--set", *arguments)[0] == 0
    assert Run(tmp_path / "run").load()[0].training.epochs == 2


def test_resume_without_a_run_is_refused(toml, tmp_path, fails):
    assert "is " + str(tmp_path / "none") + " a run?" in fails("train", toml, "--run", tmp_path / "none", "--resume")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["training.epocs=1"], "unknown key 'training.epocs'"),
        (["training.epochs"], "expected section.key=value"),
        (["data.train=absent.jsonl"], "absent.jsonl"),
        (["data.train=toy.toml"], "toy.toml:2: not JSON"),
        (["tasks.intent.field=tokens"], "train.jsonl:1: field 'tokens': expected a string"),
        (["tasks.intent.field=absent"], "task 'intent': no training record has a label"),
        (["seed=2000000000000000000"], "seed"),
        (["tasks.keys.kind=classification", "tasks.keys.field=intent"], "keys"),
        (["data.valid=bare.jsonl"], "label"),
        (["training.learning_rate=1e30"], "loss"),
        (["tasks.total.kind=classification", "tasks.total.field=intent"], "total"),
    ],
)
def test_train_says_what_is_wrong_in_one_line(toml, tmp_path, fails, overrides, reason):
    toy.write_lines(toml.parent / "bare.jsonl", [{"tokens": ["play"]}])
    settings = [word for override in ["training.epochs=1", *overrides] for word in ("--set", override)]
    assert reason in fails("train", toml, "--run", tmp_path / "run", *settings)


@pytest.mark.parametrize("threads", [0, -1])
@pytest.mark.parametrize("command", ["train", "bench"])
def test_a_number_of_threads_below_1_is_refused(toml, tmp_path, command, threads, capsys):
    argv = ["train", str(toml), "--run", str(tmp_path)] if command == "train" else ["bench", "--shape", "1,1,1,1"]
    try:
        status = main([*argv, "--threads", str(threads)])
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2)
    assert "threads" in capsys.readouterr().err


# predict


def test_predict_prints_every_task_of_a_text(trained, capsys):
    assert main(["predict", str(trained[0]), "please play hard rock"]) == 0
    intent, slots, topics, politeness = capsys.readouterr().out.splitlines()
    assert intent.startswith("intent: music (")
    assert intent.endswith(" %)")
    assert slots == "slots: please play [hard rock | genre]"
    assert topics in ("topics: genre", "topics: food, genre")
    assert abs(float(politeness.removeprefix("politeness: ")) - 1) < 1


def test_predict_as_json(trained, capsys):
    assert main(["predict", str(trained[0]), "book sushi", "watch jazz now", "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    own = {"intent", "intent/probability", "slots", "slots/spans", "topics", "topics/probability", "politeness"}
    own |= {"politeness/uncertainty"}
    assert set(first) == {"tokens", "unknown_tokens", *own}
    assert first["slots/spans"] == [{"start": 5, "end": 10, "label": "food", "text": "sushi"}]
    assert (first["tokens"], first["intent"], first["slots"]) == (["book", "sushi"], "table", ["O", "B-food"])
    assert 0 < first["intent/probability"] <= 1
    assert isinstance(first["topics"], list)
    assert isinstance(first["politeness"], float)
    assert len(second["slots"]) == 3


def test_options_may_stand_before_the_texts(trained, capsys):
    assert main(["predict", str(trained[0]), "--json", "play jazz"]) == 0
    assert json.loads(capsys.readouterr().out)["intent"] == "music"


def test_predict_of_texts_is_that_of_lines_on_standard_input(trained, capsys, monkeypatch):
    texts = ["play jazz", "please please book hot dogs"]
    assert main(["predict", str(trained[0]), *texts, "--json"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(texts)))
    assert main(["predict", str(trained[0]), "--json"]) == 0
    assert capsys.readouterr().out == expected


def test_predict_of_a_text_does_not_depend_on_the_others(trained, capsys):
    assert main(["predict", str(trained[0]), "watch jazz and sushi", "play jazz", "--json"]) == 0
    second = capsys.readouterr().out.splitlines()[1]
    assert main(["predict", str(trained[0]), "play jazz", "--json"]) == 0
    assert capsys.readouterr().out.splitlines() == [second]


def test_predict_lowercases_where_training_did(tmp_path, capsys):
    path = toy.write_files(tmp_path)
    settings = ("--set", "training.epochs=1", "--set", "data.lowercase=true")
    quiet("train", path, "--run", tmp_path / "run", *settings)
    assert main(["predict", str(tmp_path / "run"), "Play JAZZ", "play jazz", "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first.pop("tokens") == ["Play", "JAZZ"]  # as they were given
    assert second.pop("tokens") == ["play", "jazz"]
    assert first == second


@pytest.mark.parametrize(
    ("tags", "marked"),
    [
        (["O", "B-x", "I-x", "O"], "a [b c | x] d"),
        (["B-x", "B-x", "I-y", "I-y"], "[a | x] [b | x] [c d | y]"),
        (["O", "O", "O", "O"], "a b c d"),
        (["DET", "N", "V", "O"], "a/DET b/N c/V d/O"),
    ],
)
def test_spans_are_marked_in_brackets(tags, marked):
    assert mark_spans(["a", "b", "c", "d"], tags) == marked


def test_predict_without_a_run_says_so(tmp_path, fails):
    assert f"is {tmp_path} a run?" in fails("predict", tmp_path, "a text")


# report, info


def test_report_prints_scores_times_and_parity_and_writes_them(trained):
    folder, _ = trained
    status, printed = quiet("report", folder, "--batches", "3")
    assert status == 0
    assert "Test set, 20 sentences" in printed
    for text in ("pymtl", "plain PyTorch, packed", "plain PyTorch, padded", "training step ms", "inference ms"):
        assert text in printed
    result = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert set(result) == {"bucketed", "shuffled", "parity"}
    for part in (result[kind][part] for kind in ("bucketed", "shuffled") for part in ("training", "inference")):
        assert set(part) == {"pymtl", "reference", "reference-padded"}
        assert part["pymtl"]["ratio"] == 1.0
        assert all(row["p50"] > 0 for row in part.values())
    assert result["parity"]["logits"] < 1e-5
    assert result["parity"]["gradients"] < 1e-4


@pytest.mark.parametrize("batches", [0, -1])
def test_report_of_no_batches_is_refused(trained, batches, capsys):
    try:
        status = main(["report", str(trained[0]), "--batches", str(batches)])
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2)
    assert "batches" in capsys.readouterr().err


def test_info_prints_versions_and_instruction_sets(capsys):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("torch") and torch.__version__ in line for line in lines)
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [line.split("  ")[0] for line in lines] == list(facts)
    assert facts["instruction set in use"] in facts["instruction sets available"]
    assert set(facts["instruction sets available"]) <= set(facts["instruction sets compiled"])


# Trouble


class Without:
    """An import finder of an environment that lacks a package."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, *_):
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("package", ["rich", "seqeval", "safetensors", "matplotlib", "sklearn"])
def test_a_missing_package_is_named_with_what_installs_it(toml, tmp_path, fails, monkeypatch, package):
    for name in ("run", "plots"):  # these import theirs when they are imported
        if f"pymtl.training.{name}" in sys.modules:
            monkeypatch.setattr(f"pymtl.training.{name}", sys.modules[f"pymtl.training.{name}"])
            monkeypatch.delitem(sys.modules, f"pymtl.training.{name}")
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without(package), *sys.meta_path])
    error = fails("train", toml, "--run", tmp_path / "run", "--set", "training.epochs=1")
    assert error == f"pymtl: error: this command needs {package}: pip install 'pymtl[cli]'\n"


def test_the_help_and_info_need_no_optional_package():
    code = "import sys; sys.modules.update(dict.fromkeys(['rich', 'seqeval', 'safetensors', 'matplotlib', 'sklearn']));"
    code += "from pymtl.__main__ import main; sys.exit(main(['info', '--json']))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_ctrl_c_ends_training_with_130_and_resume_goes_on(toml, tmp_path):
    folder = tmp_path / "run"
    arguments = ("train", toml, "--run", folder, "--set", "training.patience=2000", "--set")
    process = shell(*arguments, "training.epochs=2000")
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "--resume goes on" in printed
    done = len(Run(folder).read_metrics())
    assert not list(folder.glob(".*"))
    assert quiet(*arguments, f"training.epochs={done + 1}", "--resume")[0] == 0
    assert len(Run(folder).read_metrics()) == done + 1


def test_ctrl_c_within_a_command_returns_130(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pymtl.benchmark.machine.facts", interrupt)
    assert main(["info"]) == 130


def test_the_program_reads_standard_input_and_prints_one_line_of_json_a_text(trained):
    process = shell("predict", trained[0], "--json")
    printed, error = process.communicate("play jazz\n\nbook sushi\n", timeout=60)
    assert process.returncode == 0, error
    answers = [json.loads(line) for line in printed.splitlines()]
    assert [answer.get("intent") for answer in answers] == ["music", None, "table"]
    assert answers[1] == {"tokens": []}


def test_the_program_prints_trouble_in_one_line_and_exits_with_1(tmp_path):
    process = shell("train", tmp_path / "absent.toml")
    printed, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert printed == ""
    assert error.startswith("pymtl: error: ")
    assert "absent.toml" in error
    assert error.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_trouble(trained):
    process = shell("predict", trained[0])
    process.stdout.close()
    _, error = process.communicate("play jazz\n" * 20, timeout=60)
    assert "Traceback" not in error
    assert "Exception ignored" not in error


# What may be wrong with data, folders and arguments


def toy_with(tmp_path, lines, **options):
    """A configuration of one classification task whose training file holds these lines."""
    config = tmp_path / "c.toml"
    (tmp_path / "t.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    settings = "".join(f"{key} = {value}\n" for key, value in options.items())
    config.write_text(
        '[data]\ntrain = "t.jsonl"\nvalid = "t.jsonl"\n[tasks.c]\nkind = "classification"\n'
        f"[model]\nembedding_dim = 4\nhidden_size = 4\n[training]\nepochs = 1\n{settings}"
    )
    return config


def test_sentences_without_labels_may_fill_a_batch(tmp_path):
    lines = ['{"tokens": ["w", "w"], "c": "a"}'] * 3 + ['{"tokens": ["w", "w", "w", "w", "w"]}'] * 4
    config = toy_with(tmp_path, lines, batch_size=4)
    for backend in ("pymtl", "reference"):
        assert quiet("train", config, "--run", tmp_path / backend, "--backend", backend)[0] == 0
    assert quiet("report", tmp_path / "pymtl", "--batches", 2)[0] == 0


def test_data_without_any_label_is_refused_before_training(tmp_path, fails):
    config = toy_with(tmp_path, ['{"tokens": ["w"]}'])
    assert "t.jsonl: no record has a label" in fails("train", config, "--run", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_validation_that_cannot_be_scored_is_refused_before_training(tmp_path, fails):
    config = toy_with(tmp_path, ['{"tokens": ["w"], "c": "a"}'])
    (tmp_path / "v.jsonl").write_text('{"tokens": ["w"]}\n')
    error = fails("train", config, "--run", tmp_path / "r", "--set", "data.valid=v.jsonl")
    assert "v.jsonl: expected a label of c to score" in error


def test_half_a_letter_in_a_label_is_named(tmp_path, fails):
    config = toy_with(tmp_path, ['{"tokens": ["w"], "c": "a"}', r'{"tokens": ["w"], "c": "\ud800"}'])
    assert "t.jsonl:2: field 'c'" in fails("train", config, "--run", tmp_path / "r")


def test_overwrite_keeps_the_old_run_until_the_new_one_can_begin(tmp_path, fails):
    config = toy_with(tmp_path, ['{"tokens": ["w"], "c": "a"}'] * 3)
    folder = tmp_path / "r"
    assert quiet("train", config, "--run", folder)[0] == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    error = fails("train", config, "--run", folder, "--overwrite", "--set", "model.hidden_size=1000000000")
    assert "allocate memory" in error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_of_something_else_is_left_alone(tmp_path, fails):
    config = toy_with(tmp_path, ['{"tokens": ["w"], "c": "a"}'] * 3)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json").write_text('{"mine": 1}')
    assert "is not of a run" in fails("train", config, "--run", tmp_path / "r")
    assert (tmp_path / "r" / "config.json").read_text() == '{"mine": 1}'


def test_a_run_is_not_resumed_with_another_vocabulary(tmp_path, fails):
    config = toy_with(tmp_path, ['{"tokens": ["w"], "c": "a"}'] * 3)
    assert quiet("train", config, "--run", tmp_path / "r")[0] == 0
    error = fails("train", config, "--run", tmp_path / "r", "--resume", "--set", "training.min_count=2")
    assert "min_count" in error


def test_input_that_is_no_text_is_named_and_output_never_fails(trained):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "pymtl", "predict", str(trained[0])]
    bad = subprocess.run(command, input=b"play jazz\n\xff\xfe\n", env=environment, capture_output=True, timeout=60)
    assert bad.returncode == 1
    assert b"standard input, line 2: not UTF-8" in bad.stderr
    assert bad.stdout.startswith(b"intent: ")  # the line before has its answer
    assert bad.stderr.count(b"\n") == 1
    with_mark = "\ufeffplay jazz".encode()
    good = subprocess.run(command, input=with_mark, env=environment, capture_output=True, timeout=60)
    assert b"music" in good.stdout
    spoken = subprocess.run([*command, "zo\u00eb"], env=environment, capture_output=True, timeout=60)
    assert spoken.returncode == 0, spoken.stderr


@pytest.mark.parametrize("argument", ["--seconds=nan", "--seconds=-1", "--seconds=inf", "--seconds=x", "--plot=a.xyz"])
def test_bench_refuses_arguments_before_it_measures(argument, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", argument])
    assert stop.value.code == 2
    assert "expected a" in capsys.readouterr().err


def test_train_says_that_there_is_no_gpu(toml, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device: there is no GPU" in fails("train", toml, "--run", tmp_path / "run", "--device", "cuda")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float16"], "--dtype: float16 is for --device cuda only"),
        (["--device", "cuda"], "--device: there is no GPU"),
    ],
)
def test_bench_says_what_only_a_gpu_can_measure(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err
