"""Parameter sharing: how several tasks' heads get their states from one input.

Each scheme is a :class:`Sharing`, made from the same arguments, and so interchangeable; ``SCHEMES`` maps their names in
configurations to the classes. Encoders that stand side by side run as one launch (:class:`ParallelLSTM`).
"""

from pymtl.sharing.base import Sharing, SharingResult
from pymtl.sharing.cross_stitch import CrossStitch
from pymtl.sharing.experts import CGC, MMoE
from pymtl.sharing.hard import HardSharing
from pymtl.sharing.hierarchical import HierarchicalSharing
from pymtl.sharing.parallel import ParallelLSTM
from pymtl.sharing.shared_private import SharedPrivate
from pymtl.sharing.soft import SoftSharing
from pymtl.sharing.task_attention import TaskAttention

SCHEMES: dict[str, type[Sharing]] = {
    "hard": HardSharing,
    "soft": SoftSharing,
    "shared_private": SharedPrivate,
    "hierarchical": HierarchicalSharing,
    "cross_stitch": CrossStitch,
    "mmoe": MMoE,
    "cgc": CGC,
    "task_attention": TaskAttention,
}

__all__ = [
    "CGC",
    "SCHEMES",
    "CrossStitch",
    "HardSharing",
    "HierarchicalSharing",
    "MMoE",
    "ParallelLSTM",
    "SharedPrivate",
    "Sharing",
    "SharingResult",
    "SoftSharing",
    "TaskAttention",
]
