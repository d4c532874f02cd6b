"""Two tasks that show what the state of a linear-attention model can do, with data made on the spot.

Recall (multi-query associative recall, https://arxiv.org/abs/2312.04927): pairs of a key and a value, then some of the
keys again among filler. After each of these the model must say the key's value. The state must hold all pairs.

Parity (https://arxiv.org/abs/2411.12537): a row of bits. After every bit, or after the last one, the model must say
whether the number of ones is odd. The state must change its sign, for which the matrix that multiplies it needs a
negative eigenvalue.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # the label where nothing is asked
FILLER = 0


@dataclass(frozen=True)
class Recall:
    """`tokens` per sequence, in which `pairs` keys are written and asked for. Keys and values have a half of the
    vocabulary each, of which 0 is the filler."""

    tokens: int = 64
    pairs: int = 8
    vocab_size: int = 256
    every: bool = True
    guess: float = 0.0  # accuracy of a guess, which a scaled accuracy of 0 stands for
    enough: float = 0.99  # accuracy at which training ends

    def __post_init__(self) -> None:
        if self.pairs < 1 or 3 * self.pairs > self.tokens:
            raise ValueError(f"--pairs must be 1 to {self.tokens // 3} (of {self.tokens} tokens), got {self.pairs}")
        if self.pairs >= self.vocab_size // 2:
            raise ValueError(f"--pairs must be less than half the vocabulary of {self.vocab_size}, got {self.pairs}")

    def batch(self, size: int, generator: torch.Generator, test: bool = False) -> tuple[Tensor, Tensor]:
        """Tokens and labels, `[size, tokens]`; the label at a position is the answer after reading it."""
        device, half, P = generator.device, self.vocab_size // 2, self.pairs

        def choices(low: int, high: int, count: int) -> Tensor:
            order = torch.rand(size, high - low, generator=generator, device=device).argsort(1)
            return low + order[:, :count]

        keys, values = choices(1, half, P), choices(half, self.vocab_size, P)
        ids = torch.full((size, self.tokens), FILLER, device=device)
        labels = torch.full_like(ids, IGNORED)
        ids[:, 0 : 2 * P : 2], ids[:, 1 : 2 * P : 2] = keys, values
        places = choices(2 * P, self.tokens, P)
        ids.scatter_(1, places, keys)
        labels.scatter_(1, places, values)
        return ids, labels


@dataclass(frozen=True)
class Parity:
    """Training lengths from `shortest` to `longest`, test lengths from `longest` to `tested`.

    `every`: the parity is asked for after every bit, otherwise after the last one, as in the paper.
    """

    shortest: int = 3
    longest: int = 20
    tested: int = 40
    every: bool = True
    vocab_size: int = 4  # filler, a bit of 0, a bit of 1, and one that is never used
    guess: float = 0.5
    enough: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest < self.tested:
            raise ValueError(
                "lengths must have 1 <= shortest <= longest < tested, got "
                f"{self.shortest}, {self.longest}, {self.tested}"
            )

    def batch(self, size: int, generator: torch.Generator, test: bool = False) -> tuple[Tensor, Tensor]:
        """Bits and labels, `[size, longest or tested]`; labels are 1 + the parity of all bits up to there.

        For training, the labels of a row end at its length. For a test, they begin after the longest training length.
        """
        device, tokens = generator.device, self.tested if test else self.longest
        bits = torch.randint(2, (size, tokens), generator=generator, device=device)
        parity = 1 + bits.cumsum(1) % 2
        low, high = (self.longest + 1, self.tested) if test else (self.shortest, self.longest)
        length = torch.randint(low, high + 1, (size, 1), generator=generator, device=device)
        place = 1 + torch.arange(tokens, device=device)
        if not self.every:
            asked = place == length
        elif test:
            asked = (place > self.longest).expand(size, -1)
        else:
            asked = place <= length
        return 1 + bits, torch.where(asked, parity, IGNORED)
