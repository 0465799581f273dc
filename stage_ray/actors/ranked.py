"""What a worker can do that may be one of several ranks: say where they meet."""

from __future__ import annotations

import ray

from stage_ray.actors.health import Pinged
from stage_ray.weights.rendezvous import free_address


class Ranked(Pinged):
    """One actor of a `RankGroup`, or a whole worker by itself."""

    def address(self) -> str:
        """Where the other ranks meet this one: HOST:PORT."""
        return free_address(ray.util.get_node_ip_address())
