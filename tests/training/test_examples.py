"""The configurations of examples/ fit their data, and what makes data for some of them runs."""

import gzip
import importlib.util
from itertools import islice
from pathlib import Path

import pytest

from pymtl.training import config as configuration
from pymtl.training.data import read_test_sets

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGURATIONS = sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.toml"))
OTHERS = {"ewt/ewt.toml", "cmudict/ctc.toml", "cmudict/ctc_joint.toml"}  # whose data are not in the repository


def every_task_has_labels(config):
    for dataset, records in read_test_sets(config).items():
        assert len(records) > 100
        for task in config.main_tasks_of(dataset):
            assert any(record.labels.get(task) is not None for record in records)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_fits_its_data(name):
    config = configuration.load(EXAMPLES / name)
    assert len(config.main_tasks) > 0
    if name not in OTHERS:
        every_task_has_labels(config)


def test_letters_are_spread_for_ctc(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    for part in ("train", "valid", "test"):
        with gzip.open(EXAMPLES / "cmudict" / "data" / f"{part}.jsonl.gz", "rt", encoding="utf-8") as file:
            words = list(islice(file, 400))
        with gzip.open(tmp_path / "data" / f"{part}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(words)
    spec = importlib.util.spec_from_file_location("spread", EXAMPLES / "cmudict" / "spread.py")
    spread = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(spread)
    monkeypatch.setattr(spread, "FOLDER", tmp_path)
    spread.main()
    assert "test.jsonl.gz: 400 words, " in capsys.readouterr().out
    for name in ("ctc", "ctc_joint"):
        config = configuration.load(EXAMPLES / "cmudict" / f"{name}.toml", folder=tmp_path)
        every_task_has_labels(config)
        (records,) = read_test_sets(config).values()
        assert all(record.tokens[1::2] == ["·"] * (len(record.tokens) // 2) for record in records)
