"""The recurrent layers of a model, and who runs each of them."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from pymtl.recurrent.base import Recurrent
from pymtl.recurrent.convert import check_module, own_checks

NOT_CONVERTED = "not converted: write model = pymtl.convert(model)"
UNKNOWN = "not an nn.LSTM, nn.GRU or nn.RNN, which pymtl.convert knows"
CELL = "a cell runs one step at a time: there is nothing to fuse"


def describe(module: nn.Module) -> str:
    """Each recurrent layer inside ``module``, who runs it now, and why: lines to print, before and after
    :func:`pymtl.convert`::

        print(pymtl.describe(model))

    Asked is for an input of the weights' dtype and device; :meth:`pymtl.LSTM.route` tells of any input.
    """
    check_module(module)
    rows = [
        (name or "the module itself", f"{_name(type(child))}({child.extra_repr()})", *_runner(child))
        for name, child in module.named_modules()
        if isinstance(child, nn.RNNBase | nn.RNNCellBase)
    ]
    if not rows:
        return f"no recurrent layer inside {type(module).__name__}"
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {layer:<{widths[1]}}  {runner:<{widths[2]}}  {reason}"
        for name, layer, runner, reason in rows
    )


def _name(kind: type[nn.Module]) -> str:
    if kind.__module__ == parametrize.__name__:  # whose class for one module is named ParametrizedLSTM
        return kind.__name__
    for package, prefix in (("torch.nn.", "nn."), ("pymtl.", "pymtl.")):
        if kind.__module__.startswith(package):
            return prefix + kind.__name__
    return kind.__name__  # a class of one's own, or what a wrapper such as fully_shard makes


def _frozen(layer: Recurrent) -> str:
    snapshot = layer._snapshot
    if snapshot is None:
        return ""
    used = snapshot.is_of(layer._weights())
    when = (
        " for calls without gradients"
        if used
        else ", not used: the parameters or the instruction set have changed since (call pymtl.freeze again)"
    )
    return f", frozen in {snapshot.dtype} ({snapshot.bytes():,} bytes){when}"


def _runner(layer: nn.Module) -> tuple[str, str]:
    if isinstance(layer, nn.RNNCellBase):
        return "torch", CELL
    if not isinstance(layer, Recurrent):
        if not isinstance(layer, nn.LSTM | nn.GRU | nn.RNN):
            return "torch", UNKNOWN
        own = own_checks(layer)
        return "torch", f"left alone by pymtl.convert: it has its own {' and '.join(own)}" if own else NOT_CONVERTED
    weights = list(layer.parameters())  # as they are: a parametrization may change when it is asked
    way = layer._pymtl_route(weights[0].new_empty(0, layer.input_size), weights)
    own = "" if type(layer).forward is Recurrent.forward else ", in what its own forward leaves to super().forward"
    return way.runner, way.reason + own + _frozen(layer)
