"""Where a run's actors live: their placement, Ray's runtime, and the calls between them."""
