import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from mechatlas.activations.architectures.squeezenet import SqueezeNet, squeezenet
from mechatlas.activations.sites import find_sites, read_activations
from mechatlas.base import InputError, Site, WeightsError

FILE = "squeezenet_v1_1_imagenet.safetensors"


def reference(weights, images):
    """The output of every Fire module, from the layout that the file describes."""

    def conv(x, name, **how):
        return functional.conv2d(
            x, weights[f"{name}.weight"], weights[f"{name}.bias"], **how
        ).relu()

    blue_green_red = torch.stack([images[:, 2], images[:, 1], images[:, 0]], dim=1)
    mean = torch.tensor([103.939, 116.779, 123.68])
    x = conv(255 * blue_green_red - mean.reshape(1, 3, 1, 1), "conv1", stride=2)
    found = {}
    for number in range(2, 10):
        if number in (2, 4, 6):
            x = functional.max_pool2d(x, 3, 2)
        squeezed = conv(x, f"fire{number}.squeeze")
        left = conv(squeezed, f"fire{number}.expand1x1")
        x = torch.cat([left, conv(squeezed, f"fire{number}.expand3x3", padding=1)], dim=1)
        found[f"fire{number}"] = x
    return found


def photographs(path, n):
    squares = []
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".JPEG"))
        for name in names[:: len(names) // n][:n]:
            image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            image = image.resize((223, 223), Image.Resampling.BICUBIC, box=box)
            squares.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    return torch.stack(squares)


@torch.no_grad()
def test_the_file_gives_the_function_that_its_layout_describes(data):
    path = data(FILE)
    network = squeezenet(path)
    images = torch.rand(2, 3, 127, 127, generator=torch.Generator().manual_seed(0))
    expected = reference(load_file(path), images)
    sites = find_sites(network, ["fire*"])
    assert [site.module for site in sites] == list(expected)
    for site, activation in read_activations(network, images, sites).items():
        torch.testing.assert_close(activation, expected[site.module], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(network(images), expected["fire9"], rtol=1e-4, atol=1e-2)


@torch.no_grad()
def test_the_two_branches_are_the_two_halves(data):
    network = squeezenet(data(FILE))
    images = torch.rand(1, 3, 79, 79, generator=torch.Generator().manual_seed(0))
    sites = find_sites(network, ["fire6", "fire6/*", "fire6.expand3x3"])
    found = {str(site): x for site, x in read_activations(network, images, sites).items()}
    assert found["fire6/expand1x1"].shape[1] == found["fire6/expand3x3"].shape[1] == 192
    torch.testing.assert_close(found["fire6/expand3x3"], found["fire6.expand3x3"])
    halves = torch.cat([found["fire6/expand1x1"], found["fire6/expand3x3"]], dim=1)
    torch.testing.assert_close(halves, found["fire6"])


@torch.no_grad()
def test_photographs_wake_deep_layers_more_in_bgr_than_in_rgb(data):
    network = squeezenet(data(FILE))
    images = photographs(data("images/imagenet_200.zip"), 20)
    site = Site("fire8")
    swapped = images.flip(1)
    norms, against = (
        read_activations(network, x, [site])[site].flatten(1).norm(dim=1) for x in (images, swapped)
    )
    assert int((norms > against).sum()) >= 15


@torch.no_grad()
def test_turning_image_and_kernels_turns_every_grid():
    torch.manual_seed(0)
    network = SqueezeNet()
    images = torch.rand(1, 3, 79, 79)
    straight = network(images)
    for name, parameter in network.named_parameters():
        if name.endswith("weight"):
            parameter.copy_(parameter.rot90(1, (2, 3)))
    torch.testing.assert_close(network(images.rot90(1, (2, 3))), straight.rot90(1, (2, 3)))


@torch.no_grad()
def test_a_classifier_in_the_file_gives_logits(tmp_path):
    torch.manual_seed(0)
    whole = SqueezeNet(n_classes=7)
    named = {k.replace(".conv.", "."): v for k, v in whole.state_dict().items()}
    assert "conv10.weight" in named
    assert "fire2.squeeze.bias" in named
    save_file(named, tmp_path / "whole.safetensors")
    network = squeezenet(tmp_path / "whole.safetensors")
    images = torch.rand(2, 3, 47, 47)
    assert network(images).shape == (2, 7)
    torch.testing.assert_close(network(images), whole(images))
    trunk = read_activations(network, images, [Site("fire9")])[Site("fire9")]
    head = functional.conv2d(trunk, named["conv10.weight"], named["conv10.bias"])
    torch.testing.assert_close(network(images), head.relu().mean(dim=(2, 3)))


def test_a_missing_key_is_named(tmp_path):
    named = {k.replace(".conv.", "."): v for k, v in SqueezeNet().state_dict().items()}
    del named["fire9.expand3x3.bias"]
    save_file(named, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match=r"missing fire9\.expand3x3\.conv\.bias"):
        squeezenet(tmp_path / "part.safetensors")


def test_half_a_file_is_refused(tmp_path):
    path = tmp_path / "half.safetensors"
    save_file({"conv1.weight": torch.ones(64, 3, 3, 3)}, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="Is the file whole"):
        squeezenet(path)


def test_bytes_are_refused_by_the_networks_name():
    with pytest.raises(InputError, match=r"squeezenet expects RGB values in 0\.\.1, got"):
        SqueezeNet()(torch.full((1, 3, 47, 47), 200.0))


def test_the_bundled_weights_are_the_published_ones_in_float16(data):
    network = squeezenet()
    published = squeezenet(data(FILE))
    assert network.conv10 is None
    for (name, own), (_, other) in zip(
        network.state_dict().items(), published.state_dict().items(), strict=True
    ):
        assert torch.equal(own, other.half().float()), name


def test_the_bundled_network_needs_no_file():
    from mechatlas.activations.networks import Network, load_network

    network = load_network(Network(name="squeezenet"))
    assert network(torch.zeros(1, 3, 63, 63)).shape == (1, 512, 3, 3)  # 63, 31, 15, 7, 3
