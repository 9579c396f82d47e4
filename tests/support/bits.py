"""Whether two builds compute the same bits: of random recurrent modules the results and all gradients.

python tests/support/bits.py --write bits.json      # with one build
python tests/support/bits.py --compare bits.json    # with the other, on the same machine and instruction set
"""

import argparse
import hashlib
import json
import random
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pymtl
from pymtl import _native


def draw(seed):
    """A module, a batch for it, initial states, and lengths; and what they are, in words."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    kind = pick.choice(["LSTM", "LSTM", "GRU", "RNN"])
    dtype = pick.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    inputs, size = pick.randint(1, 40), pick.choice([1, 7, 16, 33, 64, 100, 130])
    batch, steps = pick.choice([1, 2, 3, 8, 17]), pick.randint(1, 12)
    options = {name: pick.random() < 0.5 for name in ("bidirectional", "bias", "batch_first")}
    options["num_layers"] = pick.choice([1, 1, 2, 3])
    if pick.random() < 0.4:
        options |= {"recurrent_dropout": 0.3, "zoneout": pick.choice([0.0, 0.2])}
        options |= {"weight_drop": pick.choice([0.0, 0.2]), "layer_norm": pick.random() < 0.5}
    module = getattr(pymtl, kind)(inputs, size, **options).to(dtype).train(pick.random() < 0.7)
    x = torch.randn(*((batch, steps) if options["batch_first"] else (steps, batch)), inputs).to(dtype)
    form = pick.choice(["dense", "packed", "lengths"])
    lengths = [steps, *(pick.randint(1, steps) for _ in range(batch - 1))]
    if form == "packed":
        x = pack_padded_sequence(x, torch.tensor(lengths), options["batch_first"], enforce_sorted=False)
    rows = options["num_layers"] * (2 if options["bidirectional"] else 1)
    state = [torch.randn(rows, batch, size).to(dtype) for _ in range(2)] if pick.random() < 0.5 else None
    state = state and [each.requires_grad_() for each in state]
    hx = state and (tuple(state) if kind == "LSTM" else state[0])
    described = f"{kind} {dtype} I{inputs} H{size} B{batch} T{steps} {form} {options}"
    return module, x, hx, {"lengths": lengths} if form == "lengths" else {}, described


def results(module: nn.Module, x, hx, given):
    """Output, last states and the gradients of the input, the initial states and the parameters; and the output without
    gradients."""
    leaf = (x.data if isinstance(x, PackedSequence) else x).detach().requires_grad_()
    batch = PackedSequence(leaf, *x[1:]) if isinstance(x, PackedSequence) else leaf
    torch.manual_seed(0)  # of the masks
    output, last = module(batch, hx, **given)
    tensors = [
        output.data if isinstance(output, PackedSequence) else output,
        *(last if type(last) is tuple else [last]),
    ]
    seeds = [torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor) for tensor in tensors]
    states = [] if hx is None else [hx] if isinstance(hx, torch.Tensor) else [*hx]
    tensors += torch.autograd.grad(tensors, [leaf, *states, *module.parameters()], seeds)
    with torch.no_grad():
        torch.manual_seed(0)
        output = module(batch, hx, **given)[0]
    return [*tensors, output.data if isinstance(output, PackedSequence) else output]


def digest(tensors):
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many modules (default: 200)")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if (arguments.write is None) == (arguments.compare is None):
        parser.error("expected one of --write and --compare")
    torch.set_num_threads(1)  # on which gradients' bits depend
    found = {}
    for seed in range(arguments.count):
        *given, described = draw(seed)
        found[described] = digest(results(*given))
    result = {"instruction set": _native.active_isa(), "torch": torch.__version__, "bits": found}
    if arguments.write is not None:
        arguments.write.write_text(json.dumps(result, indent=1) + "\n")
        return 0
    before = json.loads(arguments.compare.read_text())
    for name in ("instruction set", "torch"):
        if before[name] != result[name]:
            parser.error(f"{arguments.compare} was written with {name} {before[name]}, this is {result[name]}")
    if before["bits"].keys() != found.keys():
        parser.error(f"{arguments.compare} has other modules: was it written with another --count?")
    different = [name for name, bits in found.items() if before["bits"][name] != bits]
    print(f"{len(found) - len(different)} of {len(found)} the same bits", *different, sep="\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
