"""From a module of integers to an ExecuTorch program for XNNPACK; needs the extra ``mobile``."""
