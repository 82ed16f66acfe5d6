"""mechatlas: `train`, on rows that fit its protocol."""

from measure import Measurement, parse, refuse

options = parse()

import torch

import mechatlas as ma
from mechatlas.base import Batch
from mechatlas.dictionaries import sparsity


class Rows:
    """Batches that are timed."""

    def __init__(self, measurement: Measurement) -> None:
        self.measurement, self.d_in = measurement, options.d_in
        self.n_rows = len(measurement.x)

    def batches(self, batch_size: int, *, seed: int = 0, start: int = 0):
        assert start == 0
        for x in self.measurement.batches():
            yield Batch(x, torch.arange(len(x)))

    def held_out(self, n_rows: int):
        held = self.measurement.held[:n_rows]
        return Batch(held, torch.arange(len(held)))

    def describe(self, row: int) -> str:
        return f"row {row}"


RULES = {
    "topk": ("TopK", {"k": options.k}),
    "batchtopk": ("BatchTopK", {"k": options.k}),
    "jumprelu": ("JumpReLU", {}),
    "l1": ("ReLU", {}),
}
name, arguments = RULES[options.rule]
if not hasattr(sparsity, name):
    refuse(f"mechatlas has no {name}")
rule = getattr(sparsity, name)(**arguments)
# The compiled code is loaded on a small dictionary, as the libraries' code is imported.
small = ma.Autoencoder(d_in=64, n_latents=2048, sparsity=rule, tied=options.tied)
ma.train(small, torch.randn(600, 64), steps=2, batch_size=512)
measurement = Measurement(options)
built = ma.Autoencoder(
    d_in=options.d_in,
    n_latents=options.n_latents,
    sparsity=rule,
    tied=options.tied,
    seed=options.seed,
)
schedule = ma.Schedule(decay=options.decay)
revival = ma.AuxK(dead_after_rows=options.dead_after) if options.dead_after else None
dictionary = ma.train(
    built,
    Rows(measurement),
    steps=options.steps,
    batch_size=options.batch_size,
    lr=options.lr or None,  # 0: the rate that it chooses
    schedule=schedule,
    revival=revival,
    on_progress=lambda done, steps: measurement.seen.end(),
)
measurement.report(ma.__version__, dictionary, dictionary.W_dec, dictionary.encode)
