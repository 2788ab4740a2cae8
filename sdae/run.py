"""The one entry that executes a run: from the terminal, from a worker, under torchrun and srun alike."""

from __future__ import annotations

import contextlib
import errno
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from typing import Any

import torch

from sdae import provenance
from sdae.config import Config, CostRun, dump, run_id
from sdae.data.fingerprint import listing, resolve
from sdae.errors import BrokenInput, Interrupted, RunFailed, UserError
from sdae.files import no_link, why
from sdae.stages.session import Session
from sdae.store import RunFolder, Store
from sdae.training import attention, distributed
from sdae.training.checkpoints import forget_states
from sdae.training.loop import Stop
from sdae.training.telemetry import Pulse
from sdae.weights import with_digest


class NeedNotDone(UserError):
    """The pre-training that a run starts from has no result yet."""


class AlreadyRunning(UserError):
    """Another living process has claimed the run."""


def execute(
    config: Config, store: Store, *, progress: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Runs one stage to its end and returns its result; a finished run's result is returned at once.

    Raises UserError for bad input (nothing is recorded), NeedNotDone, AlreadyRunning, RunFailed (`failure.json` says
    why) and Interrupted (the state is saved, but of a cost run; execute again to go on).
    """
    store.must_be_real()
    config = with_content(config)
    folder = store.run(run_id(config))
    if (result := folder.result()) is not None:
        if result.get("id") != folder.id or not isinstance(result.get("metrics"), dict):
            cure = "`sdae-cli results check --repair` sets aside what is torn"
            raise UserError(f"{folder.path / 'result.json'}: not the result of this run: {cure}")
        _tidy(folder)
        return result
    if (need := getattr(getattr(config, "init", None), "run", None)) and not store.run(need).done:
        raise NeedNotDone(f"{folder.id}: waits for {need}, which is not done in {store.root}")
    if config.efficiency.threads:
        torch.set_num_threads(config.efficiency.threads)
    world = distributed.start(config.efficiency)
    batch = config.optim.batch_size if config.stage != "cost" else world.size
    if batch % world.size:
        raise UserError(f"optim.batch_size: {batch} pictures cannot be shared equally by {world.size} processes")
    fresh = not (folder.path / "config.yaml").exists()
    if world.first:
        store.open()
        folder.create(config)
    world.wait()
    with contextlib.ExitStack() as stack:
        stack.callback(distributed.stop)
        if world.first and not stack.enter_context(folder.claim()):
            who = "{0[host]}, process {0[pid]}".format(folder.claimed() or {"host": "somewhere", "pid": "?"})
            cure = f"`sdae-cli sweep logs {folder.id} -f --store {store.root}` follows it"
            raise AlreadyRunning(f"{folder.id}: another process is running it ({who}): {cure}")
        if (result := folder.result()) is not None:  # finished by another between the look and the claim
            return result
        if world.first:
            folder.create(config)  # again: another one, refused, may have removed the folder before the claim
        try:
            return _execute(config, store, folder, world, progress)
        except UserError:
            with contextlib.suppress(OSError):  # a disk that is only read now keeps it; another may have removed it
                if world.first and fresh and not folder.dispossessed and not any(folder.checkpoints.iterdir()):
                    store.remove(folder.id)  # refused before anything was computed: nothing is left behind
            raise


def _tidy(folder: RunFolder) -> None:
    """Removes what a process could not that was killed, or met a broken disk, when its result was written."""
    if folder.path.is_symlink() or folder.checkpoints.is_symlink():
        return  # what it leads to is another's
    names = ("claim.json", "failure.json")
    if any(folder.checkpoints.glob("state-*")) or any((folder.path / name).exists() for name in names):
        with contextlib.suppress(UserError, OSError), folder.claim() as mine:  # not in a store that is only read
            if mine:
                forget_states(folder.checkpoints)
                (folder.path / "failure.json").unlink(missing_ok=True)


def with_content(config: Config) -> Config:
    """The config with the fingerprint of the pictures, and the digest of the weights' file, that are really there.

    Raises UserError where they are absent or others than those asked for.
    """
    if isinstance(config, CostRun):
        return config
    data = resolve(config.data)
    listing(data)
    init = {} if config.stage == "pretrain" else {"init": with_digest(config.init)}
    return config.model_copy(update={"data": data, **init})


def _execute(
    config: Config, store: Store, folder: RunFolder, world: distributed.World,
    progress: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any]:  # fmt: skip
    stage = import_module(f"sdae.stages.{provenance.STAGE_MODULES[config.stage]}")
    began = time.time()
    if world.first:
        folder.write("provenance.json", provenance.record(config.stage))
        folder.forget_failure()
        say(folder, f"{folder.id} starts on {world.device}, {world.size} process(es)")
    pulse = Pulse(folder, progress if world.first else None)
    beating = pulse if world.first else contextlib.nullcontext()  # the heartbeat is the first rank's
    kernel = config.efficiency.attention
    try:
        with Stop() as stop, beating, attention.using(None if kernel == "auto" else kernel):
            outcome = stage.run(config, Session(store, folder, world, pulse, stop))
    except Interrupted as error:
        if world.first:
            say(folder, str(error))
        raise
    except UserError:
        raise
    except KeyboardInterrupt:
        raise Interrupted(f"{folder.id}: stopped; run it again to go on from its last checkpoint") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise UserError(f"{error.filename or folder.path}: cannot be written: {why(error)}") from error
        kind = "OutOfMemory" if isinstance(error, (torch.OutOfMemoryError, MemoryError)) else type(error).__name__
        message = str(error).strip() or kind
        if folder.dispossessed:
            raise Interrupted(f"{folder.id}: another process has taken the run over") from error
        if folder.failure() is None:  # else another rank has told why, and this one only lost its connection
            folder.fail(kind, message, traceback.format_exc())
            say(folder, f"failed: {kind}: {message}")
        failed = BrokenInput if isinstance(error, BrokenInput) else RunFailed
        raise failed(f"{folder.id}: {message.splitlines()[0]}") from error
    result = _result(config, folder, world, outcome, began)
    if world.first:
        if folder.dispossessed:  # we slept for longer than a claim holds: the result is its new owner's to write
            raise Interrupted(f"{folder.id}: another process has taken the run over")
        folder.finish(result)
        forget_states(folder.checkpoints)
        say(folder, f"done in {result['time']['seconds']:.1f} s: {result['metrics']}")
    world.wait()
    return result


def _result(
    config: Config, folder: RunFolder, world: distributed.World, outcome: dict[str, Any], began: float
) -> dict[str, Any]:
    model = config.model
    network = f"{model.arch} ({model.width}x{model.depth}, patch {model.patch_size})"
    origin = provenance.code()
    return {
        "format": 1, "id": folder.id, "stage": config.stage, "seed": config.seed, "scale": config.scale,
        "dataset": describe_data(config), "model": network,
        "image_size": config.data.image_size, "metrics": outcome["metrics"], "weights": outcome.get("weights", {}),
        "time": {
            "started": datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": round(time.time() - began, 3),
        },
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "world_size": world.size, "synthetic": False, "config": dump(config),
        "provenance": {
            "commit": origin["commit"], "dirty": origin["dirty"], "substance": provenance.substance(config.stage),
        },
        "skipped": outcome.get("skipped", []),
    }  # fmt: skip


def describe_data(config: Config) -> dict[str, Any]:
    """`dataset` of result.json: name, fingerprint, pictures by split, number of classes."""
    if config.stage == "cost":
        return {"name": "random", "fingerprint": None}
    found = listing(config.data)
    counts = {split: sum(numbers) for split, numbers in found.counts.items()}
    return {"name": config.data.name, "fingerprint": config.data.fingerprint, **counts, "classes": len(found.classes)}


def say(folder: RunFolder, text: str) -> None:
    """A line in the run's log."""
    with contextlib.suppress(OSError), open(folder.log, "a", encoding="utf-8", opener=no_link) as file:
        file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}\n")
