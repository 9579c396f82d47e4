"""From the plain values of TOML and JSON to checked dataclasses."""

from __future__ import annotations

import difflib
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pymtl.training.errors import ConfigError

_NAMES = {type(None): "nothing", bool: "true or false"}


def build(cls: type, raw: Any, where: str, prefix: str) -> Any:
    """An instance of a dataclass.

    A class with a ``from_plain`` of its own makes itself. One with ``keys_for`` says which of its keys suit a
    dictionary, for the error of an unknown one.

    Args:
        cls: the dataclass.
        raw: a dictionary.
        where: what the values are from, for errors.
        prefix: the keys above, each with a dot.

    Raises:
        ConfigError: a key is unknown or missing, or a value is of another type; the message names it.
    """
    if hasattr(cls, "from_plain"):
        return cls.from_plain(raw, where, prefix)
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: {prefix.rstrip('.') or 'the file'}: expected a section, got {raw!r}")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    for key in raw:
        if key not in known:
            expected = list(cls.keys_for(raw) if hasattr(cls, "keys_for") else known)
            near = difflib.get_close_matches(key, expected, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"{where}: unknown key {prefix + key!r}{hint}, expected one of {', '.join(expected)}")
    values = {}
    for name, info in known.items():
        if name in raw:
            values[name] = _value(hints[name], raw[name], where, prefix + name)
        elif info.default is MISSING and info.default_factory is MISSING:
            raise ConfigError(f"{where}: missing key {prefix + name!r}")
    return cls(**values)


def _value(hint: Any, raw: Any, where: str, key: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType) and any(is_dataclass(choice) for choice in get_args(hint)):
        if raw is None and type(None) in get_args(hint):
            return None
        hint = next(choice for choice in get_args(hint) if is_dataclass(choice))
    if is_dataclass(hint):
        return build(hint, raw, where, key + ".")
    if get_origin(hint) is dict:
        if not isinstance(raw, dict):
            raise ConfigError(f"{where}: {key}: expected a section, got {raw!r}")
        return {name: _value(get_args(hint)[1], value, where, f"{key}.{name}") for name, value in raw.items()}
    if get_origin(hint) is list:
        if not isinstance(raw, list):
            raise ConfigError(f"{where}: {key}: expected a list, got {raw!r}")
        return [_value(get_args(hint)[0], value, where, f"{key}[{i}]") for i, value in enumerate(raw)]
    if get_origin(hint) is Literal:
        if raw not in get_args(hint):
            raise ConfigError(f"{where}: {key}: expected one of {', '.join(get_args(hint))}, got {raw!r}")
        return raw
    if hint is Any:
        return raw
    if get_origin(hint) in (Union, types.UnionType) and isinstance(raw, dict):
        tables = [choice for choice in get_args(hint) if get_origin(choice) is dict]
        if tables:
            return _value(tables[0], raw, where, key)
    allowed = tuple(get_origin(choice) or choice for choice in get_args(hint)) or (hint,)
    if float in allowed and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if not isinstance(raw, allowed) or (isinstance(raw, bool) and bool not in allowed):
        names = " or ".join(_NAMES.get(a, a.__name__) for a in allowed)
        raise ConfigError(f"{where}: {key}: expected {names}, got {raw!r}")
    return raw
