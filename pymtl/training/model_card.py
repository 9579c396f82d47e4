"""A page that says what a trained model is: a model card (Mitchell et al. 2019)."""

from __future__ import annotations

from pymtl.training.config import Config
from pymtl.training.markdown import table
from pymtl.training.metrics import exact_tasks
from pymtl.training.run import Run
from pymtl.training.vocabulary import Vocabulary


def model_card(run: Run, config: Config, vocabulary: Vocabulary) -> str:
    """The card in Markdown, from the run's own files."""
    manifest = run.read_manifest()
    auxiliary = [name for name in config.tasks if name not in config.main_tasks]
    lines = [
        "---",
        "library_name: pymtl",
        "---",
        "",
        f"# {run.folder.resolve().name}",
        "",
        f"A recurrent model of {len(config.main_tasks)} task{'s' if len(config.main_tasks) > 1 else ''}, trained with "
        f"pymtl {manifest['pymtl']} on torch "
        f"{manifest['torch']}, {manifest['date'][:10]}.",
        *([f"Beside them it was trained on auxiliary tasks: {', '.join(auxiliary)}."] if auxiliary else []),
        "",
        "## Tasks",
        "",
    ]
    rows = []
    for name, task in config.main_tasks.items():
        known = vocabulary.labels[name][task.rules.special_labels :] if vocabulary.counts.get(name) else []
        labels = list(map(task.rules.label_name, known))
        shown = ", ".join(labels[:12]) + (f", … ({len(labels)})" if len(labels) > 12 else "")
        rows.append([name, task.kind, shown])
    lines += table(["task", "kind", "labels"], rows, numbers=False)
    model = config.model
    lines += [
        "",
        "## Model",
        "",
        f"{'Bidirectional' if model.bidirectional else 'One-directional'} LSTM, {model.num_layers} "
        f"layer{'s' if model.num_layers > 1 else ''} of {model.hidden_size} units, sharing {config.sharing.kind}, "
        f"balancing {config.balancing.kind}; "
        f"{len(vocabulary.tokens):,} tokens"
        + ("" if len(config.sets) > 1 else f", texts split by {next(iter(config.sets.values())).tokenizer!r}")
        + ". All settings are in `config.json`.",
        "",
        "## Data",
        "",
    ]
    rows = []
    for part, file in manifest.get("data", {}).items():
        rows.append([part, file["file"], f"{file['bytes']:,}", f"`{file['sha256'][:16]}…`"])
    lines += table(["part", "file", "bytes", "SHA-256"], rows, numbers=False)
    lines += ["", "## Scores", ""]
    scores = manifest["scores"]
    parts = [part for part in ("validation", "test") if scores[part]]
    lines += [f"Of epoch {manifest['epoch']}, the best in validation.", ""]
    rows = []
    for name in dict.fromkeys(name for part in parts for name in scores[part]):
        of = f" ({', '.join(exact_tasks(config))})" if name == "exact_match" else ""
        cells = [f"{scores[part][name]:.4f}" if name in scores[part] else "" for part in parts]
        rows.append([name + of, *cells])
    lines += table(["score", *parts], rows)
    lines += [
        "",
        "They say how the model does on texts like these. On others `pymtl evaluate` tells.",
        "",
        "## Use",
        "",
        "```python",
        "import pymtl",
        "",
        'model = pymtl.load("path/to/this/folder")',
        'answer = model.predict("a text")',
        "```",
        "",
    ]
    return "\n".join(lines)
