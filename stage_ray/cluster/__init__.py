"""Where it runs: Ray, the seats of a run's actors and the calls between them."""
