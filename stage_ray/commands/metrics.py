"""``stage-ray metrics``: explain every metric."""

from __future__ import annotations

from typing import Annotated

import typer


def metrics(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="As Markdown, the whole of deploy/grafana/METRICS.md")
    ] = False,
) -> None:
    """Explain every metric that a run records and its workers report: name, unit, meaning.

    Example: stage-ray metrics
    """
    from stage_ray.observability import registry

    typer.echo(registry.markdown() if markdown else registry.TABLE, nl=False)
