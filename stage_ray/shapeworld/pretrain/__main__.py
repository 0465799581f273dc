"""`python -m stage_ray.shapeworld.pretrain`: the same as `stage-ray pretrain`, without the rest of the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from stage_ray.shapeworld.pretrain import STAGES, pretrain


def main() -> None:
    """Parse the arguments and run the stages."""
    parser = argparse.ArgumentParser(prog="python -m stage_ray.shapeworld.pretrain", description=pretrain.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the results and the working files")
    parser.add_argument("--stage", action="append", choices=STAGES, help="may be given several times; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps of each stage, to see that all works")
    arguments = parser.parse_args()
    pretrain(arguments.out, stages=arguments.stage, seed=arguments.seed, smoke=arguments.smoke)


if __name__ == "__main__":
    main()
