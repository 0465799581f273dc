"""What every worker answers while it works: that it lives."""

from __future__ import annotations

import os

import ray


class Pinged:
    """Answers pings on a thread of its own (Ray's concurrency group ``health``)."""

    @ray.method(concurrency_group="health")
    def ping(self) -> tuple[int, str]:
        """Process id and Ray's node id; both say which process to kill when it stops answering."""
        return os.getpid(), ray.get_runtime_context().get_node_id()
