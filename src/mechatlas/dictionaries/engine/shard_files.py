"""Files of a dictionary over several processes: one for each range of latents, and a manifest.

    ShardFiles     checkpoints of a run in progress, as `checkpoints` has them for one process
    SHARDS         manifest; it names the files of one step, each with its latents and checksum

A file holds some latents whole, so any number of processes can go on from it: each reads the files
that have latents of its own, one after another. The manifest is replaced when all files of a step
are there, so it always names files that belong together.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mechatlas.base import DiskError, WeightsError
from mechatlas.dictionaries.engine.checkpoints import FILE, refuse_other_run
from mechatlas.files import checksum, read_manifest, remove, write, write_manifest
from mechatlas.outputs import claim
from mechatlas.tensorfiles import read_safetensors

SHARDS = "shards.json"
WHOLE = ("b_dec", "threshold")
"""Tensors that every process has whole."""


class ShardFiles:
    """Checkpoints of the latents of this process.

    Args:
        mesh: Processes.
        latents: Latents of this process.
        n_latents: Latents of the dictionary.
    """

    def __init__(self, mesh: DeviceMesh, latents: range, n_latents: int) -> None:
        self.mesh, self.latents, self.n_latents = mesh, latents, n_latents

    @contextlib.contextmanager
    def claim(self, folder: Path) -> Iterator[None]:
        """Keep other runs out of a folder, which the first process claims for all."""
        with claim(folder) if dist.get_rank() == 0 else contextlib.nullcontext():
            dist.barrier()
            yield

    def keep(
        self,
        folder: Path,
        tensors: dict[str, Tensor],
        settings: dict[str, Any],
        progress: dict[str, Any],
    ) -> None:
        """Write a checkpoint of all processes over the one before.

        Args:
            folder: Folder of the files, which is there.
            tensors: Weights, moments and the like of these latents, by name.
            settings: Settings that a run can only be continued with.
            progress: Counters.

        Raises:
            DiskError: The folder is not writable or the disk is full; the one before is still
                there.
        """
        entry = None
        if self.mesh.get_local_rank("data") == 0:
            name = f"{progress['done']:08}-{self.latents.start:08}.safetensors"
            data = safetensors.torch.save({n: t.cpu().contiguous() for n, t in tensors.items()})
            write(folder / name, data, make_folder=False)
            entry = [name, self.latents.start, self.latents.stop, checksum(data)]
        entries: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(entries, entry)
        if dist.get_rank() == 0:
            files = sorted(filter(None, entries), key=lambda each: each[1])
            facts = {"kind": "shards", "schema": 1, "n_latents": self.n_latents, "shards": files}
            state = {"settings": settings, "progress": progress}
            write_manifest(folder / SHARDS, facts | state, make_folder=False)
            for file in folder.glob("*.safetensors"):
                if file.name not in {name for name, *_ in files}:
                    remove(file)
        dist.barrier()

    def continued(
        self, folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Read a checkpoint of any number of processes into the tensors of this one.

        Args:
            folder: Folder of the files.
            tensors: Tensors of the run, which are changed in place.
            settings: Settings of the run.

        Returns:
            The counters of the run; None if it has not left a checkpoint yet.

        Raises:
            WeightsError: A file is damaged or missing, or is of a run with other settings.
        """
        manifest = folder / SHARDS
        if not os.path.lexists(manifest):
            if os.path.lexists(folder / FILE):
                raise WeightsError(
                    f"{folder / FILE} is of a single process: continue it without torchrun, or "
                    "delete it to train anew."
                )
            return None
        try:
            state = read_manifest(manifest)
            files = [
                (str(name), *map(int, ends), str(sum_)) for name, *ends, sum_ in state["shards"]
            ]
            was, progress = dict(state["settings"]), dict(state["progress"])
        except (DiskError, KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{manifest}: {error}. Delete it to train anew.") from error
        refuse_other_run(manifest, was, settings, [])
        missing = len(self.latents)
        for name, start, stop, expected in files:
            low, high = max(start, self.latents.start), min(stop, self.latents.stop)
            if low < high and Path(name).name == name:
                kept = read_safetensors(folder / name, expected=expected)[0]
                for key, tensor in tensors.items():
                    _copy(kept[key], tensor, key, low - start, low - self.latents.start, high - low)
                missing -= high - low
        if missing:
            raise WeightsError(f"{manifest} names no file for {missing} latents of this process.")
        return progress


def _copy(source: Tensor, target: Tensor, name: str, begin: int, to: int, n: int) -> None:
    """Copy some latents of a tensor, from `begin` in the source to `to` in the target."""
    parameter = name.split(".")[1]
    if parameter in WHOLE:
        target.copy_(source)
    else:
        axis = 1 if parameter == "_W_enc" else 0
        target.narrow(axis, to, n).copy_(source.narrow(axis, begin, n))
