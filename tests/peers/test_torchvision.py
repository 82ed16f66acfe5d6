"""Sites of the stock networks of torchvision, without weights: `make test-peers`."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mechatlas.activations.sites import list_sites, read_activations

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
PEERS = Path(os.environ.get("MECHATLAS_PEERS", ROOT / ".venv-peers"))
NETWORKS = {
    "alexnet": 64, "vgg11_bn": 32, "resnet18": 32, "resnext50_32x4d": 32, "squeezenet1_1": 32,
    "googlenet": 32, "inception_v3": 75, "densenet121": 32, "mobilenet_v2": 32,
    "mobilenet_v3_small": 32, "shufflenet_v2_x0_5": 32, "mnasnet0_5": 32, "efficientnet_b0": 32,
    "efficientnet_v2_s": 32, "regnet_y_400mf": 32, "convnext_tiny": 32, "swin_t": 32,
    "swin_v2_t": 64, "vit_b_16": 32, "maxvit_t": 224,
}  # fmt: skip
"""Names of networks, and the side of the images that they are given."""


@pytest.fixture(scope="module")
def models() -> Any:
    """Module of torchvision's networks; its own torch is not needed."""
    packages = next(PEERS.glob("lib/python3*/site-packages/torchvision"), None)
    if packages is None:
        pytest.skip(f"needs torchvision in {PEERS}: tools/make_peers.sh")
    sys.path.append(str(packages.parent))
    try:
        sys.path.insert(0, str(ROOT / "tools"))
        shims = importlib.import_module("peer_shims")  # declares operators that do not load
        yield importlib.import_module("torchvision.models")
        del shims
    finally:
        sys.path.remove(str(ROOT / "tools"))
        sys.path.remove(str(packages.parent))


def own_values(network: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """Tensors that each module returned, call by call, cloned at once."""
    values: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in network.named_modules():

        def keep(_module: nn.Module, _args: Any, out: Any, name: str = name) -> None:
            tensor = out[0] if isinstance(out, tuple) else out
            if isinstance(tensor, Tensor):
                values.setdefault(name, []).append(tensor.clone())

        handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return values


@pytest.mark.parametrize("name", NETWORKS)
def test_all_sites_are_what_the_modules_returned(name, models):
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if name == "vit_b_16":
        options["image_size"] = NETWORKS[name]
    network = getattr(models, name)(weights=None, **options).eval()
    x = torch.randn(1, 3, NETWORKS[name], NETWORKS[name])
    truth = own_values(network, x)
    with torch.no_grad():
        sites = [str(info.site) for info in list_sites(network, x)]
        found = read_activations(network, x, sites)
    assert len(sites) > 20 or name == "alexnet"
    wrong = []
    for site in sites:
        module, _, call = site.partition("#")
        value = truth[module][int(call or 1) - 1]
        assert call or len(truth[module]) == 1, f"{site} is one of several calls"
        if not torch.equal(found[site], value):
            wrong.append(site)
    assert not wrong, f"{len(wrong)} of {len(sites)} sites: {wrong[:5]}"
    listed = {site.partition("#")[0] for site in sites}
    assert set(truth) - listed <= {"", *(n for n in truth if truth[n][0].ndim < 2)}
