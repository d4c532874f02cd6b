"""Speed, with records: `python -m benchmarks.ops` (see its `--help`). Not part of the installed package."""
