"""The drop-in recurrent modules, their options, and what is done with them: converting, freezing."""

from pymtl.recurrent.base import Recurrent, set_variants
from pymtl.recurrent.convert import convert, revert
from pymtl.recurrent.describe import describe
from pymtl.recurrent.freeze import freeze, frozen_bytes, unfreeze
from pymtl.recurrent.gru import GRU
from pymtl.recurrent.lstm import LSTM
from pymtl.recurrent.rnn import RNN

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Recurrent",
    "convert",
    "describe",
    "freeze",
    "frozen_bytes",
    "revert",
    "set_variants",
    "unfreeze",
]

import pymtl.recurrent.moved  # noqa: F401  (old pickles load)
