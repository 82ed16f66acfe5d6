"""One dictionary over several processes, each with some of the latents and some of the rows.

    mesh_of        processes of `torchrun` -> a mesh of processes along `data` and `latent`
    Shard          latents of this process, a `LinearCoder` that `train` takes as any other
    ShardedStep    step of all processes together, equal to that of one but for rounding

A process encodes its rows with its latents. Of all codes those are kept that one process would
keep: their values are gathered, k numbers for each row and process. Each process then decodes its
own atoms, and the sum over the latents, one number for each row and column, is the only large
message of a step. No gradient is exchanged: a process has every code and row that its latents learn
from. The whole dictionary is never on one host.
"""

import math
import os
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import pad

from mechatlas.base import RecipeError
from mechatlas.dictionaries.autoencoder import LinearCoder
from mechatlas.dictionaries.engine import fallback
from mechatlas.dictionaries.engine.interface import Dead, Step
from mechatlas.dictionaries.engine.shard_files import ShardFiles
from mechatlas.dictionaries.engine.sparse_steps import BatchSearch, SparseStep
from mechatlas.dictionaries.engine.structures import Codes
from mechatlas.dictionaries.engine.threads import Run
from mechatlas.dictionaries.objective import Objective
from mechatlas.dictionaries.revival import ROWS, AuxK, Resample, Revival
from mechatlas.dictionaries.sparsity import BatchTopK, TopK

DRAWN = 2**20
"""Random numbers that are drawn at once; a multiple of 16, which torch draws together."""

SPREAD = 3.0
"""Codes of a process that are looked for beyond its share of k, in standard deviations."""


def mesh_of(*, n_data: int = 1, device: str = "cpu") -> DeviceMesh:
    """Arrange the processes of `torchrun` along `data` and `latent`; without it there is one.

    Args:
        n_data: Processes that share out the rows of a batch; the others share out the latents.
        device: Kind of device that they compute on, "cpu" (gloo) or "cuda" (nccl).

    Raises:
        RecipeError: The number of processes is not a multiple of `n_data`.
    """
    if not dist.is_initialized():
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        together = {} if "RANK" in os.environ else alone
        dist.init_process_group("nccl" if device == "cuda" else "gloo", **together)
    n = dist.get_world_size()
    if n_data < 1 or n % n_data:
        raise RecipeError(f"n_data is {n_data}, expected a divisor of the {n} processes.")
    return init_device_mesh(device, (n_data, n // n_data), mesh_dim_names=("data", "latent"))


class Shard(LinearCoder):
    """Range of the latents of a dictionary, the whole of which no process has.

    `encode` gives the codes of these latents, `decode` the reconstruction by all.
    """

    def __init__(self, like: LinearCoder, n_latents: int, mesh: DeviceMesh) -> None:
        """Draw the weights that a dictionary in one process would have.

        Args:
            like: Dictionary of the same kind and settings, of any number of latents.
            n_latents: Latents of the dictionary.
            mesh: Processes, from `mesh_of`.

        Raises:
            RecipeError: Such a dictionary cannot be shared out.
        """
        n_parts, part = mesh["latent"].size(), mesh.get_local_rank("latent")
        self.latents = range(part * n_latents // n_parts, (part + 1) * n_latents // n_parts)
        self.n_all, self.mesh = n_latents, mesh
        self.files = ShardFiles(mesh, self.latents, n_latents)
        if not isinstance(like.sparsity, TopK | BatchTopK) or len(like.matryoshka_widths) > 1:
            raise RecipeError(
                "Dictionaries over several processes are TopK or BatchTopK, without "
                f"matryoshka_widths; got {like}."
            )
        if like.sparsity.k > n_latents // n_parts:
            raise RecipeError(
                f"{n_latents} latents over {n_parts} processes are {n_latents // n_parts} each, "
                f"expected at least k = {like.sparsity.k}: start fewer processes."
            )
        super().__init__(
            read=range(like.reads.start, like.reads.stop),
            write=range(like.writes.start, like.writes.stop),
            edges=like.edges,
            config={**like.config, "n_latents": len(self.latents)},
        )
        self.k, self.kind = like.sparsity.k, type(like).__name__
        self.start_id = f"drawn by seed {self.config['seed']}"

    def _draw(self, random: torch.Generator, width: int) -> Tensor:
        """Rows of this process among those that one process would draw."""
        mine = torch.empty(len(self.latents) * width)
        low, high, n = self.latents.start * width, self.latents.stop * width, self.n_all * width
        bounds = [*range(0, max(1, n - DRAWN // 2), DRAWN), n]  # the last piece is never short
        for begin, end in pairwise(bounds):
            piece = torch.randn(end - begin, generator=random)
            a, b = max(low, begin), min(high, end)
            if a < b:
                mine[a - low : b - low] = piece[a - begin : b - begin]
        return mine.view(-1, width)

    def extra_repr(self) -> str:
        """Arguments that the whole dictionary was built with."""
        config = {**self.config, "n_latents": self.n_all}
        return ", ".join(f"{name}={value}" for name, value in config.items())

    @property
    def file_name(self) -> str:
        """Name of the file of these latents."""
        return shard_file(self.latents.start)

    @property
    def file_names(self) -> list[str]:
        """Names of the files of all latents."""
        n = self.mesh["latent"].size()
        return [shard_file(part * self.n_all // n) for part in range(n)]

    def encode(self, x: Any) -> Float[Tensor, "batch latent"]:
        """Sparse code of each sample for the latents of this process."""
        threshold = self.state.get("threshold")
        if threshold is not None and threshold >= 0:
            return super().encode(x)
        pre = self.pre_activations(x)
        top = pre.topk(self.k, dim=-1)
        values = top.values.relu()
        values = values * largest_of_rows(values, self.k, self.mesh)[0]
        return torch.zeros_like(pre).scatter_(-1, top.indices, values)

    def decode(self, code: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch d_out"]:
        """Reconstruction by the latents of all processes."""
        return summed(code @ self.W_dec.detach(), self.mesh) + self.b_dec.detach()

    def total(self, number: float | int) -> float:
        """Sum a number over the latents of all processes."""
        return float(summed(torch.tensor(number, dtype=torch.float64), self.mesh))

    def step(self, objective: Objective, revival: AuxK | Resample | None = None) -> Step:
        """Make the optimizer.

        Raises:
            RecipeError: Latents are to be resampled.
        """
        if isinstance(revival, Resample):
            raise RecipeError("Latents over several processes are revived by AuxK, not Resample.")
        return ShardedStep(self, objective)


def shard_file(first: int) -> str:
    """Name of the file of the latents from a first one."""
    return f"dictionary-{first:08}.safetensors"


def summed(x: Tensor, mesh: DeviceMesh, dim: str = "latent") -> Tensor:
    """Sum a tensor over processes, in place."""
    dist.all_reduce(x, group=mesh.get_group(dim))
    return x


def gathered(x: Tensor, mesh: DeviceMesh, dim: str) -> list[Tensor]:
    """Tensors of all processes, which may have different numbers of rows."""
    group, n = mesh.get_group(dim), mesh[dim].size()
    own = torch.tensor(len(x), device=x.device)
    counts = [torch.empty_like(own) for _ in range(n)]
    dist.all_gather(counts, own, group=group)
    sizes = [int(count) for count in counts]
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in range(n)]
    dist.all_gather(parts, padded, group=group)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def largest_of_rows(
    values: Float[Tensor, "row candidate"], k: int, mesh: DeviceMesh
) -> tuple[Bool[Tensor, "row candidate"], Bool[Tensor, " row"]]:
    """Candidates of this process that are among the k largest of a row, of all processes.

    Returns:
        Which of them, and whether no process kept all of its own, each above zero.
    """
    parts = [torch.empty_like(values) for _ in range(mesh["latent"].size())]
    dist.all_gather(parts, values.contiguous(), group=mesh.get_group("latent"))
    every = torch.stack(parts, dim=1)
    flat = every.flatten(1)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept.scatter_(1, flat.topk(min(k, flat.shape[1]), dim=1).indices, True)
    kept = kept.view_as(every)
    exhausted = (kept & (every > 0)).all(dim=2).any(dim=1)
    return kept[:, mesh.get_local_rank("latent")], ~exhausted


def largest_of_batch(
    values: Float[Tensor, " candidate"], n: int, mesh: DeviceMesh
) -> Bool[Tensor, " candidate"]:
    """Candidates of this process that are among the n largest of all processes."""
    by_rows = [torch.cat(gathered(values, mesh, "latent"))]
    by_rows = gathered(by_rows[0], mesh, "data")
    every = torch.cat(by_rows)
    if len(every) <= n:
        return torch.ones_like(values, dtype=torch.bool)
    # Candidates of equal value are kept in the order of the processes.
    last = every.kthvalue(len(every) - n + 1).values
    place = len(torch.cat([*by_rows[: mesh.get_local_rank("data")], every[:0]]))
    sizes = [len(part) for part in gathered(values, mesh, "latent")]
    place += sum(sizes[: mesh.get_local_rank("latent")])
    ties = every == last
    kept = (every > last) | (ties & (ties.cumsum(0) <= n - (every > last).sum()))
    return kept[place : place + len(values)]


class MeshSearch:
    """A `CodeSearch` among the latents and rows of all processes; gives codes of all rows."""

    def __init__(self, search: BatchSearch, mesh: DeviceMesh) -> None:
        self.search, self.mesh = search, mesh

    def largest_of_rows(self, k: int) -> Codes:
        """Find the k largest codes of each row, of which these latents have some.

        They seldom have many more than their share, so no more are looked for at first: only
        where all that some process found are kept may it have further ones.
        """
        dictionary, share = self.search.dictionary, k / self.mesh["latent"].size()
        few = min(k, math.ceil(share + SPREAD * math.sqrt(share)))
        codes = self.search.largest_of_rows(few)
        values, latents = codes.values.view(-1, few), codes.latents.view(-1, few)
        kept, complete = largest_of_rows(values, k, self.mesh)
        more = (~complete).nonzero().flatten()
        if few < k and len(more):
            values, latents, kept = (pad(x, (0, k - few)) for x in (values, latents, kept))
            for rows in more.split(ROWS):
                # No screening, which may give up in one process and not in another.
                x = self.search.x[rows][:, dictionary.reads]
                top = dictionary.pre_activations(x).topk(k)
                values[rows], latents[rows] = top.values.relu(), top.indices.int()
                kept[rows] = largest_of_rows(values[rows], k, self.mesh)[0]
        starts = torch.arange(0, values.numel() + 1, values.shape[1], device=values.device)
        flat = values.flatten()
        return self._of_all_rows(Codes(starts, latents.flatten(), flat, flat), kept.flatten())

    def largest_of_batch(self, k: int) -> Codes:
        """Find the codes above zero that are largest in the batch, k a row on average."""
        n_rows = int(summed(torch.tensor(len(self.search.x)), self.mesh, "data"))
        most = -(-k * n_rows // len(self.search.x))  # these rows may have all of them
        codes = self.search.largest_of_batch(most)
        return self._of_all_rows(codes, largest_of_batch(codes.values, k * n_rows, self.mesh))

    def above(self, low: Float[Tensor, " latent"] | float) -> Codes | None:
        """Find no codes: the rules that ask for them are not shared out.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(f"codes above {low} over several processes")

    def _of_all_rows(self, codes: Codes, kept: Bool[Tensor, " pairs"]) -> Codes:
        """Codes that are kept, for the rows of all processes."""
        before = torch.cat([kept.new_zeros(1, dtype=torch.long), kept.cumsum(0)])
        starts = before[codes.starts.long()]
        counts, latents, values = starts.diff(), codes.latents[kept], codes.values[kept]
        if self.mesh["data"].size() > 1:
            parts = (gathered(x, self.mesh, "data") for x in (counts, latents, values))
            counts, latents, values = map(torch.cat, parts)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Codes(starts, latents, values, values)


class ShardedStep(SparseStep):
    """Step of the latents of this process, in time with all others."""

    dictionary: Shard

    def __init__(self, dictionary: Shard, objective: Objective) -> None:
        super().__init__(dictionary, objective)
        self.mesh = dictionary.mesh

    def select(self, x: Tensor, run: Run) -> Codes | None:
        """Codes of all rows; this process looks for those of its share of the rows."""
        part, parts = self.mesh.get_local_rank("data"), self.mesh["data"].size()
        mine = slice(part * len(x) // parts, (part + 1) * len(x) // parts)
        codes = super().select(x[mine], run)
        if parts > 1:
            dictionary = self.dictionary
            read = x[:, dictionary.reads]
            self.room["x"] = read - dictionary.b_dec if dictionary.subtracts_b_dec else read
        return codes

    def _find(self, search: BatchSearch) -> Codes | None:
        """Find codes among those of all processes; a threshold is that of all."""
        state = self.dictionary.state
        codes = self.dictionary.rule.find_codes(MeshSearch(search, self.mesh), state)
        if "threshold" in state and codes is not None:
            # It moves with the smallest code kept: the lowest of the processes that have some.
            lowest = state["threshold"].clone()
            if not (codes.values > 0).any():
                lowest.fill_(torch.inf)
            dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self.mesh.get_group("latent"))
            if lowest.isfinite():
                state["threshold"].copy_(lowest)
        return codes

    def _by_columns(self, dead: Dead | None) -> bool:
        """Whole rows: what other processes reconstruct is known for these."""
        del dead
        return False

    def left_by_others(self, target: Tensor, codes: Codes) -> Tensor:
        """Rows less what the latents of other processes reconstruct."""
        atoms = self.dictionary.W_dec.data
        own = fallback.summed(codes.latents.long(), atoms, codes.starts, codes.values)
        return target - summed(own.clone(), self.mesh).sub_(own)

    def over_all(self, part: Any) -> Any:
        """Sum of a number or tensor over the latents of all processes."""
        return summed(part, self.mesh) if isinstance(part, Tensor) else self.dictionary.total(part)

    def n_dead(self, dead: Dead) -> int:
        """Number of dead latents of all processes."""
        return int(self.dictionary.total(len(dead[1])))

    def revive(self, dead: Dead, x: Tensor, residual: Tensor) -> Revival:
        """Gradients of the dead latents of this process, which reconstruct with all others."""
        (aux, latents), k = dead, min(dead[0].k, self.n_dead(dead))
        dictionary = self.dictionary
        parameters = dictionary.W_dec.data, dictionary.encoder_rows, dictionary.b_enc.data
        atoms, encoder, bias = (each[latents] for each in parameters)
        weight = aux.auxk_alpha / residual.square().mean().clamp_min(1e-12)
        found = Revival(latents, *map(torch.zeros_like, (atoms, encoder, bias)))
        for part, left in zip(x.split(ROWS), residual.split(ROWS), strict=True):
            top = (part @ encoder.T + bias).topk(min(k, len(latents)), dim=-1)
            values = pad(top.values.relu(), (0, k - top.values.shape[1]))
            values = values * largest_of_rows(values, k, self.mesh)[0]
            code = part.new_zeros(len(part), len(latents))
            code.scatter_(-1, top.indices, values[:, : top.values.shape[1]])
            error = summed(code @ atoms, self.mesh).sub_(left).mul_(2 * weight / len(x))
            d_code = (error @ atoms.T) * (code > 0)
            found.atoms.add_(code.T @ error)
            found.rows.add_(d_code.T @ part)
            found.bias.add_(d_code.sum(dim=0))
        return found
