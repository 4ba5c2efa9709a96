"""Where things stand in a recipe, so that an error can say it."""

from dataclasses import dataclass, field

from lightslim.errors import CompressionError

Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """A file (or an option of the command line) and, if it has lines, the line.

    Example:
        >>> print(Place("recipe.yaml", 7))
        recipe.yaml:7
    """

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


Places = dict[Keys, Place]


@dataclass(frozen=True)
class Where:
    """A key path in a document; knows the place to name when something is wrong there.

    Example:
        >>> where = Where(("strategies",), {("strategies",): Place("recipe.yaml", 7)})
        >>> print(where / "halve" / "target_ratio")
        recipe.yaml:7: strategies.halve.target_ratio
    """

    keys: Keys = ()
    places: Places = field(default_factory=dict, repr=False)

    def __truediv__(self, key: str | int) -> "Where":
        return Where((*self.keys, key), self.places)

    def __str__(self) -> str:
        return ": ".join(filter(None, [str(self.place or ""), ".".join(map(str, self.keys))]))

    @property
    def place(self) -> Place | None:
        """The place of the value, or of the nearest thing around it that has one."""
        ancestors = (self.keys[:length] for length in range(len(self.keys), -1, -1))
        return next((self.places[keys] for keys in ancestors if keys in self.places), None)

    def error(self, message: str) -> CompressionError:
        """An error that begins with the place and the key path.

        Example:
            >>> Where(("epoch",)).error("must be a whole number")
            CompressionError('epoch: must be a whole number')
        """
        return CompressionError(": ".join(filter(None, [str(self), message])))
