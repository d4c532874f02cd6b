"""Keeps what the peer's tuning found: the files `*.autotune.json` in Triton's cache folder, so that no run tunes twice.

Our own kernels are not tuned by timing, so all such files are the peer's.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

SUFFIX = ".autotune.json"


def triton_cache() -> Path:
    """The folder in which Triton keeps what it compiled and tuned."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def unpack(source: Path, cache: Path) -> tuple[int, int]:
    """Copy the tuning results of a folder or a tar file into `cache`. Returns how many were written and already there.

    A file that is in `cache` already stays. Raises ValueError if `source` is neither a folder nor a tar file, if it has
    no results, or if one of them would be written outside of `cache`.
    """
    written = kept = 0
    for name, data in _members(source):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"--peer-cache must hold paths inside Triton's cache folder, got {name} in {source.name}")
        target = cache / path
        if target.exists():
            kept += 1
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        written += 1
    if not written + kept:
        raise ValueError(f"--peer-cache must hold *{SUFFIX} files, got none in {source}")
    return written, kept


def save(file: Path, cache: Path) -> int:
    """Write the tuning results in `cache` as a tar.gz. Returns how many there are."""
    found = sorted(cache.glob(f"*/*{SUFFIX}"))
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz") as archive:
        for path in found:
            data = path.read_bytes()
            member = tarfile.TarInfo(path.relative_to(cache).as_posix())
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return len(found)


def _members(source: Path) -> Iterator[tuple[str, bytes]]:
    if source.is_dir():
        for path in sorted(source.rglob(f"*{SUFFIX}")):
            yield path.relative_to(source).as_posix(), path.read_bytes()
        return
    try:
        archive = tarfile.open(source)  # noqa: SIM115 - closed by the with below; an unreadable one is the user's error
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"--peer-cache must be a folder or a tar file, got {source}: {error}") from None
    with archive:
        for member in archive:
            data = archive.extractfile(member) if member.isfile() and member.name.endswith(SUFFIX) else None
            if data is not None:
                yield member.name, data.read()
