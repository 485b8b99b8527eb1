"""What is alive while a loss is computed."""

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Watches the tensors of at least `numel` numbers that operations return; a view is the tensor that it looks at.

    `most` and `most_bytes`: so many of them, and so many bytes, were alive at one time at most. `largest`: the numbers
    in the largest of them.
    """

    def __init__(self, numel: int = 0):
        super().__init__()
        self.numel, self.most, self.most_bytes, self.largest = numel, 0, 0, 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.alive = {key: found for key, found in self.alive.items() if not found[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.numel:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, tensor.numel())
        self.most = max(self.most, len(self.alive))
        self.most_bytes = max(self.most_bytes, sum(size for _, size in self.alive.values()))
        return out
