"""Loss balancing: how the tasks' losses become one.

Each method is a :class:`Balancing` for :class:`pymtl.JointLoss`; ``METHODS`` maps their names in configurations to the
classes. :class:`GradientAggregation` brings those that combine the tasks' gradients, through torchjd.
"""

from pymtl.balancing.base import Balancing
from pymtl.balancing.dwa import DWA
from pymtl.balancing.equal_norm import EqualNorm
from pymtl.balancing.ew import EW
from pymtl.balancing.famo import FAMO
from pymtl.balancing.gls import GLS
from pymtl.balancing.gradient_aggregation import GradientAggregation
from pymtl.balancing.gradnorm import GradNorm
from pymtl.balancing.imtl_l import IMTLL
from pymtl.balancing.rlw import RLW
from pymtl.balancing.stch import STCH
from pymtl.balancing.uw import UW

METHODS: dict[str, type[Balancing]] = {
    "equal_norm": EqualNorm,
    "ew": EW,
    "uw": UW,
    "dwa": DWA,
    "gls": GLS,
    "rlw": RLW,
    "imtl_l": IMTLL,
    "stch": STCH,
    "famo": FAMO,
    "gradnorm": GradNorm,
    "gradient_aggregation": GradientAggregation,
}

__all__ = [
    "DWA",
    "EW",
    "FAMO",
    "GLS",
    "IMTLL",
    "METHODS",
    "RLW",
    "STCH",
    "UW",
    "Balancing",
    "EqualNorm",
    "GradNorm",
    "GradientAggregation",
]
