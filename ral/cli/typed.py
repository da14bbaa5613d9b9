"""Values of YAML files and of the shell, converted to the type of a setting."""

from __future__ import annotations

import operator
import types
import typing
from enum import Enum
from typing import Any, ClassVar

import yaml

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def typed(value: Any, hint: Any) -> Any:
    """A value as the first type of a hint that accepts it.

    Text becomes a number, bool or list if the type needs one: `1e-6` is a float although YAML reads
    it as text, and `3,-1` is a list of numbers.

    Args:
        value: from YAML or the shell.
        hint: a type, or a union of types, as `typing.get_type_hints` returns it.

    Raises:
        ValueError: no type of the hint accepts it; the message names the types.
    """
    options = _options(hint)
    if _is_none(value, options):
        return None
    for option in sorted(options, key=_order):
        try:
            return _as(value, option)
        except (TypeError, ValueError):
            continue
    raise ValueError(f"must be {describe(hint)}; got {value!r}")


def describe(hint: Any) -> str:
    """A hint as people read it: "float", "list of int or text"."""
    names = []
    for option in _options(hint):
        if option is types.NoneType:
            continue
        if typing.get_origin(option) is list:
            names.append(f"list of {describe(typing.get_args(option)[0])}")
        elif typing.get_origin(option) is dict or option is dict:
            names.append("mapping")
        elif option is str or typing.get_origin(option) is typing.Literal:
            names.append("text")
        elif option is bool:
            names.append("true or false")
        elif not (isinstance(option, type) and issubclass(option, Enum)):
            names.append(getattr(option, "__name__", str(option)))
    return " or ".join(dict.fromkeys(names))


def is_bool(hint: Any) -> bool:
    """Whether a setting is a switch, whose name alone on the command line means true."""
    options = _options(hint)
    return bool in options and str not in options


def _options(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [option for part in typing.get_args(hint) for option in _options(part)]
    return [types.NoneType if hint is None else hint]


def _is_none(value: Any, options: list[Any]) -> bool:
    if types.NoneType not in options:
        return False
    # "none" is a word where text is allowed, as in report_to=none.
    words = ("null", "~", "") if str in options else ("null", "~", "", "none")
    return value is None or (isinstance(value, str) and value.lower() in words)


def _order(option: Any) -> int:
    """Narrow types first: every text is a str, and every int a float."""
    origin = typing.get_origin(option) or option
    order = [types.NoneType, bool, int, float, list, dict, str]
    return order.index(origin) if origin in order else len(order)


def _as(value: Any, option: Any) -> Any:
    origin = typing.get_origin(option) or option
    if origin is bool:
        return _truth(value)
    if origin is list:
        return _list(value, typing.get_args(option))
    if origin is dict:
        return _mapping(value)
    if origin not in (int, float, str, types.NoneType):
        return value  # enums and the like check for themselves
    if origin is types.NoneType or isinstance(value, bool):
        raise ValueError
    if origin is int:
        return _int(value)
    if origin is str and not isinstance(value, str | int | float):
        raise ValueError
    return origin(value)


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in (*_TRUE, *_FALSE):
        return value.lower() in _TRUE
    raise ValueError


def _int(value: Any) -> int:
    try:
        return int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):  # 1e3, 2.0
        number = float(value)
        if not number.is_integer():
            raise
        return int(number)


def _list(value: Any, inside: tuple[Any, ...]) -> list[Any]:
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("[") and text.endswith("]"):
            value = read_yaml(text)
        elif "," in text or (inside and str not in _options(inside[0])):
            value = [part.strip() for part in text.split(",") if part.strip()]
        else:
            value = [text]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError
    return [typed(part, inside[0]) for part in value] if inside else list(value)


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.strip().startswith("{"):
        value = read_yaml(value)
    if not isinstance(value, dict):
        raise ValueError
    return value


def read_yaml(text: str) -> Any:
    """The value of a YAML text in which yes, no, on and off are words, as in `save_strategy: no`.

    Raises:
        ValueError: it is no YAML; the message says where.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where is not None else ""
        raise ValueError(f"{getattr(error, 'problem', None) or 'not YAML'}{line}") from error


class _Loader(yaml.SafeLoader):
    # YAML 1.1 finds a bool by the first letter of a word; 1.2 knows true and false alone.
    yaml_implicit_resolvers: ClassVar = {
        letter: [each for each in resolvers if letter in "tTfF" or not each[0].endswith(":bool")]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
