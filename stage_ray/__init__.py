"""stage_ray: STAGE post-training of autoregressive image models, on Ray, with rollouts served by vLLM.

Read it in the direction the data flows: ``config`` -> ``records`` -> ``policies`` -> ``engines`` -> ``rewards`` ->
``pipeline`` -> ``algorithm`` -> ``learner`` -> ``weights`` -> ``train``.

Use it from Python as from the command line: `load_config`, `train`, `evaluate`, `evaluate_suites`, `generate`.

Example:
    from stage_ray import evaluate, load_config, train

    summary = train(load_config("stage_shapeworld", ["steps=20"], run_dir="runs/short"))
    print(evaluate(summary.run_dir / "final").headline_value)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stage_ray.config.load import load_config
    from stage_ray.inference.evaluate import evaluate, evaluate_suites
    from stage_ray.inference.generate import generate
    from stage_ray.train import train

__all__ = ["evaluate", "evaluate_suites", "generate", "load_config", "train"]
__version__ = "0.2.0"

_HOMES = {
    "evaluate": "inference.evaluate",
    "evaluate_suites": "inference.evaluate",
    "generate": "inference.generate",
    "load_config": "config.load",
    "train": "train",
}


def __getattr__(name: str) -> Any:
    """Import a function when it is first asked for: torch and Ray take seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("stage_ray.config.home").ensure_home()  # as the command line does
    home = importlib.import_module(f"stage_ray.{_HOMES[name]}")
    return home if name == "train" else getattr(home, name)  # a module that can be called


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
