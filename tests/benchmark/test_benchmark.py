"""Timing, the layer benchmark on tiny shapes, the comparison of a trained model, and ``pymtl bench``."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch
import toy

import pymtl
from pymtl.__main__ import main
from pymtl.benchmark import gpu
from pymtl.benchmark.lstm import DEFAULT_SHAPES, FILL, Shape, recurrence, run
from pymtl.benchmark.machine import cpu_name, peak_gflops, read_gigabytes
from pymtl.benchmark.plots import speed_ratios
from pymtl.benchmark.timing import interleaved, percentile
from pymtl.training.speed import compare

TINY = Shape(2, 5, 3, 4)


@pytest.fixture
def low_peak(monkeypatch):
    """Saves the seconds that measuring the machine's limit takes."""
    monkeypatch.setattr("pymtl.benchmark.lstm.peak_gflops", lambda threads, dtype, runs=10: 100.0 * threads)


@pytest.fixture
def every_warning():
    """PyTorch gives its warnings each time, not just the first."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


# Timing


@pytest.mark.parametrize(
    ("block", "turns"),
    [(1, "a1 b1 a2 b2 a3 b3 a4 b4 a5 b5"), (2, "a1 a2 b1 b2 a3 a4 b3 b4 a5 b5"), (9, "a1 a2 a3 a4 a5 b1 b2 b3 b4 b5")],
)
def test_contenders_take_turns_by_blocks_of_work_after_a_warm_up(block, turns):
    calls = []
    contenders = {name: lambda item, name=name: calls.append(f"{name}{item}") for name in ("a", "b")}
    result = interleaved(contenders, [1, 2, 3, 4, 5], "a", block)
    assert calls == ["a1", "a2", "a3", "b1", "b2", "b3", *turns.split()]
    assert set(result) == {"a", "b"}
    assert set(result["a"]) == {"p50", "p90", "ratio"}


def test_a_ratio_says_how_many_times_as_fast_ours_is():
    contenders = {"ours": lambda _: time.sleep(0.002), "theirs": lambda _: time.sleep(0.008)}
    result = interleaved(contenders, range(5), "ours")
    assert result["ours"]["ratio"] == 1.0
    assert 2 < result["theirs"]["ratio"] < 5
    assert 2 <= result["ours"]["p50"] <= result["ours"]["p90"]


@pytest.mark.parametrize(
    ("block", "seconds", "a", "b"),
    [
        # a takes 1, 2, 10 s, b 2, 2, 30 s: ratios 2, 1, 3.
        (1, [1, 2, 2, 2, 10, 30], (2, 10), (2, 30, 2.0)),
        # a takes 1 and 3, 2 and 2 s, b 2 and 6, 2 and 2 s: ratios 8/4, 4/4.
        (2, [1, 3, 2, 6, 2, 2, 2, 2], (2, 3), (2, 6, 1.5)),
    ],
)
def test_times_are_milliseconds_and_ratios_those_of_neighbours(monkeypatch, block, seconds, a, b):
    ticks = iter([time for end in seconds for time in (0, end)])
    monkeypatch.setattr("pymtl.benchmark.timing.time.perf_counter", lambda: next(ticks))
    result = interleaved({"a": lambda _: None, "b": lambda _: None}, range(len(seconds) // 2), "a", block)
    assert result["a"] == {"p50": 1e3 * a[0], "p90": 1e3 * a[1], "ratio": 1.0}
    assert result["b"] == {"p50": 1e3 * b[0], "p90": 1e3 * b[1], "ratio": b[2]}


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([3.0], 0.9, 3.0), ([2, 1], 0.9, 2), (range(100), 0.5, 50), (range(100), 0.0, 0), (range(10), 1.0, 9)],
)
def test_percentile(values, share, expected):
    assert percentile(values, share) == expected


# Shapes


def test_a_shape_is_parsed_and_named():
    assert Shape.parse("1, 40,64,128") == Shape(1, 40, 64, 128)
    assert str(Shape(1, 40, 64, 128)) == "B1 T40 I64 H128"


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "1,2,3,x", "0,2,3,4", "-1,2,3,4", "1.5,2,3,4"])
def test_a_text_that_is_no_shape_is_refused(text):
    with pytest.raises(ValueError, match="expected B,T,I,H as four numbers above 0"):
        Shape.parse(text)


def test_flops_are_those_of_the_matrix_products():
    # 2 directions x 10 tokens x 4 gates x 4 units x (3 + 4) multiply-adds of 2 operations.
    assert TINY.forward_flops(10) == 2 * 10 * 4 * 4 * 7 * 2
    assert TINY.forward_flops(10, directions=1) == TINY.forward_flops(10) // 2


@pytest.mark.parametrize("shape", [Shape(1, 1, 1, 1), Shape(64, 50, 2, 2), *(Shape(*s) for s in DEFAULT_SHAPES)])
def test_lengths_are_within_the_steps_the_longest_full_and_the_mean_as_documented(shape):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.stack([shape.lengths(generator) for _ in range(50)]).float()
    assert lengths.min() >= 1
    assert (lengths.amax(1) == shape.steps).all()
    if shape.batch >= 16:
        assert lengths.mean() / shape.steps == pytest.approx(FILL, abs=0.05)


# Measurements


def test_every_mode_of_a_shape_is_measured(low_peak):
    rows = list(run([TINY], seconds=0.01))
    assert [row["mode"] for row in rows] == ["inference", "training", "inference, lengths", "training, lengths"]
    assert [list(row["contenders"]) for row in rows] == [
        ["pymtl", "pymtl frozen", "nn.LSTM"],
        ["pymtl", "nn.LSTM"],
        ["pymtl", "nn.LSTM packed", "nn.LSTM padded"],
        ["pymtl", "nn.LSTM packed", "nn.LSTM padded"],
    ]
    for row in rows:
        assert row["shape"] == "B2 T5 I3 H4"
        assert row["parity"] < 1e-5
        assert row["tokens"] == 10 or "lengths" in row["mode"]
        assert 5 <= row["runs"] <= 200
        assert row["share_of_peak"] == pytest.approx(row["gflops"] / row["peak_gflops"])
        factor = 3 if row["mode"].startswith("training") else 1
        flops = factor * TINY.forward_flops(row["tokens"])
        assert row["gflops"] == pytest.approx(flops / row["contenders"]["pymtl"]["p50"] * 1e-6)
        assert all(timed["p50"] <= timed["p90"] for timed in row["contenders"].values())


def test_a_single_sequence_has_no_rows_of_variable_length(low_peak):
    assert [row["mode"] for row in run([Shape(1, 3, 2, 2)], seconds=0.01)] == ["inference", "training"]


def test_gradients_of_ours_and_theirs_are_compared_not_ours_with_ours(low_peak, monkeypatch):
    class Wrong(pymtl.LSTM):
        def forward(self, *arguments, **options):
            output, states = super().forward(*arguments, **options)
            return output + (output - output.detach()), states  # the same values, twice the gradient

    def wrong(module):
        result = pymtl.LSTM(module.input_size, module.hidden_size, bidirectional=True).eval()
        result.load_state_dict(module.state_dict())
        result.__class__ = Wrong
        return result

    monkeypatch.setattr("pymtl.benchmark.lstm.pymtl.convert", wrong)
    monkeypatch.setattr("pymtl.benchmark.lstm.pymtl.freeze", lambda module: module)
    inference, training = run([Shape(1, 3, 2, 2)], seconds=0.01)
    assert inference["parity"] < 1e-5
    assert training["parity"] > 0.5


def test_the_recurrence_is_measured_on_one_thread_and_gives_the_threads_back(low_peak, threads):
    threads(2)
    rows = recurrence(seconds=0.0)
    first = next(rows)
    assert torch.get_num_threads() == 1
    assert first["shape"] == "B1 T64 I64 H64"
    assert first["peak_gflops"] == 100.0
    # A median of ratios and a ratio of medians: the same where there is one limit.
    assert math.isclose(first["share_of_peak"], first["gflops"] / 100)
    rows.close()
    assert torch.get_num_threads() == 2


def test_the_machine_has_a_name_and_a_limit():
    assert cpu_name()
    assert peak_gflops(1) > 0.1
    assert peak_gflops(1, "bfloat16") > 0.1
    assert read_gigabytes(1, 1 << 16) > 0.01
    with pytest.raises(ValueError, match="dtype: expected float32, float64 or bfloat16, got int8"):
        peak_gflops(1, "int8")


def test_a_trained_model_is_compared_without_changing_it(tmp_path):
    config = toy.load(tmp_path, "training.epochs=1", toml=toy.TOML + toy.ALL_KINDS)
    trained = toy.fitted(config, tmp_path / "run")
    before = {name: p.clone() for name, p in trained.model_with_loss.model.state_dict().items()}
    result = compare(trained.model_with_loss, config, trained.vocabulary, trained.train, trained.valid, batches=2)
    for kind in ("bucketed", "shuffled"):
        parts = result[kind]
        assert set(parts["training"]) == set(parts["inference"]) == {"pymtl", "reference", "reference-padded"}
    assert result["parity"]["logits"] < 1e-5
    assert result["parity"]["gradients"] < 1e-4
    assert all(torch.equal(p, before[name]) for name, p in trained.model_with_loss.model.state_dict().items())


# The command


TABLE = ("B2 T5 I3 H4", "B1 T3 I2 H2", "inference, lengths", "nn.LSTM packed", "pymtl frozen", "% peak", "error")


@pytest.mark.filterwarnings("error")
def test_bench_prints_a_table_and_writes_json_and_a_plot(low_peak, every_warning, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    files = tmp_path / "new" / "result.json", tmp_path / "plots" / "result.png"
    argv = ["bench", "--shape", "2,5,3,4", "--shape", "1,3,2,2", "--seconds", "0.01", "--threads", "1"]
    assert main([*argv, "--json", str(files[0]), "--plot", str(files[1])]) == 0
    printed, error = capsys.readouterr()
    assert error == ""
    assert all(text in printed for text in TABLE)
    result = json.loads(files[0].read_text(encoding="utf-8"))
    assert set(result) == {"date", "dtype", "machine", "rows", "recurrence"}
    assert len(result["rows"]) == 6
    assert result["machine"]["torch"] == torch.__version__
    assert files[1].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_bench_measures_another_dtype_beside_nn_lstm_in_the_same(low_peak, tmp_path, capsys):
    argv = ["bench", "--shape", "2,5,3,4", "--seconds", "0.01", "--threads", "1", "--json", str(tmp_path / "r.json")]
    assert main([*argv, "--dtype", "bfloat16"]) == 0
    assert ", bfloat16" in capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert result["dtype"] == "bfloat16"
    assert all(1e-4 < row["parity"] < 0.1 for row in result["rows"] if row["mode"].startswith("training"))


def test_bench_cuts_no_number_off_where_the_output_is_no_terminal(low_peak, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["bench", "--shape", "32,50,30,12", "--seconds", "0.01"]) == 0
    assert "…" not in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["1,2,3", "big", "0,1,1,1"])
def test_bench_refuses_what_is_no_shape_in_one_line(shape, capsys):
    assert main(["bench", "--shape", shape]) == 1
    error = capsys.readouterr().err
    assert error == f"pymtl: error: --shape: expected B,T,I,H as four numbers above 0, got {shape!r}\n"


def test_the_plot_has_a_bar_for_every_pytorch_contender(low_peak):
    result = {
        "dtype": "float32",
        "rows": list(run([TINY], seconds=0.01)),
        "machine": {"cpu": "some", "instruction set in use": "avx2", "threads": 1},
    }
    axes = speed_ratios(result).axes[0]
    assert len(axes.get_yticklabels()) == 1 + 1 + 2 + 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "against nn.LSTM",
        "against nn.LSTM packed",
        "against nn.LSTM padded",
    ]


def test_the_least_time_on_a_gpu_is_that_of_exchanges_and_products():
    limits = gpu.Limits({"float32": 50.0, "tf32": 400.0, "bfloat16": 800.0}, 4000.0, {2: 0.5, 4: 0.6, 8: 0.8}, {})
    case = gpu.Case(8, 100, 64, 256)  # a cluster of 4 blocks
    products = 2 * 8 * 256 * (64 + 256) * 800
    assert limits.least_ms(case, 800, 1) == pytest.approx(100 * 0.6e-3 + products / 800e9)
    assert limits.least_ms(case, 800, 2) == pytest.approx(200 * 0.6e-3 + 3 * products / 800e9)
    exact, rounded = (replace(case, dtype=torch.float32, hidden_size=96, tf32=tf32) for tf32 in (False, True))
    products = 2 * 8 * 96 * (64 + 96) * 800
    assert limits.least_ms(exact, 800, 1) == pytest.approx(100 * 0.6e-3 + products / 50e9)
    assert limits.least_ms(rounded, 800, 1) == pytest.approx(100 * 0.6e-3 + products / 400e9)
    assert limits.least_ms(replace(case, hidden_size=600), 800, 1) is None
