"""Two processes with unequal shards hold exactly the integers of one process."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cl_plugins import metrics as M
from tests._helpers import leave_processes

CORRECT = [[90, 20, 30], [70, 85, 25], [55, 65, 95]]


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _samples():
    """One line a sample: row, column, whether it was right."""
    return [(i, j, int(n < CORRECT[i][j])) for i in range(3) for j in range(3) for n in range(100)]


def _write(metrics, samples):
    for row, column, right in samples:
        metrics.update(row, column, right, 1)


def _worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    samples = _samples()
    mine = samples[:677] if rank == 0 else samples[677:]
    collection = M.standard_metrics(3)
    growing = M.AccuracyMatrix()
    _write(collection, mine)
    _write(growing, mine)
    if rank:
        growing.update(20, 17, 3, 4)  # this process alone has grown
    before = int(growing.total.sum())
    matrix = growing.compute()
    assert int(growing.total.sum()) == before  # back to its own counts
    metric = M.AccuracyMatrix(3)
    _write(metric, mine)
    metric.sync()
    counts = metric.correct.clone(), metric.total.clone()
    metric.unsync()
    torch.save({"values": dict(collection.compute()), "matrix": matrix, "counts": counts}, f"{folder}/{rank}.pt")
    leave_processes()


@pytest.mark.ddp
def test_two_processes_equal_one(tmp_path):
    mp.spawn(_worker, args=(_free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone, state = M.standard_metrics(3), M.AccuracyMatrix(3)
    _write(alone, _samples())
    _write(state, _samples())
    for result in (first, second):
        torch.testing.assert_close(result["values"], dict(alone.compute()), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(result["counts"][0], state.correct)
        assert torch.equal(result["counts"][1], state.total)
        assert result["matrix"].shape == (21, 18)
        assert result["matrix"][20, 17] == 0.75
        torch.testing.assert_close(result["matrix"][:3, :3], state.compute(), rtol=0, atol=0)
