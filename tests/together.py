"""One process of a torchrun job: `torchrun --nproc-per-node 2 tests/together.py FEATURES LABELS [KILL]`.

Clusters the features together with the other processes; each checks that all have the same labels, the first
saves them. With KILL, the last process ends itself before the others have its share.
"""

import os
import signal
import sys

import numpy as np
import torch
from torch import distributed as dist

from ecul import clustering
from ecul.common import distributed


def main(features, labels, kill=""):
    torch.set_num_threads(1)
    distributed.start("cpu")
    if kill and distributed.rank() == distributed.size() - 1:
        clustering.encode = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    given = np.load(features)
    arrays = (torch.from_numpy(given[name]) for name in ("features", "cameras", "modalities"))
    found = clustering.emcc(*arrays, k1=12, k2=3, k3=9, together=True)
    others = [torch.empty_like(found) for _ in range(distributed.size())]
    dist.all_gather(others, found)
    assert all(torch.equal(found, other) for other in others)
    if distributed.rank() == 0:
        np.save(labels, found.numpy())
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
