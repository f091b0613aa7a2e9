"""Benchmarks. Every module here is part of a command: libraries are imported without their notices."""

from sgg_fast.quiet import quiet_imports

quiet_imports()
