"""What other processes run: importable by name, as spawn needs it."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from modules import KINDS, ours_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

import pymtl


class Encoded(Dataset):
    """Sequences that a worker runs a module on, with the number of threads it has."""

    def __init__(self, module, sequences):
        self.module = module
        self.sequences = sequences

    def __len__(self):
        return len(self.sequences)

    def __getitem__(self, index):
        with torch.no_grad():
            output, _ = self.module(self.sequences[index])
        return index, output, os.getpid()


class Encoder(nn.Module):
    """One module of each kind over the same padded batch, so that one wrapper trains all."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.kinds = nn.ModuleDict(
            {
                kind.replace(" ", "_"): ours_of(kind, 5, 7, num_layers=2, bidirectional=True, dtype=dtype)
                for kind in KINDS
            }
        )
        self.kinds["GRU"].weight_hh_l0.requires_grad_(False)

    def forward(self, x, lengths):
        return sum(module(x, lengths=lengths)[0].square().sum((0, 2)) for module in self.kinds.values())


def converted_within(model):
    """Wrapped with torch's modules inside, which become ours afterwards."""
    return pymtl.convert(nn.parallel.DistributedDataParallel(pymtl.revert(model, inplace=True)), inplace=True)


def sharded(model):
    for part in (*model.kinds.values(), model):
        fully_shard(part)
    return model


WAYS = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "converted within it": converted_within,
    "fully_shard": sharded,
}


def whole(gradient):
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def train_a_share(rank, world, way, rendezvous, state, x, lengths, path):
    """One of several processes: the gradients of its share of the batch, averaged with the others'."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        model = Encoder()
        model.load_state_dict(state)
        parallel = WAYS[way](model)
        for _ in range(2):  # the second pass through the reducer's buckets as they were rebuilt
            parallel.zero_grad()
            parallel(x[:, rank::world], lengths[rank::world]).mean().backward()
        torch.save({name: whole(p.grad) for name, p in model.named_parameters()}, f"{path}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def count_threads():
    """Prints how many threads the process has after a call at each number of threads, beside those of the pool, which
    wait for a busy machine: one fewer than were told at most."""
    module = ours_of("LSTM", 64, 128, bidirectional=True)
    x = torch.randn(50, 32, 64)
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        with torch.no_grad():
            module(x)
        module(x)[0].sum().backward()
        names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
        assert names.count("pymtl") < count, names
        sys.stdout.write(f"{len(names) - names.count('pymtl')} ")


if __name__ == "__main__":
    count_threads()
