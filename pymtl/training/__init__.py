"""Training multi-task models from a configuration: what ``pymtl train`` and ``pymtl predict`` run."""
