"""Whether a module does only what its class says, and which names a module may have."""

from __future__ import annotations

from torch import nn


def runs_own_code(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether calling the module does more than ``base`` does: a forward of its own, or hooks.

    Such a module is called as it is, where others' weights go straight to a kernel.
    """
    # Pruning and the older weight normalisation compute a module's weight in such a hook.
    return (
        type(module).forward is not base.forward
        or "forward" in vars(module)
        or bool(module._forward_pre_hooks or module._forward_hooks)
        or bool(module._backward_pre_hooks or module._backward_hooks)
    )


_TAKEN = frozenset(dir(nn.ModuleDict()))


def is_module_name(name: str) -> bool:
    """Whether a module can have this name among others."""
    return bool(name) and "." not in name and name not in _TAKEN
