"""``stage-ray bench``: speed claims as ratios against honest baselines measured in the same run. See README.md here."""

from stage_ray.registry import Registry

BENCHES = Registry("stage_ray.bench", "Bench", "bench")  # a bench is a file here whose class's name ends in Bench


def bench_names() -> list[str]:
    """Every bench as the command names it, in alphabetical order; imports none of them."""
    return [name.replace("_", "-") for name in BENCHES.names()]
