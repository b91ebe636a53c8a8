"""What differs between the config that a run was started with and the one that it is to go on with.

Some keys say where and how fast a run works, what it writes and what it measures: they may change. All others decide what the
network becomes; a run whose schedule or data changed half way is another experiment, unless somebody says so by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from denoiselab.runs.checks import show
from denoiselab.runs.errors import ConfigError

UNSAID = ("allow", "name", "resume", "run", "runs", "trust")  # about the command, not the run
FREE = (
    "compile",
    "datamodule.cache",
    "datamodule.download",
    "datamodule.eval_batch_size",
    "datamodule.num_workers",
    "datamodule.root",  # the fingerprint of the data decides
    "datamodule.test_root",
    "guidance",  # of samples for pictures and metrics, whose protocols say so
    "init_from",
    "init_weights",
    "logger",
    "metrics",
    "sampler",
    "trainer.accelerator",
    "trainer.accumulate",
    "trainer.devices",
    "trainer.max_steps",
    "trainer.num_nodes",
    "trainer.threads",
    "trainer.val_every",
)
# Of Lightning's callbacks those that only watch, or end a run; others change how it trains. Ours may all change.
WATCHING = (
    "DeviceStatsMonitor",
    "EarlyStopping",
    "LearningRateMonitor",
    "ModelSummary",
    "RichModelSummary",
    "RichProgressBar",
    "Timer",
    "TQDMProgressBar",
)
_ABSENT = object()


def flatten(node: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by their dotted keys; lists are leaves."""
    if not isinstance(node, dict) or not node:
        return {path: node}
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        leaves |= flatten(value, f"{path}.{key}" if path else str(key))
    return leaves


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The keys with another value, which may be absent, with both values as one would type them; in the order of the keys."""
    before, after = flatten(old), flatten(new)
    found = {key: (before.get(key, _ABSENT), after.get(key, _ABSENT)) for key in sorted({*before, *after})}
    return {key: (_text(a), _text(b)) for key, (a, b) in found.items() if not _same(a, b)}


def _same(a: Any, b: Any) -> bool:
    """Whether two leaves mean the same: 1 and 1.0 do, 1 and true do not, and what is not a number is what it is."""
    return (a == b and isinstance(a, bool) == isinstance(b, bool)) or repr(a) == repr(b)


def _text(value: Any) -> str:
    return "absent" if value is _ABSENT else show(value)


def below(key: str, names: Sequence[str]) -> bool:
    """Whether a key is one of the names, or part of what one of them names."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _is_free(key: str, *configs: dict[str, Any]) -> bool:
    """Whether a key may change between these configs; one of a callback if that changes no training in any of them."""
    first, _, rest = key.partition(".")
    if first != "callbacks" or not rest:
        return below(key, (*FREE, "callbacks"))
    groups = [config.get("callbacks") for config in configs]
    nodes = [group.get(rest.partition(".")[0]) for group in groups if isinstance(group, dict)]
    return all(
        _only_watches(node.get("_target_") if isinstance(node, dict) else "") for node in nodes if node is not None
    )


def _only_watches(target: Any) -> bool:
    """Whether a callback is one of ours, or among `WATCHING`."""
    if not isinstance(target, str):
        return False
    of_lightning = target.startswith("lightning.pytorch.callbacks.") and target.rpartition(".")[2] in WATCHING
    return of_lightning or target.startswith("denoiselab.")


def check_changes(old: dict[str, Any], new: dict[str, Any], allow: Sequence[str]) -> list[str]:
    """The differences that are harmless or allowed, as lines for the log.

    Args:
        old: config of the checkpoint.
        new: config to go on with.
        allow: keys whose change is meant; a group's name allows all of it.

    Raises:
        ConfigError: if another one changes the meaning of the run; it names them all.
    """
    changed = {key: values for key, values in differences(old, new).items() if not below(key, UNSAID)}
    lines = {key: f"{key} {was} → {now}" for key, (was, now) in changed.items()}
    refused = [key for key in changed if not _is_free(key, old, new) and not below(key, allow)]
    if refused:
        raise ConfigError(
            f"resume: {', '.join(lines[key] for key in refused)}: would change what the run means; to do so all the same, "
            f"allow=[{','.join(refused)}]"
        )
    return list(lines.values())
