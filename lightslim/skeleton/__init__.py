"""A new plugin package, ready to be installed: what ``lightslim plugins new`` writes."""

from lightslim.skeleton.write import new_plugin

__all__ = ["new_plugin"]
