"""A sequence for each text, written token by token: a translation, a pronunciation, a summary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pymtl.decoder import DecoderHead
from pymtl.serving.answers import GenerationAnswers, Scored
from pymtl.serving.encoding import UNKNOWN
from pymtl.serving.generation import END
from pymtl.serving.generation import UNKNOWN as UNKNOWN_ID
from pymtl.serving.records import Record
from pymtl.serving.tokenizing import JOINER
from pymtl.serving.values import are_strings, shown
from pymtl.training.errors import DataError
from pymtl.training.kinds.base import AttentionHeadsOptions, Column, Learned, Requirement, SmoothingOptions
from pymtl.training.kinds.sequences import ReferenceOptions, RightAnswers, SequenceKind, error_rate, exact_matches

END_NAME = "<end>"
SPECIAL = (END_NAME, UNKNOWN)  # the first labels
WORTH_SAYING = 0.05  # of the answers' tokens


def _rare_words(values: Sequence[RightAnswers]) -> int:
    """How many answers have a word that no other has."""
    count = Counter(word for label in values for word in set(label.tokens))
    return sum(any(count[word] == 1 for word in label.tokens) for label in values)


def _on_copying(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> str | None:
    """How many words of answers stand in their texts, and what keeps how many more from it. None if there are none."""
    total, found = 0, 0
    capitals, signs = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for text, answer in pairs:
        given, alike = set(text), {_bare(token): token for token in text}
        for word in answer:
            if JOINER in word or not re.search(r"\w", word):
                continue  # signs are learnt
            total += 1
            if word in given:
                found += 1
            elif (read := alike.get(_bare(word))) is not None:
                (capitals if word.casefold() == read.casefold() else signs)[word, read] += 1
    if total == 0:
        return None
    line = f"{100 * found / total:.0f} % of its answers' words stand in their texts and can be copied"
    for what, others, advice in (
        ("capitals", capitals, "a copy looks as in the text, which lowercase = true makes small"),
        ("signs", signs, 'tokenizer = "words" splits them off in texts, units = "pieces" in answers'),
    ):
        if others.total() >= WORTH_SAYING * total:
            answered, read = others.most_common(1)[0][0]
            share = 100 * others.total() / total
            line += f"; {share:.0f} % differ in {what}, as {answered!r} from the text's {read!r}: {advice}"
    if found < WORTH_SAYING * total and ";" not in line:
        line += ": are texts and answers split alike?"
    return line


def _bare(token: str) -> str:
    """A token without the signs around it, in small letters; of signs alone the token."""
    return re.sub(r"^\W+|\W+$", "", token.casefold()) or token


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(ReferenceOptions, AttentionHeadsOptions, SmoothingOptions):
    # What answers are made of. Lists: "tokens". Texts: "words", split at spaces; "pieces", words and signs, as the
    # tokenizer "words" splits them; "characters". "auto": "tokens" or "words"
    units: Literal["auto", "tokens", "words", "pieces", "characters"] = "auto"
    label_min_count: int = 1  # tokens of answers that are rarer in training are not learnt
    decoder_cell: Literal["lstm", "gru"] = "lstm"  # what writes the answers
    decoder_size: int = 256  # its units
    decoder_layers: int = 1  # its layers
    decoder_embedding_dim: int = 128  # of the tokens it writes
    decoder_dropout: float = 0.3  # of these tokens, and of what the decoder's output layer reads
    attention: Literal["dot", "general", "additive"] = "general"  # how the decoder's states find the text's
    decoder_tied: bool = False  # whether the weights of the output layer are the embedding's
    copy: bool = False  # whether tokens of the text may be copied into an answer, also ones that training has not seen
    beam_size: int = 1  # hypotheses that are kept in the search for an answer
    max_length: int = 0  # tokens of an answer at most; 0: twice as many as the longest in training


class Generation(GenerationAnswers, SequenceKind):
    """Edit distance to the nearest right answer, over the answers' lengths; exact matches; of texts the same of words,
    BLEU and chrF by sacrebleu."""

    Options = GenerationOptions
    has_reference = True
    looked_for = 1
    parts_are = ("token of answers", "tokens of answers")
    special_labels = len(SPECIAL)
    scores = ("token_error_rate", "exact_match", "word_error_rate", "bleu", "chrf")
    lower_is_better = frozenset({"token_error_rate", "word_error_rate"})

    def requirements(self, task: Any, config: Any) -> list[Requirement]:
        numbers = ("label_min_count", "decoder_size", "decoder_layers", "decoder_embedding_dim", "beam_size")
        return [
            *((getattr(task, key) >= 1, key, "a number above 0") for key in numbers),
            (task.max_length >= 0, "max_length", "a number of at least 0"),
            (0 <= task.decoder_dropout < 1, "decoder_dropout", "a number from 0 to below 1"),
            (not task.copy or task.label_smoothing == 0, "label_smoothing", "0 with copy"),
            (not task.copy or task.units != "characters", "units", "tokens, words or pieces with copy"),
            (not task.copy or config.model.words, "copy", "a text of words to copy from"),
            (task.decoder_size % task.attention_heads == 0, "attention_heads", "a divisor of decoder_size"),
        ]

    # From records to targets.

    def suits(self, column: Column) -> str | None:
        """Texts may be anything; a list that names something twice is no set of labels."""
        if column.is_cells or not all(map(are_strings, column.values)):
            return None
        twice = sum(len(set(value)) < len(value) for value in column.values)
        return "lists of strings, whose order counts" if 50 * twice >= len(column.values) else None

    def of_cell(self, cell: str, task: Any) -> list[str] | str:
        return cell.split() if task.units == "tokens" else cell.strip()

    def sequence_of(self, answer: Any, task: Any) -> tuple[str, ...]:
        wanted = {"tokens": "a list of strings", "auto": "a text or a list of strings"}.get(task.units, "a text")
        is_text = isinstance(answer, str)
        if not (is_text or are_strings(answer)) or (task.units != "auto" and is_text != (task.units != "tokens")):
            raise DataError(f"expected {wanted}, got {shown(answer, lambda part: isinstance(part, str))}")
        found = self.tokens_of(answer, task)
        for name in SPECIAL:
            if name in found:
                raise DataError(f"expected answers without {name}, which has a meaning of its own here")
        if task.units == "pieces" and JOINER in answer:
            raise DataError(f"expected answers without {JOINER}, which has a meaning of its own with units = 'pieces'")
        return tuple(found)

    def vocabulary(self, name: str, values: Sequence[Any], task: Any) -> list[str]:
        counts = Counter(token for label in values for token in label.tokens)
        kept = [token for token, count in counts.items() if count >= task.label_min_count]
        if counts and not kept and not task.copy:
            raise DataError(
                f"tasks.{name}.label_min_count: expected {counts.most_common(1)[0][1]} at most, how often the most "
                f"frequent token of its answers occurs, got {task.label_min_count}"
            )
        return [*SPECIAL, *sorted(kept, key=lambda token: (-counts[token], token))]

    def settled(self, name: str, task: Any, values: Sequence[Any], notes: list[str]) -> Any:
        texts = [label.is_text for label in values]
        if any(texts) and not all(texts):
            raise DataError(f"tasks.{name}: expected labels that are all texts or all lists of tokens, got both")
        units = ("words" if any(texts) else "tokens") if task.units == "auto" else task.units
        super().settled(name, task, values, notes)
        longest = max((len(label.tokens) for label in values), default=0)
        if 0 < task.max_length < longest:
            count = sum(len(label.tokens) > task.max_length for label in values)
            notes.append(
                f"{name}: {count:,} of {len(values):,} answers are longer than max_length = {task.max_length} and can "
                f"never be given: the longest has {longest} {units}"
            )
        rare = _rare_words(values) if units in ("words", "pieces") and not task.copy else 0
        if 2 * rare > len(values):
            notes.append(
                f"{name}: {rare:,} of {len(values):,} answers hold a word that stands in no other answer, so that it "
                'cannot be learnt. Are they spelled out (dates, numbers, forms of words)? Then units = "characters"; '
                "copy = true lets words of the text stand in an answer"
            )
        return replace(task, units=units, max_length=task.max_length or max(2 * longest, 1))

    def remarks(self, name: str, task: Any, records: Sequence[Record]) -> list[str]:
        if not task.copy:
            return []
        pairs = [
            (record.tokens, record.labels[name].tokens) for record in records if record.labels.get(name) is not None
        ]
        found = _on_copying(pairs)
        return [] if found is None else [f"{name}: {found}"]

    def target(
        self, label: RightAnswers, encoding: Mapping[str, int], tokens: Tensor, task: Any, config: Any
    ) -> Tensor:
        return torch.tensor([*(encoding.get(token, UNKNOWN_ID) for token in label.tokens), END], dtype=torch.int64)

    # The model.

    def head(self, task: Any, learned: Learned, words: nn.Embedding | None) -> DecoderHead:
        return DecoderHead(
            len(learned.labels),
            hidden_size=task.decoder_size,
            num_layers=task.decoder_layers,
            embedding_dim=task.decoder_embedding_dim,
            cell=task.decoder_cell,
            attention=task.attention,
            attention_heads=task.attention_heads,
            tied=task.decoder_tied,
            dropout=task.decoder_dropout,
            copy=task.copy,
            unknown=UNKNOWN_ID,
            loss=self.cross_entropy(task, learned),
            reads=self.reads(task),
        )

    def is_right(self, truth: RightAnswers, guess: Any, task: Any) -> bool:
        return tuple(self.tokens_of(guess, task)) in set(truth)  # which may hold what no record may

    # From answers to scores.

    def score(
        self, truth: Sequence[Any], guess: Sequence[Any], details: Sequence[Mapping[str, Any]], scored: Scored
    ) -> dict[str, float]:
        task = scored.task
        found = [tuple(self.tokens_of(each, task)) for each in guess]
        scores = {
            "token_error_rate": error_rate(list(map(list, truth)), found),
            "exact_match": exact_matches(truth, found),
        }
        if task.units == "tokens":
            return scores
        if task.units != "words":
            words = [["".join(self.in_form(answer, task)).split() for answer in label] for label in truth]
            scores["word_error_rate"] = error_rate(words, [each.split() for each in guess])
        import sacrebleu

        texts = [[self.in_form(answer, task) for answer in label] for label in truth]
        most = max(map(len, texts))
        references = [[own[i] if i < len(own) else None for own in texts] for i in range(most)]
        # Answers may be shorter than BLEU's four words in a row: then as many count as they have.
        bleu = sacrebleu.corpus_bleu(list(guess), references, use_effective_order=True)
        scores["bleu"] = min(bleu.score / 100, 1.0)  # which rounding may have passed
        scores["chrf"] = min(sacrebleu.corpus_chrf(list(guess), references).score / 100, 1.0)
        return scores
