"""`python benchmarks/_checkout.py FOLDER`: answers `benchmarks.host` with the library of the checkout in FOLDER.

The benchmarks stay this checkout's: what is timed in turn differs in the library alone. Run as a file, never with -m.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


def take(checkout: Path) -> None:
    """Import `fla` from a checkout, and everything else as from this one. Raises RuntimeError where it has none."""
    sys.path[0] = str(checkout)
    import fla

    if checkout not in Path(fla.__file__ or "").resolve().parents:
        raise RuntimeError(f"`fla` was imported from {fla.__file__}, not from {checkout}")
    sys.path[0] = str(HERE)


if __name__ == "__main__":
    take(Path(sys.argv[1]).resolve())
    from benchmarks._host_side import HANDLERS
    from benchmarks._worker import serve

    serve(HANDLERS)
