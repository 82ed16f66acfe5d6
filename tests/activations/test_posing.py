"""Stores of all poses: the right blocks, exactly, at places that mean the same in every pose."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mechatlas.activations import collect as module
from mechatlas.activations.architectures.inception import InceptionMini, inception_mini
from mechatlas.activations.collect import StoreConfig, collect
from mechatlas.activations.posing import PoseConfig, action_of, places_of
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Arrays, Images, Samples, open_samples
from mechatlas.activations.sites import find_sites, read_activations
from mechatlas.activations.store import Store
from mechatlas.base import InputError, Site, StoreError
from mechatlas.maths.actions import Custom, Rotate
from mechatlas.maths.groups import GroupError
from mechatlas.maths.named_groups import group, permutation_group
from tests.activations.test_collect import files
from tests.conformance import ROWS_CHECKS
from tests.maths.permutations import Permute
from tests.networks import tiny

SIDE = 15
NETWORK = tiny()
MIXED, FIRST = find_sites(NETWORK, ["mixed", "first"])
D4 = PoseConfig(name="D4")


def images(folder: Path, n: int = 30, side: int = SIDE, network: nn.Module = NETWORK) -> Samples:
    source = folder / f"images{side}.npy"
    random = np.random.default_rng(0)
    np.save(source, random.integers(0, 256, (n, side, side, 3), dtype=np.uint8))
    return open_samples(Images(source=str(source), side=side), network)


def every(samples: Samples) -> Tensor:
    return samples.stack([samples.read(i) for i in range(len(samples))])


def rows_at(store: Store, site: str = "mixed") -> dict[tuple[int, int, int], Tensor]:
    """Rows by sample, y and x."""
    return {
        tuple(place): row
        for batch, where in store.rows(site).scan()
        for row, place in zip(batch.x, where.tolist(), strict=True)
    }


ALL = StoreConfig(positions=Positions(rule="all"), batch_size=7)


def test_a_block_is_the_activation_of_the_posed_input_at_the_moved_place(tmp_path):
    samples = images(tmp_path, 12)
    store = collect(NETWORK, samples, [MIXED, FIRST], tmp_path / "store", ALL, group=D4)
    d4, action = group("D4"), Rotate(group("D4"))
    assert store.group == d4
    assert getattr(store.group, "element_names", None) == d4.element_names
    for site, d in ((MIXED, 8), (FIRST, 6)):
        shape = store.shapes[str(site)]
        assert shape.width == 8 * d
        rows = rows_at(store, str(site))
        reach = 2 if site == MIXED else 1
        assert len(rows) == 12 * (SIDE - 2 * reach) ** 2 == 12 * (shape.places or 0)
        for g in range(8):
            posed = read_activations(NETWORK, action(g, every(samples)), [site])[site]
            back = action.pull_back(g, posed)
            sample, y, x = torch.tensor(list(rows)).T
            found = torch.stack(list(rows.values()))[:, g * d : (g + 1) * d]
            torch.testing.assert_close(found, back[sample, :, y, x].detach(), atol=1e-6, rtol=1e-5)
    assert store.shapes["mixed"].branches == {"left": [0, 5], "right": [5, 8]}
    assert store.rows("mixed/right").d_in == 3


def test_the_rows_of_a_posed_input_are_those_of_the_input_with_blocks_permuted(tmp_path):
    # x(hI)_g = a(ghI) = x(I)_gh, at the place where h takes the content.
    samples = images(tmp_path, n=4)
    pixels = np.stack([samples.read(i) for i in range(4)])
    plain = rows_at(collect(NETWORK, samples, [MIXED], tmp_path / "plain", ALL, group=D4))
    d4, action = group("D4"), Rotate(group("D4"))
    for h in (1, 3, 5):
        turned = np.ascontiguousarray(action(h, pixels.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1))
        np.save(tmp_path / f"turned{h}.npy", turned)
        its = open_samples(Images(source=str(tmp_path / f"turned{h}.npy"), side=SIDE), NETWORK)
        posed = rows_at(collect(NETWORK, its, [MIXED], tmp_path / str(h), ALL, group=D4))
        assert len(posed) == len(plain)
        places = np.array(list(plain))
        moved = action.moved(h, places[:, 1:].astype(np.float64), SIDE).round().astype(int).tolist()
        at = zip(places[:, 0].tolist(), moved, strict=True)
        found = torch.stack([posed[sample, y, x] for sample, (y, x) in at])
        wanted = torch.stack(list(plain.values())).reshape(-1, 8, 8)[:, d4.table[:, h].tolist()]
        torch.testing.assert_close(found.reshape(-1, 8, 8), wanted, atol=1e-6, rtol=1e-5)


def test_poses_of_a_symmetric_network_give_equal_blocks_at_every_site(tmp_path):
    network = inception_mini().double().float()
    action = Rotate(group("D4"))
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            kernel = part.weight.detach()
            part.weight = nn.Parameter(torch.stack([action(g, kernel) for g in range(8)]).mean(0))
    samples = images(tmp_path, 3, 63, network)
    sites = find_sites(network, ["mixed3a", "mixed3b", "mixed4a"])
    store = collect(network, samples, sites, tmp_path / "store", group=D4)
    for site in store.sites:
        blocks = next(store.rows(site).batches(20)).x.reshape(20, 8, -1)
        torch.testing.assert_close(blocks, blocks[:, :1].expand_as(blocks), atol=2e-4, rtol=1e-3)
        assert blocks.std() > 0.01


def test_turns_that_interpolate_stay_inside_the_circle_and_close_to_the_truth(tmp_path):
    # A network whose output at a place is the mean of what it sees: the same in every pose.
    network = nn.Sequential(nn.AvgPool2d(7, stride=2))
    random = np.random.default_rng(0)
    small = torch.from_numpy(random.random((6, 3, 6, 6)))
    smooth = nn.functional.interpolate(small, 61, mode="bicubic", align_corners=True).clamp(0, 1)
    np.save(tmp_path / "x.npy", smooth.permute(0, 2, 3, 1).numpy())
    samples = open_samples(Images(source=str(tmp_path / "x.npy"), side=61), network)
    for matched in (False, True):
        posing = PoseConfig(name="D16", matched_blur=matched)
        out = tmp_path / f"store {matched}"
        store = collect(network, samples, [Site("0")], out, ALL, group=posing)
        places = store.shapes["0"].places
        assert places is not None
        assert 300 < places < 28 * 28 * 0.75
        blocks = torch.stack(list(rows_at(store, "0").values())).reshape(-1, 32, 3)
        # What is seen is a square, which a turned network would see turned.
        assert float((blocks - blocks[:, :1]).abs().mean()) < 0.01
        assert float((blocks - blocks[:, :1]).abs().max()) < 0.08
        assert store.manifest["group"]["matched_blur"] is matched


@pytest.mark.parametrize("rule", ["norm", "random"])
@pytest.mark.parametrize("paired", [False, True])
def test_places_are_drawn_among_those_kept_and_pair_up(tmp_path, rule, paired):
    settings = StoreConfig(
        positions=Positions(rule=rule, per_sample=6), paired=paired, batch_size=7
    )
    store = collect(NETWORK, images(tmp_path), [FIRST, MIXED], tmp_path / "s", settings, group=D4)
    places = {site: list(rows_at(store, site)) for site in store.sites}
    assert all(len(found) == 30 * 6 for found in places.values())
    for _, y, x in places["mixed"]:
        assert 2 <= min(y, x) <= max(y, x) < SIDE - 2
    assert (places["mixed"] == places["first"]) == paired
    if paired:
        assert store.paired(["first", "mixed"]).d_in == 8 * (6 + 8)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_of_a_group_store_pass_for_rows_in_every_format(tmp_path, dtype):
    settings = StoreConfig(positions=Positions(per_sample=3), dtype=dtype)
    store = collect(NETWORK, images(tmp_path), [MIXED], tmp_path / "store", settings, group=D4)
    for check in ROWS_CHECKS:
        check(store.rows())


def test_a_run_that_stops_between_rounds_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 4000)

    def in_five_rounds(n_samples, shapes, settings):
        assert shapes[MIXED].width in (64, 32, 8), "the budget must count every block"
        return [module.Round("train", part) for part in np.array_split(np.arange(n_samples), 5)]

    monkeypatch.setattr(module, "_plan", in_five_rounds)
    samples = images(tmp_path)

    def run(out: Path, stop: int = 10**9) -> Store:
        def progress(done: int, total: int) -> None:
            if done > stop:
                raise KeyboardInterrupt

        return collect(NETWORK, samples, [MIXED], out, group=D4, on_progress=progress)

    run(tmp_path / "whole")
    for stop in (7, 13, 25):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", stop)
    run(tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    with pytest.raises(StoreError, match=r"differs in group"):
        collect(NETWORK, samples, [MIXED], tmp_path / "whole", group=PoseConfig(name="C4"))
    with pytest.raises(StoreError, match=r"differs in group"):
        collect(NETWORK, samples, [MIXED], tmp_path / "whole")


def test_a_plain_store_has_no_group(tmp_path):
    store = collect(NETWORK, images(tmp_path), [MIXED], tmp_path / "store")
    assert store.group is None
    assert "group" not in store.manifest
    assert json.loads((tmp_path / "store/manifest.json").read_text())["sites"]["mixed"].keys() == {
        "width", "grid", "branches",
    }  # fmt: skip


def test_hues_keep_every_position(tmp_path):
    samples = images(tmp_path, 5)
    posing = PoseConfig(name="C3", action="hue")
    store = collect(NETWORK, samples, [MIXED], tmp_path / "store", ALL, group=posing)
    rows = rows_at(store)
    assert len(rows) == 5 * SIDE**2
    sample, y, x = torch.tensor(list(rows)).T
    for g in range(3):
        whole = read_activations(NETWORK, every(samples).roll(g, dims=1), [MIXED])[MIXED].detach()
        found = torch.stack(list(rows.values()))[:, 8 * g : 8 * g + 8]
        torch.testing.assert_close(found, whole[sample, :, y, x], atol=1e-6, rtol=1e-5)


def test_shifts_of_tokens_follow_the_tokens(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 6, 5)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    network = nn.Sequential(nn.Linear(5, 4))
    samples = open_samples(Arrays(source=tmp_path / "x.npy"), network)

    def roll(g: int, inputs: Tensor) -> Tensor:
        return inputs.roll(2 * g, dims=1)

    def moved(g, points, side):
        return np.stack([points[:, 0], (points[:, 1] + 2 * g) % 6], axis=1)

    roll.moved = moved  # pyright: ignore[reportFunctionMemberAccess]
    action = Custom(group("C3"), roll, name="roll")
    store = collect(network, samples, [Site("0")], tmp_path / "store", ALL, group=action)
    for row in rows_at(store, "0").values():
        blocks = row.reshape(3, 4)
        torch.testing.assert_close(blocks, blocks[:1].expand(3, 4))


def test_permutations_of_channels_act_on_plain_vectors(tmp_path):
    s3, permutations = permutation_group([[1, 0, 2], [1, 2, 0]], name="S3")
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    network = nn.Sequential(nn.Linear(3, 4))
    samples = open_samples(Arrays(source=tmp_path / "x.npy"), network)
    action = Permute(s3, permutations)
    store = collect(network, samples, [Site("0")], tmp_path / "store", ALL, group=action)
    for (sample, _, _), row in rows_at(store, "0").items():
        posed = torch.cat([action(g, torch.from_numpy(x[sample : sample + 1])) for g in range(6)])
        torch.testing.assert_close(row, network(posed).detach().flatten())


def brightness(g: int, inputs: Tensor) -> Tensor:
    return inputs * (1 - 0.3 * g)


def test_what_cannot_be_is_refused_in_one_sentence(tmp_path):
    network = InceptionMini()
    with pytest.raises(
        InputError,
        match=r"No position of mixed4a sees only the inside of an image of side 31 in all poses "
        r"of D4 \(it sees 45 pixels\)\. Images of side 47 would do",
    ):
        collect(
            network, images(tmp_path, 3, 31, network), [Site("mixed4a")], tmp_path / "a", group=D4
        )
    with pytest.raises(
        InputError,
        match=r"side 64, D4 does not take the positions of mixed3a to positions.*side 65 would do",
    ):
        collect(
            network, images(tmp_path, 3, 64, network), [Site("mixed3a")], tmp_path / "a", group=D4
        )
    samples = images(tmp_path, 3, 31, network)
    with pytest.raises(InputError, match="Every unit of classify sees the whole image"):
        collect(network, samples, [Site("classify")], tmp_path / "a", group=PoseConfig(name="C8"))
    posing = PoseConfig(name="C2", action="tests.activations.test_posing:brightness")
    with pytest.raises(GroupError, match=r"does not act as C2: element 1 after 1 differs"):
        collect(NETWORK, images(tmp_path), [MIXED], tmp_path / "a", group=posing)
    with pytest.raises(ValueError, match="There is no function 'nowhere:f' to act with"):
        action_of(PoseConfig(name="C2", action="nowhere:f"))
    with pytest.raises(ValueError, match="action must be rotate, hue, shift, scale or package"):
        PoseConfig(name="C2", action="rotat")
    with pytest.raises(ValueError, match="matched_blur has nothing to match: D4 is exact"):
        PoseConfig(name="D4", matched_blur=True)
    with pytest.raises(GroupError, match="rotate needs a group C_n"):
        PoseConfig(name="S4")
    action = Custom(group("C2").relabel([1, 0]), lambda _, x: x)
    with pytest.raises(GroupError, match="has its identity at 1"):
        collect(NETWORK, images(tmp_path), [MIXED], tmp_path / "a", group=action)
    assert not (tmp_path / "a").exists()


def test_units_that_see_everything_may_be_posed_exactly(tmp_path):
    network = InceptionMini()
    samples = images(tmp_path, 3, 31, network)
    store = collect(network, samples, [Site("classify")], tmp_path / "s", ALL, group=D4)
    action = Rotate(group("D4"))
    for (sample, _, _), row in rows_at(store, "classify").items():
        posed = torch.cat([action(g, every(samples)[sample : sample + 1]) for g in range(8)])
        torch.testing.assert_close(row, network(posed).detach().flatten(), atol=1e-4, rtol=1e-4)


def test_every_kept_place_sees_nothing_outside_the_circle_in_any_pose(tmp_path):
    # What is outside the circle must not matter at all.
    network = inception_mini()
    action = Rotate(group("C6"))
    x = every(images(tmp_path, 2, 63, network))
    site = Site("mixed3a")
    places = places_of(action, network, site, x[:1])
    y, z = np.indices((63, 63)) - 31
    outside = torch.from_numpy(np.hypot(y, z) > 31)
    other = torch.where(outside, torch.rand(2, 3, 63, 63), x)
    chosen = torch.arange(len(places.kept)).expand(2, -1)
    for g in range(6):
        one, two = (
            read_activations(network, action(g, i), [site])[site].detach().flatten(2).mT
            for i in (x, other)
        )
        found = places.take(g, one, chosen), places.take(g, two, chosen)
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    plain = read_activations(network, x, [site])[site].detach().flatten(2).mT
    torch.testing.assert_close(
        places.take(0, plain, chosen), plain[:, places.kept], atol=1e-5, rtol=1e-5
    )
