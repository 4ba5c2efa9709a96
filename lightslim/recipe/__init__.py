"""Recipes: from YAML text, read strictly, to strategies, models, data and Trainer arguments.

From the bottom up: ``sources`` (includes and overrides of what ``lightslim.yamlfile`` has read), ``hints`` and
``arguments`` (values against type hints), ``blueprint`` and ``drafts`` (sections to objects), ``schedule`` (what runs
when), ``recipe`` (the whole).
"""

from lightslim.recipe.recipe import Recipe

__all__ = ["Recipe"]
