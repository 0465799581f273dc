"""What every worker answers, whatever its role: that it lives, and where the ranks of its group meet."""

from __future__ import annotations

import os
import socket

import ray


class Worker:
    """Base class of the actors: answers pings on a thread of its own (Ray's concurrency group ``health``)."""

    @ray.method(concurrency_group="health")
    def ping(self) -> tuple[int, str]:
        """Process id and Ray's node id; both say which process to kill when it stops answering."""
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def address(self) -> str:
        """Where the other ranks meet this one: HOST:PORT."""
        return free_address(ray.util.get_node_ip_address())

    def setup(self, address: str = "") -> None:
        """Load what takes time; one of several ranks first meets the others at ``address``."""


def free_address(host: str) -> str:
    """HOST:PORT of a port that is free there now.

    Example:
        >>> free_address("127.0.0.1").startswith("127.0.0.1:")
        True
    """
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"
