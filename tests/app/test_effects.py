"""`mechatlas effects`, and the chapters on effects and on evaluation."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import mechatlas as ma
from mechatlas.app.cli import main
from mechatlas.app.commands.effects import EffectsConfig
from mechatlas.app.commands.evaluate import EvaluateConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.report.chapter import number
from mechatlas.app.report.chapters import effects
from mechatlas.app.report.dossiers import LogitLine
from mechatlas.app.report.from_python import memory_run
from mechatlas.app.report.page import make_chapters
from mechatlas.app.report.runs import Run, Runs, TrustConfig, find_runs
from mechatlas.app.run_folder import execute
from mechatlas.base import InputError, no_progress
from mechatlas.dictionaries.formats import load, save
from mechatlas.dictionaries.sparsity import TopK

pytest.importorskip("transformers")

from tests.app.worlds import bytes_in, dry_run
from tests.language_models import byte_tokenizer, model

SITE = "model.layers.1"
PLANTED, RAISED, LOWERED = 5, 40, 70
RECIPE = """
sites = ["model.layers.1"]
out = "runs/store"
[network]
name = "transformer"
arguments = { path = "llama", dtype = "float32" }
[samples]
type = "Texts"
source = "texts.jsonl"
context = 16
packing = "document"
[storage]
held_out = 0.3
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Runs on a tiny decoder, and a dictionary with one latent whose tokens are known."""
    place = tmp_path_factory.mktemp("effects")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        network = model("llama")
        with torch.no_grad():
            network.lm_head.weight[[RAISED, LOWERED]] *= 6  # above what others write by chance
        network.save_pretrained("llama")
        byte_tokenizer(first="<s>").save_pretrained("llama")
        rows = [{"text": f"Text {i} of some words. " * (1 + i % 3)} for i in range(40)]
        (place / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (place / "collect.toml").write_text(RECIPE)
        main(["collect", "collect.toml"])
        train = TrainConfig(
            store=place / "runs/store", out=place / "runs/sae", n_latents=24, sparsity=TopK(k=4),
            steps=30, batch_size=64,
        )  # fmt: skip
        execute(train)
        sae = load(place / "runs/sae")
        unembed, gain = network.lm_head.weight.detach(), network.model.norm.weight.detach()
        with torch.no_grad():
            sae.W_dec[PLANTED] = 9 * (unembed[RAISED] - unembed[LOWERED]) / gain
        save(sae, place / "planted")
        common = {"dictionary": place / "runs/sae", "n_samples": 6}
        execute(EffectsConfig(**common, n_random=300, n_ablated=6, out=place / "runs/effects"))
        execute(EvaluateConfig(**common, out=place / "runs/worth"))
    return place


def test_a_planted_latent_is_found_with_its_tokens(here, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(here)
    words = ["effects", "planted", "--site", SITE, "--network", "llama", "--samples", "texts.jsonl",
             "--n-random", "2000", "--attribute", "0", "--out", str(tmp_path / "out")]  # fmt: skip
    with pytest.raises(SystemExit):
        main(words[:2] + words[4:])  # without its site
    assert "does not say of which site" in capsys.readouterr().err
    main(words)
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "out/result.json").read_text())
    table = pq.read_table(tmp_path / "out/logits.parquet").to_pylist()
    ends = byte_tokenizer().batch_decode([[RAISED], [LOWERED]])
    assert [table[PLANTED][f"{end}_words"][0] for end in ("top", "bottom")] == ends
    assert table[PLANTED]["q_top"] == min(row["q_top"] for row in table)
    assert result["n_raising"] == sum(row["q_top"] <= 0.05 for row in table)
    assert f"{result['n_raising']} raise" in said
    assert result["attributions"] == []


def test_answers_are_attributed_without_their_padding(here):
    result = json.loads((here / "runs/effects/result.json").read_text())
    one, other = result["attributions"]
    assert one["sample"] != other["sample"]
    for each in (one, other):
        assert len(each["words"]) == len(each["positions"]) <= 16
        assert sum(each["positions"]) == pytest.approx(each["all_latents"], rel=1e-4, abs=1e-6)
        assert re.fullmatch(r"next token '.*' over '.*'", each["output"], re.DOTALL)
        assert each["value"] >= 0, "the likeliest over the second"


def test_images_have_no_effects_on_tokens(tmp_path):
    sae = ma.Autoencoder(d_in=240, n_latents=16, sparsity=ma.TopK(k=2))
    save(sae, tmp_path / "sae")
    config = EffectsConfig(
        dictionary=tmp_path / "sae", network="inception_mini", samples=tmp_path / "x.toml",
        site="mixed3b", out=tmp_path / "out",
    )  # fmt: skip
    (tmp_path / "x.toml").write_text('[samples]\ntype = "Images"\nsource = "photos"\nside = 31\n')
    with pytest.raises(InputError, match=r"Effects on tokens need texts, got \d+ samples"):
        execute(config)


def test_the_page_has_the_tokens_and_what_the_dictionary_is_worth(here, monkeypatch):
    monkeypatch.chdir(here)
    chapters = {each.name: each for each in make_chapters(find_runs(here / "runs"))}
    tokens, worth = chapters["effects"], chapters["evaluation"]
    assert tokens.data == ["sae"]
    (first, line), *_ = tokens.statements
    assert first == ("sae", 0)
    assert isinstance(line, LogitLine)
    table = pq.read_table(here / "runs/effects/logits.parquet").to_pylist()
    assert [word for word, _ in line.raises] == table[0]["top_words"][:8]
    assert len(tokens.statements) == 24
    noted = [*tokens.findings, *tokens.absences]
    assert len(noted) == 1
    assert "300 random directions" in getattr(noted[0], "evidence", "") + getattr(
        noted[0], "power", ""
    )
    result = json.loads((here / "runs/worth/result.json").read_text())
    assert number(result["spliced"]["kl_divergence"]["value"]) in worth.findings[0].evidence
    assert set(worth.figures) == {"density", "losses"}
    shares = worth.figures["density"]["data"][0]["y"]
    assert sum(shares) == pytest.approx(1)
    assert worth.figures["density"]["data"][0]["x"][0] == "never"
    assert 'id="evaluation-0"' in worth.html


def test_results_from_python_are_drawn(here):
    network, sae = model("llama"), load(here / "planted")
    tokens = torch.randint(0, 258, (2, 8), generator=torch.Generator().manual_seed(0))
    logits = ma.logit_effects(network, sae, tokens=tokens, site=SITE, n_random=50)
    attributed = ma.attribute(network, sae, tokens, output=3, site=SITE, n_ablated=4)
    runs: list[Run] = [memory_run(("mine",), [each], {}) for each in (logits, attributed)]
    drawn = effects.chapter(Runs(Path(), runs, 0, TrustConfig(), {}), no_progress)
    assert drawn is not None
    assert "50</dd>" in drawn.html
    assert "Rank correlation with 4 ablations" in drawn.html


def test_a_dry_run_knows_the_size_of_the_table(here, tmp_path, monkeypatch):
    monkeypatch.chdir(here)
    words = ("runs/sae", "--n-samples", "6", "--n-random", "300", "--n-ablated", "6")
    found = dry_run("effects", *words, out=tmp_path / "new")
    size = bytes_in(here / "runs/effects")
    assert 0.3 * size < found.disk < 3 * size
