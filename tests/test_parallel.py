"""Devices, and several processes: what they share out gives what one process gives."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import losses_of

from noisout_nb import parallel
from noisout_nb.files import load_safely
from noisout_nb.parallel import get_device, has_bfloat16, memory_format

# Devices


@pytest.fixture
def machine(monkeypatch):
    """A machine with the given accelerators."""
    monkeypatch.delenv("NOISOUT_DEVICE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def having(cuda=0, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return having


def test_the_device_is_a_gpu_where_there_is_one(machine, monkeypatch):
    machine()
    assert get_device() == torch.device("cpu")
    machine(cuda=1)
    assert get_device() == torch.device("cuda", 0)
    monkeypatch.setenv("NOISOUT_DEVICE", "cpu")
    assert get_device() == torch.device("cpu")


def test_apples_gpu_is_refused_in_words_and_used_on_request(machine, monkeypatch):
    machine(mps=True)
    with pytest.warns(UserWarning, match="MPS.*float64.*NOISOUT_DEVICE=mps"):
        assert get_device() == torch.device("cpu")
    monkeypatch.setenv("NOISOUT_DEVICE", "mps")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_device() == torch.device("mps")


@pytest.mark.parametrize("name", ["cuda", "tpu", "GPU"])
def test_a_device_that_is_not_there_is_named(name, machine, monkeypatch):
    machine(mps=True)
    monkeypatch.setenv("NOISOUT_DEVICE", name)
    with pytest.raises(ValueError, match=f"NOISOUT_DEVICE is '{name}'.*mps, cpu"):
        get_device()


def test_each_process_has_a_gpu_of_its_own_and_leaves_the_group(machine, monkeypatch):
    calls, at_exit = [], []
    machine(cuda=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(parallel.atexit, "register", at_exit.append)
    device = get_device()
    assert device == torch.device("cuda", 1)
    assert calls == [device, (("nccl",), {"device_id": device})]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("left"))
    assert get_device() == device and len(at_exit) == 1
    at_exit[0]()
    assert calls[2:] == [device, "left"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 has no GPU.*--nproc-per-node=2"):
        get_device()


def test_only_devices_with_bfloat16_have_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    cpu, cuda, mps = map(torch.device, ("cpu", "cuda", "mps"))
    assert [has_bfloat16(device) for device in (cpu, cuda, mps)] == [True, False, False]
    layouts = [memory_format(cpu, True), memory_format(cpu), memory_format(cuda, True)]
    assert layouts == [torch.contiguous_format, torch.channels_last, torch.channels_last]


# Several processes

PROGRAM = """
import atexit, sys, weakref
from pathlib import Path
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from noisout_nb.parallel import gather, get_device, rank_and_world, share
folder = Path(sys.argv[1])

# registered before the group is joined, so called after it has been left
atexit.register(lambda: (folder / f"group{rank}").write_text(str(group and group())))
assert get_device() == torch.device("cpu")
rank, world = rank_and_world()
group = weakref.ref(dist.group.WORLD) if world > 1 else None

for count in range(2 * world + 2):
    for shape in ((count,), (count, 2, 3)):
        whole = torch.arange(torch.zeros(shape).numel()).reshape(shape)
        part = share(whole)
        assert len(part) == len(range(rank, count, world))
        assert torch.equal(gather(part, count), whole)

import tiny
from noisout_nb.training import held_out_loss
for batch_size, stop in ((5, 2), (1, 4)):  # uneven shares, and an empty one
    options = {"checkpoint": folder / f"run{batch_size}.pth", "batches": {"batch_size": batch_size}}
    tiny.losses_of(tiny.network(dropout=0.0), stop=stop, **options)
loss = held_out_loss(tiny.network(), tiny.PROCESS, tiny.DATA, count=10, batch_size=3)
(folder / f"held{rank}").write_text(repr(loss))
"""


def launch(folder, processes):
    folder.mkdir()
    program = folder / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    folders = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    settings = {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += [program, folder]
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:4000]
    assert "destroy_process_group" not in result.stderr, "the group was not left"
    for rank in range(processes):
        kept = (folder / f"group{rank}").read_text()
        assert kept == "None", f"{kept} is left: its threads outlive Python, which may abort"
    return folder


def test_processes_give_what_one_gives(tmp_path):
    two = launch(tmp_path / "two", 2)
    assert (two / "held0").read_text() == (two / "held1").read_text()
    expected = launch(tmp_path / "one", 1)
    ours, theirs = (float((folder / "held0").read_text()) for folder in (two, expected))
    assert ours == pytest.approx(theirs, rel=1e-6)
    for batch_size in (5, 1):
        found, one = (load_safely(f / f"run{batch_size}.pth") for f in (two, expected))
        assert found["step"] == one["step"] and found["losses"] == pytest.approx(one["losses"])
        for name, value in one["model"].items():
            torch.testing.assert_close(found["model"][name], value, rtol=1e-4, atol=1e-4)
    # one process goes on where two have stopped
    from tiny import network

    path = two / "run5.pth"
    options = {"checkpoint": path, "batches": {"batch_size": 5}}
    losses = losses_of(network(dropout=0.0), **options)
    (expected / "run5.pth").unlink()
    options["checkpoint"] = expected / "run5.pth"
    assert losses == pytest.approx(losses_of(network(dropout=0.0), **options), rel=1e-4)
