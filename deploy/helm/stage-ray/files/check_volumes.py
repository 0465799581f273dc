"""Before Ray starts: can this user write where the run will? Where not, one sentence about each place, and exit code 1.

A volume of a shared file system often belongs to root, and Kubernetes cannot change that.
Usage: python check_volumes.py KEY=DIRECTORY...
"""

import os
import sys
import tempfile


def trouble(key, directory):
    """What is wrong with a directory, or with the one it will be made in; None if it can be written to.

    Nothing stays behind.

    Example:
        >>> trouble("storage.checkpoints", "/tmp/runs/first")
    """
    place = os.path.abspath(directory)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"1")
    except OSError as error:
        groups = ", ".join(str(group) for group in sorted({os.getgid(), *os.getgroups()}))
        sentence = f"{key}: user {os.getuid()} (groups {groups}) cannot write to {place}: {error.strerror}"
        mend = "give it to that user or one of the groups, or name its group in podSecurity.supplementalGroups"
        return f"{sentence}; {mend}" if isinstance(error, PermissionError) else sentence
    return None


if __name__ == "__main__":
    pairs = [argument.partition("=") for argument in sys.argv[1:]]
    found = [trouble(key, directory) for key, _, directory in pairs]
    sys.exit("\n".join(sentence for sentence in found if sentence) or 0)
