"""Measurements: paired, in shuffled order, each with a control of a thing against itself."""
