"""A recorder of the operators that make the host wait for the device."""

from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Records every operator that hands a tensor's value or size-by-value back to Python."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        if name.startswith(self.WAITS):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))
