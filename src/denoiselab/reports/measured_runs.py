"""What runs have measured: read from their files, held to one protocol a column, and told apart by their configs."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from denoiselab.evaluation.records import RUN_FIELDS, Number
from denoiselab.runs.checks import show
from denoiselab.runs.files import from_json, read_json, read_small
from denoiselab.runs.folder import COMMAND, CONFIG

METRICS = "metrics.jsonl"
# Of a protocol: which model was measured (but for its step, which must be asked for), and what came of it
NEVER_COMPARED = {*RUN_FIELDS, "checkpoint", "run", "standard_error"} - {"step"}
SEED = "seed"  # of the sampling noise: unlike seeds are comparable, only not paired
# Of a config: what leaves a trained model as it is, what the protocol says better, and the seed that groups repeat
NOT_NAMED = (
    *("seed", "name", "runs", "trust", "compile", "logger", "callbacks", "metrics", "sampler", "guidance", "hydra"),
    *(f"datamodule.{key}" for key in ("seed", "root", "num_workers", "eval_batch_size")),
    *(f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "threads", "val_every")),
)


class _Target(str):
    """The full name of a class; tables show its last part."""


class UnlikeError(ValueError):
    """Numbers of unlike protocols would share a column; the message is one line."""


@dataclass(frozen=True)
class MeasuredRun:
    """The newest numbers of one run, or those of one evaluation file.

    Args:
        path: as it was given.
        label: what messages call it.
        weights: which weights the numbers are of, where a file has several; else "".
        numbers: by name.
        config: of the run; empty where that is not known, as for a folder of images.
        choices: of each group of the config.
        overrides: of the command that made the run.
    """

    path: Path
    label: str
    weights: str
    numbers: dict[str, Number]
    config: dict[str, Any]
    choices: dict[str, str]
    overrides: list[str]

    @property
    def seed(self) -> int | None:
        """The training seed."""
        seed = self.config.get("seed")
        return seed if isinstance(seed, int) else None


def read_all(paths: Sequence[Path]) -> tuple[list[MeasuredRun], list[str]]:
    """The numbers below some run folders and evaluation files, and a line for each thing that could not be read.

    Args:
        paths: run folders, or files that `evaluate.py` wrote.
    """
    notes: list[str] = []
    found: list[MeasuredRun] = []
    for path in paths:
        file = path if path.is_file() else path / METRICS
        if not file.exists():
            notes.append(f"{file}: there is none; measure with evaluate.py run={path}, and compare the file it writes")
            continue
        numbers, damaged = _read_numbers(file)
        notes += damaged
        near = file.resolve().parents[:2]  # evaluations lie in a folder of the run's
        home = next((folder for folder in near if (folder / CONFIG).exists()), near[0])
        config = read_mapping(home / CONFIG)
        told = (config, *commanded(read_mapping(home / COMMAND) if config else {}))
        label = path.resolve().name if path.is_dir() else str(path)
        found += [MeasuredRun(path, label, weights, some, *told) for weights, some in _by_weights(numbers).items()]
    paths_of: dict[str, set[Path]] = {}
    for run in found:
        paths_of.setdefault(run.label, set()).add(run.path)
    return [run if len(paths_of[run.label]) == 1 else replace(run, label=str(run.path)) for run in found], notes


def _read_numbers(file: Path) -> tuple[list[Number], list[str]]:
    """Every number of a file, and a line for each that is damaged."""
    records: list[tuple[str, Any]] = []
    if file.suffix == ".json":
        whole = read_mapping(file).get("numbers")
        if not isinstance(whole, list):
            return [], [f"{file}: is no file of numbers that evaluate.py wrote"]
        records = [(f"{file}: number {i}", record) for i, record in enumerate(whole, 1)]
    else:
        try:
            lines = read_small(file).decode(errors="replace").splitlines()
        except (OSError, ValueError) as error:
            return [], [f"{error}; left out"]
        records = [(f"{file}:{i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    numbers: list[Number] = []
    notes: list[str] = []
    for where, record in records:
        try:
            numbers.append(Number.from_dict(from_json(record) if isinstance(record, str) else record))
        except ValueError:
            notes.append(f"{where}: is damaged; left out")
    if not numbers:
        notes.append(f"{file}: holds no numbers; left out")
    return numbers, notes


def read_mapping(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file of a run; an empty one if there is none, or it cannot be read."""
    try:
        value = read_json(file)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def commanded(command: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The choices and overrides of a command.json, as far as they are such."""
    choices, overrides = command.get("choices"), command.get("overrides")
    return (
        {group: c for group, c in choices.items() if isinstance(c, str)} if isinstance(choices, dict) else {},
        [o for o in overrides if isinstance(o, str)] if isinstance(overrides, list) else [],
    )


def _by_weights(numbers: Sequence[Number]) -> dict[str, dict[str, Number]]:
    """The numbers of the last step: one set, or one for each kind of weights where a name was measured of several."""
    last = max((n.protocol.get("step") or 0 for n in numbers), default=0)
    newest = {
        (n.name, str(n.protocol.get("weights"))): n for n in numbers if (n.protocol.get("step") or 0) == last
    }  # a resumed run may have written a line twice: the later one counts
    names = {name for name, _ in newest}
    if len(names) == len(newest):
        return {"": {n.name: n for n in newest.values()}} if newest else {}
    kinds = dict.fromkeys(weights for _, weights in newest)
    return {kind: {name: n for (name, weights), n in newest.items() if weights == kind} for kind in kinds}


# --- one protocol a column ---


def flatten(node: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by their dotted names; a `_target_` stands under its node's name."""
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            leaves |= flatten(value, name)
        elif key == "_target_":
            leaves = {path: _Target(value)} | leaves  # first: it is what a reader wants to hear of
        elif not key.startswith("_"):
            leaves[name] = json.dumps(value) if isinstance(value, list) else value
    return leaves


def covered(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted name is one of `names` or below it."""
    return any(key == name or key.startswith((f"{name}.", f"{name}/")) for name in names)


def allowed_to_vary(vary: Sequence[str]) -> set[str]:
    """What `vary` allows: what it names, and the cost of a sample with whatever decides it."""
    allowed = set(vary)
    if any(name.split(".")[0] in ("sampler", "guidance") for name in vary):
        allowed.add("nfe")
    if "nfe" in vary:
        allowed |= {"sampler.nfe", "sampler.steps"}
    return allowed


def like(protocol: Mapping[str, Any], vary: Sequence[str] = ()) -> dict[str, Any]:
    """What of a protocol has to be equal for two numbers of one name to share a column, by dotted names.

    Args:
        protocol: of a number.
        vary: fields that may differ.
    """
    free = {*allowed_to_vary(vary), *NEVER_COMPARED, SEED}
    return {key: value for key, value in flatten(protocol).items() if not covered(key, free)}


def check_protocols(runs: Sequence[MeasuredRun], vary: Sequence[str]) -> None:
    """See to it that each name means the same in every run.

    Args:
        runs: that are to be compared.
        vary: fields of the protocol that may differ, dotted names or nodes.

    Raises:
        UnlikeError: naming the first field that differs, with both values and both runs.
        ValueError: if `vary` names what is in no protocol.
    """
    fields = {key for run in runs for number in run.numbers.values() for key in flatten(number.protocol)}
    for name in vary:
        if not any(covered(key, [name]) for key in fields):
            nodes = sorted({key.split(".")[0] for key in fields} - NEVER_COMPARED - {SEED})
            raise ValueError(f"vary={name}: must be a field of the protocols: {', '.join(nodes)}")
    first = ""
    nodes = list(vary)
    for column in columns_of(runs):
        have = [run for run in runs if column in run.numbers]
        start = like(have[0].numbers[column].protocol, vary)
        for run in have[1:]:
            other = like(run.numbers[column].protocol, vary)
            for key in start | other:
                if start.get(key) == other.get(key):
                    continue
                nodes.append(key.split(".")[0])
                said = [
                    f"{brief(leaves[key]) if key in leaves else 'not said'} in {_called(r, have[0], run)}"
                    for leaves, r in ((start, have[0]), (other, run))
                ]
                first = first or f"{column}: {show(key)} differs: {', '.join(said)}"
    if first:
        decided = {"sampler", "guidance"} & set(nodes)  # by these the NFE are
        asked = dict.fromkeys(show(node) for node in nodes if not (decided and node == "nfe"))
        raise UnlikeError(f"{first}; compare like with like, or allow it with vary=[{','.join(asked)}]")


def _called(run: MeasuredRun, *both: MeasuredRun) -> str:
    """Its label, with the weights where both numbers are of one run."""
    return f"{run.label} ({run.weights})" if len({r.label for r in both}) == 1 else run.label


def columns_of(runs: Sequence[MeasuredRun]) -> list[str]:
    """The names of all numbers, in the order in which they come."""
    return list(dict.fromkeys(name for run in runs for name in run.numbers))


# --- what rows are called ---


def identity(run: MeasuredRun, vary: Sequence[str]) -> dict[str, Any]:
    """What a run is but for its training seed: choices, config, and of the protocol what may vary.

    Args:
        run: of numbers.
        vary: fields of the protocol that may differ.
    """
    choices = {group: c for group, c in run.choices.items() if not covered(group, (*NOT_NAMED, "trainer"))}
    config = {key: value for key, value in flatten(run.config).items() if not covered(key, NOT_NAMED)}
    protocol: dict[str, Any] = {}
    for number in run.numbers.values():
        protocol |= flatten(number.protocol)
    varied = {key: value for key, value in protocol.items() if covered(key, allowed_to_vary(vary))}
    kind = {"weights": run.weights} if run.weights else {}
    # A choice and its node share a name: what was chosen says more than its class
    return config | choices | varied | kind


def telling_keys(rows: Sequence[Mapping[str, Any]], by_hand: Collection[str], vary: Sequence[str] = ()) -> list[str]:
    """The fewest keys that tell rows apart: what was set by hand or may vary, and what does not follow from that.

    Args:
        rows: `identity` of each.
        by_hand: keys that are named whenever they differ.
        vary: fields of the protocol that may differ, and are named if they do.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    keys.sort(key=lambda key: (key != "experiment", "." in key or "/" in key))  # choices before details
    differing = [key for key in keys if len({row.get(key) for row in rows}) > 1]
    sampling = [key for key in differing if covered(key, allowed_to_vary(vary))]
    training = [key for key in differing if key not in sampling]

    def needed(chosen: list[str], more: Sequence[str]) -> list[str]:
        """What is chosen already, and of the rest what does not follow from it."""
        for key in more:
            apart, further = ({tuple(map(row.get, told)) for row in rows} for told in (chosen, [*chosen, key]))
            if len(further) > len(apart):
                chosen = [*chosen, key]
        return chosen

    chosen = needed([key for key in training if key in by_hand], training) + needed([], sampling)
    return sorted(chosen, key=keys.index)


def shortened(keys: Sequence[str]) -> dict[str, str]:
    """For each dotted key its last part, where no other one ends so."""
    tails = [re.split(r"[./]", key)[-1] for key in keys]
    return {key: tail if tails.count(tail) == 1 else key for key, tail in zip(keys, tails, strict=True)}


def row_names(rows: Sequence[Mapping[str, Any]], by_hand: Collection[str], vary: Sequence[str]) -> list[str]:
    """The shortest names that tell rows apart; see `telling_keys`."""
    short = shortened(telling_keys(rows, by_hand, vary))
    return [", ".join(f"{short[key]}={brief(row[key])}" for key in short if key in row) for row in rows]


def brief(value: Any) -> str:
    """A value of a config as names of rows have it."""
    if isinstance(value, _Target):
        return value.rpartition(".")[2]
    return f"{value:g}" if isinstance(value, float) else "null" if value == "None" else show(value)
