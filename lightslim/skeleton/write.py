"""From a name and a kind to a folder that is there whole or not at all."""

import importlib.util
import re
import shutil
import tempfile
from collections.abc import Mapping
from keyword import iskeyword
from pathlib import Path
from string import Template

from lightslim.errors import CompressionError, did_you_mean
from lightslim.registry import KINDS, registry
from lightslim.skeleton.kinds import TEMPLATES
from lightslim.skeleton.package import FILES


def new_plugin(name: str, kind: str = "criterion", out: str | Path = ".") -> Path:
    """Write a package with one working component, its card and its test.

    Args:
        name: of the distribution, as ``lightslim-mine``; the component is named after what follows ``lightslim-``.
        kind: of the component.
        out: the folder to write the package's folder into.

    Returns:
        The package's folder, ``out/name``.

    Raises:
        CompressionError: a name that cannot be used or is taken, an unknown kind, a folder that exists already or
            cannot be written; nothing is left behind then.

    Example:
        >>> folder = new_plugin("lightslim-mine", "criterion", tempfile.mkdtemp())
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'pyproject.toml', 'src', 'tests']
    """
    if kind not in KINDS:
        raise CompressionError(f"{kind!r} is not a kind of component; {did_you_mean(kind, KINDS)}")
    words = _words(name, kind)
    folder = Path(out) / name
    if folder.exists():
        raise CompressionError(f"{folder} is there already: name another --out, or remove it")
    texts = {_filled(path, words): _filled(text, words) for path, text in FILES.items()}
    _write(folder, texts)
    return folder


def _words(name: str, kind: str) -> dict[str, str]:
    """What the templates' places are filled with."""
    module = name.replace("-", "_")
    plain = module.removeprefix("lightslim_")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or iskeyword(plain) or plain == "lightslim":
        raise CompressionError(
            f"{name!r} cannot name a plugin: small letters, digits and single hyphens; did you mean {_nearest(name)!r}?"
        )
    if importlib.util.find_spec(module) is not None:
        raise CompressionError(
            f"there is a module {module!r} already; did you mean 'lightslim-my-{plain.replace('_', '-')}'?"
        )
    template = TEMPLATES[kind]
    component = plain if template.function else "".join(map(str.capitalize, plain.split("_"))) + template.suffix
    if component in registry().names(kind):
        raise CompressionError(
            f"there is a {kind} {component!r} already; did you mean 'lightslim-my-{plain.replace('_', '-')}'?"
        )
    words = {"name": name, "module": module, "component": component, "kind": kind}
    return words | {part: _filled(text, words) for part, text in template.parts().items()}


def _nearest(name: str) -> str:
    """The name that can be used and is most like ``name``."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").removeprefix("lightslim").strip("-")
    return f"lightslim-{plain if plain and not iskeyword(plain) else 'my-' + (plain or 'plugin')}"


def _filled(text: str, words: Mapping[str, str]) -> str:
    return Template(text).substitute(words)


def _write(folder: Path, texts: Mapping[str, str]) -> None:
    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        partial.chmod(0o755)  # mkdtemp's are private
        for path, text in texts.items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_text(text, encoding="utf-8")
        partial.rename(folder)
    except OSError as error:
        raise CompressionError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
