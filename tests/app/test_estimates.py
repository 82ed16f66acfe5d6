"""Estimates before work: what they say, that they change nothing, and what a dry run leaves."""

import itertools
import json

import numpy as np
import pytest
from torch import nn

import mechatlas as ma
from mechatlas.app import estimates, run_folder
from mechatlas.app.cli import main
from mechatlas.app.commands import match as match_command
from mechatlas.app.commands import train as train_command
from mechatlas.app.estimates import Estimate, in_words
from mechatlas.base import RecipeError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("estimates") / "store"
    x = np.random.default_rng(0).normal(size=(400, 6)).astype("float32")
    ma.collect(nn.Sequential(nn.Linear(6, 32), nn.ReLU()), x, ["0", "1"], folder)
    return folder


def training(path, store, *lines):
    settings = (f'store = "{store}"', "steps = 30", "batch_size = 32", *lines)
    path.write_text("\n".join(settings))
    return str(path)


def dry(capsys, *words):
    main([*map(str, words), "--dry-run", "--json"])
    return json.loads(capsys.readouterr().out)


def test_an_estimate_reads_as_a_sentence():
    estimate = Estimate(seconds=754.0, memory=3 << 29, disk=300 << 20)
    assert in_words(estimate) == "About 13 minutes, 1.5 GiB of memory and 300 MiB of disk."
    estimate = Estimate(seconds=7200.0, memory=200 << 20)
    assert in_words(estimate) == "About 2.0 hours, 200 MiB of memory."


def test_a_dry_run_of_collect_knows_the_size_of_the_store_and_writes_nothing(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros((70, 32, 32, 3), dtype=np.uint8))
    recipe = tmp_path / "collect.toml"
    recipe.write_text(
        f'sites = ["mixed3b", "mixed4c"]\n[network]\nname = "inception_mini"\n'
        f'[samples]\nsource = "{tmp_path}/x.npy"\nside = 32\n[storage.positions]\nper_sample = 7'
    )
    found = dry(capsys, "collect", recipe, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert found["seconds"] > 0
    main(["collect", str(recipe), "--out", str(tmp_path / "store"), "--json"])
    size = json.loads(capsys.readouterr().out)["bytes"]
    assert abs(found["disk"] - size) < 0.1 * size


def test_a_dry_run_of_training_is_as_long_as_its_steps(store, tmp_path, capsys, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(estimates.time, "perf_counter", lambda: float(next(clock)))
    times = itertools.count(0.0, 7.0)  # from the begin to the estimate
    monkeypatch.setattr(estimates.time, "monotonic", lambda: next(times))
    recipe = training(tmp_path / "train.toml", store, 'site = "1"', "n_latents = 64")
    out = tmp_path / "new"
    found = dry(capsys, "train", recipe, "--out", out)
    assert found["seconds"] == 30 + 7  # a second a step, by this clock, and the start
    assert not out.exists()
    main(["train", recipe, "--out", str(out)])
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert abs(found["disk"] - size) < 0.2 * size
    capsys.readouterr()

    sweep = training(tmp_path / "sweep.toml", store, 'site = "1"', "n_latents = [64, 128]")
    whole = dry(capsys, "sweep", sweep, "--out", tmp_path / "sweep")
    assert whole["seconds"] == 45 + 7
    assert found["memory"] <= whole["memory"] < 1.1 * found["memory"]  # most is of any process
    assert not (tmp_path / "sweep").exists()

    other = dry(capsys, "match", out, out, "--out", tmp_path / "match")
    assert 0 < other["seconds"] < 60
    assert not (tmp_path / "match").exists()


def test_training_has_the_same_bytes_whether_its_cost_was_estimated(
    store, tmp_path, capsys, monkeypatch
):
    recipe = training(tmp_path / "train.toml", store, 'site = "1"', "n_latents = 64")
    main(["train", recipe, "--out", str(tmp_path / "plain")])
    assert "About" not in capsys.readouterr().err
    monkeypatch.setattr(train_command, "WORTH_MEASURING", 0)
    monkeypatch.setattr("mechatlas.app.estimates.WORTH_SAYING", 0)
    main(["train", recipe, "--out", str(tmp_path / "estimated")])
    assert "mechatlas: About" in capsys.readouterr().err
    files = [tmp_path / name / "dictionary.safetensors" for name in ("plain", "estimated")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_dry_run_of_a_basis_knows_its_size_and_writes_nothing(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(90, 24)).astype("float32"))
    recipe = tmp_path / "basis.toml"
    recipe.write_text(
        'layers = ["0", "1"]\n[network]\nname = "tests.app.test_estimates:wide"\n[samples]\n'
        f'type = "Arrays"\nsource = "{tmp_path}/x.npy"\n[settings]\nn_null_graphs = 1'
    )
    found = dry(capsys, "basis", recipe, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert 0 < found["seconds"] < 60
    main(["basis", str(recipe), "--out", str(tmp_path / "basis"), "--json"])
    assert json.loads(capsys.readouterr().out)["layers"][0]["n_edge_samples"] == 90
    size = (tmp_path / "basis" / "basis.safetensors").stat().st_size
    assert 0.7 * size < found["disk"] < 1.5 * size


def wide():
    return nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(24, 32), nn.ReLU()))


def test_a_dry_run_makes_the_mistakes_known(store, tmp_path, capsys, monkeypatch):
    recipe = training(tmp_path / "train.toml", store, 'site = "7"')
    with pytest.raises(SystemExit):
        main(["train", recipe, "--dry-run"])
    assert "7" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["verify", str(store), "--dry-run"])
    assert "`mechatlas verify` makes no estimate; demo, collect, train" in capsys.readouterr().err
    monkeypatch.setattr(run_folder, "n_processes", lambda: 2)
    with pytest.raises(SystemExit):
        main(["train", recipe, "--dry-run"])
    assert "--dry-run is for one process: leave out torchrun." in capsys.readouterr().err


def test_a_dry_run_of_what_makes_no_estimate_ends_before_it_writes(tmp_path):
    config = train_command.TrainConfig(store=tmp_path, site="1", out=tmp_path / "new")
    folder = run_folder.RunFolder(config.out, "dictionary", config, dry_run=True)
    with pytest.raises(RecipeError, match="There is no estimate of this"), folder:
        folder.begin()
    assert not config.out.exists()


def test_a_dry_run_of_a_group_net_trains_a_little_and_writes_nothing(tmp_path, capsys):
    recipe = tmp_path / "s3.toml"
    recipe.write_text('group = "S3"\nsteps = 4000\nwidth = 16\nn_seeds = 2')
    found = dry(capsys, "train", recipe, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert found["seconds"] > 0
    main(["train", str(recipe), "--steps", "20", "--out", str(tmp_path / "nets")])
    size = sum(path.stat().st_size for path in (tmp_path / "nets").glob("net_*.safetensors"))
    assert 0.4 * size < found["disk"] < 1.1 * size


@pytest.mark.parametrize(("cost", "width"), [("decoder", 32), ("all", 64), ("codes", 380)])
def test_a_dry_run_of_a_match_knows_the_width_of_what_is_compared(
    cost, width, store, tmp_path, capsys, monkeypatch
):
    sides, seen = [], []

    def of_matching(pairs):
        seen.extend(pairs)
        return estimates.of_matching(seen)

    monkeypatch.setattr(match_command, "of_matching", of_matching)
    for seed in ("1", "2"):
        recipe = training(tmp_path / f"{seed}.toml", store, 'site = "1"', "n_latents = 40")
        main(["train", recipe, "--seed", seed, "--out", str(tmp_path / seed)])
        sides.append(tmp_path / seed)
    capsys.readouterr()
    new = tmp_path / "new"
    found = dry(capsys, "match", *sides, "--cost", cost, "--store", store, "--out", new)
    assert not new.exists()
    assert found["seconds"] > 0
    assert seen == [((40, width), (40, width))]


def test_work_is_extrapolated_from_its_beginning(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(estimates.time, "perf_counter", lambda: float(next(clock)))
    done = []

    def work(progress):
        for i in range(500):
            done.append(i)
            progress(i + 1, 500)

    assert estimates.of_work([work], memory=0).seconds == 500  # a second a unit, by this clock
    assert len(done) == 1 + estimates.PROBE_SECONDS


def test_short_work_is_measured_whole(monkeypatch):
    clock = iter(range(10))
    monkeypatch.setattr(estimates.time, "perf_counter", lambda: float(next(clock)))
    assert estimates.of_work([lambda progress: progress(1, 1)] * 2, memory=5).seconds == 4


def test_a_dry_run_of_a_page_and_of_the_tour_writes_nothing(store, tmp_path, capsys):
    recipe = training(tmp_path / "train.toml", store, 'site = "1"', "n_latents = 64")
    main(["train", recipe, "--out", str(tmp_path / "runs" / "first")])
    capsys.readouterr()
    page = tmp_path / "page.html"
    found = dry(capsys, "report", tmp_path / "runs", "--out", page)
    assert not page.exists()
    main(["report", str(tmp_path / "runs"), "--out", str(page)])
    assert 0.3 * page.stat().st_size < found["disk"] < 3 * page.stat().st_size
    assert 0 < found["seconds"] < 60
    capsys.readouterr()

    one, two = (dry(capsys, "demo", "--out", tmp_path / "demo", "--processes", n) for n in (1, 2))
    assert not (tmp_path / "demo").exists()
    assert one["seconds"] > two["seconds"] > 0
    assert one["disk"] == two["disk"] > 0


def test_only_work_over_a_minute_is_announced(capsys):
    for seconds, said in ((59.0, ""), (90.0, "mechatlas: About 1.5 minutes, 1 MiB of memory.\n")):
        estimate = Estimate(seconds=seconds, memory=1 << 20)
        estimates.expect(lambda estimate=estimate: estimate, is_long=True, dry_run=False)
        assert capsys.readouterr().err == said
    estimates.expect(lambda: pytest.fail("it is made"), is_long=False, dry_run=False)
