"""One recipe from several sources: the files it includes, and settings given on the command line."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from lightslim.errors import CompressionError, did_you_mean
from lightslim.recipe.hints import fit
from lightslim.yamlfile import Document, Place, Where, parse, read


def gather(path: str | PathLike[str], sections: Sequence[str], overrides: Sequence[str] = ()) -> Document:
    """Read a recipe, merge what it includes section by section, and apply overrides.

    Args:
        path: the recipe.
        sections: the top-level keys it may have beside ``version`` and ``include``.
        overrides: ``key.path=value`` each, see :func:`override`.

    Raises:
        CompressionError: a source is malformed, a file includes itself, or two sources give the same thing.
    """
    document, files = Document({}, {(): Place(str(path))}), dict[Path, Document]()
    _collect(Path(path), ("version", "include", *sections), files)
    for file in files.values():
        _merge(document, file)
    for assignment in overrides:
        override(document, assignment)
    _check_sections(document, ("version", *sections))
    return document


def _collect(
    path: Path,
    sections: Sequence[str],
    files: dict[Path, Document],
    chain: Sequence[Path] = (),
    asked: Where | None = None,
) -> None:
    file, here = read(path, sections, asked), path.resolve()
    if asked and here in chain:
        raise asked.error(f"{' -> '.join(step.name for step in [*chain, here])} goes round in a circle")
    if here in files:
        return
    files[here] = file
    _check_sections(file, sections)
    names, where = file.tree.get("include"), file.where("include")
    for name in fit([names] if isinstance(names, str) else names, list[str] | None, where) or []:
        _collect(path.parent / name, sections, files, [*chain, here], where)


def _check_sections(document: Document, sections: Sequence[str]) -> None:
    if not isinstance(document.tree, dict):
        raise document.where().error(f"must be a mapping of sections: {', '.join(sections)}")
    for section in document.tree:
        if section not in sections:
            raise document.where(section).error(f"there is no such section; {did_you_mean(str(section), sections)}")
    if document.tree.get("version", 1) not in (1, "1.0"):
        raise document.where("version").error(f"must be 1.0, not {document.tree['version']!r}")


def _merge(document: Document, file: Document) -> None:
    for section, content in file.tree.items():
        if section == "include" or content is None or (section == "version" and section in document.tree):
            continue
        if section not in document.tree:
            document.tree[section] = content
        else:
            _merge_section(document, file, section)
    document.places.update({keys: place for keys, place in file.places.items() if keys not in document.places})


def _merge_section(document: Document, file: Document, section: str) -> None:
    present, content = document.tree[section], file.tree[section]
    if not isinstance(present, dict) or not isinstance(content, dict):
        raise file.where(section).error(f"is given twice, first at {document.places[section,]}")
    for name, value in content.items():
        if name in present:
            raise file.where(section, name).error(f"is given twice, first at {document.places[section, name]}")
        present[name] = value


def override(document: Document, assignment: str, option: str = "--set") -> None:
    """Set one value of a document, in place.

    Args:
        document: the recipe.
        assignment: ``key.path=value``. The path is split at dots and all of it but the last key must exist; items of a
            list go by number. The value is YAML. To set a key that itself holds a dot, set the mapping around it.
        option: of the command line, which errors name.

    Raises:
        CompressionError: it is written otherwise, or the path leads nowhere.

    Example:
        >>> document = parse("compressor: {epoch: 100, strategies: [halve]}", "recipe.yaml")
        >>> override(document, "compressor.epoch=3")
        >>> document.tree, str(document.where("compressor", "epoch"))
        ({'compressor': {'epoch': 3, 'strategies': ['halve']}}, '--set compressor.epoch: compressor.epoch')
    """
    path, equals, text = assignment.partition("=")
    steps, source = path.strip().split("."), f"{option} {path.strip()}"
    if not equals or not all(steps):
        raise CompressionError(f"{option} {assignment}: must be written as key.path=value")
    value = parse(text, source, numbered=False)
    target, where = document.tree, Where((), {(): Place(source)})
    for step in steps[:-1]:
        key = _key(target, step, where)
        target, where = target[key], where / key
    key = _key(target, steps[-1], where, new=isinstance(target, dict))
    target[key] = value.tree
    _replace_places(document, (where / key).keys, value)


def settings_of(assignments: Sequence[str], option: str) -> dict[str, Any]:
    """Settings given one by one on the command line.

    Raises:
        CompressionError: one is not written as ``name=value``.

    Example:
        >>> settings_of(["opset=20", "deploy=x86"], "--option")
        {'opset': 20, 'deploy': 'x86'}
    """
    document = parse("{}", option)
    for assignment in assignments:
        override(document, assignment, option)
    return dict(document.tree)


def _key(container: Any, step: str, where: Where, new: bool = False) -> str | int:
    if not isinstance(container, dict | list):
        raise where.error("is a single value: there is nothing in it to set")
    choices = {str(key): key for key in (container if isinstance(container, dict) else range(len(container)))}
    if step not in choices and not new:
        raise where.error(f"there is no {step!r}; {did_you_mean(step, choices)}")
    return choices.get(step, step)


def _replace_places(document: Document, keys: tuple[str | int, ...], value: Document) -> None:
    for old in [old for old in document.places if old[: len(keys)] == keys]:
        del document.places[old]
    document.places.update({keys + below: place for below, place in value.places.items()})
