"""``python -m stage_ray`` is ``stage-ray``."""

import sys

from stage_ray.cli import main

sys.exit(main())
