"""The module names under which pickles of earlier versions look for this package; to be removed in version 0.3."""

import sys
from types import ModuleType

from pymtl.recurrent import convert, gru, lstm, options, rnn

_variants = ModuleType("pymtl.variants", "Moved to pymtl.recurrent.options.")
_variants.Variants = options.Options

MOVED = {
    "pymtl.convert": sys.modules[convert.__module__],
    "pymtl.gru": gru,
    "pymtl.lstm": lstm,
    "pymtl.rnn": rnn,
    "pymtl.variants": _variants,
}
for _name, _module in MOVED.items():
    sys.modules.setdefault(_name, _module)
