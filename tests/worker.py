"""One process of a torchrun job: `torchrun --nproc-per-node 2 tests/worker.py WORLD CONFIG OUTPUT [KILL]`.

Trains until on_epoch of process 0 ends the run, then checks from inside that every process takes its turn in
each clustering, and that all hold equal labels, banks and weights. With KILL, process 1 ends itself in the
second epoch.
"""

import json
import os
import signal
import sys

import torch
from torch import distributed as dist

from ecul import Config, clustering, open_dataset, training
from ecul.common import distributed
from ecul.stages import Contrast


def main(world, config, output, kill=""):
    torch.set_num_threads(1)
    banks, train_batches = [], training.train_batches
    tables, assign_labels = [], training.assign_labels
    turns, jaccard_pairs, seen = [], clustering.jaccard_pairs, []

    def counted(*arguments):
        turns.append(arguments[-2:])
        return jaccard_pairs(*arguments)

    def labelled(*arguments):
        found = assign_labels(*arguments)
        match = torch.empty(0) if found.match is None else torch.from_numpy(found.match)
        parts = [found.own, found.joint, found.selected, match, arguments[0], exchanged := arguments[4]]
        seen.append(exchanged)
        tables.append(torch.cat([part.flatten().double() for part in parts if part is not None]))
        return found

    def watched(forward, optimizer, terms, *rest):
        if kill and dist.get_rank() == 1 and banks:
            os.kill(os.getpid(), signal.SIGKILL)
        result = train_batches(forward, optimizer, terms, *rest)
        held = [t.memory.features.flatten() for t in terms if isinstance(t, Contrast)]
        banks.append(torch.cat(held))
        return result

    training.train_batches, training.assign_labels = watched, labelled
    clustering.jaccard_pairs = counted

    def stop(row):
        if row["epoch"] == 1:
            raise StopIteration

    config = Config.from_dict(json.loads(config))
    run = training.train(open_dataset("sysu", world), config, output=output, device="cpu", on_epoch=stop)
    assert distributed.broadcast(torch.full((2,), dist.get_rank())).tolist() == [0, 0]
    assert [views is None for views in seen] == [True, False]  # stage 2 matches by the exchanged views too
    assert turns == [(dist.get_rank(), dist.get_world_size())] * 5  # each modality twice, and both once
    for held in [*tables, *banks, torch.cat([p.flatten() for p in run.model.parameters()])]:
        others = [torch.empty_like(held) for _ in range(dist.get_world_size())]
        dist.all_gather(others, held.detach())
        assert all(torch.equal(held, other) for other in others)
    if dist.get_rank() == 0:
        print(f"equal banks in {len(banks)} epochs")
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
