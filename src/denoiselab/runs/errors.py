"""The two ways in which a command ends early on purpose."""

from __future__ import annotations


class ConfigError(ValueError):
    """A mistake in the configuration, in one line: key, value and what is allowed. Exit code 2."""


class RankError(RuntimeError):
    """A process of a job failed; the message is the first cause. Exit code 1."""
