"""The demo's text: where it comes from, how it is split, and how far it compresses without a neural network."""

import gzip
import lzma
import math
import random
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

# folders that differ from one distribution of Python to the next
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
HELD_OUT_BYTES = 1 << 18  # of the held-out tenth that are used


class UserError(Exception):
    """An error that the user can correct. It ends the program with one line on stderr and exit code 2."""


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files at `paths` and below the folders there, sorted. Without paths, the source of the standard library."""
    if not paths:
        root = Path(sysconfig.get_path("stdlib"))
        return [f for f in sorted(root.rglob("*.py")) if not NOT_LIBRARY & set(f.relative_to(root).parts)]
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(f for f in path.rglob("*") if f.is_file() and not _hidden(f.relative_to(path))) or [path]
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_files(paths: Sequence[str]) -> list[bytes]:
    """The content of every text file. An unreadable file is an error, but one of the standard library is left out.

    A file that is no text is left out in a folder, and an error if it is named itself.
    """
    texts, named = [], set(map(Path, paths))
    for file in find_files(paths):
        try:
            text = file.read_bytes()
        except OSError as error:
            if paths:
                raise UserError(f"cannot read --text {file}: {error.strerror}") from None
            continue
        if b"\0" not in text[:4096]:  # pictures and programs have zero bytes
            texts.append(text)
        elif file in named:
            raise UserError(f"--text {file} is no text: it holds zero bytes, as pictures, programs and UTF-16 do")
    if not any(texts):
        raise UserError(f"--text {' '.join(paths)}: there is no text in it, only empty files and files with zero bytes")
    return texts


def split(texts: list[bytes], seq_len: int) -> tuple[bytes, bytes]:
    """Training text and held-out text. Held out is every tenth file or, of fewer than ten files, the last tenth."""
    if len(texts) >= 10:
        train, held_out = [t for i, t in enumerate(texts) if i % 10 != 9], texts[9::10]
        random.Random(0).shuffle(held_out)  # only the beginning is used, and should be a fair sample
    else:
        whole = b"".join(texts)
        train, held_out = [whole[: len(whole) * 9 // 10]], [whole[len(whole) * 9 // 10 :]]
    training, validation = b"".join(train), b"".join(held_out)[:HELD_OUT_BYTES]
    if len(training) < seq_len or len(validation) <= seq_len:
        raise UserError(
            f"--text has {len(training):,} bytes to train on and {len(validation):,} held out (every tenth file, or "
            f"the last tenth of fewer than ten): too few for --seq-len {seq_len}. Give more text or a smaller --seq-len"
        )
    return training, validation[: (len(validation) - 1) // seq_len * seq_len + 1]


def baselines(training: bytes, held_out: bytes) -> dict[str, float]:
    """Name -> bits per byte of a method without a neural network, on the held-out text."""
    counts = Counter(training)
    total = len(training) + 256  # add-one smoothing: a byte that was never seen must be possible
    frequencies = -sum(math.log2((counts[byte] + 1) / total) for byte in held_out)
    sizes = {
        "gzip -9": len(gzip.compress(held_out, 9)),
        "xz -9e": len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)),
    }
    compressors = {name: 8 * size / len(held_out) for name, size in sizes.items()}
    return {"uniform guess": 8.0, "byte frequencies": frequencies / len(held_out), **compressors}
