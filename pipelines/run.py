"""Walk the stage graph: one stage, or all of them in order, each only where its work is not yet done."""

from __future__ import annotations

from collections.abc import Iterable

from pipelines.progress import say
from pipelines.settings import Settings
from pipelines.stage import Plan


def order(settings: Settings) -> list[str]:
    """All stages, each after those it needs (the order of the config where it is free)."""
    done: list[str] = []

    def visit(stage: str, path: tuple[str, ...]) -> None:
        if stage in path:
            raise ValueError(f"graph: {' → '.join((*path, stage))} is a circle")
        if stage not in settings.graph:
            raise ValueError(f"graph.{path[-1]}.needs names {stage!r}, which is no stage")
        for need in settings.graph[stage].needs:
            visit(need, (*path, stage))
        if stage not in done:
            done.append(stage)

    for stage in settings.graph:
        visit(stage, ())
    return done


def run_stages(settings: Settings, stages: Iterable[str], *, redo: bool) -> bool:
    """Bring `stages` up to date, in order, on one Ray session.  Returns whether there was anything to do.

    Raises ValueError when an input outside `stages` is missing or made with other settings, and, unless `redo`, when a
    stage's folder holds work of other settings.
    """
    order(settings)  # raises on a circle
    plan = Plan(settings)
    plan.folder.check_writable()
    stages = list(stages)
    first = next((stage for stage in stages if not plan.is_done(stage)), None)
    if first is None:
        for stage in stages:
            _skip(stage)
        return False
    plan.check_inputs(first)
    plan.check_stale(first, redo=redo)
    plan.fingerprint(first)  # reads the source: a wrong data.root is told before Ray starts
    from cluster.session import session

    with plan.folder.locked(), session() as resources:
        for stage in stages:
            if plan.is_done(stage):
                _skip(stage)
                continue
            plan.check_inputs(stage)
            plan.begin(stage, redo=redo)
            say(f"{stage}: starts")
            record = plan.execute(stage, resources)
            metrics = record["metrics"]
            say(f"{stage}: done in {metrics['seconds']:.0f} s, {metrics['peak_rss_mb']:.0f} MiB at most")
    return True


def _skip(stage: str) -> None:
    say(f"{stage}: done before, nothing to do")


def run_all(settings: Settings) -> bool:
    """The whole path, then metrics.json with every stage's figures.  Returns whether there was anything to do."""
    worked = run_stages(settings, order(settings), redo=settings.changed != "refuse")
    from pipelines.evaluate.metrics import write_metrics

    write_metrics(settings)
    return worked
