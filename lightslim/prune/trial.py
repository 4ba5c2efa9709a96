"""Try a cut before keeping it: a group that cannot be cut is frozen, with the reason, instead of breaking the model.

A failure has a place: the modules whose code was running. Sizes that their Python holds are made to follow the cut
first; if that is not enough, the groups whose units pass there are frozen. Modules of one class share their code, so
what was learned of two of them goes for all.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lightslim.graph import Axis, Graph, Group, Kept, Made, ShapeTrace, disagreement, kept_sizes, leaves, same_way
from lightslim.prune.neutral import (
    Failure,
    Outputs,
    cannot_count,
    changed_result,
    comparable,
    enclosing,
    outermost,
    outputs,
)
from lightslim.sizes import sizes_from_axes
from lightslim.steps import Probe
from lightslim.surgery import Cut, apply, plan

Choose = Callable[[Graph], Kept]
Place = tuple[int, int, int]


def feasible(graph: Graph, probe: Probe, choose: Choose) -> tuple[Graph, Kept, Cut]:
    """Choose units to keep, and freeze groups until the cut model runs its own steps.

    The trial cuts the live model, runs it, and puts the old tensors back: no copy of the weights is made.

    Args:
        graph: the recording of the uncut model.
        probe: how to run the model.
        choose: from a graph to the units to keep; asked again after each refusal.

    Returns:
        The graph with what could not be cut frozen, the units to keep, and the cut that leaves them.
    """
    lessons = _Lessons(probe)
    while True:
        kept = choose(graph)
        cut = plan(probe.module, graph, kept)
        failure = lessons.failure(graph, kept, cut)
        if failure is None:
            return graph, kept, cut
        graph = lessons.following(graph, kept, failure) or lessons.freezing(graph, kept, failure)


class _Lessons:
    """What the trials of one model have taught about its classes of modules."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.modules: dict[str, nn.Module] = dict(probe.module.named_modules())
        self.readings: Counter[type[nn.Module]] = Counter()
        self.frozen_at: set[tuple[type[nn.Module], Place]] = set()

    def failure(self, graph: Graph, kept: Kept, cut: Cut) -> Failure | None:
        """Why the model does not run, or not as the algebra predicts, when ``cut`` to ``kept``; None if it does."""
        if not kept:
            return None
        try:
            failure, got, proven = self._odd_run(graph, kept, cut)
            return failure if failure or proven else changed_result(graph, self.probe, kept, got)
        except Exception as error:  # whatever the user's code raises when a size is not what it expects
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return Failure(reason, _running(self.probe.module, error))

    def _odd_run(self, graph: Graph, kept: Kept, cut: Cut) -> tuple[Failure | None, Outputs | None, bool]:
        """Run the cut model.

        Returns:
            Why its shapes are odd, its outputs where they can be compared as they are, and whether there is no need to.
        """
        # Numbers are compared in full precision, shapes in that of the training
        exact = self.probe.context is nullcontext and len(comparable(graph, kept)) == len(kept)
        got, proven, watched = None, False, outermost(self.probe.module)
        undo = apply(self.probe.module, cut)
        try:
            for training, expected in self._runs(graph, kept):
                trace = ShapeTrace()
                if training or not exact:
                    self.probe.run(training, within=trace)
                else:
                    got = outputs(self.probe, watched, within=trace)
                if found := disagreement(expected, trace, kept_sizes(kept)):
                    return Failure(found[1], enclosing(found[0].where)), None, False
                proven = proven or (not training and cannot_count(expected, trace))
        finally:
            undo()
        return None, got, proven

    def _runs(self, graph: Graph, kept: Kept) -> Iterator[tuple[bool, Sequence[Made]]]:
        """Which runs to try; a training run that does the same as the evaluation shows nothing new."""
        evaluation, training = graph.traces[False], graph.traces.get(True)
        yield False, evaluation
        dropouts = {path for path, module in self.modules.items() if _only_noise(module, graph.made_by(path), kept)}
        if training is not None and not same_way(evaluation, training, kept, dropouts):
            yield True, training

    def following(self, graph: Graph, kept: Kept, failure: Failure) -> Graph | None:
        """The same graph in which the sizes in the Python of a failed module's class follow the cut, in a new reading.

        None where no module at the place of the failure holds such sizes, or every reading has failed.
        """
        for path in failure.where:
            kind, tried = type(self.modules[path]), self.readings[type(self.modules[path])]
            if tried < len(sizes_from_axes(self.modules[path], graph.made_by(path), kept_sizes(kept))):
                self.readings[kind] = tried + 1
                return self._follow(graph, kind, tried)
        return None

    def _follow(self, graph: Graph, kind: type[nn.Module], reading: int) -> Graph:
        paths = [path for path, module in self.modules.items() if type(module) is kind]
        return replace(graph, follow={**graph.follow, **dict.fromkeys(paths, reading)})

    def freezing(self, graph: Graph, kept: Kept, failure: Failure) -> Graph:
        """The same graph without the group that breaks the model; when its place did so before, in all its class."""
        groups = [group for group in graph if group.axis in kept]
        culprit, failure, path = self._culprit(graph, groups, kept, failure)
        refused = [culprit, *self._siblings(graph, groups, culprit, path)]
        for kind in [kind for kind, tried in self.readings.items() if tried > 1]:
            self.readings[kind] = 1
            graph = self._follow(graph, kind, 0)
        return graph.without(refused, f"the model does not stand this cut: {failure.reason}")

    def _culprit(self, graph: Graph, groups: list[Group], kept: Kept, failure: Failure) -> tuple[Group, Failure, str]:
        """One group that breaks the model by itself or after others, sought among those at the place of the failure."""
        for path in failure.where:
            seen = {leaf for made in graph.made_by(path) for axis in made.touched for leaf in leaves(axis)}
            suspects = [group for group in groups if group.axis in seen]
            again = failure if len(suspects) == len(groups) else self._failure_of(graph, suspects, kept)
            if again is not None:
                return *self._first_to_break(graph, suspects, kept, again), path
        return *self._first_to_break(graph, groups, kept, failure), ""

    def _first_to_break(self, graph: Graph, groups: list[Group], kept: Kept, failure: Failure) -> tuple[Group, Failure]:
        """The group that first breaks the model when they are cut in order, by bisection over how many are cut."""
        runs, fails = 0, len(groups)
        while fails - runs > 1:
            middle = (runs + fails) // 2
            found = self._failure_of(graph, groups[:middle], kept)
            if found is None:
                runs = middle
            else:
                fails, failure = middle, found
        return groups[fails - 1], failure

    def _failure_of(self, graph: Graph, groups: Sequence[Group], kept: Kept) -> Failure | None:
        fewer = {group.axis: kept[group.axis] for group in groups}
        return self.failure(graph, fewer, plan(self.probe.module, graph, fewer))

    def _siblings(self, graph: Graph, groups: list[Group], culprit: Group, path: str) -> Iterator[Group]:
        """The groups at the same place in other modules of the class, if the place has broken the model before."""
        kind = type(self.modules[path])
        places = {(kind, place) for leaf, place in _places(graph, path) if leaf is culprit.axis}
        if places & self.frozen_at:
            paths = [p for p, module in self.modules.items() if type(module) is kind]
            there = {leaf for p in paths for leaf, place in _places(graph, p) if (kind, place) in places}
            yield from (group for group in groups if group.axis in there and group is not culprit)
        self.frozen_at |= places


_NOISE = {"native_dropout", "bernoulli", "empty", "empty_like", "new_empty", "mul", "div"}


def _only_noise(module: nn.Module, run: Sequence[Made], kept: Kept) -> bool:
    """Whether a module is some dropout: it holds nothing, and multiplies by random numbers when training.

    Numbers for each of the units may be as many as its code says; torch's own makes as many as there are.
    """
    held = chain(module.children(), module.parameters(), module.buffers())
    if next(held, None) is not None or not all(made.op.rstrip("_") in _NOISE for made in run):
        return False
    made = (axis for one in run if one.op in ("empty", "new_empty") for axis in one.touched)
    return isinstance(module, _DropoutNd) or not any(leaf in kept for axis in made for leaf in leaves(axis))


def _running(module: nn.Module, error: BaseException) -> tuple[str, ...]:
    """The paths of the modules whose methods were running when ``error`` was raised, the innermost first."""
    paths = {id(child): path for path, child in module.named_modules()}
    found, frames = [], error.__traceback__
    while frames is not None:
        found.append(paths.get(id(frames.tb_frame.f_locals.get("self"))))
        frames = frames.tb_next
    return tuple(dict.fromkeys([*(path for path in reversed(found) if path is not None), ""]))


def _places(graph: Graph, path: str) -> Iterator[tuple[Axis, Place]]:
    """The leaves that pass through a module's own code, and where: which op, which of its dimensions, which part."""
    for i, made in enumerate(graph.made_by(path)):
        for j, axis in enumerate(made.touched):
            for k, leaf in enumerate(leaves(axis)):
                yield leaf, (i, j, k)
