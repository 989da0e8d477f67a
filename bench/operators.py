"""Number of operators that PyTorch dispatches; on a GPU, about the number of kernels that the host launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# They only describe existing memory and launch nothing.
_VIEWS = frozenset(
    {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split", "split_with_sizes"}
    | {"unsqueeze", "squeeze", "unbind", "detach", "alias", "as_strided", "_reshape_alias"}
)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += function._schema.name.partition("::")[2] not in _VIEWS
        return function(*args, **(kwargs or {}))


def count_operators(function: Callable[[], object]) -> int:
    """Return the number of operators that a function dispatches, without views."""
    function()  # the first call initializes the optimizer and caches
    with _Counter() as counter:  # type: ignore[no-untyped-call]
        function()
    return int(counter.count)
