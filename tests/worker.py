"""One process of a torchrun job: `torchrun --nproc-per-node 2 tests/worker.py WORLD CONFIG OUTPUT [KILL]`.

Trains, then checks from inside that every process holds equal banks and weights. With KILL, process 1 ends
itself in the second epoch.
"""

import json
import os
import signal
import sys

import torch
from torch import distributed as dist

from ecul import Config, open_dataset, training
from ecul.common import distributed
from ecul.stages import Contrast


def main(world, config, output, kill=""):
    torch.set_num_threads(1)
    banks, train_batches = [], training.train_batches

    def watched(forward, optimizer, terms, *rest):
        if kill and dist.get_rank() == 1 and banks:
            os.kill(os.getpid(), signal.SIGKILL)
        result = train_batches(forward, optimizer, terms, *rest)
        held = [t.memory.features.flatten() for t in terms if isinstance(t, Contrast)]
        banks.append(torch.cat(held))
        return result

    training.train_batches = watched
    run = training.train(
        open_dataset("sysu", world), Config.from_dict(json.loads(config)), output=output, device="cpu"
    )
    for held in [*banks, torch.cat([p.flatten() for p in run.model.parameters()])]:
        others = [torch.empty_like(held) for _ in range(dist.get_world_size())]
        dist.all_gather(others, held.detach())
        assert all(torch.equal(held, other) for other in others)
    if dist.get_rank() == 0:
        print(f"equal banks in {len(banks)} epochs")
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
