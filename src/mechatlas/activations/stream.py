"""Rows to train on straight from a network, without a store.

    stream         network, samples and sites -> `NetworkRows`, a source for `train`
    NetworkRows    rows of the sites side by side, read pool by pool

Samples are taken in a random order, read in pools that fit in the memory allowed, and the rows of a
pool are shuffled. Order and pools are a function of the seed, and how many rows a pool has is known
from its tokens alone: a run is continued without reading again what it has been trained on.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechatlas.activations.layouts import layouts_of
from mechatlas.activations.networks import as_input
from mechatlas.activations.passes import on_device
from mechatlas.activations.positions import Positions, TokenSamples, is_causal, left_out
from mechatlas.activations.row_checks import refuse_other_grid, refuse_other_width
from mechatlas.activations.samples import Samples, open_samples
from mechatlas.activations.sites import as_site, read_activations
from mechatlas.base import Batch, InputError, Result, Site
from mechatlas.devices import as_device


def stream(
    network: nn.Module,
    samples: Any,
    sites: Site | str | Sequence[Site | str],
    *,
    positions: Positions | None = None,
    held_out: float = 0.05,
    batch_size: int = 16,
    pool_mib: int = 512,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> "NetworkRows":
    """Read rows from a network while a dictionary is trained on them.

    Args:
        network: Network, left as it is.
        samples: Samples, or whatever `open_samples` takes.
        sites: One site or several. `train` takes one dictionary for each, in this order (a site may
            be named twice), or dictionaries that read all of them side by side.
        positions: Positions that are kept; by default all that `collect` does not leave out.
        held_out: Fraction of the samples that is never trained on.
        batch_size: Samples in one forward pass.
        pool_mib: Memory for the rows that are shuffled together, in MiB.
        seed: Seed of the held-out samples and of drawn positions.
        device: Device on which the network runs; by default its own.

    Raises:
        InputError: There are fewer than two samples, sites differ in their grids, or every position
            is left out.
        SiteError: The network has no such site.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import mechatlas as ma
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> rows = ma.stream(network, torch.randn(500, 4), "1")
        >>> sae = ma.Autoencoder(d_in=8, n_latents=16, sparsity=ma.TopK(k=2))
        >>> sae = ma.train(sae, rows, steps=20, batch_size=64)
        >>> len(sae.history.fvu)
        20
    """
    named = [sites] if isinstance(sites, str | Site) else list(sites)
    return NetworkRows(
        network,
        open_samples(samples, network),
        [as_site(network, site) for site in named],
        positions=positions or Positions(rule="all"),
        held_out=held_out,
        batch_size=batch_size,
        pool_mib=pool_mib,
        seed=seed,
        device=as_device(device, network),
    )


class NetworkRows(Result):
    """Rows of some sites of a network, side by side; fits `Rows`."""

    d_in: int
    """Number of channels of all sites."""
    n_rows: int
    """Largest number of rows in an epoch."""
    parts: list[slice]
    """Columns of each site."""

    def __init__(
        self,
        network: nn.Module,
        samples: Samples,
        sites: Sequence[Site],
        *,
        positions: Positions,
        held_out: float,
        batch_size: int,
        pool_mib: int,
        seed: int,
        device: torch.device,
    ) -> None:
        if len(samples) < 2 or not sites or not 0 < held_out < 1:
            raise InputError(
                f"A stream needs a site, two samples and held_out between 0 and 1; got {len(sites)}"
                f" sites, {len(samples)} samples and held_out = {held_out}."
            )
        self.network, self.samples = network, samples
        self.sites: list[Site] = list(dict.fromkeys(sites))
        self.device, self.batch_size = device, batch_size
        self._tokens = samples if isinstance(samples, TokenSamples) else None
        with on_device(network, device):
            self._prepare(sites, positions, pool_mib << 20)
        order = np.random.default_rng([seed, 0]).permutation(len(samples))
        n_held = min(math.ceil(held_out * len(samples)), len(samples) - 1)
        self._held, self._train = order[:n_held], order[n_held:]
        self.n_rows = len(self._train) * self.positions.count(self.n_positions)
        self._held_out: Batch | None = None

    def _prepare(self, sites: Sequence[Site], positions: Positions, pool_bytes: int) -> None:
        """Find widths, grids and the size of a pool, from one sample."""
        first = self._inputs([0])
        activations = read_activations(self.network, first, self.sites)
        self._layouts = layouts_of(self.network, first, self.sites)
        whole = {site: self._layouts[site].rows(a) for site, a in activations.items()}
        self._shapes = {
            site: (self._layouts[site].grid(activations[site]), rows.shape[-1])
            for site, rows in whole.items()
        }
        grids = {str(site): tuple(rows.shape[1:-1]) for site, rows in whole.items()}
        if len(set(grids.values())) > 1:
            raise InputError(
                f"Rows of sites of different grids do not belong together: {grids}. Stream them "
                "one by one, or collect a paired store."
            )
        self.n_positions = math.prod(next(iter(grids.values())))
        ends = np.cumsum([0] + [rows.shape[-1] for rows in whole.values()]).tolist()
        columns = itertools.starmap(slice, itertools.pairwise(ends))
        of_site = dict(zip(self.sites, columns, strict=True))
        self.parts, self.d_in = [of_site[site] for site in sites], ends[-1]
        causal = self._tokens is not None and is_causal(
            self.network, first, self._tokens.padding(0), self.sites
        )
        self.positions = positions.resolved(tokens=self._tokens is not None, causal=causal)
        row_bytes = self.d_in * max(rows.element_size() for rows in whole.values()) + 8
        sample_bytes = row_bytes * self.positions.count(self.n_positions)
        # One pool is still in use while the next is read.
        self.samples_in_pool = max(1, pool_bytes // 2 // sample_bytes)

    def summary(self) -> str:
        """Sites, samples and what a pool holds."""
        names = ", ".join(map(str, self.sites[:4])) + (", ..." if len(self.sites) > 4 else "")
        return (
            f"Rows of {names} from {len(self._train):,} samples, {len(self._held):,} held out: at "
            f"most {self.n_rows:,} of {self.d_in} channels, shuffled among "
            f"{min(self.samples_in_pool, len(self._train)):,} samples"
        )

    def batches(self, batch_size: int, *, seed: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield endless shuffled batches, one epoch after another.

        Args:
            batch_size: Rows of a batch.
            seed: Seed of the order.
            start: Number of the first batch; the network does not run on those before.

        Raises:
            InputError: Every position is left out.
        """
        missing, parts = batch_size, []
        for pool, order in self._pools(seed, start * batch_size):
            taken = 0
            while taken < len(order):
                index = order[taken : taken + missing]
                parts.append(Batch(pool.x[index].float(), pool.row[index]))
                taken, missing = taken + len(index), missing - len(index)
                if not missing:
                    x, row = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
                    yield Batch(x, row)
                    missing, parts = batch_size, []

    def _pools(self, seed: int, skip: int) -> Iterator[tuple[Batch, Int[Tensor, " row"]]]:
        """Pools of rows, each with a random order, from a row on."""
        counts: dict[int, int] = {}
        for epoch in itertools.count():
            order = np.random.default_rng([seed, epoch, 3]).permutation(self._train)
            total = 0
            for number in range(math.ceil(len(order) / self.samples_in_pool)):
                first = number * self.samples_in_pool
                numbers = order[first : first + self.samples_in_pool].tolist()
                n = sum(self._count(i, counts) for i in numbers)
                total += n
                if skip >= n:
                    skip -= n
                    continue
                shuffled = np.random.default_rng([seed, epoch, number, 4]).permutation(n)
                yield self._read(numbers, n), torch.from_numpy(shuffled[skip:])
                skip = 0
            if not total:
                raise InputError("Every position of the samples is left out.")

    def _count(self, sample: int, counts: dict[int, int]) -> int:
        """Rows of a sample, from its tokens alone."""
        if sample not in counts:
            excluded = self._excluded([sample])
            allowed = self.n_positions - (0 if excluded is None else int(excluded.sum()))
            counts[sample] = min(self.positions.count(self.n_positions), allowed)
        return counts[sample]

    def _excluded(self, numbers: Sequence[int]) -> Tensor | None:
        if self._tokens is None:
            return None
        excluded = left_out(self._tokens, numbers, self.positions, Counter())
        return excluded if excluded.shape[1] == self.n_positions else None

    def _inputs(self, numbers: Sequence[int]) -> Any:
        batch = self.samples.stack([self.samples.read(i) for i in numbers])
        return as_input(self.network, batch.to(self.device))

    @torch.inference_mode()
    def _read(self, numbers: Sequence[int], n: int) -> Batch:
        """Run the network on some samples, and keep `n` rows in the network's number format."""
        x: Tensor | None = None
        row = torch.empty(n, dtype=torch.long)
        done = 0
        with on_device(self.network, self.device):
            for first in range(0, len(numbers), self.batch_size):
                some = list(numbers[first : first + self.batch_size])
                rows, ids = self._rows_of(some)
                x = torch.empty(n, self.d_in, dtype=rows.dtype) if x is None else x
                x[done : done + len(rows)], row[done : done + len(rows)] = rows.cpu(), ids.cpu()
                done += len(rows)
        return Batch(torch.empty(0, self.d_in) if x is None else x, row)

    def _rows_of(self, some: list[int]) -> tuple[Float[Tensor, "row d_in"], Int[Tensor, " row"]]:
        """Rows of some samples that are kept, and their numbers."""
        activations = read_activations(self.network, self._inputs(some), self.sites)
        whole = [self._layouts[s].rows(a) for s, a in activations.items()]
        for (site, activation), rows in zip(activations.items(), whole, strict=True):
            grid, width = self._shapes[site]
            refuse_other_grid(self._layouts[site].grid(activation), grid, site)
            refuse_other_width(rows.shape[-1], width, site)
        flat = [rows.reshape(len(rows), self.n_positions, -1) for rows in whole]
        drawn = self.positions.draw(flat[0], some, self._excluded(some))
        of_sample, column = (drawn >= 0).nonzero().T
        place = drawn[of_sample, column]
        number = torch.tensor(some, device=place.device)[of_sample] * self.n_positions + place
        return torch.cat([rows[of_sample, place] for rows in flat], dim=1), number

    def held_out(self, n_rows: int) -> Batch:
        """Up to `n_rows` rows of samples that `batches` never reads."""
        if self._held_out is None or len(self._held_out.row) < n_rows:
            counts: dict[int, int] = {}
            numbers, n = [], 0
            for i in self._held.tolist():
                if n >= n_rows:
                    break
                numbers.append(i)
                n += self._count(i, counts)
            self._held_out = self._read(numbers, n)
        return Batch(self._held_out.x[:n_rows].float(), self._held_out.row[:n_rows])

    def describe(self, row: int) -> str:
        """The sample of a row, and its position there."""
        sample, position = divmod(row, self.n_positions)
        return f"{self.samples.name(sample)} position {position}"
