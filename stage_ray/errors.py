"""The two ways a command ends badly that are not bugs: each message is one clear sentence for a person."""

from collections.abc import Sequence


class ConfigError(ValueError):
    """Wrong usage or config; names the key, the value and the fix. Exit code 2."""


class RunError(RuntimeError):
    """The run could not go on; names what failed and where to look. Exit code 1."""


class LearnerLostError(RunError):
    """The learner died or hung; another one has started in its place, and has not got the run's state yet."""


class GroupsLostError(Exception):
    """The payload of some groups is gone, with the node that held it; the other groups are as they were."""

    def __init__(self, group_ids: Sequence[int]) -> None:
        super().__init__(f"groups {list(group_ids)} were lost with a node")
        self.group_ids = list(group_ids)


class Interrupted(RunError):  # noqa: N818  it is no error: someone wanted it
    """A signal ended the run, after a checkpoint. Exit code 128 plus the signal's number, as shells expect."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
