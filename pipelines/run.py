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
    pending = [stage for stage in stages if not plan.is_done(stage)]
    for stage in stages:
        if stage not in pending:
            say(f"{stage}: done before, nothing to do")
    if not pending:
        return False
    plan.check_inputs(pending[0])
    plan.check_stale(pending[0], redo=redo)
    plan.fingerprint(pending[0])  # reads the source: a wrong data.root is told before Ray starts
    from cluster.session import session

    with session() as resources:
        for stage in pending:
            plan.check_inputs(stage)
            plan.begin(stage, redo=redo)
            say(f"{stage}: starts")
            record = plan.execute(stage, resources)
            metrics = record["metrics"]
            say(f"{stage}: done in {metrics['seconds']:.0f} s, {metrics['peak_rss_mb']:.0f} MiB at most")
    return True


def run_all(settings: Settings) -> bool:
    """The whole path, then metrics.json with every stage's figures.  Returns whether there was anything to do."""
    worked = run_stages(settings, order(settings), redo=settings.changed != "refuse")
    from pipelines.evaluate.metrics import write_metrics

    write_metrics(settings)
    return worked
