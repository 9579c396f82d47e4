"""What a model begins with: word vectors, and the weights of another run."""

import pytest
import torch
import toy
from parity import assert_same_bits

from pymtl.training import config as configuration
from pymtl.training.errors import ConfigError, DataError
from pymtl.training.run import Run
from pymtl.training.vectors import read_vectors
from pymtl.training.warm_start import warm_start


@pytest.mark.parametrize("header", ["", "4 3\n"])
def test_vectors_are_read_by_word_and_by_its_lower_case(tmp_path, header):
    (tmp_path / "v.txt").write_text(header + "play 1 2 3\nJazz 4 5 6\nrock 7 8 9\n. . . 1 1 1\n", encoding="utf-8")
    vectors, found, _ = read_vectors(tmp_path / "v.txt", ["<pad>", "Play", "play", "Rock", "Jazz", "x", ". . ."], 3)
    assert found.tolist() == [False, True, True, True, True, False, True]
    assert vectors[1].tolist() == vectors[2].tolist() == [1, 2, 3]
    assert vectors[3].tolist() == [7, 8, 9]
    assert vectors[6].tolist() == [1, 1, 1]
    assert not vectors[[0, 5]].any()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("4 2\nplay 1 2\n", "v.txt:1: expected vectors of 3"),
        ("play 1 2\n", "v.txt:1: expected vectors of 3 numbers, got 2"),
        ("play 1 2 3 4\n", "v.txt:1: expected vectors of 3 numbers, got 4"),
        ("play 1 2 3\n\nx y 1\n", "v.txt:3: expected a word and 3"),
        ("play 1 2 x\n", "v.txt:1"),
        ("play 1 2 3\nrock 1 2 3\njazz 1 2 3 4\n", "v.txt:3: expected vectors of 3 numbers, got 4"),
        ("rock 1 2 3\nrock 1 2 3\nplay 1 nan 3\n", "v.txt:3: expected finite numbers of 'play', got 1.0 nan 3.0"),
        ("play 1 2 -inf\n", "v.txt:1: expected finite numbers of 'play'"),
        ("play 1 2 1e50\n", "v.txt:1: expected finite numbers of 'play'"),
    ],
)
def test_a_bad_line_of_vectors_is_named(tmp_path, text, reason):
    (tmp_path / "v.txt").write_text(text)
    with pytest.raises(DataError) as error:
        read_vectors(tmp_path / "v.txt", ["play"], 3)
    assert reason in str(error.value)


def test_a_warm_start_takes_what_the_other_run_knows(tmp_path):
    config = toy.load(tmp_path, "training.epochs=1")
    first = toy.fitted(config, tmp_path / "first")
    again = configuration.load(
        tmp_path / "toy.toml",
        [
            f'warm_start={{run="{tmp_path / "first"}", parts=["embedding", "encoder", "heads.slots"], freeze=true}}',
            "training.min_count=25",
        ],
    )
    result = toy.trainer(again, tmp_path / "second")
    assert result.vocabulary.tokens != first.vocabulary.tokens
    fresh = {name: p.clone() for name, p in result.model_with_loss.model.state_dict().items()}
    taken = warm_start(result.model_with_loss.model, again, result.vocabulary)
    best = Run(tmp_path / "first").load_model()[0].model.state_dict()
    own = result.model_with_loss.model.state_dict()
    for token in result.vocabulary.tokens:
        row, other = result.vocabulary.tokens.index(token), first.vocabulary.tokens.index(token)
        assert torch.equal(own["embedding.weight"][row], best["embedding.weight"][other])
    same = [name for name in own if name.startswith(("encoder", "heads.slots"))]
    assert_same_bits({name: own[name] for name in same}, {name: best[name] for name in same})
    assert torch.equal(own["heads.intent.weight"], fresh["heads.intent.weight"])
    assert {name for name, p in result.model_with_loss.model.named_parameters() if not p.requires_grad} == set(taken)


def test_a_warm_start_checks_the_labels_of_every_head_it_takes(tmp_path):
    toy.fitted(toy.load(tmp_path, "training.epochs=1"), tmp_path / "first")
    lines = [{**record, "intent": record["intent"] + "!"} for record in toy.requests(60)]
    toy.write_lines(tmp_path / "other.jsonl", lines)
    start = f'warm_start={{run="{tmp_path / "first"}", parts=["heads"]}}'
    config = configuration.load(tmp_path / "toy.toml", [start, "data.train=other.jsonl"])
    result = toy.trainer(config, tmp_path / "second")
    with pytest.raises(ConfigError, match=r"warm_start.parts: heads: expected the labels"):
        warm_start(result.model_with_loss.model, config, result.vocabulary)


@pytest.mark.parametrize(
    ("part", "overrides", "reason"),
    [
        ("heads.nothing", [], "expected one of embedding, encoder, heads.*got 'heads.nothing'"),
        ("encoder", ["model.hidden_size=9"], r"encoder.weight_ih_l0: expected shape \[36, 8\], got \[32, 8\]"),
        ("embedding", ["model.embedding_dim=9"], "expected embeddings of 9 numbers, got 8"),
    ],
)
def test_a_warm_start_that_does_not_fit_is_refused(tmp_path, part, overrides, reason):
    toy.fitted(toy.load(tmp_path, "training.epochs=1"), tmp_path / "first")
    config = configuration.load(
        tmp_path / "toy.toml", [f'warm_start={{run="{tmp_path / "first"}", parts=["{part}"]}}', *overrides]
    )
    result = toy.trainer(config, tmp_path / "second")
    with pytest.raises(ConfigError, match=reason):
        warm_start(result.model_with_loss.model, config, result.vocabulary)
