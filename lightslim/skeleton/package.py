"""The files of a new plugin, by path, with places for what depends on its kind."""

FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "$name"
version = "0.1.0"
description = "A $kind for lightslim"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["lightslim"]

[project.entry-points.lightslim]
$module = "$module"

[tool.hatch.build.targets.wheel]
packages = ["src/$module"]
""",
    "README.md": """\
# $name

$summary

```bash
pip install -e .
lightslim plugins          # lists $component
pytest
```

## The math

What it computes, in a formula.

## Three ways to call it

$usage

In a recipe:

```yaml
$recipe
```

## What to expect

What you measured.

## Suggested settings

## When not to use it

## Sources

The papers it comes from.
""",
    "src/$module/__init__.py": '''\
"""$summary"""

$code


@hookimpl
def lightslim_register(registry: Registry) -> None:
    """Add the $kind."""
    registry.add("$kind", $component)
''',
    "tests/test_$module.py": '''\
"""What every $kind must do."""

$test


def test_it_is_found_once_installed():
    assert registry().get("$kind", "$component") is $component
''',
}
