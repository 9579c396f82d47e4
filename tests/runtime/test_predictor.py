"""pymtl_runtime answers as pymtl.load does, from the file that ``pymtl export`` writes."""

import copy
import json
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import every
import numpy as np
import pytest
import torch
import toy
from programs import pymtl_runtime

import pymtl
from pymtl.__main__ import main

FREQUENCIES = '[tasks.often]\nkind = "log_frequency"'
SIDE = '[tasks.side]\nkind = "classification"\nauxiliary = true\nfield = "intent"'
EVERY = f"{every.EVERY}\n{FREQUENCIES}\n\n{SIDE}\n"
TWO_SETS = """
seed = 1
[datasets.one]
train = "train.jsonl"
holdout = 0.2
[datasets.two]
train = "train.jsonl"
tokenizer = "whitespace"
lowercase = true
holdout = 0.2
[tasks.intent]
kind = "classification"
dataset = "one"
[tasks.slots]
kind = "tagging"
dataset = "two"
[characters]
kind = "cnn"
size = 4
[model]
embedding_dim = 8
hidden_size = 8
num_layers = 2
[training]
epochs = 2
"""
ONE_WAY = toy.TOML.replace("dropout = 0.1", "dropout = 0.1\nbidirectional = false")
ONE_WAY = ONE_WAY.replace('kind = "tagging"', 'kind = "tagging"\ndecoder = "crf"')
TEXTS = ["play jazz", "please, please book hot dogs now!", "watch Sushi", "", "a", "zebra crossing zebra", "né 🎉 play"]


def trained(folder, toml, name="run"):
    path = every.write(folder, toml)
    assert main(["train", str(path), "--run", str(folder / name)]) == 0
    return folder / name


def file_of(run, *options):
    """The run's file, written where it is asked for first."""
    path = run.parent / f"{run.name}{''.join(options)}.pymtl"
    if not path.exists():
        assert main(["export", str(run), str(path), *options]) == 0
    return path


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("every"), EVERY)


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("two"), TWO_SETS)


@pytest.fixture(scope="module")
def one_way(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_way")
    toy.write_files(folder, ONE_WAY)
    assert main(["train", str(folder / "toy.toml"), "--run", str(folder / "run")]) == 0
    return folder / "run"


def same(ours, theirs):
    """The same answers; numbers but for rounding."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            same(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            same(a, b)
    elif isinstance(ours, float):
        assert math.isclose(ours, theirs, rel_tol=1e-4, abs_tol=1e-6)
    else:
        assert ours == theirs


def asked(count=12, seed=9):
    return [{key: record[key] for key in ("tokens", "case", "signal")} for record in every.records(count, seed)]


@pytest.mark.parametrize("weights", [None, "int8", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"distributions": False}, {"batch_size": 1}, {"beam_size": 3}], ids=str)
def test_every_kind_of_task_and_input(everything, weights, options):
    theirs = pymtl.load(everything, weights=None if weights is None else getattr(torch, weights))
    ours = pymtl_runtime.load(file_of(everything, *(() if weights is None else ("--weights", weights))))
    assert ours.weights == theirs.weights
    assert "side" not in ours.tasks
    same(ours.predict(asked(), **options), theirs.predict(asked(), **options))


def test_logits_and_labels(everything):
    theirs, ours = pymtl.load(everything), pymtl_runtime.load(file_of(everything))
    assert ours.labels == theirs.labels
    assert ours.vocabulary.tokens == theirs.vocabulary.tokens
    found, expected = ours.logits(asked()), theirs.logits(asked())
    assert found.keys() == expected.keys()
    for task in found:
        z = expected[task]
        z = z.flatten(2) if z.dim() == 4 else z  # a language model's directions stand side by side
        np.testing.assert_allclose(found[task], z, rtol=1e-4, atol=1e-5)


def test_texts_of_several_data_sets(two_sets):
    theirs, ours = pymtl.load(two_sets), pymtl_runtime.load(file_of(two_sets))
    same(ours.predict(TEXTS), theirs.predict(TEXTS))
    same(ours.predict("Play JAZZ"), theirs.predict("Play JAZZ"))
    same(ours.predict([["Play", "x y"], {"text": "book it"}]), theirs.predict([["Play", "x y"], {"text": "book it"}]))


@pytest.mark.parametrize("given", [3, b"play", [3], [["a", 3]], [{"words": "x"}]])
def test_errors_are_the_same(two_sets, given):
    messages = []
    for model in (pymtl.load(two_sets), pymtl_runtime.load(file_of(two_sets))):
        with pytest.raises((TypeError, ValueError)) as caught:
            model.predict(given)
        messages.append((type(caught.value).__name__, str(caught.value)))
    assert messages[0] == messages[1]


def test_many_threads_may_ask_at_once(two_sets):
    model = pymtl_runtime.load(file_of(two_sets))
    expected = [model.predict(text) for text in TEXTS]
    found = {}

    def ask(number):
        found[number] = [[model.predict(text) for text in TEXTS] for _ in range(20)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answers == expected for each in found.values() for answers in each)


def test_a_stream_says_of_each_token_what_is_known_by_then(one_way):
    model = pymtl_runtime.load(file_of(one_way))
    stream = model.stream()
    assert stream.tasks == ["intent", "slots"]
    tokens = ["please", "play", "hard", "rock", "please", "jazz"]
    for _ in range(2):
        for first, last in ((0, 1), (1, 3), (3, 6)):
            answer = stream.feed(tokens[first:last], distributions=True)
            so_far = model.predict([tokens[:last]])[0]
            same(answer["intent/probabilities"], so_far["intent/probabilities"])
            assert answer["intent"] == so_far["intent"]
            logits = model.logits([tokens[:last]])["slots"][0, first:last]
            assert answer["slots"] == [model.labels["slots"][i] for i in logits.argmax(-1)]
        stream.reset()
    with pytest.raises(pymtl_runtime.DataError, match="at least one token"):
        stream.feed([])


def test_a_model_that_reads_both_ways_has_no_stream(two_sets):
    with pytest.raises(ValueError, match="tokens so far"):
        pymtl_runtime.load(file_of(two_sets)).stream()


def test_the_command_line(two_sets, everything, capsys):
    from pymtl_runtime.__main__ import main as runtime

    path = str(file_of(two_sets))
    capsys.readouterr()
    assert runtime(["predict", path, "please play jazz", "zebra"]) == 0
    ours = capsys.readouterr().out
    assert main(["predict", str(two_sets), "please play jazz", "zebra"]) == 0
    assert ours == capsys.readouterr().out
    assert runtime(["predict", path, "--json", "play"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == ["play"]
    lines = [json.dumps(record) for record in asked(3)]
    assert runtime(["predict", str(file_of(everything)), "--records", *lines]) == 0
    assert capsys.readouterr().out.count("intent: ") == 3
    assert runtime(["predict", str(file_of(everything)), "play"]) == 1
    assert "error: this model reads case, signal of each token too: give JSON" in capsys.readouterr().err
    assert runtime(["info", str(file_of(everything))]) == 0
    said = capsys.readouterr().out
    assert "reads signal: 2 numbers a token" in said
    assert "answers slots: path of tokens" in said
    assert runtime(["info", str(two_sets / "config.json")]) == 1
    assert "config.json: expected a file that pymtl.export has written" in capsys.readouterr().err
    assert runtime(["predict", str(two_sets), "play"]) == 1
    assert "is a folder: expected a file; of a run, 'pymtl export RUN FILE.pymtl' makes one" in capsys.readouterr().err
    assert runtime(["flags"]) == 0
    assert capsys.readouterr().out.startswith("-I")


def test_it_needs_numpy_alone(two_sets):
    code = """
import sys
sys.path += sys.argv[1:3]
import pymtl_runtime
pymtl_runtime.load(sys.argv[3]).predict("play jazz")
foreign = {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(sorted(name for name in foreign if not name.startswith("_")))
"""
    folders = [str(Path(module.__file__).parents[1]) for module in (np, pymtl_runtime)]
    command = [sys.executable, "-S", "-c", code, *folders, str(file_of(two_sets))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "['numpy', 'pymtl_runtime']\n"


@pytest.mark.parametrize("number", [-1, 2**63, 2**64 + 1])
@pytest.mark.parametrize("name", ["threads", "memory_limit"])
def test_numbers_out_of_range_are_named(two_sets, name, number):
    with pytest.raises(ValueError, match=rf"{name}: expected a number from 0 to 2\^63 - 1, got {number}"):
        pymtl_runtime.load(file_of(two_sets), **{name: number})


@pytest.mark.parametrize(
    ("path", "options", "kind", "reason"),
    [
        ("", {}, ValueError, "path: expected the name of a file, got ''"),
        ("a\0b", {}, ValueError, "path: expected the name of a file"),
        ("a", {"threads": 1.5}, TypeError, "threads: expected a whole number, got 1.5"),
        ("a", {"memory_limit": "4 GB"}, TypeError, "memory_limit: expected a whole number, got '4 GB'"),
        ("a", {"threads": 257}, ValueError, "threads: expected a number from 0 to 256, got 257"),
    ],
)
def test_wrong_arguments_are_named(path, options, kind, reason):
    with pytest.raises(kind, match=reason):
        pymtl_runtime.Model(path, **options)


def test_weights_above_the_limit_are_refused(two_sets):
    with pytest.raises(MemoryError, match="more than the limit of memory: raise memory_limit"):
        pymtl_runtime.load(file_of(two_sets), memory_limit=1000)


def test_a_pipe_and_a_folder_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.pymtl")  # which nobody writes to: opening it to read would wait for ever
    (tmp_path / "folder.pymtl").mkdir()
    for name, what in (("pipe", "expected a file, got something else"), ("folder", "is a folder: expected a file")):
        with pytest.raises(pymtl_runtime.ModelError, match=rf"{name}\.pymtl: {what}"):
            pymtl_runtime.Model(tmp_path / f"{name}.pymtl")


def run_predict(path, *options, given=b""):
    return subprocess.run(
        [sys.executable, "-m", "pymtl_runtime", "predict", str(path), *options],
        input=given,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(pymtl_runtime.__file__).parents[1])},
    )


def test_the_program_reads_what_editors_write(everything, two_sets):
    marked = run_predict(file_of(two_sets), "--json", given=b"\xef\xbb\xbfplay jazz\r\n\r\nwatch\n")
    found = [json.loads(line)["tokens"] for line in marked.stdout.splitlines()]
    assert (marked.returncode, found) == (0, [["play", "jazz"], [], ["watch"]])
    record = json.dumps({"tokens": ["a"], "case": [0], "signal": [[0.0, 1.0]]}).encode()
    blank = run_predict(file_of(everything), "--records", "--json", given=b"\n" + record + b"\n\n")
    found = [json.loads(line)["tokens"] for line in blank.stdout.splitlines()]
    assert (blank.returncode, found) == (0, [[], ["a"], []]), blank.stderr


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["--json", "--", "-5"], ["-5"]),
        (["--", "-5"], None),
        (["--json", "play", "--", "-5"], ["play", "-5"]),
        (["play", "--json"], ["play"]),
        (["--json", "play", "jazz"], ["play", "jazz"]),
    ],
)
def test_texts_may_stand_behind_options_and_dashes(two_sets, options, texts):
    done = run_predict(file_of(two_sets), *options)
    assert done.returncode == 0, done.stderr
    if texts is not None:
        assert ["".join(json.loads(line)["tokens"]) for line in done.stdout.splitlines()] == texts


def test_an_unknown_option_is_named(two_sets):
    done = run_predict(file_of(two_sets), "--jsn", "play")
    assert (done.returncode, b"unrecognized arguments: --jsn" in done.stderr) == (2, True)


def test_a_closed_standard_input_is_named(two_sets):
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m pymtl_runtime predict {file_of(two_sets)} <&-"],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(pymtl_runtime.__file__).parents[1])},
    )
    reason = b"error: expected texts, or lines of standard input, which is closed\n"
    assert (done.returncode, done.stderr) == (1, reason)


def test_numbers_beyond_float32_are_refused(everything):
    record = {"tokens": ["a"], "case": [0], "signal": [[1e300, 1.0]]}
    for model in (pymtl.load(everything), pymtl_runtime.load(file_of(everything))):
        with pytest.raises(ValueError, match=r"input 1: .*signal"):
            model.predict(record)
    with pytest.raises(ValueError, match=r"fields\['signal'\]: expected numbers that float32 can hold"):
        model.model.session().run([1], {"signal": [[1e300, 1.0]]})


def test_what_is_no_file_of_a_run_is_named(tmp_path, two_sets):
    with pytest.raises(pymtl_runtime.ModelError, match=r"nothing\.pymtl: No such file"):
        pymtl_runtime.load(tmp_path / "nothing.pymtl")
    pymtl.export(pymtl.LSTM(3, 4), tmp_path / "layer.pymtl")
    with pytest.raises(pymtl_runtime.ModelError, match=r"exported from Python: pymtl_runtime\.Model loads it"):
        pymtl_runtime.load(tmp_path / "layer.pymtl")
    broken = tmp_path / "broken.pymtl"
    broken.write_bytes(file_of(two_sets).read_bytes()[:5000])
    with pytest.raises(pymtl_runtime.ModelError, match=r"broken\.pymtl: "):
        pymtl_runtime.load(broken)


def test_exporting_leaves_what_is_there_and_names_what_it_cannot(two_sets, tmp_path, capsys):
    path = tmp_path / "taken.pymtl"
    path.write_text("mine")
    assert main(["export", str(two_sets), str(path)]) == 1
    assert "is there already: name another file, or pass --overwrite" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert main(["export", str(two_sets), str(tmp_path / "x.onnx"), "--weights", "int8"]) == 1
    assert "ONNX's recurrent operators take float32, got torch.int8: leave out weights" in capsys.readouterr().err
    assert main(["predict", str(path), "play"]) == 1
    assert "is a file, expected the folder of a run: python -m pymtl_runtime predict" in capsys.readouterr().err
    assert main(["export", str(two_sets), str(path), "--overwrite"]) == 0
    assert pymtl_runtime.load(path).predict("play jazz")["tokens"] == ["play", "jazz"]
    assert main(["export", str(two_sets), str(tmp_path / "no" / "folder.pymtl")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["taken.pymtl"]


def test_a_program_is_replaced_only_if_told_to_and_a_run_never(everything, two_sets, tmp_path, capsys):
    folder = tmp_path / "program"
    assert main(["export", str(everything), str(folder), "--weights", "int8"]) == 0
    assert main(["export", str(two_sets), str(folder)]) == 1
    assert "holds an export already: name another folder, or pass --overwrite" in capsys.readouterr().err
    assert main(["export", str(two_sets), str(folder), "--overwrite"]) == 0
    same(pymtl.load(folder).predict(TEXTS), pymtl.load(two_sets).predict(TEXTS))
    assert pymtl.load(folder).weights == "float32"
    assert not (folder / "crfs.safetensors").exists()
    assert main(["export", str(everything), str(two_sets), "--overwrite"]) == 1
    assert "holds something else already: name another folder\n" in capsys.readouterr().err


def test_a_copy_loads_the_file_again(two_sets):
    model = pymtl_runtime.load(file_of(two_sets), threads=1)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        same(other.predict(TEXTS), model.predict(TEXTS))
    assert pickle.loads(pickle.dumps(model.model)).tasks == model.model.tasks
    with pytest.raises(TypeError, match="a session cannot be copied or sent to another process"):
        copy.copy(model.model.session())
    with multiprocessing.get_context("fork").Pool(2) as pool:
        same(pool.map(model.predict, TEXTS), [model.predict(text) for text in TEXTS])


def test_a_stream_s_states_are_kept_and_put_back(one_way):
    model = pymtl_runtime.load(file_of(one_way))

    def begun():
        stream = model.stream()
        stream.feed("please play")
        return stream.state

    kept = begun()  # of a stream that is there no more
    assert kept.shape == (16,)
    stream = model.stream()
    stream.feed("zebra")
    stream.state = kept
    whole = model.predict([["please", "play", "jazz"]])[0]
    answer = stream.feed("jazz", distributions=True)
    same(answer["intent/probabilities"], whole["intent/probabilities"])
    with pytest.raises(ValueError, match="state: expected 16 numbers"):
        stream.state = kept[:3]


def test_a_stream_goes_on_whatever_is_asked_of_it(tmp_path):
    torch.manual_seed(0)
    heads = {"a": pymtl.TokenClassificationHead(3), "b": pymtl.TokenClassificationHead(3)}
    scheme = pymtl.sharing.HierarchicalSharing(list(heads), 4, 5, bidirectional=False, levels={"a": 1, "b": 2})
    pymtl.export(pymtl.MultiTaskModel(torch.nn.Embedding(9, 4), scheme, heads), tmp_path / "m.pymtl")
    model = pymtl_runtime.Model(tmp_path / "m.pymtl")
    whole = model.session()
    whole.run([3], {"words": [2, 5, 7]})
    stream = model.stream()
    stream.run([1], {"words": [2]}, tasks=["a"])
    stream.run([1], {"words": [5]}, tasks=["a"])
    stream.run([1], {"words": [7]}, tasks=["b"])
    assert np.array_equal(stream.logits("b")[0], whole.logits("b")[2])


@pytest.mark.parametrize("description", ["hello", "3", "[]", '{"settings": 3}', '{"settings": {}, "labels": {}}'])
def test_a_damaged_description_is_named(one_way, tmp_path, description):
    path = tmp_path / "m.pymtl"
    program = pymtl.lowering.lower(pymtl.LSTM(3, 4))
    program.as_json = lambda _: json.dumps(
        {**json.loads(type(program).as_json(program, {})), "description": description}
    )
    pymtl.lowering.write(program, path, {})
    with pytest.raises(pymtl_runtime.ModelError, match=r"m\.pymtl: (damaged|expected the model of a run)"):
        pymtl_runtime.load(path)
    assert pymtl_runtime.Model(path).tasks[0].name == "output"
    from pymtl_runtime.__main__ import main as runtime

    assert runtime(["info", str(path)]) == 0


def test_a_data_set_that_is_not_there_is_named(two_sets):
    for model in (pymtl.load(two_sets), pymtl_runtime.load(file_of(two_sets))):
        with pytest.raises(ValueError, match=r"dataset: expected one of \['one', 'two'\], got ''"):
            model.logits(["a"])


def test_the_limit_of_memory_is_that_of_characters_too(two_sets):
    model = pymtl_runtime.load(file_of(two_sets), memory_limit=10**6)
    model.predict(TEXTS)
    with pytest.raises(MemoryError, match="the limit of memory"):
        model.predict([["x" * 16] * 10000])


def test_a_failed_call_leaves_a_streams_states(tmp_path):
    torch.manual_seed(0)
    pymtl.export(pymtl.LSTM(12, 64, num_layers=2), tmp_path / "m.pymtl")
    refused = 0
    for limit in range(150_000, 700_000, 5_000):  # of some the first layer has run before memory is short
        try:
            stream = pymtl_runtime.Model(tmp_path / "m.pymtl", 1, limit).stream()
            stream.run([3], {"features": np.ones((3, 12))})
        except MemoryError:
            continue
        before = stream.state
        try:
            stream.run([500], {"features": np.ones((500, 12))})
        except MemoryError:
            refused += 1
            assert np.array_equal(stream.state, before)
            with pytest.raises(ValueError, match="there are no answers"):
                stream.logits("output")
    assert refused > 0


def test_states_are_numbers_and_a_new_text_has_no_answers(tmp_path):
    pymtl.export(pymtl.LSTM(3, 4), tmp_path / "m.pymtl")
    stream = pymtl_runtime.Model(tmp_path / "m.pymtl").stream()
    with pytest.raises(TypeError, match="state: expected numbers, got <U1"):
        stream.state = ["1"] * len(stream.state)
    stream.run([1], {"features": np.ones((1, 3))})
    stream.logits("output")
    stream.reset()
    with pytest.raises(ValueError, match="there are no answers"):
        stream.logits("output")


def test_a_stream_has_no_path_but_its_logits(one_way):
    stream = pymtl_runtime.Model(file_of(one_way)).stream()
    stream.run([1], {"words": [2]})
    stream.logits("slots")
    with pytest.raises(ValueError, match='"slots": a stream has its logits alone'):
        stream.answer("slots")


def test_lengths_above_the_limit_take_no_memory(one_way):
    session = pymtl_runtime.Model(file_of(one_way), memory_limit=10**8).session()
    with pytest.raises(MemoryError, match="got one of 67108864 tokens: split it"):
        session.run([2**26], {})


TWO_TEXTS = """
[datasets.one]
train = "one.jsonl"
holdout = 0.25
[datasets.two]
train = "two.jsonl"
tokens = "said"
holdout = 0.25
[tasks.mood]
kind = "classification"
dataset = "one"
[tasks.topic]
kind = "classification"
dataset = "two"
[model]
embedding_dim = 8
hidden_size = 8
[training]
epochs = 1
"""


def test_a_record_may_lack_the_text_of_a_data_set(tmp_path):
    for name, text, task in (("one", "tokens", "mood"), ("two", "said", "topic")):
        records = [{text: f"bring tea {i}", task: "ab"[i % 2]} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "two.toml").write_text(TWO_TEXTS)
    assert main(["train", str(tmp_path / "two.toml"), "--run", str(tmp_path / "run")]) == 0
    for model in (pymtl.load(tmp_path / "run"), pymtl_runtime.load(file_of(tmp_path / "run"))):
        given = [{"said": said, "tokens": tokens} for said in ("", "bring it") for tokens in ("", "bring tea")]
        nothing, first, second, both = model.predict(given, distributions=False)
        assert nothing == {"tokens": []}
        assert (first["tokens"], "mood" in first, "topic" in first) == (["bring", "tea"], True, False)
        assert (second["tokens"], "mood" in second, "topic" in second) == (["bring", "it"], False, True)
        assert ("mood" in both, "topic" in both) == (True, True)


def test_a_second_thread_is_refused_a_session(one_way):
    session = pymtl_runtime.load(file_of(one_way)).model.session()
    with session._alone, pytest.raises(RuntimeError, match="in use by another thread: make one for each"):
        session.run([1], {"words": [2]})
    session.run([1], {"words": [2]})


@pytest.mark.parametrize(
    ("lengths", "fields", "options", "kind", "reason"),
    [
        (2, {"words": [2, 3]}, {}, TypeError, "lengths: expected a list of whole numbers"),
        ([2.0], {"words": [2, 3]}, {}, TypeError, "lengths: expected a list of whole numbers"),
        ([], {"words": []}, {}, ValueError, "at least one"),
        ([0], {"words": []}, {}, ValueError, "expected numbers from 1"),
        ([2**62] * 2, {"words": [2]}, {}, ValueError, "expected numbers from 1"),
        ([2], {"words": "ab"}, {}, TypeError, r"fields\['words'\]: expected a list with a value for each token"),
        ([2], {"words": [2]}, {}, ValueError, r"expected strings or whole numbers \[2\], got int64 \[1\]"),
        ([2], {"words": ["a"]}, {}, ValueError, "expected 2 strings, one a token, got 1"),
        ([2], {"words": ["a", 3]}, {}, TypeError, "expected strings or whole numbers .*got 3 at 1 among others"),
        ([2], {"words": [0.5, 1.5]}, {}, TypeError, "expected strings or whole numbers"),
        ([2], {"words": {"play", "jazz"}}, {}, TypeError, r"fields\['words'\]: expected a list with a value for each"),
        ([2], {"words": iter([2, 3])}, {}, TypeError, r"fields\['words'\]: expected a list with a value for each"),
        ([2], {"words": None}, {}, TypeError, r"fields\['words'\]: expected a list with a value for each"),
        ([2], {"words": bytearray(b"ab")}, {}, TypeError, r"fields\['words'\]: expected a list with a value for each"),
        ([2], {"words": [[2], [2, 3]]}, {}, ValueError, r"fields\['words'\]: expected strings or whole numbers \[2\]"),
        ([1], {"words": np.array([2**63 + 1], np.uint64)}, {}, ValueError, "got 9223372036854775809"),
        ([2], {"words": ["\udc80", "a"]}, {}, ValueError, r"fields\['words'\]: expected text, got '\\udc80'"),
        ([2], {"words": ["a\0", "a"]}, {}, ValueError, r"fields\['words'\]: expected strings without a zero"),
        ([1], {"words": [2]}, {"tasks": 3}, TypeError, "tasks: expected a list of names"),
        (
            [2],
            {"words": [[1, 2], [3, 4]]},
            {},
            ValueError,
            r"expected strings or whole numbers \[2\], got int64 \[2, 2\]",
        ),
        ([2], {"word": ["a", "b"]}, {}, ValueError, r"fields: expected some of \['words'\], got 'word'"),
        ([2], {}, {}, ValueError, 'field "words": expected one of the batch, got none'),
        ([2], {"words": [2, 10**6]}, {}, ValueError, "got 1000000 at token 1 of sequence 0"),
        ([1], {"words": [2]}, {"tasks": "intent"}, TypeError, "tasks: expected a list of names"),
        ([1], {"words": [2]}, {"tasks": ["x"]}, KeyError, "task: expected one of"),
        ([1], {"words": [2]}, {"tasks": []}, ValueError, "tasks: expected at least one"),
    ],
)
def test_wrong_batches_are_named(one_way, lengths, fields, options, kind, reason):
    session = pymtl_runtime.load(file_of(one_way)).model.session()
    session.run([1], {"words": [2]})
    with pytest.raises(kind, match=reason):
        session.run(lengths, fields, **options)
    with pytest.raises(ValueError, match="there are no answers"):
        session.answer("intent")
    session.run([2], {"words": np.array(["play", "jazz"])})
    expected = session.logits("intent")
    session.run([2], {"words": ["play", "jazz"]})
    assert np.array_equal(session.logits("intent"), expected)
