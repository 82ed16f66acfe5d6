"""Cost of a large job by formulas: bytes, traffic, memory and device hours of every stage.

    python benchmarks/scaling.py            rewrite the tables of docs/scaling.md
    python benchmarks/scaling.py --check    exit with 1 if they are not up to date

The job is dictionaries on all layers of a language model. `tests/test_scaling.py` compares the
formulas with runs of three sizes and with the messages of the sharded trainer.
"""

import argparse
import dataclasses
import re
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
MARKED = re.compile(r"(<!-- scaling: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FLOAT = 4
PLACE_BYTES = 12
"""Bytes of a row of a store beside its numbers: sample, y and x."""
STEP_COPIES = 3
"""Numbers kept for each weight in training: itself and two moments."""
UPDATE_BYTES = 7 * FLOAT
"""Bytes moved for each weight in a step: weight and moments read and written, one more read."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Dictionaries on all layers of a model."""

    parameters: float = 2.6e9
    """Parameters of the model that a token passes (Gemma 2 2B)."""
    layers: int = 26
    d: int = 2304
    n_tokens: int = 10**9
    latents: int = 65_536
    k: int = 64
    batch: int = 4096
    itemsize: int = 2
    """Bytes of a number in the store."""


@dataclasses.dataclass(frozen=True)
class Device:
    """Speeds of a device, of its data sheet, and the fraction of them that is reached."""

    name: str = "H100 SXM"
    flops: float = 989e12
    bytes_per_second: float = 3.35e12
    memory: float = 80e9
    reached: float = 0.4
    link: float = 50e9
    """Bytes a second of a message between processes, each way."""


def store_bytes(job: Job) -> float:
    """Bytes of a store of all layers."""
    return job.n_tokens * job.layers * (job.d * job.itemsize + PLACE_BYTES)


def collect_flops(job: Job) -> float:
    """Operations of running the model over all tokens: two for each parameter."""
    return 2 * job.parameters * job.n_tokens


def weights(job: Job, n_latent: int = 1) -> float:
    """Weights of an untied dictionary that a process has."""
    return job.latents * (2 * job.d + 1) / n_latent + job.d


def training_bytes(job: Job, n_latent: int = 1) -> float:
    """Bytes of weights and moments, which a checkpoint also has."""
    return STEP_COPIES * FLOAT * weights(job, n_latent)


def step_flops(job: Job, n_latent: int = 1, n_data: int = 1) -> float:
    """Operations of a step: the dense product, and seven sparse ones with the codes."""
    sparse = 7 * 2 * job.batch * job.k * job.d / n_latent
    return 2 * job.batch * job.d * job.latents / n_latent / n_data + sparse


def gathered_bytes(job: Job) -> float:
    """Bytes that a process gives to the gathering of candidates in a step."""
    return FLOAT * job.batch * job.k


def summed_bytes(job: Job) -> float:
    """Bytes that a process gives to sums in a step: reconstructions, and the encoder's input."""
    return FLOAT * (job.batch + 1) * job.d


def received_bytes(job: Job, n_latent: int) -> float:
    """Bytes that a process receives in a step, with sums that go round in a ring."""
    others = n_latent - 1
    return others * gathered_bytes(job) + 2 * others / n_latent * summed_bytes(job)


def step_seconds(job: Job, device: Device, n_latent: int = 1) -> tuple[float, float]:
    """Seconds of a step that a device computes, and that it waits for messages."""
    product = step_flops(job, n_latent) / device.flops / device.reached
    traffic = UPDATE_BYTES * weights(job, n_latent) / device.bytes_per_second / device.reached
    return product + traffic, received_bytes(job, n_latent) / device.link


def train_hours(job: Job, device: Device, n_latent: int = 1) -> float:
    """Device hours of the dictionaries of all layers, one pass over all tokens."""
    steps = job.n_tokens / job.batch * job.layers
    return steps * sum(step_seconds(job, device, n_latent)) * n_latent / 3600


def match_flops(job: Job, passes: float = 2.0) -> float:
    """Operations of pricing all pairs of neighboring layers, each row a few times."""
    return (job.layers - 1) * passes * 2 * job.latents**2 * job.d


def match_bytes(job: Job, listed: int = 64) -> float:
    """Bytes of a pair in matching: both decoders, and the cheapest columns of each row."""
    return 2 * FLOAT * job.latents * job.d + job.latents * listed * 12


def size(n_bytes: float) -> str:
    """Bytes in the largest unit that fits."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:,.1f} {unit}"
    return f"{n_bytes:,.0f} B"


def table_of_stages() -> str:
    """Stages of the job for four sizes of the dictionaries."""
    device = Device()
    sizes = (16_384, 65_536, 262_144, 1_048_576)
    jobs = [Job(latents=n) for n in sizes]
    rows = [
        ("latents", [f"{n:,}" for n in sizes]),
        ("store, bfloat16", [size(store_bytes(j)) for j in jobs]),
        ("collecting, device hours", [
            f"{collect_flops(j) / device.flops / device.reached / 3600:.1f}" for j in jobs]),
        ("reading the store once", [size(store_bytes(j)) for j in jobs]),
        ("dictionaries of all layers", [size(j.layers * FLOAT * weights(j)) for j in jobs]),
        ("training: weights and moments of a layer", [size(training_bytes(j)) for j in jobs]),
        ("step, ms", [f"{1e3 * sum(step_seconds(j, device)):.1f}" for j in jobs]),
        ("training all layers, device hours", [f"{train_hours(j, device):,.0f}" for j in jobs]),
        ("matching: memory of a pair", [size(match_bytes(j)) for j in jobs]),
        ("matching all neighbors, device hours", [
            f"{match_flops(j) / 67e12 / device.reached / 3600:.2g}" for j in jobs]),
    ]  # fmt: skip
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    return "\n".join([lines[0], "|---" * (len(sizes) + 1) + "|", *lines[1:]]) + "\n"


def table_of_processes() -> str:
    """Sharded training of one layer with 1,048,576 latents."""
    device, job = Device(), Job(latents=1_048_576)
    lines = [
        "| processes | memory of one | received | computing, ms | messages, ms | efficiency |",
        "|---|---|---|---|---|---|",
    ]
    alone = sum(step_seconds(job, device))
    for n in (1, 2, 4, 8, 16, 32, 64):
        computing, waiting = step_seconds(job, device, n)
        lines.append(
            f"| {n} | {size(training_bytes(job, n))} | {size(received_bytes(job, n))} | "
            f"{1e3 * computing:.1f} | {1e3 * waiting:.1f} | "
            f"{alone / n / (computing + waiting):.0%} |"
        )
    return "\n".join(lines) + "\n"


TABLES = {"stages": table_of_stages, "processes": table_of_processes}


def main() -> None:
    """Write the tables into the page, or compare them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    text = PAGE.read_text()
    new = MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)
    if parser.parse_args().check:
        sys.exit(new != text)
    PAGE.write_text(new)


if __name__ == "__main__":
    main()
