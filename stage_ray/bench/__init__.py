"""``stage-ray bench``: speed claims as ratios against honest baselines measured in the same run. See README.md here."""

from stage_ray.registry import Registry

# A bench is a file of this room with a class that ends in Bench; the command writes its name with a dash.
BENCHES = Registry("stage_ray.bench", "Bench", "bench")


def bench_names() -> list[str]:
    """Every bench as the command names it, in alphabetical order; imports none of them."""
    return [name.replace("_", "-") for name in BENCHES.names()]
