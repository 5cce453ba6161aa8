"""One process of a torchrun job: `torchrun --nproc-per-node 2 tests/together.py WORLDS LABELS [KILL]`.

Clusters the features of each world together with the other processes; each checks that all have the same
labels, the first saves them. With KILL, the last process ends itself before the others have its share.
"""

import os
import signal
import sys

import numpy as np
import torch
from torch import distributed as dist

from ecul import clustering
from ecul.common import distributed


def main(worlds, labels, kill=""):
    torch.set_num_threads(1)
    distributed.start("cpu")
    if kill and distributed.rank() == distributed.size() - 1:
        clustering.jaccard_pairs = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    arrays = [torch.from_numpy(array) for array in np.load(worlds).values()]
    together = []
    for world in zip(*[iter(arrays)] * 3, strict=True):  # features, cameras, modalities
        found = clustering.emcc(*world, k1=12, k2=3, k3=9, together=True)
        others = [torch.empty_like(found) for _ in range(distributed.size())]
        dist.all_gather(others, found)
        assert all(torch.equal(found, other) for other in others)
        together.append(found.numpy())
    if distributed.rank() == 0:
        np.savez(labels, *together)
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
