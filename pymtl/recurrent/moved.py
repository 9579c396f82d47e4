"""The module names under which pickles of earlier versions look for this package; to be removed in version 0.3."""

import sys
from types import ModuleType

import pymtl
from pymtl.recurrent import convert, freeze, gru, lstm, options, rnn, snapshot

_variants = ModuleType("pymtl.variants", "Moved to pymtl.recurrent.options.")
_variants.Variants = options.Options

MOVED = {
    "pymtl.convert": sys.modules[convert.__module__],
    "pymtl.freezing": sys.modules[freeze.__module__],
    "pymtl.gru": gru,
    "pymtl.lstm": lstm,
    "pymtl.rnn": rnn,
    "pymtl.snapshot": snapshot,
    "pymtl.variants": _variants,
}
for _name, _module in MOVED.items():
    sys.modules.setdefault(_name, _module)
    if _name != "pymtl.convert":  # which is the function
        setattr(pymtl, _name.removeprefix("pymtl."), _module)
