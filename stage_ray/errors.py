"""The two ways a command ends badly that are not bugs: each message is one clear sentence for a person."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any


class ConfigError(ValueError):
    """Wrong usage or config; names the key, the value and the fix. Exit code 2."""


class RunError(RuntimeError):
    """The run could not go on; names what failed and where to look. Exit code 1."""


class LearnerLostError(RunError):
    """The learner died or hung; another one has started in its place, and has not got the run's state yet."""


class GroupsLostError(Exception):
    """The payload of some groups was lost with the node that held it; the other groups are as they were."""

    def __init__(self, group_ids: Sequence[int]) -> None:
        super().__init__(f"groups {list(group_ids)} were lost with a node")
        self.group_ids = list(group_ids)


class Interrupted(RunError):  # noqa: N818  it is no error: a user asked for it
    """A signal ended the run, after a checkpoint. Exit code 128 plus the signal's number, as shells expect."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def suggest(name: str, known: Collection[str], prefix: str = "") -> str:
    """The fix of an unknown name: the nearest known one, after ``prefix``, or all of them.

    Example:
        >>> suggest("clop", ["clip", "geneval"], "rewards."), suggest("x", ["geneval", "clip"])
        ("did you mean 'rewards.clip'?", 'known here: clip, geneval')
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.55)
    return f"did you mean {prefix + near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"


def impossible(key: str, error: Mapping[str, Any]) -> str:
    """One of pydantic's errors about a value, as a sentence that begins with the key and the value."""
    return f"{key} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"
