"""Keys, tokens and passwords stay out of whatever a run writes or prints.

Nothing in this project needs a secret from its config: W&B and the hubs read theirs from the environment, and so should a
user's own class. Hence secrets are taken out once, at the source: `app/compose.py` redacts the command line before Hydra sees
it and the config right after composition, so that all that follows (config.json, checkpoints, job scripts, hyperparameters,
the command that W&B stores) only ever sees `***`. An exception or a library may still quote what is in the environment, so
text is redacted again where it leaves: the terminal, train.log and JSON files. What W&B collects by itself is settled by its
settings, in `training/logs.py`.

What looks like a secret:

    the value of a key, or of an environment variable, whose name says so: `api_key`, `HF_TOKEN`, `db.password`
    such a value of at least 8 characters, wherever else it stands
    `name=value` and `name: value` with such a name, inside any text
    the user part of a URL, a bearer token, and tokens of well-known forms
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO
from urllib.parse import quote

MASK = "***"
SHORTEST = 8  # characters; shorter values are ordinary words, and only hidden behind their own names

_ANYWHERE = re.compile(
    r"(password|passwd|passphrase|passcode|secret|credential|apikey|accesskey|privatekey|webhook)s?$"
)
_LAST = re.compile(r"(.*token|authorization|auth|bearer|cookie|jwt)$")
_KINDS_OF_KEY = {"access", "account", "api", "auth", "encryption", "license", "private", "service", "signing", "ssh"}
_MODEL_TOKENS = {"bos", "class", "cls", "eos", "mask", "null", "pad", "per", "register", "sep", "unk"}
_PLACES = {"dir", "file", "folder", "path", "sock"}  # SSH_AUTH_SOCK and token_file say where, not what
_NO_VALUES = {"", "null", "none", "true", "false", "???", MASK}

_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]{0,20}://)([^/\s\"'<>?#]+)@")
_BEARER = re.compile(r"\b(Bearer|Authorization: *\w+) +[\w.~+/=-]{8,}", re.IGNORECASE)
_FORMS = re.compile(  # what may begin again every few characters looks ahead a little only: long texts took for ever
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_\w{30,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[a-z]-[\w-]{10,}"
    r"|sk-(?=[A-Za-z_-]{0,200}+\d)[\w-]{20,}|A[KS]IA[A-Z0-9]{16}|wandb_v\d_\w{20,}"
    r"|eyJ[\w-]{10,400}+\.[\w-]{10,}+\.[\w-]*)",
    re.DOTALL,
)
_NAME = re.compile(r"(?<![\w.-])([\w.-]{2,100})[\"']?( ?= ?|:[ \t]*)")
_VALUE = re.compile(
    r"""(["'])(?P<quoted>(?:(?!\1)[^\\]|\\.)*)\1"""
    r"""|(?P<plain>\$\{[^}]{0,1000}\}|[^\s,;&}\])"']+?(?=:?(?:[\s,;&}\])"']|$)))"""
)
_YAML = re.compile(r"^(?P<indent> *(?:- )*)(?P<key>[\"']?[\w.-]+[\"']?):(?: (?P<value>.*))?$")


@functools.lru_cache(4096)
def is_secret_name(name: str) -> bool:
    """Whether a key such as `logger.api_key`, or a variable such as `HF_TOKEN`, holds a secret; `num_tokens` does not."""
    return any(map(_says_secret, name.split(".")))


def _says_secret(name: str) -> bool:
    parts = _words(name)
    if not parts or parts[-1] in _PLACES:
        return False
    before = parts[-2] if len(parts) > 1 else ""
    if any(map(_ANYWHERE.search, parts)):
        return True
    if parts[-1] == "key":
        return before in _KINDS_OF_KEY
    if parts[-1] in ("pwd", "pat"):  # PWD is the working folder
        return before != ""
    return _LAST.match(parts[-1]) is not None and before not in _MODEL_TOKENS


def _words(name: str) -> list[str]:
    """`apiKey`, `API_KEY` and `api-key-2` are [api, key]."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def environment_secrets(environ: Mapping[str, str]) -> list[str]:
    """The secrets among environment variables: by name, or the password in a URL.

    Any variable with the word "token" or "key" counts, since what is found is only ever searched for in text. Paths that
    exist do not count, nor do values below 8 characters.
    """
    found = []
    for name, value in environ.items():
        words = _words(name)
        wide = bool({"token", "key"} & set(words)) and words[-1] not in _PLACES
        if (wide or is_secret_name(name)) and not os.path.exists(value):
            found += value.splitlines()
        found += [user.rpartition(":")[2] for _, user in _URL.findall(value)]
    return _long(found)


def config_secrets(value: Any) -> list[str]:
    """The secrets in nested plain data: values of at least 8 characters under keys whose names say so."""
    return _long(list(_leaves(value, False)))


def _leaves(value: Any, secret: bool) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, secret or is_secret_name(str(key)))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, secret)
    elif secret and not _says_nothing(value):
        yield from str(value).splitlines()


def argument_secrets(arguments: Sequence[str]) -> list[str]:
    """The secrets typed as `key=value` on a command line, at least 8 characters long."""
    found = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if is_secret_name(key):
            found += [value, value.strip("\"'")]
        else:
            found += [text for _, _, text in _pairs(argument)]
    return _long(found)


def _long(secrets: Sequence[str]) -> list[str]:
    found = (secret.strip() for secret in secrets)
    return list(dict.fromkeys(secret for secret in found if len(secret) >= SHORTEST and not _says_nothing(secret)))


def _says_nothing(value: Any) -> bool:
    """Whether a value is none at all, or names one that is elsewhere, as ${oc.env:HF_TOKEN} does."""
    if isinstance(value, str):
        bare = value.strip(" \"'")
        return bare.lower() in _NO_VALUES or re.fullmatch(r"\$\{[^}]*\}", bare) is not None
    return value is None or isinstance(value, bool)


def redact_text(text: str, secrets: Sequence[str] | None = None) -> str:
    """A text without secrets.

    Args:
        text: any.
        secrets: to look for, each however its spaces are broken over lines; None: those of the environment.
    """
    if secrets is None:
        secrets = environment_secrets(os.environ)
    if secrets:
        text = re.sub(_any_of(tuple(secrets)), MASK, text)
    text = _FORMS.sub(MASK, _BEARER.sub(rf"\1 {MASK}", _URL.sub(rf"\1{MASK}@", text)))
    pieces, end = [], 0
    for start, stop, _ in _pairs(text):
        pieces += [text[end:start], MASK]
        end = stop
    return "".join(pieces) + text[end:]


@functools.lru_cache(64)
def _any_of(secrets: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern of secrets as they are, and as JSON, Python, YAML and URLs write them."""
    forms = {
        form
        for secret in secrets
        for form in (
            secret,
            json.dumps(secret)[1:-1],
            repr(secret)[1:-1],
            secret.replace("'", "''"),
            quote(secret, safe=""),
        )
    }
    longest_first = sorted(forms, key=lambda form: (-len(form), form))
    return re.compile("|".join(r"\s+".join(map(re.escape, form.split())) for form in longest_first))


def _pairs(text: str) -> Iterator[tuple[int, int, str]]:
    """Where `name=value` and `name: value` with a secret's name have their values: start, stop, value without quotes."""
    done = 0
    for found in _NAME.finditer(text):
        value = _VALUE.match(text, found.end()) if found.start() >= done and is_secret_name(found[1]) else None
        if value is None:
            continue
        plain = value["plain"] is not None
        inner = value["plain" if plain else "quoted"]
        prose = plain and found[2] != found[2].strip() and ":" in found[2]  # "token: must be text" is no pair
        if not _says_nothing(inner) and not (prose and len(inner) < SHORTEST):
            group = "plain" if plain else "quoted"
            done = value.end(group)
            yield value.start(group), done, inner


def redact(value: Any, secrets: Sequence[str] | None = None) -> Any:
    """Nested plain data without secrets; `_target_`s, which are checked elsewhere, stay as they are.

    Args:
        value: dicts, lists and plain values.
        secrets: to look for beside those of the data's own keys; None: those of the environment.
    """
    if secrets is None:
        secrets = environment_secrets(os.environ)
    return _redacted(value, [*secrets, *config_secrets(value)])


def _redacted(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        return redact_text(value, secrets)
    if isinstance(value, list | tuple):
        return type(value)(_redacted(inner, secrets) for inner in value)
    if not isinstance(value, dict):
        return value
    plain = {}
    for key, inner in value.items():
        name = redact_text(key, secrets) if isinstance(key, str) else key
        if key == "_target_":
            plain[name] = inner
        elif is_secret_name(str(key)):
            plain[name] = inner if _says_nothing(inner) else MASK
        else:
            plain[name] = _redacted(inner, secrets)
    return plain


def redact_arguments(arguments: Sequence[str], secrets: Sequence[str] | None = None) -> list[str]:
    """The words of a command line without secrets.

    Args:
        arguments: such as `+logger.api_key=abc`.
        secrets: to look for beside those that are typed here under a name that says so; None: those of the environment.
    """
    if secrets is None:
        secrets = environment_secrets(os.environ)
    known = [*secrets, *argument_secrets(arguments)]
    plain = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        hide = equals and is_secret_name(key) and not _says_nothing(value)
        plain.append(f"{key}={MASK}" if hide else redact_text(argument, known))
    return plain


def redact_yaml(text: str, secrets: Sequence[str] | None = None) -> str:
    """Printed YAML, with other lines around it or not, without secrets; all below a secret key becomes one value."""
    lines: list[str] = []
    inside: int | None = None  # the indent of the secret key whose value is being left out
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip(" "))
        if inside is not None and (not line.strip() or indent > inside or line[inside:].startswith("- ")):
            continue
        inside = None
        found = _YAML.match(line)
        if found and is_secret_name(found["key"].strip("\"'")) and not _says_nothing(found["value"] or "nested"):
            inside = len(found["indent"])
            line = f"{found['indent']}{found['key']}: '{MASK}'"
        lines.append(line)
    return redact_text("\n".join(lines) + ("\n" if text.endswith("\n") else ""), secrets)


def changed_keys(before: Any, after: Any, key: str = "") -> list[str]:
    """The dotted keys whose values differ between data and what `redact` made of it."""
    if isinstance(before, dict) and isinstance(after, dict) and len(before) == len(after):
        pairs = zip(before.items(), after.values(), strict=True)
        return [found for (name, old), new in pairs for found in changed_keys(old, new, f"{key}.{name}".lstrip("."))]
    same = before == after or repr(before) == repr(after)  # a value that is no number is not equal to itself
    return [] if same else [redact_text(key)]


class RedactingFormatter(logging.Formatter):
    """Formats log records, their tracebacks too, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The line or lines of a record."""
        return redact_text(super().format(record))


class RedactingStream:
    """A text stream that passes lines on once they are whole, without secrets.

    Args:
        stream: to write to.
        secrets: to look for.
    """

    def __init__(self, stream: TextIO, secrets: Sequence[str]) -> None:
        self.stream, self.secrets, self.held = stream, secrets, ""

    def write(self, text: str) -> int:
        """Write the lines that are complete now."""
        whole, end, self.held = (self.held + text).rpartition("\n")
        if end:
            self.stream.write(redact_text(whole + end, self.secrets))
        return len(text)

    def flush(self) -> None:
        """Write the beginning of a line, too."""
        self.stream.write(redact_text(self.held, self.secrets))
        self.held = ""
        self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def redact_terminal(secrets: Sequence[str] | None = None) -> None:
    """Keep secrets off this process's stdout and stderr, tracebacks and the logs of libraries included, from now on.

    Args:
        secrets: to look for; None: those of the environment.
    """
    known = environment_secrets(os.environ) if secrets is None else secrets
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, RedactingStream):
            setattr(sys, name, RedactingStream(stream, known))
