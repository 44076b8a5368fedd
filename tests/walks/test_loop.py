"""What the loop may not do: wait for the device between log points, or go on with a loss that is not finite."""

import signal
import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from walks.training import SETTINGS, settings_without, status, train

from dist_kd import checkpoint, lifetime, loop, wiring
from dist_kd.cli import parse
from dist_kd.cli.exits import PREEMPTED
from dist_kd.data.loader import TrainLoader
from dist_kd.errors import DataError, DivergedError
from dist_kd.run_folder import RunFolder
from dist_kd.runtime import start_runtime
from dist_kd.tracking import NullTracker
from dist_kd.wiring import build_run


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host: on a GPU each would wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip", [(), ("--clip-norm", "1")])
def test_no_host_sync_between_log_points(digits, tmp_path, clip):
    words = [*SETTINGS, "--in-memory", "--workers", "0", "--data", str(digits), "--save-path", str(tmp_path), *clip]
    parsed = parse(words, {})
    run, _ = build_run(parsed, start_runtime(parsed.config), RunFolder(tmp_path))
    run.updates._most_pending = 2  # as on a GPU; a CPU's own memory may be looked at
    batches = run.source.batches(0)
    loop._train_step(run, batches)
    ready = [next(batches) for _ in range(2 * run.plan.accum_steps)]  # the data path works on the host by nature
    with HostReads() as reads:
        loop._train_step(run, iter(ready))
    assert reads.count == 0
    with HostReads() as reads:
        float(torch.ones(()))
    assert reads.count == 1  # the counter counts
    run.stop.uninstall()
    run.source.close()
    run.tracker.close("test")


def weights(folder) -> dict[str, torch.Tensor]:
    found, _ = checkpoint.find(folder / "checkpoints")
    return checkpoint.load(found, "cpu").tensors["model"]


def test_a_diverged_run_stops_and_keeps_its_weights(digits, tmp_path):
    words = ["--in-memory", "--workers", "0"]
    assert train(tmp_path, digits, *words, stop_at_batch=21) == "preempted"
    before = weights(tmp_path)

    def broken(batches):
        for batch in batches:
            yield batch._replace(images=batch.images * float("nan"))

    parsed = parse([*SETTINGS, *words, "--data", str(digits), "--save-path", str(tmp_path)], {})
    run, _ = build_run(parsed, start_runtime(parsed.config), RunFolder(tmp_path))
    inner = run.source

    class Nan:
        account, spec = inner.account, inner.spec

        def batches(self, step):
            return broken(inner.batches(step))

    run.source = Nan()
    with pytest.raises(DivergedError, match="gradients of step 22 are not finite"):
        loop.fit(run)
    inner.close()
    run.stop.uninstall()
    run.tracker.close("failed")
    after = weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before if not name.endswith("num_batches_tracked"))


def test_an_infinite_loss_with_finite_gradients_is_all_ranks_error(digits, tmp_path):
    parsed = parse(
        [*SETTINGS, "--in-memory", "--workers", "0", "--data", str(digits), "--save-path", str(tmp_path)], {}
    )
    run, _ = build_run(parsed, start_runtime(parsed.config), RunFolder(tmp_path))
    forward = run.learner.forward
    run.learner.forward = lambda *words: (terms := forward(*words))._replace(total=terms.total + float("inf"))
    with pytest.raises(DivergedError, match=r"the training loss is `nan` at step 4") as caught:
        loop.fit(run)
    assert caught.value.alike
    run.source.close()
    run.stop.uninstall()
    run.tracker.close("failed")


def test_a_start_that_fails_gives_everything_back(digits, tmp_path, monkeypatch):
    class Recording(NullTracker):
        closed = ()

        def close(self, status):
            self.closed += (status,)

    def fail(*_):
        raise DataError("the validation set is damaged")

    tracker, before = Recording(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(wiring, "open_tracker", lambda *_, **__: tracker)
    monkeypatch.setattr(wiring.teacher_score, "before_training", fail)
    parsed = parse([*SETTINGS, "--data", str(digits), "--save-path", str(tmp_path)], {})
    with pytest.raises(DataError, match="is damaged"):
        build_run(parsed, start_runtime(parsed.config), RunFolder(tmp_path))
    assert tracker.closed == ("failed",)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("why", [DataError("the training set is damaged"), None])
def test_an_end_that_fails_takes_no_errors_place_and_is_whole(digits, tmp_path, monkeypatch, why):
    """The loaders cannot be closed: the error before that is told; without one, that is the error."""

    def refuse(_):
        raise OSError("a worker cannot be joined")

    def fit(run):
        if why is not None:
            raise why
        return "preempted"

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(TrainLoader, "close", refuse)
    monkeypatch.setattr(lifetime, "fit", fit)
    words = ["--in-memory", "--workers", "0", "--data", str(digits), "--save-path", str(tmp_path)]
    with pytest.raises(DataError if why else OSError, match="is damaged" if why else "cannot be joined"):
        lifetime.run_training(parse([*SETTINGS, *words], {}))
    assert status(tmp_path)["state"] == ("failed" if why else "preempted")
    assert not (tmp_path / "lock").exists() and signal.getsignal(signal.SIGTERM) is before
    deadline = time.monotonic() + 60
    while watching := [thread.name for thread in threading.enumerate() if thread.name.startswith("watchdog")]:
        assert time.monotonic() < deadline, watching
        time.sleep(0.05)


def test_a_time_limit_stops_it(digits, tmp_path):
    """It counts from the process's start, whatever building the run took; what has just begun goes on."""
    words = ["--in-memory", "--workers", "0", "--max-steps", "2", "--time-limit", "59"]
    settings = settings_without("--epochs")
    parsed = parse([*settings, *words, "--data", str(digits), "--save-path", str(tmp_path)], {})
    assert lifetime.run_training(parsed, begun=time.monotonic() - 3600) == PREEMPTED
    stopped = status(tmp_path)
    assert (stopped["state"], stopped["step"], stopped["message"]) == ("preempted", 0, "time limit")
    assert train(tmp_path, digits, *words, settings=settings) == "done"
