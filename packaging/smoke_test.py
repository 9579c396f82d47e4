"""What an installed wheel must be able to do, with nothing but torch beside it."""

import importlib.metadata

import torch

import pymtl

torch.manual_seed(0)
theirs = torch.nn.LSTM(20, 33, num_layers=2, bidirectional=True, batch_first=True)
ours = pymtl.convert(theirs)
x = torch.randn(4, 9, 20, requires_grad=True)
expected, actual = theirs(x)[0], ours(x)[0]
torch.testing.assert_close(actual, expected)
for a, b in zip(
    torch.autograd.grad(actual.square().sum(), x), torch.autograd.grad(expected.square().sum(), x), strict=True
):
    torch.testing.assert_close(a, b)

model = pymtl.MultiTaskModel(
    torch.nn.Embedding(50, 20),
    pymtl.LSTM(20, 16, bidirectional=True, batch_first=True),
    {"intent": pymtl.ClassificationHead(7, pooling="mean"), "slots": pymtl.TokenClassificationHead(11)},
)
tokens, lengths = torch.randint(50, (3, 6)), torch.tensor([4, 6, 1])
logits = model(tokens, lengths)
targets = {"intent": torch.tensor([0, 6, 3]), "slots": torch.randint(11, (3, 6))}
pymtl.JointLoss({"intent": 0.5, "slots": 0.5}, model.losses)(logits, targets).total.backward()
assert all(p.grad is not None for p in model.parameters())
print(f"pymtl {importlib.metadata.version('pymtl')} works with torch {torch.__version__}")
