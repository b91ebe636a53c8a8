"""Config checks: every `_target_` exists, every key is one of its arguments, every value has the annotated type.

The annotations of the constructors are the schema, read by pydantic; nothing is declared twice. Ranges are the
constructors' own business: they raise ValueError("key=value: what is allowed").
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from denoiselab.runs.errors import ConfigError

SPECIAL = ("_target_", "_partial_", "_convert_", "_recursive_")
ROOMS = ("backbones", "codecs", "data", "diffusion", "evaluation", "training")
TRUSTED = (*(f"denoiselab.{room}" for room in ROOMS), "torch.optim")


def show(value: Any) -> str:
    """A value as one would type it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


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
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}: cannot be imported ({error})") from error
    if not callable(found):
        raise ConfigError(f"{key}: must be a class or function")
    return found


def check_targets(node: Any, trust: Iterable[str], path: str = "") -> None:
    """Refuse targets outside the allow-list, before anything of a foreign config is imported or built.

    A target must be named below, and be defined below, a trusted package: a trusted module's import of something else
    (`denoiselab.runs.folder.subprocess.run`) is not.

    Raises:
        ConfigError: naming the first one.
    """
    allowed = (*TRUSTED, *trust)

    def below(name: Any) -> bool:
        return isinstance(name, str) and any(name == a or name.startswith(f"{a}.") for a in allowed)

    if isinstance(node, dict):
        if "_target_" in node:
            target = node["_target_"]
            refused = (
                f"{path}._target_={target}: is not trusted; allowed are {', '.join(allowed)}, and what trust=[...] adds"
            )
            if not below(target):
                raise ConfigError(refused)
            if not below(getattr(locate(target, path), "__module__", None)):
                raise ConfigError(refused)
        for key, value in node.items():
            check_targets(value, trust, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):  # a checkpoint may hold tuples, and Hydra builds what is in them
        for i, value in enumerate(node):
            check_targets(value, trust, f"{path}[{i}]")
    elif isinstance(node, str) and "${" in node:  # Hydra would resolve it, to a node to be built for example
        raise ConfigError(f"{path}={node}: must be resolved")
    elif not (node is None or isinstance(node, str | int | float)):
        raise ConfigError(f"{path}={node}: must be plain data")


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
    parameters = inspect.signature(target).parameters
    hints = _hints(target)
    given = {key: value for key, value in node.items() if key not in SPECIAL}
    for key, value in given.items():
        if key not in parameters:
            raise ConfigError(f"{path}.{key}={show(value)}: {_unknown(key, parameters)}")
        if not _is_node(value):
            check_value(value, hints.get(key, Any), f"{path}.{key}")
    if node.get("_partial_"):
        return
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and parameter.kind == parameter.KEYWORD_ONLY and key not in given:
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


def check_value(value: Any, annotation: Any, path: str) -> None:
    """Check one value strictly: "3" is no number, 3.5 no integer, an integer may stand for a float.

    Raises:
        ConfigError: if it is of another type.
    """
    try:
        config = None if inspect.isclass(annotation) else ConfigDict(arbitrary_types_allowed=True)
        adapter = TypeAdapter(annotation, config=config)
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError, NameError):
        if not inspect.isclass(annotation) or isinstance(value, dict):
            return
        group = path.replace(".", "/")  # something to be built, which no plain value can be
        raise ConfigError(f"{path}={show(value)}: must be chosen as a group, {group}={show(value)}") from None
    try:
        adapter.validate_json(json.dumps(value), strict=True)  # JSON's arrays may stand for tuples
    except ValidationError as error:
        raise ConfigError(f"{path}={show(value)}: must be {_name(annotation)}") from error


def _name(annotation: Any) -> str:
    """An annotation as a person would say it."""
    plain = {float: "a number", int: "an integer", bool: "true or false", str: "text", type(None): "null"}
    if annotation in plain:
        return plain[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(show, arguments))
    if origin in (list, tuple) and arguments:
        plural = {"a number": "numbers", "an integer": "integers"}
        kinds = dict.fromkeys(_name(a) for a in arguments if a is not ...)
        return "a list of " + " and ".join(plural.get(kind, kind) for kind in kinds)
    if origin is dict:
        return f"a mapping to {_name(arguments[1])}"
    if arguments:
        names = [_name(a) for a in arguments if inspect.isclass(a) is False or a in plain]
        return " or ".join(dict.fromkeys(names)) or str(annotation)
    return getattr(annotation, "__name__", str(annotation))
