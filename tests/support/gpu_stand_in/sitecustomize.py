"""Every Python process that finds this folder on its path believes that there is a GPU, which the CPU stands in for:
the CUDA kernels run on the host (see cuda_on_host), events are a clock's, and a graph's replay is a call.

It shows that a script for a machine with a GPU runs from end to end; its times mean nothing.
"""

import contextlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cuda_on_host  # noqa: F401  (replaces the CPU's kernels)

import pymtl.benchmark.gpu
import pymtl.ops.dtypes


class Event:
    def __init__(self, enable_timing=False):
        self.at = None

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    """Records nothing, so a replay computes nothing."""

    def replay(self):
        pass


pymtl.benchmark.gpu.DEVICE = "cpu"
pymtl.benchmark.gpu.has_cuda = lambda tensor: True
pymtl.ops.dtypes._OF_THE_CPU = (torch.float32, torch.float16)
torch.cuda.Event = Event
torch.cuda.Stream = torch.cuda.current_stream = Stream
torch.cuda.stream = torch.cuda.graph = lambda *_: contextlib.nullcontext()
torch.cuda.CUDAGraph = Graph
torch.cuda.synchronize = lambda: None
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_name = lambda: "no GPU"
torch.cuda.get_device_properties = lambda _: SimpleNamespace(name="no GPU", multi_processor_count=1)
