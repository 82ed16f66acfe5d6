import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from mechatlas.activations.architectures.inception_v1 import inception_v1
from mechatlas.activations.sites import find_sites, read_activations
from mechatlas.base import InputError, UserError, WeightsError

# Block: channels in, then 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
BLOCKS = {
    "mixed3a": (192, 64, 96, 128, 16, 32, 32),
    "mixed3b": (256, 128, 128, 192, 32, 96, 64),
    "mixed4a": (480, 192, 96, 204, 16, 48, 64),
    "mixed4b": (508, 160, 112, 224, 24, 64, 64),
    "mixed4c": (512, 128, 128, 256, 24, 64, 64),
    "mixed4d": (512, 112, 144, 288, 32, 64, 64),
    "mixed4e": (528, 256, 160, 320, 32, 128, 128),
    "mixed5a": (832, 256, 160, 320, 48, 128, 128),
    "mixed5b": (832, 384, 192, 384, 48, 128, 128),
}
LUCENT = "1x1", "3x3_bottleneck", "3x3", "5x5_bottleneck", "5x5", "pool_reduce"
CAPTUM = "conv_1x1", "conv_3x3_reduce", "conv_3x3", "conv_5x5_reduce", "conv_5x5", "pool_proj"
STEM = [("conv2d0_pre_relu_conv", "conv1"), ("conv2d1_pre_relu_conv", "conv2")]
STEM += [("conv2d2_pre_relu_conv", "conv3"), ("softmax2_pre_activation_matmul", "fc")]
NORMS = {"lucent": (9, 1e-4, 0.5, 1.0), "captum": (11, 0.0011, 0.5, 2.0)}


@pytest.fixture(scope="module")
def weights():
    """Random weights under Lucent's names, biases included."""
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "conv2d0_pre_relu_conv": (64, 3, 7, 7),
        "conv2d1_pre_relu_conv": (64, 64, 1, 1),
        "conv2d2_pre_relu_conv": (192, 64, 3, 3),
        "softmax2_pre_activation_matmul": (1008, 1024),
    }
    for block, (n_in, *widths) in BLOCKS.items():
        inputs = (n_in, n_in, widths[1], n_in, widths[3], n_in)
        for part, width, n, side in zip(LUCENT, widths, inputs, (1, 1, 3, 1, 5, 1), strict=True):
            shapes[f"{block}_{part}_pre_relu_conv"] = (width, n, side, side)
    tensors = {}
    for name, shape in shapes.items():
        fan_in = torch.Size(shape[1:]).numel()
        noise = torch.randn(shape, generator=generator)
        tensors[f"{name}.weight"] = noise * (2 / fan_in) ** 0.5
        tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 3
    return tensors


@pytest.fixture(scope="module")
def files(weights, tmp_path_factory):
    """The same weights as both projects save them, with auxiliary heads."""
    folder = tmp_path_factory.mktemp("inception_v1")
    lucent = folder / "lucent.pth"
    heads = {"head0_bottleneck_pre_relu_conv.weight": torch.ones(2, 2, 1, 1)}
    heads |= {"nn1_pre_relu_matmul.bias": torch.ones(2)}
    heads |= {"softmax0_pre_activation_matmul.weight": torch.ones(2, 2)}
    torch.save(weights | heads, lucent)
    captum = folder / "captum.safetensors"
    heads = {"aux1.loss_conv.weight": torch.ones(2), "aux2.loss_classifier.bias": torch.ones(2)}
    save_file(as_captum(weights) | heads, captum)
    return {"lucent": lucent, "captum": captum}


def as_captum(weights):
    names = dict(STEM)
    for block in BLOCKS:
        for lucent, captum in zip(LUCENT, CAPTUM, strict=True):
            names[f"{block}_{lucent}_pre_relu_conv"] = f"{block}.{captum}"
    renamed = {}
    for key, tensor in weights.items():
        module, _, kind = key.rpartition(".")
        renamed[f"{names[module]}.{kind}"] = tensor
    return renamed


def normalised(x, size, alpha, beta, k):
    """Local response normalisation, channel by channel."""
    squares = x.square()
    n = x.shape[1]
    total = torch.zeros_like(x)
    for c in range(n):
        total[:, c] = squares[:, max(0, c - size // 2) : min(n, c + size // 2 + 1)].sum(dim=1)
    return x / (k + alpha * total / size) ** beta


def reference(weights, images, norm):
    """The activations of every stage, written down without a module."""

    def conv(x, name, pad=(0, 0, 0, 0), stride=1):
        x = functional.pad(x, pad)
        name += "_pre_relu_conv"
        return functional.conv2d(
            x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride
        ).clamp(min=0)

    def pool(x, pad, stride):
        x = functional.pad(x, pad, value=-torch.inf)
        windows = x.unfold(2, 3, stride).unfold(3, 3, stride)
        return windows.amax(dim=(4, 5))

    def mixed(x, name):
        branches = [
            conv(x, f"{name}_1x1"),
            conv(conv(x, f"{name}_3x3_bottleneck"), f"{name}_3x3", (1,) * 4),
            conv(conv(x, f"{name}_5x5_bottleneck"), f"{name}_5x5", (2,) * 4),
            conv(pool(x, (1,) * 4, 1), f"{name}_pool_reduce"),
        ]
        found[name] = torch.cat(branches, dim=1)
        return found[name]

    found = {}
    x = conv(images * 255 - 117, "conv2d0", (2, 3, 2, 3), 2)
    found["conv2d0"] = x
    x = normalised(pool(x, (0, 1, 0, 1), 2), *norm)
    x = normalised(conv(conv(x, "conv2d1"), "conv2d2", (1,) * 4), *norm)
    x = pool(x, (0, 1, 0, 1), 2)
    for name in BLOCKS:
        if name in ("mixed4a", "mixed5a"):
            x = pool(x, (0, 1, 0, 1), 2)
        x = mixed(x, name)
    last = "softmax2_pre_activation_matmul"
    logits = x.mean(dim=(2, 3)) @ weights[f"{last}.weight"].T + weights[f"{last}.bias"]
    return found, logits


def photograph(side, seed=0):
    """Blotches rather than noise, so that pooling and normalisation have something to do."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, side // 8, side // 8, generator=generator)
    return functional.interpolate(coarse, size=side, mode="bilinear")


def close(found, expected):
    """Equal to 1e-4 of the largest value."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("port", ["lucent", "captum"])
@torch.no_grad()
def test_a_file_of_either_port_gives_the_function_of_that_port(port, files, weights):
    network = inception_v1(files[port])
    assert network.variant == port
    images = photograph(224)
    expected, logits = reference(weights, images, NORMS[port])
    close(network(images), logits)
    found = read_activations(network, images, find_sites(network, ["conv2d0", "mixed*"]))
    for site, activation in found.items():
        close(activation, expected[site.module])
    assert expected["mixed4a"].shape == (1, 508, 14, 14)


@torch.no_grad()
def test_the_ports_differ_only_in_how_they_normalise(files):
    images = photograph(64)
    lucent, captum = inception_v1(files["lucent"]), inception_v1(files["captum"])
    assert (lucent(images) - captum(images)).abs().max() > 0.01 * captum(images).abs().max()
    forced = inception_v1(files["captum"], variant="lucent")
    torch.testing.assert_close(forced(images), lucent(images))


def test_branches_are_the_slices_that_the_branches_write(files):
    network = inception_v1(files["lucent"])
    sites = find_sites(network, ["mixed4b/*", "mixed4b.conv_5x5", "mixed4b.project"])
    with torch.no_grad():
        found = {
            str(site): x for site, x in read_activations(network, photograph(64), sites).items()
        }
    widths = {name: found[f"mixed4b/{name}"].shape[1] for name in ("1x1", "3x3", "5x5", "pool")}
    assert widths == {"1x1": 160, "3x3": 224, "5x5": 64, "pool": 64}
    torch.testing.assert_close(found["mixed4b/5x5"], found["mixed4b.conv_5x5"])
    torch.testing.assert_close(found["mixed4b/pool"], found["mixed4b.project"])


@torch.no_grad()
def test_random_weights_repeat_and_carry_activity_to_the_last_layer():
    network, again = inception_v1(seed=1), inception_v1(seed=1)
    images = photograph(64)
    torch.testing.assert_close(network(images), again(images))
    assert not torch.equal(network(images), inception_v1(seed=2)(images))
    for site, x in read_activations(
        network, images, find_sites(network, ["conv2d*", "mixed*"])
    ).items():
        assert (x > 0).float().mean() > 0.2, site
        assert (x > 0).any(dim=(0, 2, 3)).float().mean() > 0.5, site
        assert 1 < x.square().mean().sqrt() < 1000, site


def test_own_names_load_only_if_the_port_is_said(tmp_path):
    network = inception_v1(variant="captum")
    torch.save(network.state_dict(), tmp_path / "own.pt")
    with pytest.raises(WeightsError, match="Pass variant='lucent' or variant='captum'"):
        inception_v1(tmp_path / "own.pt")
    loaded = inception_v1(tmp_path / "own.pt", variant="captum")
    images = photograph(32)
    torch.testing.assert_close(loaded(images), network(images))


def test_an_unknown_port_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="one of lucent, captum, got 'lucid'"):
        inception_v1(variant="lucid")


def test_missing_and_surplus_and_misshapen_keys_are_all_named(weights, tmp_path):
    damaged = dict(weights)
    del damaged["mixed4b_5x5_bottleneck_pre_relu_conv.weight"]
    damaged["mixed4f_1x1_pre_relu_conv.weight"] = torch.ones(1)
    damaged["softmax2_pre_activation_matmul.bias"] = torch.ones(1000)
    torch.save(damaged, tmp_path / "damaged.pth")
    with pytest.raises(WeightsError) as refusal:
        inception_v1(tmp_path / "damaged.pth")
    assert "missing mixed4b.reduce_5x5.conv.weight" in str(refusal.value)
    assert "surplus mixed4f_1x1_pre_relu_conv.weight" in str(refusal.value)
    assert "classify.bias has shape (1000,), expected (1008,)" in str(refusal.value)


@pytest.mark.parametrize("port", ["lucent", "captum"])
def test_half_a_file_is_refused(port, files, tmp_path):
    whole = files[port].read_bytes()
    half = tmp_path / f"half{files[port].suffix}"
    half.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="Is the file whole"):
        inception_v1(half)


def test_bytes_are_refused_by_the_networks_name():
    with pytest.raises(InputError, match=r"inception_v1 expects RGB values in 0\.\.1, got"):
        inception_v1()(photograph(32) * 255)
