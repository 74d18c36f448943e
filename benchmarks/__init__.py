"""The benchmark harness: ``python -m benchmarks --help``; ``docs/benchmarks.md`` explains it."""

import os

# Read when torch is first imported: its profiler, asked for peak memory, would announce itself.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
