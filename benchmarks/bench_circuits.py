"""All pairs of 2,048 x 2,048 features, by every branch, against the floor of its products.

Also the cost of following activations of sixteen samples through the gates that they meet.

Run: `python benchmarks/bench_circuits.py`. Prints process CPU seconds, the ratio to the matrix
products alone, and the largest memory of the process.
"""

import time

import torch

from mechatlas.activations.architectures.inception_v1 import inception_v1
from mechatlas.analysis.circuits.recording import record_gates
from mechatlas.analysis.circuits.virtual_weights import compose_responses, encoder_rows, pair_blocks
from mechatlas.analysis.circuits.wiring import trace_wiring
from mechatlas.app.run_folder import peak_bytes
from mechatlas.base import Site
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.sparsity import TopK


def main(n: int = 2048) -> None:
    """Weigh mixed4b -> mixed4c of InceptionV1 with random dictionaries."""
    network = inception_v1().eval()
    wiring = trace_wiring(network, Site("mixed4b"), Site("mixed4c"), torch.rand(1, 3, 64, 64))
    a = Autoencoder(d_in=512, n_latents=n, sparsity=TopK(k=32))
    b = Autoencoder(d_in=512, n_latents=n, sparsity=TopK(k=32), seed=1)
    encoder = b.W_enc.detach()
    maps = torch.randn(16, 512, 14, 14).relu()
    clock = time.process_time()
    record_gates(wiring, a, b, [maps])
    followed = time.process_time() - clock
    clock = time.process_time()
    found = compose_responses(wiring, a)
    composed = time.process_time() - clock
    clock = time.process_time()
    for response in found:
        rows = encoder_rows(wiring, response, encoder).T.contiguous()
        for values in response.values:
            torch.mm(rows, values.T)
    floor = time.process_time() - clock
    clock = time.process_time()
    total = sum(float(block.norm.sum()) for block in pair_blocks(wiring, found, encoder))
    taken = time.process_time() - clock
    taps = sum(len(response.taps) for response in found)
    print(f"{n} x {n} features, {taps} taps: composing {composed:.2f} s, products {floor:.2f} s,")
    print(f"all pairs {taken:.2f} s ({taken / floor:.2f} of the floor), norms {total:.6g},")
    print(f"following activations {followed / len(maps):.2f} s a sample,")
    print(f"peak {peak_bytes() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
