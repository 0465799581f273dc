"""The training loop that the stages share: learning rate, time budget, resumable checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stage_ray.observability.progress import Progress
from stage_ray.policies.devices import hardware_has_bfloat16

CHECKPOINT_EVERY_S = 240.0
REPORT_EVERY = 50  # steps
console = Console(width=120)


def device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    """bfloat16 for the products of a forward pass, where the hardware has it: elsewhere it is emulated, and slow."""
    return torch.autocast(device().type, torch.bfloat16, enabled=hardware_has_bfloat16(device()))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A `TrainingRun`: ``step``, ``elapsed_s``, ``history``; on the CPU, tensors of ``module`` and ``optimizers``."""
    with safe_open(path, "pt") as file:
        saved: dict[str, Any] = json.loads(file.metadata()["progress"]) | {"module": {}, "optimizers": {}}
        for name in file.keys():  # noqa: SIM118
            part, _, rest = name.partition(".")
            saved[part][rest] = file.get_tensor(name)
    return saved


@dataclass(frozen=True, slots=True)
class Budget:
    """How long a stage trains: `steps`, or `seconds` of wall-clock time if those pass first."""

    steps: int
    seconds: float = math.inf

    def progress(self, step: int, elapsed_s: float) -> float:
        """Fraction done, 0..1."""
        return min(1.0, max(step / self.steps, elapsed_s / self.seconds))


class TrainingRun:
    """Iterate over it to get (step, progress) pairs; everything around a step happens here.

    Invariant: the file at `path` holds weights, optimizer state, step and elapsed time of one same moment. Each step's
    data depends on seed and step only, so a run that is started again goes on as if never interrupted.
    """

    def __init__(
        self,
        path: Path,
        module: nn.Module,
        peak_lr: float,
        budget: Budget,
        weight_decay: float = 0.01,
        warmup: float = 0.03,
        hidden: nn.Module | None = None,
    ) -> None:
        """AdamW trains the module, but Muon (Jordan et al., 2024) the matrices of its part ``hidden``: in small
        transformers a step of it is worth about two."""
        self.path, self.module, self.budget, self.peak_lr, self.warmup = path, module, budget, peak_lr, warmup
        matrices = [p for p in hidden.parameters() if p.requires_grad and p.dim() == 2] if hidden else []
        taken = {id(p) for p in matrices}
        rest = [p for p in module.parameters() if p.requires_grad and id(p) not in taken]
        # Biases and norms do not decay.
        decayed = {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay}
        groups = [decayed, {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.95))]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=peak_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.optimizers.append(muon)
        self.step, self.elapsed_s = 0, 0.0
        self.history: list[dict[str, float]] = []
        if path.exists():
            saved = read_checkpoint(path)
            module.load_state_dict(saved["module"])
            for number, optimizer in enumerate(self.optimizers):
                states = optimizer.state_dict()
                for name, tensor in saved["optimizers"].items():  # "0.12.exp_avg": optimizer, parameter, key
                    which, parameter, key = name.split(".")
                    if int(which) == number:
                        states["state"].setdefault(int(parameter), {})[key] = tensor
                optimizer.load_state_dict(states)
            self.step, self.elapsed_s, self.history = saved["step"], saved["elapsed_s"], saved["history"]
            console.print(f"{path.stem}: resumed at step {self.step}")

    def __iter__(self) -> Iterator[tuple[int, float]]:
        started = time.monotonic() - self.elapsed_s
        saved_at = time.monotonic()
        with Progress(console) as shown, shown.bar(self.path.stem, total=self.budget.steps) as advance:
            advance(self.step)
            while (progress := self.budget.progress(self.step, self.elapsed_s)) < 1.0:
                # A linear warm-up, then a cosine to a hundredth of the peak.
                rate = self.peak_lr * (progress + 1e-3) / (self.warmup + 1e-3)
                if progress >= self.warmup:
                    phase = (progress - self.warmup) / (1 - self.warmup)
                    rate = self.peak_lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * phase)))
                for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                    group["lr"] = rate
                yield self.step, progress
                self.step += 1
                advance(1)
                self.elapsed_s = time.monotonic() - started
                if time.monotonic() - saved_at > CHECKPOINT_EVERY_S:
                    self.save()
                    saved_at = time.monotonic()
        self.save()

    def descend(self, loss: Tensor, report: Tensor | None = None) -> None:
        """One clipped step. Every `REPORT_EVERY` steps prints and keeps the loss, or of its terms the one to `report`.

        Raises:
            FloatingPointError: the gradient is not finite; the weights are unspoiled.
        """
        self.module.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"{self.path.stem}: gradient norm {norm} at step {self.step}")
        for optimizer in self.optimizers:
            optimizer.step()
        if self.step % REPORT_EVERY == 0:
            value = float((loss if report is None else report).detach())
            self.history.append({"step": self.step, "elapsed_s": round(self.elapsed_s, 1), "loss": value})
            done = self.budget.progress(self.step, self.elapsed_s)
            console.print(f"{self.path.stem} {self.step:5d}  {done:4.0%}  loss {value:.4f}  {self.elapsed_s:.0f} s")

    def save(self) -> None:
        """Write the checkpoint whole or not at all."""
        tensors = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizers.{number}.{index}.{key}": value for key, value in state.items()}
        # Tied weights share memory, which safetensors refuses: clones cost little here.
        copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        progress = {"step": self.step, "elapsed_s": self.elapsed_s, "history": self.history}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(self.path.name + ".tmp")
        save_file(copies, scratch, metadata={"progress": json.dumps(progress)})
        scratch.replace(self.path)
