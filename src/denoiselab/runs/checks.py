"""Config checks: every `_target_` exists, every key is one of its arguments, every value has the annotated type.

The annotations of the constructors are the schema, read by pydantic; nothing is declared twice. Ranges are the
constructors' own business: they raise ValueError("key=value: what is allowed").
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from denoiselab.runs.errors import ConfigError

SPECIAL = ("_target_", "_partial_")
PLAIN = {float: "a number", int: "an integer", bool: "true or false", str: "text", type(None): "null"}
SHOWN = 160  # characters of a value in a message


def show(value: Any) -> str:
    """A value as one would type it, in one line and not at any length."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else _beginning(value)
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]}...{text[-SHOWN // 4 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _beginning(value: Any) -> str:
    """What str() gives, but of what is nested its beginning: a file of a few bytes may hold what fills the memory as text."""
    if not isinstance(value, dict | list | tuple):
        many = type(value) is int and value.bit_length() > 1000  # Python refuses to print those of thousands of digits
        return f"a number of {value.bit_length()} bits" if many else str(value)
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > SHOWN:
            return f"{text[: SHOWN - 3]}..."
    return text


def _pieces(value: Any) -> Iterator[str]:
    """The text of plain data, piece by piece."""
    if isinstance(value, dict):
        yield "{"
        for i, (key, part) in enumerate(value.items()):
            yield ", " if i else ""
            yield from _pieces(key)
            yield ": "
            yield from _pieces(part)
        yield "}"
    elif isinstance(value, list | tuple):
        yield "[" if isinstance(value, list) else "("
        for i, part in enumerate(value):
            yield ", " if i else ""
            yield from _pieces(part)
        yield "]" if isinstance(value, list) else ",)" if len(value) == 1 else ")"
    else:
        yield repr(value[:SHOWN]) if type(value) is str else _beginning(value)


def locate(target: Any, path: str) -> Any:
    """The class or function that a `_target_` names.

    Raises:
        ConfigError: if there is none.
    """
    key = f"{path}._target_={target}"
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{key}: must be the full name of a class or function")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing somebody's module may raise anything
        raise ConfigError(f"{key}: cannot be imported ({show(error)})") from error
    if not callable(found):
        raise ConfigError(f"{key}: must be a class or function")
    return found


def check_types(node: Any, path: str = "") -> None:
    """Check every node with a `_target_` against the signature of what it names.

    Args:
        node: resolved config, plain data.
        path: of the node, for messages.

    Raises:
        ConfigError: for the first unknown key, missing argument or value of another type.
    """
    if isinstance(node, list):
        for i, value in enumerate(node):
            check_types(value, f"{path}[{i}]")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        _check_call(node, path)
    for key, value in node.items():
        check_types(value, f"{path}.{key}" if path else str(key))


def _check_call(node: dict[str, Any], path: str) -> None:
    target = locate(node["_target_"], path)
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}._target_={show(node['_target_'])}: does not say what it takes") from error
    hints = _hints(target)
    check_value(node.get("_partial_", False), bool, f"{path}._partial_")
    given = {key: value for key, value in node.items() if key not in SPECIAL}
    for key, value in given.items():
        if key not in parameters:
            raise ConfigError(f"{path}.{key}={show(value)}: {_unknown(key, parameters)}")
        check_kind(value, hints.get(key, Any), f"{path}.{key}")
    if node.get("_partial_"):
        return
    for key, parameter in parameters.items():
        needed = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if needed and parameter.default is parameter.empty and key not in given:
            raise ConfigError(f"{path}.{key}: is missing; {node['_target_']} needs it")


def _unknown(key: str, allowed: Iterable[str]) -> str:
    names = [name for name in allowed if name != "self"]
    close = difflib.get_close_matches(key, names, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"no such key{hint} (allowed: {', '.join(sorted(names))})"


def _is_node(value: Any) -> bool:
    """Whether a value is, or holds, something to be built, which is checked by itself."""
    if isinstance(value, dict):
        return "_target_" in value or any(map(_is_node, value.values()))
    return isinstance(value, list) and any(map(_is_node, value))


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # annotations of other people's classes need not resolve
        return {}


def check_kind(value: Any, annotation: Any, path: str) -> None:
    """Check that what a value's nodes are to be built into is of the annotated kind; plain values as `check_value` does.

    Raises:
        ConfigError: if it is of another kind.
    """
    if not _is_node(value):
        check_value(value, annotation, path)
        return
    options = _options(annotation)
    if isinstance(value, dict) and "_target_" in value:
        if not any(_makes(value, option, path) for option in options):
            kinds = [_kind(option) for option in options if option is not type(None)]
            raise ConfigError(f"{path}._target_={value['_target_']}: must be {' or '.join(kinds)}")
        return
    wanted = list if isinstance(value, list) else dict
    parts = {f"[{i}]": v for i, v in enumerate(value)} if wanted is list else {f".{k}": v for k, v in value.items()}
    inside = next((typing.get_args(option)[-1] for option in options if typing.get_origin(option) is wanted), Any)
    for key, part in parts.items():
        check_kind(part, inside, f"{path}{key}")


def _only_built(annotation: Any) -> bool:
    """Whether no plain value can be that, and pydantic cannot tell."""
    return getattr(annotation, "_is_protocol", False) or typing.get_origin(annotation) is Callable


def _options(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _makes(node: dict[str, Any], wanted: Any, path: str) -> bool:
    """Whether a node can make what is wanted, as far as annotations tell."""
    origin, late = typing.get_origin(wanted), bool(node.get("_partial_"))
    if wanted in PLAIN or origin in (typing.Literal, list, dict, tuple):
        return False
    if origin is Callable:
        if not late:
            return _is_a(_made(node, path), Callable)
        wanted = typing.get_args(wanted)[-1]
    elif inspect.isclass(wanted) and late:
        return False
    return _is_a(_made(node, path), typing.get_origin(wanted) or wanted)


def _made(node: dict[str, Any], path: str) -> Any:
    """The class of what a node is built into; Any where a function does not say."""
    target = locate(node["_target_"], path)
    if inspect.isclass(target):
        return target
    made = _hints(target).get("return", Any)
    return typing.get_origin(made) or made


def _is_a(made: Any, wanted: Any) -> bool:
    if not (inspect.isclass(made) and inspect.isclass(wanted)) or Any in (made, wanted):
        return True
    if not getattr(wanted, "_is_protocol", False):
        return issubclass(made, wanted)
    names = [key for key, value in vars(wanted).items() if inspect.isfunction(value) and key != "__init__"]
    return all(any(name in vars(base) for base in made.__mro__) for name in names)


def _kind(annotation: Any) -> str:
    if typing.get_origin(annotation) is Callable:
        return f"something that makes {_kind(typing.get_args(annotation)[-1])}, with _partial_: true"
    return _name(annotation) if annotation in PLAIN else f"a {getattr(annotation, '__name__', annotation)}"


def check_value(value: Any, annotation: Any, path: str) -> None:
    """Check one value strictly: "3" is no number, 3.5 no integer, an integer may stand for a float.

    Raises:
        ConfigError: if it is of another type.
    """
    plain = [option for option in _options(annotation) if not _only_built(option)]
    try:
        if not plain:
            raise TypeError
        kind: Any = typing.Union[tuple(plain)]  # noqa: UP007  # of a list
        config = None if inspect.isclass(kind) else ConfigDict(arbitrary_types_allowed=True)
        adapter: TypeAdapter[Any] = TypeAdapter(kind, config=config)
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError, NameError):
        if plain and not inspect.isclass(annotation):
            return
        group = path.replace(".", "/")  # something to be built, which no plain value can be
        if isinstance(value, dict):
            raise ConfigError(f"{path}._target_: is missing; choose the whole with {group}=<choice>") from None
        raise ConfigError(f"{path}={show(value)}: must be chosen as a group, {group}={show(value)}") from None
    try:
        adapter.validate_json(json.dumps(value), strict=True)  # JSON's arrays may stand for tuples
    except ValidationError as error:
        raise ConfigError(f"{path}={show(value)}: must be {_name(annotation)}") from error


def _name(annotation: Any) -> str:
    """An annotation as a person would say it."""
    if annotation in PLAIN:
        return PLAIN[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(show, arguments))
    if origin in (list, tuple) and arguments:
        plural = {"a number": "numbers", "an integer": "integers"}
        kinds = dict.fromkeys(_name(a) for a in arguments if a is not ...)
        return "a list of " + " and ".join(plural.get(kind, kind) for kind in kinds)
    if origin is dict:
        return f"a mapping to {_name(arguments[1])}"
    if origin is Callable:
        return _kind(annotation)
    if arguments:
        names = [_name(a) for a in arguments if inspect.isclass(a) is False or a in PLAIN]
        return " or ".join(dict.fromkeys(names)) or str(annotation)
    return getattr(annotation, "__name__", str(annotation))
