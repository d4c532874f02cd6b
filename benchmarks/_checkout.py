"""`python benchmarks/_checkout.py FOLDER`: a process in which `benchmarks.host` times another checkout.

`fla` comes from the checkout in FOLDER and the benchmarks from this one, so the two sides of a comparison differ in the
library alone. This file must be run as a file, never with -m.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


def take(checkout: Path) -> None:
    """Import `fla` from a checkout; later imports come from this one.

    Raises RuntimeError if that checkout has no `fla`.
    """
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
