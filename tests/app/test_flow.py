"""`mechatlas flow` and its chapter, on planted origins."""

import pyarrow.parquet as pq
import pytest
import torch

import mechatlas as ma
from mechatlas.app import estimates
from mechatlas.app.commands.flow import FlowConfig
from mechatlas.app.report.dossiers import FlowLine
from mechatlas.app.report.page import make_chapters
from mechatlas.app.report.runs import find_runs
from mechatlas.app.run_folder import execute
from mechatlas.base import RecipeError
from tests.analysis.matching.test_flow import planted

from .worlds import dry_run, run_command

SITES = ("model.layers.3", "model.layers.5", "model.layers.4.self_attn", "model.layers.5.mlp")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    place = tmp_path_factory.mktemp("flow")
    stream, attention, mlp, _ = planted()
    for name, rows in zip(("a", "b", "heads", "neurons"), (*stream, attention, mlp), strict=True):
        sae = ma.Autoencoder(d_in=rows.shape[1], n_latents=len(rows), sparsity=ma.TopK(k=2))
        sae.W_dec.data[:] = torch.from_numpy(rows)
        ma.save(sae, place / name)
    return place


def words(here, sites=SITES):
    names = ("a", "b", "--attention", "heads", "--mlp", "neurons")
    paths = [each if each.startswith("-") else str(here / each) for each in names]
    return [*paths, "--sites", *sites, "--out", str(here / "runs/flow")]


def test_origins_are_told_with_their_links(here):
    result, told = run_command("flow", *words(here))
    (step,) = result["steps"]
    truth = planted()[3]
    table = pq.read_table(here / "runs/flow/flow.parquet").to_pydict()
    right = [list(step["counts"]).index(origin) == t
             for origin, t in zip(table["origin"], truth, strict=True)]  # fmt: skip
    assert sum(right) > 0.88 * len(truth)
    assert f"{step['counts']['born in the MLP']} born in the MLP" in told
    assert set(step["thresholds"]) == {"a", "heads", "neurons"}
    point = result["tracks"][0][-1]
    row = table["latent"].index(point["latent"])
    assert result["modules"][table["module"][row]] == point["module"] or not point["module"]

    chapters = {each.name: each for each in make_chapters(find_runs(here / "runs"))}
    flow = chapters["flow"]
    lines = [line for _, line in flow.statements if isinstance(line, FlowLine)]
    assert [line.origin for line in lines] == table["origin"]
    assert {line.module_name for line in lines} == {"", "heads", "neurons"}
    assert sum(trace["y"][0] for trace in flow.figures["origins0"]["data"]) == pytest.approx(1)
    assert "of the links to each dictionary" in flow.findings[0].evidence


def test_origins_that_nothing_could_show_are_not_drawn(here):
    result, _ = run_command(
        "flow", str(here / "a"), str(here / "b"), "--sites", *SITES[:2],
        "--out", str(here / "alone/flow"),
    )  # fmt: skip
    assert result["steps"][0]["counts"]["born in the MLP"] == 0
    flow = next(c for c in make_chapters(find_runs(here / "alone")) if c.name == "flow")
    names = [trace["name"] for trace in flow.figures["origins0"]["data"]]
    assert names == ["passed on", "unexplained"]
    assert "born in the MLP" not in flow.html
    assert "0% <small>" not in flow.html, "what could not be found has no share"


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (
            (*SITES[:3], "model.layers.6.mlp"),
            "of layer 6, which lies after none of the layers 3, 5",
        ),
        ((*SITES[:3], "mlp"), "of site 'mlp', which names no layer"),
        (SITES[:2], "one site for each of the 4 dictionaries, got 2"),
    ],
)
def test_modules_find_their_step_by_their_site(here, sites, message):
    with pytest.raises(RecipeError, match=message):
        run_command("flow", *words(here, sites))
    with pytest.raises(RecipeError, match="needs two dictionaries or more, got 1"):
        execute(FlowConfig(dictionaries=(here / "a",), out=here / "none"))


def test_a_dry_run_counts_every_link(here, monkeypatch):
    monkeypatch.setattr(estimates, "_products_per_second", lambda: 1e9)
    found = dry_run("flow", *words(here)[:-2], out=here / "new")
    sizes = {name: ma.load(here / name).n_latents for name in ("a", "b", "heads", "neurons")}
    entries = sizes["b"] * (sizes["a"] + sizes["heads"] + sizes["neurons"])
    assert found.seconds == pytest.approx(estimates.PER_ENTRY * entries / 1e9)
