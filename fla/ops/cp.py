"""Where other programs look for what makes sequences that are cut over several processes; it is not there yet."""

from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor


@dataclass
class FLACPContext:
    """Which part of the packed sequences a process has. Ops take None in its place, and nothing else yet."""

    group: Any = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    is_last_rank: bool | None = None
    pre_num_ranks: int | None = None
    is_first_rank: bool | None = None
    post_num_ranks: int | None = None
    conv1d_kernel_size: int | None = None
    pre_num_conv_tokens: int | None = None

    @property
    def num_seqs(self) -> int:
        """Number of sequences of which this process has a part."""
        return 0 if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def is_cp_enabled(self) -> bool:
        return self.group is not None


def build_cp_context(
    cu_seqlens: Tensor,
    group: Any,
    conv1d_kernel_size: int | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    use_tf32x3_affine_chain: bool = True,
    layout: str = "contiguous",
) -> NoReturn:
    """Raises NotImplementedError: sequences cut over several processes are not computed yet."""
    raise NotImplementedError("build_cp_context: sequences cut over several processes are not computed yet")
