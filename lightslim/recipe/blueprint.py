"""A class that a recipe names: found at once, built later."""

import contextlib
import importlib
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightslim.errors import did_you_mean
from lightslim.yamlfile import Where


@dataclass(frozen=True, eq=False)
class Blueprint:
    """A class (or function), the arguments to call it with, and where the recipe says so.

    Example:
        >>> Blueprint(complex, {"real": 1, "imag": 2}, Where()).build()
        (1+2j)
    """

    target: Callable[..., Any]
    arguments: Mapping[str, Any]
    where: Where

    def __repr__(self) -> str:
        return f"a {getattr(self.target, '__name__', self.target)} object"

    def build(self, built: dict["Blueprint", Any] | None = None) -> Any:
        """Build the object, and first those among its arguments.

        Args:
            built: what exists already, by blueprint; added to, so that calls that share it share objects.

        Raises:
            CompressionError: the class refused its arguments with a ValueError or TypeError.
        """
        built = {} if built is None else built
        if self not in built:
            arguments = realize(self.arguments, built)
            try:
                built[self] = self.target(**arguments)
            except (ValueError, TypeError) as error:
                raise self._blamed(error).error(str(error) or type(error).__name__) from error
        return built[self]

    def _blamed(self, error: Exception) -> Where:
        # House style: the message begins with the argument's name.
        word = re.match(r"\w*", str(error))
        return self.where / word[0] if word and word[0] in self.arguments else self.where


def realize(value: Any, built: dict[Blueprint, Any]) -> Any:
    """The value with every blueprint in it built.

    Example:
        >>> realize({"points": [Blueprint(complex, {"real": 1}, Where())]}, {})
        {'points': [(1+0j)]}
    """
    if isinstance(value, Blueprint):
        return value.build(built)
    if isinstance(value, Mapping):
        return {key: realize(item, built) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(realize(item, built) for item in value)
    return value


def imported(name: str, where: Where) -> Callable[..., Any]:
    """What ``pkg.mod:Name`` names.

    Raises:
        CompressionError: it is written otherwise, cannot be imported, or is nothing that can be called.

    Example:
        >>> imported("fractions:Fraction.from_float", Where())(0.5)
        Fraction(1, 2)
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise where.error(f"{name!r} must be written as pkg.mod:Name")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever a user's module does when it runs
        raise where.error(f"{module_name!r} cannot be imported: {type(error).__name__}: {error}") from error
    try:
        found = operator.attrgetter(attribute)(module)
    except AttributeError:
        public = [known for known in vars(module) if not known.startswith("_")]
        raise where.error(f"{module_name} has no {attribute!r}; {did_you_mean(attribute, public)}") from None
    if not callable(found):
        raise where.error(f"{name} is no class or function")
    return found  # type: ignore[no-any-return]


@contextlib.contextmanager
def importable(*folders: Path) -> Iterator[None]:
    """Modules in these folders can be imported for a while, the first folder's before the others'."""
    added = [str(folder.resolve()) for folder in folders]
    sys.path[:0] = added
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in added:
            with contextlib.suppress(ValueError):
                sys.path.remove(folder)
