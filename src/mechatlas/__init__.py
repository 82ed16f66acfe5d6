"""An atlas of the features of any trained PyTorch network.

    import mechatlas as ma

    network = ma.load_network(ma.Network(name="inception_mini"))
    samples = ma.open_samples(ma.Images(source="photos", side=63, crops=50), network)
    store = ma.collect(network, samples, ma.find_sites(network, ["mixed3b"]), Path("store"))
    rows = store.rows("mixed3b")
    dictionary = ma.train(ma.Autoencoder(d_in=rows.d_in, n_latents=1024), rows, steps=500)

The names are listed in `__init__.pyi` and imported when first used, so that `import mechatlas`
costs next to nothing.
"""

import importlib

import lazy_loader

from mechatlas import deprecated

_look_up, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    if name not in deprecated.NAMES:
        return _look_up(name)
    home, _, new = deprecated.NAMES[name].rpartition(".")
    deprecated.warn(f"mechatlas.{name}", deprecated.NAMES[name])
    return getattr(importlib.import_module(home), new)
