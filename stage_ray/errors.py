"""The two ways a command ends badly that are not bugs: each message is one clear sentence for a person."""


class ConfigError(ValueError):
    """Wrong usage or config; names the key, the value and the mend. Exit code 2."""


class RunError(RuntimeError):
    """The run could not go on; names what failed and where to look. Exit code 1."""
