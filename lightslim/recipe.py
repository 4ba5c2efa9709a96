"""A recipe: one YAML file that says which strategies compress which model, and when.

Sections ``pruners``, ``distillers`` and ``strategies`` hold named instances, ``{class: Name, argument: value ...}``;
``model``, ``teacher`` and ``data`` hold one each, by ``class: pkg.mod:Name``; ``trainer`` holds arguments of Lightning's
Trainer; ``compressor`` (or, as of old, ``compress_pass``) says what runs. Everything in it is checked when it is read.
"""

_KINDS = {"pruners": "pruner", "distillers": "distiller", "strategies": "strategy"}
_OBJECTS = ("model", "teacher", "data")
_COMPRESSORS = ("compressor", "compress_pass")
_SECTIONS = (*_KINDS, *_OBJECTS, "trainer", *_COMPRESSORS)
