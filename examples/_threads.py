"""How many threads a training step takes: as many as make it quicker, found by timing steps while training goes on.

PyTorch divides every operation among its threads and waits for the last of them. Where other programs use the cores,
one of the threads is always waiting for its turn, and a step of two threads may take twenty times as long as of one.
"""

import statistics
from collections.abc import Callable

import torch

TRIAL = 4  # steps with another number of threads, of which the first is not counted
GAIN = 1.05  # by how much more threads must be quicker to be kept
LOST = 1.5  # so many times the expected seconds are too many; twice that, also in a trial's first step
RECENT = 5  # steps that have to take too long before fewer threads are tried
PATIENCE = 50  # steps until more threads are tried again; twice as many after each time that it was in vain


class Threads:
    """`seen(seconds)` after every step; `count` threads are used for the next one."""

    def __init__(self, most: int, least: int = 1, use: Callable[[int], None] = torch.set_num_threads) -> None:
        self.counts = [2**i for i in range(most.bit_length()) if least <= 2**i < most] + [most]
        self.use = use
        self.at = self.best = 0  # places in `counts`: what is used now, and what was best so far
        self.pace = 0.0  # seconds a step at the best
        self.steps: list[float] = []  # at `at`, since it was chosen
        self.patience, self.waited = PATIENCE, 0
        use(self.count)

    @property
    def count(self) -> int:
        return self.counts[self.at]

    def seen(self, seconds: float) -> None:
        """Take note of a step, and choose the number of threads for the next one."""
        self.steps.append(seconds)
        if not self.pace:  # the first trial has nothing to be compared with
            if len(self.steps) == TRIAL:
                self.keep()
        elif self.at != self.best:
            self.judge()
        elif self.at and len(self.steps) >= RECENT and min(self.steps[-RECENT:]) > LOST * self.pace:
            self.pace = statistics.median(self.steps[-RECENT:])
            self.try_at(self.at - 1)
        else:
            self.waited += 1
            if self.waited >= self.patience:
                self.pace = statistics.median(self.steps[-RECENT:])
                self.try_more()

    def judge(self) -> None:
        """During a trial: keep what is tried, or go back, as soon as either is clear."""
        more, counted = self.at > self.best, self.steps[1:]
        if self.steps[-1] > (LOST if counted else 2 * LOST) * self.pace:
            self.go_back()
        elif len(self.steps) == TRIAL:
            better = self.pace / statistics.median(counted)
            if better > (GAIN if more else 1.0):
                self.patience = PATIENCE
                self.keep(further=self.at + (1 if more else -1))
            else:
                self.go_back()

    def keep(self, further: int = 1) -> None:
        """What is used now is the best so far; one further in the same direction may be better still."""
        self.best, self.pace = self.at, statistics.median(self.steps[1:])
        self.waited = 0
        self.try_at(further)

    def go_back(self) -> None:
        if self.at > self.best:
            self.patience *= 2
        self.waited = 0
        self.try_at(self.best)

    def try_more(self) -> None:
        self.waited = 0
        self.try_at(self.best + 1)

    def try_at(self, place: int) -> None:
        self.at = place if 0 <= place < len(self.counts) else self.best
        self.steps = []
        self.use(self.count)
