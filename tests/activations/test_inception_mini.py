"""The bundled network: its accuracy, and that poses act exactly on its grids."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mechatlas.activations.architectures.inception import InceptionMini, inception_mini
from mechatlas.activations.branches import branches_of
from mechatlas.activations.networks import load_weights
from mechatlas.activations.sites import find_sites, read_activations
from mechatlas.base import InputError, WeightsError

POSES = [(turns, mirror) for turns in range(4) for mirror in (False, True)]


def pose(x: Tensor, turns: int, mirror: bool) -> Tensor:
    turned = torch.rot90(x, turns, dims=(2, 3))
    return turned.flip(3) if mirror else turned


@pytest.mark.parametrize("side", [31, 63])
@pytest.mark.parametrize(("turns", "mirror"), POSES)
def test_quarter_turns_and_mirrors_act_exactly_on_every_grid(side, turns, mirror):
    # With kernels that no pose changes, posing the image must pose every map exactly: then the
    # grids, the padding and the pooling are symmetric, which is all that the network adds.
    network = inception_mini().double()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            kernel = module.weight.detach()
            mean = torch.stack([pose(kernel, *p) for p in POSES]).mean(dim=0)
            module.weight = nn.Parameter(mean)
    x = torch.rand(
        2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    sites = find_sites(network, ["conv2d*", "mixed*"])
    plain, posed = (
        read_activations(network, x, sites),
        read_activations(network, pose(x, turns, mirror), sites),
    )
    for site in sites:
        assert plain[site].shape[2] % 2 == 1, f"{site} has an even side"
        torch.testing.assert_close(
            posed[site], pose(plain[site], turns, mirror), atol=1e-10, rtol=0
        )


def test_its_modules_are_named_as_in_inception_v1_and_have_four_branches():
    network = inception_mini()
    names = [name for name, m in network.named_modules() if hasattr(m, "branches")]
    assert names == ["mixed3a", "mixed3b", "mixed4a", "mixed4b", "mixed4c", "mixed4d"]
    for name in names:
        branches = branches_of(network, name)
        assert list(branches) == ["1x1", "3x3", "5x5", "pool"]


def test_a_branch_is_what_its_last_convolution_gives():
    network = inception_mini()
    x = torch.rand(1, 3, 31, 31)
    sites = find_sites(network, ["mixed4a/5x5", "mixed4a.conv_5x5"])
    found = read_activations(network, x, sites)
    torch.testing.assert_close(found[sites[0]], found[sites[1]])


def test_images_outside_0_to_1_are_refused_by_name():
    network = inception_mini()
    with pytest.raises(
        InputError, match=r"inception_mini expects RGB values in 0\.\.1, got 0\.\.255"
    ):
        network(torch.tensor([0.0, 255.0, 3.0])[None, :, None, None].expand(1, 3, 31, 31))
    with pytest.raises(InputError, match=r"expects images of shape \(batch, 3"):
        network.input(torch.zeros(1, 1, 31, 31))
    with pytest.raises(InputError, match="got nan"):
        network(torch.full((1, 3, 31, 31), torch.nan))


def test_weights_of_another_network_are_refused_with_every_key(tmp_path):
    from safetensors.torch import save_file

    tensors = {k: v.contiguous() for k, v in InceptionMini().state_dict().items()}
    tensors["conv2d9.bias"] = tensors.pop("conv2d0.conv.bias")
    tensors["classify.bias"] = torch.zeros(3)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as caught:
        inception_mini(weights=tmp_path / "w.safetensors")
    for part in ("missing conv2d0.conv.bias", "surplus conv2d9.bias", "expected (10,)"):
        assert part in str(caught.value)


def test_a_weights_file_cut_in_half_is_refused_by_name(tmp_path):
    from safetensors.torch import save

    whole = save({k: v.contiguous() for k, v in InceptionMini().state_dict().items()})
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    network = InceptionMini()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(WeightsError, match=r"half\.safetensors cannot be read"):
        load_weights(network, tmp_path / "half.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_accuracy_on_the_first_thousand_test_images(data):
    archive = zipfile.ZipFile(data("images/cifar10_jpeg.zip"))
    names = sorted(n for n in archive.namelist() if n.startswith("test/"))[::10]
    pictures = [Image.open(io.BytesIO(archive.read(n))).convert("RGB") for n in names]
    images = torch.from_numpy(np.stack([np.asarray(p)[:31, :31] for p in pictures]))
    labels = torch.tensor([InceptionMini.classes.index(n.split("/")[1]) for n in names])
    with torch.no_grad():
        logits = inception_mini()(images.permute(0, 3, 1, 2).float() / 255)
    assert len(names) == 1000
    assert (logits.argmax(1) == labels).float().mean() > 0.83  # 85 % less three standard errors
