"""What it takes to answer texts by a trained model, besides the model's numbers: from a record to numbers, and from
numbers to an answer.

Without torch, and with imports of its own modules alone: training uses it, and so does ``pymtl_runtime``, which brings
a copy along.
"""
