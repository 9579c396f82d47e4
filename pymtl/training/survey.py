"""What the data hold, for a person to see before training begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pymtl.serving.records import Record
from pymtl.training.config import Config
from pymtl.training.data import Sets
from pymtl.training.vocabulary import Vocabulary

MOST = 8  # labels that are named with their counts
HALF = 0.5  # of the tokens that are unknown: a text read in the wrong pieces
FEW = 5  # texts that validate a label


def survey(sets: Sets, vocabulary: Vocabulary) -> list[str]:
    """What is worth knowing of the data, a line each: how texts are split, how many labels of which task there are,
    those of validation or test that training lacks, and the share of unknown words."""
    config = sets.config
    lines = list(sets.notes)
    for name, data in config.sets.items():
        if data.tokenizer != "auto" and config.model.words:
            of = f" of {name}" if name else ""
            lines.append(
                f"texts{of} are split by the tokenizer {data.tokenizer!r}; lists of tokens are taken as they are"
            )
    for name in config.tasks:
        count = sum(record.labels.get(name) is not None for own in sets.train.values() for record in own)
        lines += _of_task(name, config, vocabulary, count)
        lines += _missing(name, sets)
        lines += config.tasks[name].rules.remarks(
            name, config.tasks[name], sets.train[config.tasks[name].dataset or ""]
        )
        if config.tasks[name].auxiliary:
            lines.append(f"{name}: auxiliary, weight {config.tasks[name].weight:g}: trained, not scored")
    if config.balancing.kind == "equal_norm":
        lines.append(
            "loss: the sum of the tasks' losses as equal_norm scales them; each task's own tells how it gets on"
        )
    for part, records in (("validation", sets.valid), ("test", sets.test)):
        lines += _unknown_labels(part, records, config, vocabulary)
        share = unknown_share([record for own in records.values() for record in own], vocabulary)
        if records and config.model.words:
            hint = ""
            if share > HALF and any(data.tokenizer != "characters" for data in config.sets.values()):
                hint = ': if they are names or single words, tokenizer = "characters" in [data] reads their letters'
            lines.append(f"{part}: {100 * share:.1f} % of the tokens are unknown to training{hint}")
    return lines


def unknown_share(records: Sequence[Record], vocabulary: Vocabulary) -> float:
    """The share of the records' tokens that are not in the vocabulary."""
    known = frozenset(vocabulary.tokens)
    total = sum(len(record.tokens) for record in records)
    return sum(token not in known for record in records for token in record.tokens) / max(total, 1)


def _of_task(name: str, config: Config, vocabulary: Vocabulary, labelled: int) -> list[str]:
    task, learned = config.tasks[name], vocabulary.learned(name)
    if not learned.counts:
        return []
    pairs = list(zip(map(task.rules.label_name, learned.labels), learned.counts))[task.rules.special_labels :]
    pairs.sort(key=lambda pair: -pair[1])
    shown = ", ".join(f"{label} ({count:,})" for label, count in pairs[:MOST])
    rarest = f", …, {pairs[-1][0]} ({pairs[-1][1]:,})" if len(pairs) > MOST else ""
    one, several = task.rules.parts_are
    lines = [f"{name}: {len(pairs)} {one if len(pairs) == 1 else several}" + (f": {shown}{rarest}" if pairs else "")]
    if len(learned.labels) == 1 and pairs[0][1] >= labelled:
        lines.append(f"{name}: every training record with a label has {pairs[0][0]!r}: there is nothing to tell apart")
    return lines


def _missing(name: str, sets: Sets) -> list[str]:
    """Labels that are missing and may mean that there are none; and classes that too few texts validate."""
    task = sets.config.tasks[name]
    own = sets.train[task.dataset or ""]
    lines = []
    missing = sum(record.labels.get(name) is None for record in own)
    if missing and task.rules.has_option("missing"):
        lines.append(
            f"{name}: {missing:,} of {len(own):,} records have no label and teach it nothing; where that means none of "
            f'the labels, set tasks.{name}.missing = "none"'
        )
    if task.rules.is_exact and not task.rules.of_tokens and not task.auxiliary:
        parts = (
            part for record in sets.valid[task.dataset or ""] for part in task.rules.parts(record.labels.get(name))
        )
        counts = Counter(map(task.rules.label_name, parts))
        few = [f"{label} ({count})" for label, count in sorted(counts.items(), key=lambda item: item[1]) if count < FEW]
        if few:
            lines.append(f"{name}: few texts validate {', '.join(few[:MOST])}: its scores there say little")
    return lines


def _unknown_labels(
    part: str, sets: Mapping[str, Sequence[Record]], config: Config, vocabulary: Vocabulary
) -> list[str]:
    lines = []
    for name, task in config.main_tasks.items():
        if not task.rules.has_vocabulary(task):
            continue
        encoding = task.rules.encoding(vocabulary.labels[name])
        unknown = Counter(
            label
            for own in sets.values()
            for record in own
            if record.labels.get(name) is not None
            for label in task.rules.unreachable(record.labels[name], record.tokens, encoding, task)
        )
        if unknown:
            shown = ", ".join(f"{label!r} ({count:,})" for label, count in unknown.most_common(MOST))
            more = ", …" if len(unknown) > MOST else ""
            lines.append(f"{part}: labels of {name} that training lacks, each one counts as missed: {shown}{more}")
    return lines
