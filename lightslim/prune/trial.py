"""Try a cut before keeping it: a group that cannot be cut is frozen, with the reason, instead of breaking the model."""

from collections.abc import Callable, Sequence

from lightslim.graph import Graph, Group, Kept, ShapeTrace, disagreement, kept_sizes
from lightslim.prune.neutral import changed_result
from lightslim.steps import Probe
from lightslim.surgery import apply, plan

Choose = Callable[[Graph], Kept]


def feasible(graph: Graph, probe: Probe, choose: Choose) -> tuple[Graph, Kept]:
    """Choose units to keep, and freeze groups until the cut model runs its own steps.

    The trial cuts the live model, runs it, and puts the old tensors back: no copy of the weights is made.

    Args:
        graph: the recording of the uncut model.
        probe: how to run the model.
        choose: from a graph to the units to keep; asked again after each refusal.

    Returns:
        The graph with what could not be cut frozen, and the units to keep.
    """
    while True:
        kept = choose(graph)
        groups = [group for group in graph if group.axis in kept]
        failure = _failure(graph, probe, groups, kept)
        if failure is None:
            return graph, kept
        culprit, reason = _culprit(graph, probe, groups, kept, failure)
        graph = graph.without([culprit], f"the model does not stand this cut: {reason}")


def _failure(graph: Graph, probe: Probe, groups: Sequence[Group], kept: Kept) -> str | None:
    """Why the model does not run, or not as the algebra predicts, with these groups cut; None if it does."""
    if not groups:
        return None
    chosen = {group.axis: kept[group.axis] for group in groups}
    undo = apply(probe.module, plan(probe.module, graph, chosen))
    try:
        odd = next(filter(None, (_odd_run(graph, probe, mode, chosen) for mode in graph.traces)), None)
    except Exception as error:  # whatever the user's code raises when a size is not what it expects
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    finally:
        undo()
    return odd or changed_result(graph, probe, chosen)


def _odd_run(graph: Graph, probe: Probe, training: bool, kept: Kept) -> str | None:
    with ShapeTrace() as trace:
        probe.run(training)
    return disagreement(graph.traces[training], trace, kept_sizes(kept))


def _culprit(graph: Graph, probe: Probe, groups: list[Group], kept: Kept, failure: str) -> tuple[Group, str]:
    """The group that first breaks the model when they are cut in order, found by bisection over how many are cut."""
    runs, fails = 0, len(groups)
    while fails - runs > 1:
        middle = (runs + fails) // 2
        found = _failure(graph, probe, groups[:middle], kept)
        if found is None:
            runs = middle
        else:
            fails, failure = middle, found
    return groups[fails - 1], failure
