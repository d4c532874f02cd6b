"""What all families with log decays, in natural logarithms, agree on."""

DEAD_LOG_DECAY = -16.0  # in nats: what such a decay leaves is smaller than float32's rounding error; its gradient is 0
MIN_LOG_DECAY = -1000.0  # gates are clamped to it: exp(-1000) is 0 in every dtype, and running sums stay finite
