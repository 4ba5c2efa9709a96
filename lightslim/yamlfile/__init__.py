"""YAML, read strictly to plain values, each with its file and line: ``places``, ``nodes``, ``document``."""

from lightslim.yamlfile.document import Document, parse, read
from lightslim.yamlfile.nodes import dump
from lightslim.yamlfile.places import Keys, Place, Places, Where

__all__ = ["Document", "Keys", "Place", "Places", "Where", "dump", "parse", "read"]
