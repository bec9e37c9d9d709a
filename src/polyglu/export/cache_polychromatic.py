"""What a cache of PolychromaticLM keeps beside keys and values: running sums, of which a routing mean is made.

They are sums of the routing input, R wide, and of the positions that count, in one tensor; padding adds nothing.
Shapes: B rows, T new positions, P positions so far.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer


class RoutedCacheLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer, and the routing's running sums at each position: fp32 ``[B, P, R + 1]``."""

    totals: Tensor | None = None

    def add(self, counted: Tensor) -> Tensor:
        """Append positions ``[B, T, R + 1]``; their running sums, ``[B, T, R + 1]``."""
        new = counted.cumsum(1)
        if self.totals is None:
            self.totals = new
        else:
            new = new + self.totals[:, -1:]
            self.totals = torch.cat((self.totals, new), dim=1)
        return new

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.totals = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; their number is given as a negative one."""
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.totals is not None:
            self.totals = self.totals[:, :tokens_to_remove] if self.get_seq_length() else None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take each row from another one."""
        super().reorder_cache(beam_idx)
        if self.totals is not None:
            self.totals = self.totals.index_select(0, beam_idx.to(self.totals.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        if self.totals is not None:
            self.totals = self.totals.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        if self.totals is not None:
            self.totals = self.totals[indices]


class RoutedStaticLayer(StaticLayer):  # type: ignore[misc]
    """The same in tensors that stay where they are, as compiled steps need; of the sums the last: ``[B, 1, R + 1]``."""

    total: Tensor | None = None

    def add(self, counted: Tensor) -> Tensor:
        """Add positions ``[B, T, R + 1]``; their running sums, ``[B, T, R + 1]``."""
        if self.total is None:
            self.total = torch.zeros_like(counted[:, :1])
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.total)
        new = counted.cumsum(1) + self.total
        self.total.copy_(new[:, -1:])
        return new

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        if self.total is not None:
            self.total.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take each row from another one."""
        super().reorder_cache(beam_idx)
        if self.total is not None:
            self.total = self.total.index_select(0, beam_idx.to(self.total.device))


def with_routing(cache: Cache, n_layers: int) -> Cache:
    """Let an empty dynamic or static cache keep routing sums as well; changed in place.

    Raises:
        ValueError: another kind of cache, or one that was filled without them.
    """
    cache.layers.extend(cache.layer_class_to_replicate() for _ in range(len(cache.layers), n_layers))
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, RoutedCacheLayer | RoutedStaticLayer):
            continue
        if type(layer) not in (DynamicLayer, StaticLayer):
            raise ValueError(
                f"{type(layer).__name__} keeps no routing sums; this model needs a dynamic or static cache"
            )
        if layer.get_seq_length():
            raise ValueError("past_key_values holds positions without routing sums; begin with an empty cache")
        static = isinstance(layer, StaticLayer)
        cache.layers[index] = RoutedStaticLayer(layer.max_cache_len) if static else RoutedCacheLayer()
    return cache
