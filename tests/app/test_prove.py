"""The command `mechatlas prove`, its folder, its chapter of the page, and training on groups."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.app import estimates
from mechatlas.app.cli import main
from mechatlas.app.commands import prove
from mechatlas.app.report.page import report
from mechatlas.maths.named_groups import group
from tests.analysis.proofs.planted import planted, true_margins
from tests.app.worlds import bytes_in, dry_run


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    folder = tmp_path_factory.mktemp("net")
    s4 = group("S4")
    weights = planted(s4, noise=0.02, seed=1)
    save_file(
        dict(zip(("left", "right", "unembed"), weights, strict=True)), folder / "net.safetensors"
    )
    np.save(folder / "table.npy", s4.table)
    return folder, weights, s4


def run(*words) -> None:
    main([str(word) for word in words])


def test_a_proof_is_made_checked_and_drawn(net, tmp_path, capsys):
    folder, weights, s4 = net
    out = tmp_path / "proof"
    run("prove", folder / "net.safetensors", "--table", folder / "table.npy", "--out", out,
        "--exact", "--compare")  # fmt: skip
    result = json.loads((out / "result.json").read_text())
    truth = float((true_margins(weights, s4.table) > 0).mean())
    assert (result["order"], result["width"]) == (24, weights[0].shape[1])
    assert 0.9 < result["accuracy_bound"] <= result["accuracy_bound_real"] <= truth
    assert result["accuracy_exact"] == truth
    assert result["accuracy_brute_force"] == pytest.approx(truth, abs=1e-3)
    for key in ("verify", "prove", "exact", "brute_force_f32", "brute_force_f64"):
        assert result[f"seconds_{key}"] > 0
    assert 0.98 < result["bi_equivariance"] < 1
    assert result["cosets"]["left"]["neurons"] == result["width"]
    assert result["cosets"]["right"]["concentration"] > 0.99
    assert {"float32", "real", "checked", "rounding"} <= set(result["sound"])
    assert result["logit_budget"]["ideal_margin"] > 0 > result["logit_budget"]["rounding"]
    recipe = tomllib.loads((out / "recipe.toml").read_text())
    assert (recipe["exact"], recipe["compute_budget"]) == (True, 0.6)
    capsys.readouterr()
    run("prove", "--check", out, folder / "net.safetensors", "--json")
    again = json.loads(capsys.readouterr().out)
    assert again["accuracy_bound"] == result["accuracy_bound"]
    run("prove", "--check", out, folder / "net.safetensors", "--reference", "--json")
    short = json.loads(capsys.readouterr().out)
    assert (short["accuracy_bound"], short["reference"]) == (result["accuracy_bound"], True)
    run("prove", "--check", out, folder / "net.safetensors", "--table", folder / "table.npy")
    np.save(tmp_path / "other.npy", s4.table.T)
    said = _refused(
        capsys, "prove", "--check", out, folder / "net.safetensors", "--out", tmp_path / "no"
    )
    assert "leave out --out" in said
    said = _refused(capsys, "prove", "--check", out, folder / "net.safetensors",
                    "--table", tmp_path / "other.npy")  # fmt: skip
    assert "about another table" in said
    page = tmp_path / "page.html"
    report(out, page)
    text = page.read_text()
    assert "rho-set" in text
    assert "bi-equivariance" in text
    assert "by the points of the rho-sets on the left and right" in text


def test_an_interrupted_proof_is_continued_without_looking_for_it_again(net, tmp_path, monkeypatch):
    folder, _, _ = net
    words = ("prove", folder / "net.safetensors", "--table", folder / "table.npy", "--out")
    run(*words, tmp_path / "whole")
    with monkeypatch.context() as broken:
        broken.setattr(prove, "describe", _interrupt)
        with pytest.raises(SystemExit, match="130"):
            run(*words, tmp_path / "proof")
    assert not (tmp_path / "proof" / "result.json").exists()
    with monkeypatch.context() as broken:
        broken.setattr(prove, "prove_bound", _interrupt)
        run(*words, tmp_path / "proof")
        with pytest.raises(SystemExit, match="130"):  # another recipe is not continued
            run(*words, tmp_path / "proof", "--compute-budget", "0.3")
    whole, continued = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "proof")
    )
    for key in ("accuracy_bound", "logit_budget", "why", "multiply_adds", "cosets"):
        assert continued[key] == whole[key]
    assert continued["seconds_prove"] > 0
    files = [tmp_path / name / "proof.safetensors" for name in ("whole", "proof")]
    assert files[0].read_bytes() == files[1].read_bytes()
    report(tmp_path / "whole", tmp_path / "page.html")
    assert "Exact accuracy" not in (tmp_path / "page.html").read_text()


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_hopeless_network_is_given_up_and_drawn_all_the_same(tmp_path):
    s4, random = group("S4"), np.random.default_rng(0)
    shapes = {"left": (24, 30), "right": (24, 30), "unembed": (30, 24)}
    arrays = {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    save_file(arrays, tmp_path / "net.safetensors")
    np.save(tmp_path / "table.npy", s4.table)
    run("prove", tmp_path / "net.safetensors", "--table", tmp_path / "table.npy", "--exact",
        "--out", tmp_path / "proof")  # fmt: skip
    result = json.loads((tmp_path / "proof" / "result.json").read_text())
    truth = (true_margins(Weights(**arrays), s4.table) > 0).mean()
    assert result["accuracy_exact"] == truth
    assert result["accuracy_bound"] <= truth
    assert result["multiply_adds_share"] < 0.9
    drawn = json.loads((tmp_path / "proof" / "neurons.json").read_text())["histogram"]
    assert drawn["edges"][0] > -1000
    assert 0 < sum(drawn["certified"]) < 24**2 == sum(drawn["true"])


def test_a_proof_of_version_0_1_is_checked_and_drawn(tmp_path, capsys):
    golden = Path(__file__).parents[1] / "golden" / "proof_0_1"
    run("prove", "--check", golden, golden / "net.safetensors")
    assert "The proof holds" in capsys.readouterr().out
    page = tmp_path / "page.html"
    report(golden, page)
    text = page.read_text()
    for words in ("dead neurons: 2", "merged into a cluster with a stronger one: 5", "waterfall"):
        assert words in text


def test_the_old_name_of_the_compute_budget_still_works(net, tmp_path):
    folder, _, _ = net
    with pytest.warns(DeprecationWarning, match="prove --compute-budget"):
        run("prove", folder / "net.safetensors", "--table", folder / "table.npy", "--out",
            tmp_path / "proof", "--effort", "0.3")  # fmt: skip
    recipe = tomllib.loads((tmp_path / "proof" / "recipe.toml").read_text())
    assert recipe["compute_budget"] == 0.3


def _refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_bad_input_is_refused_with_one_sentence(net, tmp_path, capsys):
    folder, (left, right, _), s4 = net
    file, table, out = folder / "net.safetensors", folder / "table.npy", tmp_path / "out"
    assert "needs --table" in _refused(capsys, "prove", file)
    save_file({"left": left, "right": right}, tmp_path / "two.safetensors")
    said = _refused(capsys, "prove", tmp_path / "two.safetensors", "--table", table, "--out", out)
    assert "has no 'unembed'" in said
    broken = np.array(s4.table)
    broken[[3, 4]] = broken[[4, 3]]
    np.save(tmp_path / "broken.npy", broken)
    said = _refused(capsys, "prove", file, "--table", tmp_path / "broken.npy", "--out", out)
    assert said.count("\n") == 1
    np.save(tmp_path / "c2.npy", group("C2").table)
    said = _refused(capsys, "prove", file, "--table", tmp_path / "c2.npy", "--out", out)
    assert "must have the shape" in said
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    said = _refused(capsys, "prove", tmp_path / "no.safetensors", "--table", table, "--out", out)
    assert "no.safetensors cannot be read" in said
    said = _refused(capsys, "prove", "--check", tmp_path / "no.safetensors", file)
    assert "is damaged or is not a proof" in said
    assert not out.exists()


def test_a_recipe_that_names_a_group_trains_a_network_on_its_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.toml").write_text(
        "generators = [[1, 0, 2], [1, 2, 0]]\nwidth = 32\nsteps = 200\nbatch_size = 64\n"
        'out = "s3"\n'
    )
    run("train", "net.toml")
    result = json.loads((tmp_path / "s3" / "result.json").read_text())
    assert result["order"] == 6
    assert result["accuracy"] > 0.9
    first = (tmp_path / "s3" / "net.safetensors").read_bytes()
    run("train", "net.toml")
    assert (tmp_path / "s3" / "net.safetensors").read_bytes() == first


def test_a_bad_recipe_of_a_group_is_refused(tmp_path, capsys):
    for text, words in (
        ('group = "S99"', "S99"),
        ('group = "S3"\ngenerators = [[1, 0]]', "either group"),
        ('group = "S3"\nwidths = 3', "unknown key widths"),
    ):
        (tmp_path / "bad.toml").write_text(text)
        assert words in _refused(capsys, "train", tmp_path / "bad.toml")


def test_a_dry_run_knows_the_size_of_the_proof(net, tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "_products_per_second", lambda: 1e6)
    folder, weights, _ = net
    words = (folder / "net.safetensors", "--table", folder / "table.npy")
    found, out = dry_run("prove", *words, out=tmp_path / "new"), tmp_path / "out"
    brute_force = 2 * 24**3 * len(weights.unembed) / 1e6
    assert found.seconds == pytest.approx(prove.PREPARATION + prove.SEARCH * brute_force)
    run("prove", *words, "--out", out)
    assert 0.3 * bytes_in(out) < found.disk < 3 * bytes_in(out)
    more = dry_run("prove", *words, "--compare", out=tmp_path / "new")
    assert more.seconds > found.seconds + 20 * brute_force
    with pytest.raises(SystemExit):
        run("prove", folder / "net.safetensors", "--check", out, "--dry-run")
