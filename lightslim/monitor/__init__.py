"""The story of a run, for loggers."""

from lightslim.monitor.callback import CompressionMonitor

__all__ = ["CompressionMonitor"]
