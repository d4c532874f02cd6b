"""Programs that measure speed and record it, `python -m benchmarks.ops` first. Not part of the installed package."""
