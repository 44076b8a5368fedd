import itertools
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch
import webdataset

from dist_kd.contracts import World
from dist_kd.data.loader import _TrainRequests
from dist_kd.data.survey import build_index
from dist_kd.data.views import TrainView
from dist_kd.errors import DataError

# conftest.py has the loaders' fixtures


def workers_of(loader):
    return [worker.pid for worker in loader._feed._iterator._workers]


def gone(pids):
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not any(os.path.exists(f"/proc/{pid}") for pid in pids):
            return True
        time.sleep(0.02)
    return False


def test_a_killed_worker_is_a_data_error(index, train):
    loader = train(index, workers=2)
    batches = loader.batches(0)
    next(batches)
    pids = workers_of(loader)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"loader process died \(.+\).*--workers"):
        os.kill(pids[0], signal.SIGKILL)
        for _ in batches:
            pass
    assert time.monotonic() - start < 10
    loader.close()
    assert gone(pids)
    assert len(list(itertools.islice(loader.batches(0), 3))) == 3  # the loader can be used again


def test_a_worker_killed_while_the_main_process_computes(index, train):
    loader = train(index, workers=2)
    batches = loader.batches(0)
    next(batches)
    with pytest.raises(DataError, match=r"loader process died"):
        os.kill(workers_of(loader)[1], signal.SIGKILL)
        time.sleep(5)
    loader.close()


@pytest.mark.parametrize("which", ["train", "evaluate"])
def test_a_death_that_somebody_else_took_for_theirs(index, train, evaluate, which):
    """It is raised wherever the main process is: a tracker, or a destructor, may let no exception out."""
    loader = train(index, workers=2, timeout_s=60.0) if which == "train" else evaluate(index, workers=2, timeout_s=60.0)
    begin = (lambda: loader.batches(0)) if which == "train" else loader.batches
    batches = begin()
    seen = [next(batches)] if which == "train" else list(batches)
    assert seen
    try:
        os.kill(workers_of(loader)[1], signal.SIGKILL)
        time.sleep(5)
    except Exception as error:
        assert "loader process died" in str(error)
    else:
        pytest.fail("nothing was raised")
    start = time.monotonic()
    with pytest.raises(DataError, match="loader process died"):
        list(itertools.islice(batches if which == "train" else begin(), 50))
    assert time.monotonic() - start < 20
    loader.close()
    assert next(iter(begin())) is not None  # the loader can be used again


def test_a_killed_worker_seen_from_another_thread(index, train):
    """Signals reach the main thread only; elsewhere the time limit finds the death."""
    loader, found = train(index, workers=1, timeout_s=1.0), []

    def run():
        batches = loader.batches(0)
        next(batches)
        os.kill(workers_of(loader)[0], signal.SIGKILL)
        try:
            list(itertools.islice(batches, 50))
        except DataError as error:
            found.append(str(error))
        loader.close()

    old = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(20)
    finally:
        signal.signal(signal.SIGCHLD, old)
    assert len(found) == 1 and "loader process died" in found[0]


class Stuck:
    """Its workers read one sample and stop there."""

    image_size = 6

    def batch(self, pixels, epoch, samples, out=None):
        next(iter(pixels))
        time.sleep(1000)


def place_of(loader, request):
    """How messages name the first sample of a request."""
    requests = iter(_TrainRequests(loader._order, World(), 6, 0))
    samples = next(itertools.islice(requests, request, None)).samples
    index = loader._feed.dataset.index
    shard, _ = index.locate(int(samples[0]))
    return rf"was at sample {samples[0]} of shard `{index.shard_path(shard)}`"


def test_a_hung_worker_is_a_data_error_in_time(index, train):
    loader = train(index, Stuck(), workers=2, timeout_s=0.5)
    batches = loader.batches(0)
    pids = workers_of(loader)
    start = time.monotonic()
    with pytest.raises(
        DataError, match=r"no batch came within `0.5` s from 2 loader processes .*--loader-timeout"
    ) as e:
        next(batches)
    assert place_of(loader, 0) in str(e.value)  # of the worker whose batch comes next
    assert time.monotonic() - start < 8
    assert gone(pids)


@pytest.mark.parametrize("worker", [0, 1])
def test_a_killed_worker_is_named_by_the_sample_it_was_at(index, train, worker):
    loader = train(index, Stuck(), workers=2)
    batches = loader.batches(0)
    pids = workers_of(loader)
    deadline = time.monotonic() + 20
    while (loader._feed._shared.at < 0).any() and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(DataError, match=r"loader process died") as error:
        os.kill(pids[worker], signal.SIGKILL)
        next(batches)
    assert place_of(loader, worker) in str(error.value)
    loader.close()
    assert gone(pids)


def test_a_stopped_worker_ends_the_run_within_the_limit(index, train):
    loader = train(index, workers=2, timeout_s=1.0)
    batches = loader.batches(0)
    next(batches)
    pids = workers_of(loader)
    os.kill(pids[0], signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"no batch came within `1` s .*the one awaited was at sample \d+ of shard `"):
        list(itertools.islice(batches, 50))
    assert time.monotonic() - start < 10
    assert gone(pids)


def test_a_worker_that_stopped_between_two_evaluations(index, evaluate):
    loader = evaluate(index, workers=2, timeout_s=1.0)
    list(loader.batches())
    pids = workers_of(loader)
    os.kill(pids[1], signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(DataError, match="no batch came within `1` s"):
        list(loader.batches())
    assert time.monotonic() - start < 10
    assert gone(pids)


def test_hung_workers_do_not_hold_up_the_end(index, train):
    loader = train(index, Stuck(), workers=2)
    loader.batches(0)
    pids = workers_of(loader)
    time.sleep(0.5)  # until they are stuck
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 5 and gone(pids)


EXIT = """
import time
from dist_kd.contracts import World
from dist_kd.data.finding import open_data
from dist_kd.data.loader import EvalLoader

class Stuck:
    image_size = 6

    def batch(self, pixels, out=None):
        time.sleep(1000)

loader = EvalLoader(open_data({folder!r}), Stuck(), world=World(), batch_size=8, device="cpu", mean=(0.5,) * 3,
                    std=(0.2,) * 3, workers=2, in_memory=False, timeout_s=1.0 if {timed} else 60.0)
if {timed}:
    next(loader.batches())
loader._feed.start(loader._requests)
print(*[worker.pid for worker in loader._feed._iterator._workers], flush=True)
time.sleep(0.5)
"""


@pytest.mark.parametrize("timed", [False, True])
def test_hung_workers_do_not_hold_up_an_exit(index, timed):
    """Also when an error goes uncaught, or nobody calls close."""
    code = EXIT.format(folder=str(index.folder), timed=timed)
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, "no batch came within" in done.stderr) == ((1, True) if timed else (0, False)), done.stderr
    assert gone(map(int, done.stdout.split())) and time.monotonic() - start < 90


def test_stop_signals_are_left_to_the_main_process(index, train):
    """Also those that come while workers are still starting."""
    loader = train(index, workers=2)
    batches = loader.batches(0)
    for pid in workers_of(loader):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, number)
    shown = list(itertools.islice(batches, 21))
    expected = list(itertools.islice(train(index).batches(0), 21))
    assert all(torch.equal(a.images, b.images) for a, b in zip(shown, expected, strict=True))


class Broken:
    image_size = 6

    def batch(self, pixels, epoch, samples, out=None):
        raise RuntimeError("a mistake in a view")


@pytest.mark.parametrize("workers", [0, 2])
def test_mistakes_in_the_code_keep_their_traceback(index, train, workers):
    with pytest.raises(RuntimeError, match="a mistake in a view"):
        next(train(index, Broken(), workers=workers).batches(0))


def test_close_ends_the_workers(index, train):
    loader = train(index, workers=2)
    next(loader.batches(0))
    pids = workers_of(loader)
    loader.close()
    assert gone(pids)
    loader.close()


def memory_of(pid):
    """Megabytes of a process by kind, as the kernel counts them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name.rstrip(":"): int(size) / 1024 for name, size, _ in map(str.split, lines)}


def test_the_memory_of_a_worker_is_bounded_and_flat(real_data, tmp_path, train):
    """100 photographs are 56 MB decoded, so an epoch kept, or a batch of it each time, would show."""
    photographs, shard = real_data / "imagenet-sample.tar", tmp_path / "a.tar"
    with tarfile.open(photographs) as tar, webdataset.TarWriter(str(shard)) as writer:
        for number, member in enumerate(filter(tarfile.TarInfo.isfile, tar)):
            image = tar.extractfile(member).read()
            writer.write({"__key__": f"k{number:03d}", "jpg": image, "cls": number})
    index = build_index(tmp_path, [shard], name="photographs", classes=None)
    loader = train(index, TrainView("rrc+flip", 224, 0), batch=20, micro_batch=20, workers=1)
    batches, found = loader.batches(0), []
    for _epoch in range(3):
        list(itertools.islice(batches, 5))
        found.append(memory_of(workers_of(loader)[0]))
    assert all(memory["Private_Dirty"] + memory["Private_Clean"] < 96 for memory in found), found
    assert max(memory["Rss"] for memory in found[1:]) - found[0]["Rss"] < 24, found
