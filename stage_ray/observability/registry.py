"""What every metric means: one catalogue of what a run records and of what its workers report, with units.

Help texts of the Prometheus endpoint, ``stage-ray metrics`` and ``deploy/grafana/METRICS.md`` are made from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

PREFIX = "stage_ray_"
RAY_PREFIX = "ray_"

Source = Literal["learner", "stream", "driver", "every worker", "rollout, learner"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, or a family of them: ``reward/<scorer>`` stands for every scorer's.

    Attributes:
        name: in ``metrics.jsonl`` and TensorBoard, or of a worker's metric.
        unit: of its value; "share" is 0..1.
        meaning: one sentence without its full stop.
        where: what records it.
        kind: a counter only grows while its process lives.
        worker: reported by the actors through Ray, with the labels ``role`` and ``worker``.

    Example:
        >>> Metric("reward/<scorer>", "score", "Mean score", "learner").matches("reward/clip")
        True
    """

    name: str
    unit: str
    meaning: str
    where: Source
    kind: Literal["gauge", "counter"] = "gauge"
    worker: bool = False

    @property
    def prometheus(self) -> str:
        """Its name in PromQL, with ``<...>`` where the name of a family differs.

        Example:
            >>> Metric("time/step_s", "s", "Seconds", "driver").prometheus
            'stage_ray_time_step_s'
        """
        total = "_total" if self.kind == "counter" else ""
        if self.worker:
            return f"{RAY_PREFIX}{self.name}{total}"
        return PREFIX + re.sub(r"<\w+>|\W", lambda part: part[0] if "<" in part[0] else "_", self.name) + total

    @property
    def help(self) -> str:
        """Its line on a metrics endpoint."""
        return f"{self.meaning} [{self.unit}]"

    def matches(self, name: str) -> bool:
        """Whether ``name`` is this metric's, or one of its family."""
        family = r"\d+" if "<updates>" in self.name else r"[^/]+"
        return re.fullmatch(re.sub(r"<\w+>", lambda _: family, re.escape(self.name)), name) is not None


RECORDED = (
    Metric("step", "updates", "Updates done", "driver"),
    Metric("alarms", "alarms", "Alarms that the newest update raised; in metrics.jsonl their names", "driver"),
    Metric("alarm", "updates", "Updates that raised an alarm, by its name; alarms.jsonl", "driver", "counter"),
    Metric(
        "reward/mean", "reward", "Weighted sum of all scorers, mean over images; no entropy reward in it", "learner"
    ),
    Metric("reward/std", "reward", "Standard deviation of the reward inside a group, mean over groups", "learner"),
    Metric("reward/informative", "share", "(group, scorer) pairs in which the scorer told the images apart", "learner"),
    Metric("reward/<scorer>", "score", "Unweighted mean of one scorer over images", "learner"),
    Metric("advantage/mean_abs", "1", "Mean size of the advantages", "learner"),
    Metric("advantage/zero_groups", "share", "Groups in which every advantage is 0", "learner"),
    Metric(
        "entropy_reward/mean", "1", "Closeness of the policy's entropy to the reference's; 1 where equal", "learner"
    ),
    Metric("entropy/policy", "nats/token", "Entropy of the policy, recorded while sampling", "learner"),
    Metric("entropy/reference", "nats/token", "Entropy of the reference model on the same tokens", "learner"),
    Metric("kl", "nats/token", "k3 estimate of the KL to the reference model, unweighted", "learner"),
    Metric("kl/weighted", "nats/token", "The KL as it enters the loss, before beta", "learner"),
    Metric("loss", "1", "Loss of the update", "learner"),
    Metric("policy_loss", "1", "Policy term of the loss", "learner"),
    Metric("grad_norm", "1", "Norm of the gradient before it is clipped", "learner"),
    Metric("lr", "1", "Learning rate of the update", "learner"),
    Metric("similarity/mean", "1", "Mean similarity of the images of a group", "learner"),
    Metric("weight/mean", "1", "Mean weight of a token in the policy term", "learner"),
    Metric("staleness/mean", "updates", "How far groups lag behind the learner, mean", "learner"),
    Metric("staleness/max", "updates", "How far the oldest group lags behind the learner", "learner"),
    Metric("staleness/<updates>", "share", "Groups that lag behind the learner by so many updates", "learner"),
    Metric("ratio/mean", "1", "Importance ratio of older groups' tokens, mean; 1 without any", "learner"),
    Metric("ratio/max", "1", "Importance ratio of older groups' tokens, greatest; 1 without any", "learner"),
    Metric("ratio/clipped", "share", "Older groups' tokens that algorithm.correction caps or masks", "learner"),
    Metric("ess", "share", "Effective sample size of older groups' tokens; 1 without any", "learner"),
    Metric(
        "mismatch/abs_logprob",
        "nats/token",
        "Mean |delta log p| of rollout engine and learner at the same version; absent if every group is older",
        "learner",
    ),
    Metric("mismatch/max_abs_logprob", "nats/token", "The same, greatest token", "learner"),
    Metric(
        "mismatch/with_drift_abs_logprob",
        "nats/token",
        "Mean |delta log p| of older groups, when drawn and now: mismatch and the drift between; absent without any",
        "learner",
    ),
    Metric("images", "images", "Images trained in the update", "learner"),
    Metric("tokens", "tokens", "Image tokens trained in the update", "learner"),
    Metric("time/reference_s", "s", "Forward passes of the reference model", "learner"),
    Metric("time/policy_s", "s", "Forward and backward passes of the policy", "learner"),
    Metric("time/rollout_s", "s", "Drawing, added up over waves and workers since the last update", "stream"),
    Metric("time/score_s", "s", "Scoring, added up over calls since the last update", "stream"),
    Metric("scoring/rescored", "groups", "Groups scored a further time since the last update", "stream"),
    Metric("scoring/replaced", "groups", "Groups that no scorer could score, replaced by fresh ones", "stream"),
    Metric("rollout/reissued", "groups", "Groups drawn again because a worker or its node was lost", "stream"),
    Metric("queue/pending", "groups", "Groups that are being drawn or scored", "stream"),
    Metric("queue/ready", "groups", "Groups drawn and scored that wait for the learner", "stream"),
    Metric("busy/rollout", "share", "Time that rollout workers worked since the last update, mean", "stream"),
    Metric("busy/reward", "share", "Time that reward workers worked since the last update, mean", "stream"),
    Metric("busy/learner", "share", "Time that the learner worked since the last update", "stream"),
    Metric("workers/rollout", "workers", "Rollout workers that can be asked now", "stream"),
    Metric("workers/reward", "workers", "Reward workers that can be asked now", "stream"),
    Metric("workers/restarts", "workers", "Workers replaced since the driver started", "stream"),
    Metric("time/wait_s", "s", "The driver waited for groups", "driver"),
    Metric("time/update_s", "s", "The driver waited for the update", "driver"),
    Metric("time/publish_s", "s", "The driver waited for the new weights to be published", "driver"),
    Metric("time/step_s", "s", "The whole step", "driver"),
    Metric("images_per_s", "images/s", "Images trained by the seconds of the step", "driver"),
)
"""What a run records: ``metrics.jsonl``, TensorBoard and the driver's Prometheus endpoint."""

WORKER = (
    Metric(
        "stage_ray_worker_calls", "calls", "Waves drawn, batches scored or updates", "every worker", "counter", True
    ),
    Metric("stage_ray_worker_busy_seconds", "s", "Time worked in those calls", "every worker", "counter", True),
    Metric("stage_ray_worker_groups", "groups", "Groups drawn, scored or trained", "every worker", "counter", True),
    Metric("stage_ray_worker_images", "images", "Images drawn, scored or trained", "every worker", "counter", True),
    Metric("stage_ray_worker_tokens", "tokens", "Image tokens of those images", "every worker", "counter", True),
    Metric("stage_ray_worker_tokens_per_second", "tokens/s", "Speed of the last call", "every worker", worker=True),
    Metric(
        "stage_ray_worker_policy_version",
        "updates",
        "Version that drew last, or was made last",
        "rollout, learner",
        worker=True,
    ),
    Metric("stage_ray_worker_peak_memory_bytes", "B", "Greatest resident memory so far", "every worker", worker=True),
    Metric(
        "stage_ray_worker_peak_gpu_memory_bytes",
        "B",
        "Greatest memory that torch took on its GPU so far; absent without one",
        "every worker",
        worker=True,
    ),
)
"""What every worker reports on its node's Ray metrics endpoint, with the labels ``role`` and ``worker``."""

ALARMS = {
    "zero_gradient": "The gradient is exactly 0, so the update changed nothing",
    "no_variance": "In every group all images had the same reward, so only the KL was trained on",
    "no_valid_reward": "No scorer told the images of any group apart, or none gave a valid score",
    "entropy_collapse": "The policy's token entropy fell below half of the reference's",
    "kl_blowup": "The KL to the reference model is beyond 0.5 nats a token",
    "mismatch": "Rollout engine and learner differ by more than 0.05 nats a token, drift included in older groups",
    "learner_lost": "The learner died or hung, and the run went back to its last checkpoint",
}
"""The label ``name`` of ``stage_ray_alarm_total`` and what it means; see `stage_ray.observability.alarms`."""


def flat(name: str) -> str:
    """A metric's name with ``_`` for what Prometheus does not take.

    Example:
        >>> flat("reward/geneval-soft")
        'reward_geneval_soft'
    """
    return re.sub(r"\W", "_", name)


def find(name: str) -> Metric | None:
    """The entry of a recorded metric: its own before that of a family, None where there is none.

    Example:
        >>> find("reward/mean").unit, find("reward/clip").unit, find("reward") is None
        ('reward', 'score', True)
    """
    own = next((metric for metric in RECORDED if metric.name == name), None)
    return own or next((metric for metric in RECORDED if metric.matches(name)), None)


def markdown() -> str:
    """The catalogue as ``deploy/grafana/METRICS.md`` has it."""
    parts = [
        "# Metrics\n\nWritten by `stage-ray metrics --markdown`; source: `stage_ray/observability/registry.py`.\n",
        "## Of a run\n\nOne row an update in `metrics.jsonl` and TensorBoard, and the newest of each on the driver's "
        "Prometheus endpoint\n(`cluster.metrics_port`).\n",
        _markdown_table(RECORDED, "metrics.jsonl"),
        "## Alarms\n\nThe label `name` of `stage_ray_alarm_total`; each has a rule in `alerts.yaml`. A run that ends "
        "because no group could be scored\n(`no_valid_reward`) takes its endpoint with it before another scrape: alert "
        "on the job that failed, too.\n",
        "| name | meaning |\n| --- | --- |\n" + "".join(f"| `{name}` | {text} |\n" for name, text in ALARMS.items()),
        "## Of its workers\n\nOn the Ray metrics endpoint of each node, with the labels `role` (rollout, reward, "
        "learner) and `worker`.\n",
        _markdown_table(WORKER, "in Ray"),
    ]
    return "\n".join(parts)


def print_table() -> None:
    """The catalogue for people, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    for title, metrics in (("Of a run", RECORDED), ("Of its workers, on Ray's metrics endpoints", WORKER)):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        table.add_column("name", no_wrap=True)
        table.add_column("unit", no_wrap=True)
        table.add_column("meaning", overflow="fold")
        for metric in metrics:
            name = metric.prometheus if metric.worker else metric.name
            table.add_row(name, metric.unit, metric.meaning)
        console.print(table)
        console.print()
    console.print("In Prometheus a run's metrics begin with stage_ray_ and have _ for /, as in stage_ray_reward_mean.")


def _markdown_table(metrics: tuple[Metric, ...], title: str) -> str:
    rows = [f"| {title} | Prometheus | kind | unit | meaning | recorded by |", "| --- | --- | --- | --- | --- | --- |"]
    for m in metrics:
        meaning = m.meaning.replace("|", "\\|")
        rows.append(f"| `{m.name}` | `{m.prometheus}` | {m.kind} | {m.unit} | {meaning} | {m.where} |")
    return "\n".join(rows) + "\n"
