"""A recorder of the operators that make the host wait for the device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Records each operator that hands a value, or a size that depends on values, back to Python.

    On a CPU nothing waits and a copy to the host is no copy, so this sees what shows in operators;
    tests that have a GPU add torch.cuda.set_sync_debug_mode("error"), which sees everything.
    """

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name.startswith(self.WAITS) or by_mask:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))
