"""Run nodes of the stage graph in order, skipping those that are up to date."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.errors import UserError
from pipelines.graph.plan import Plan
from pipelines.graph.settings import Settings
from pipelines.monitor.progress import say


def order(settings: Settings) -> list[str]:
    """All nodes in topological order (the order of the config where that leaves a choice)."""
    done: list[str] = []
    plan = Plan(settings)

    def visit(node: str, path: tuple[str, ...]) -> None:
        if node in path:
            raise UserError(f"graph: {' → '.join((*path, node))} is a cycle")
        for need in plan.inputs(node):
            visit(need, (*path, node))
        if node not in done:
            done.append(node)

    for node in settings.graph:
        visit(node, ())
    return done


def run_stages(settings: Settings, nodes: Iterable[str], *, redo: bool) -> bool:
    """Bring nodes up to date, in order, in one Ray session.  Returns whether there was anything to do.

    Raises:
        UserError: an input outside `nodes` is missing or was made with other settings; a folder holds files that are
            not ours; or, unless `redo`, results of other settings.  Those of protected stages need changed=redo.
    """
    selected = set(nodes)
    nodes = [node for node in order(settings) if node in selected]
    plan = Plan(settings, looked_at=nodes)
    plan.folder.check_writable()
    plan.check(nodes, redo=redo)
    if all(plan.is_done(node) for node in nodes):
        for node in nodes:
            _skip(node)
        return False
    from cluster.session import session

    with plan.folder.locked(), session() as resources:
        for node in nodes:
            if plan.is_done(node):
                _skip(node)
                continue
            plan.check_inputs(node)
            plan.begin(node, redo=True)
            say(f"{node}: starts")
            metrics = plan.execute(node, resources.refreshed())["metrics"]
            say(f"{node}: done in {metrics['seconds']:.0f} s, {metrics['peak_rss_mb']:.0f} MiB at most")
    return True


def _skip(node: str) -> None:
    say(f"{node}: done before, nothing to do")


def run_all(settings: Settings) -> bool:
    """All nodes of the graph.  Returns whether there was anything to do."""
    return run_stages(settings, order(settings), redo=settings.changed != "refuse")
