import io
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from mechatlas.analysis.symmetry import interchange
from mechatlas.analysis.symmetry.stimuli import draw_stimuli
from mechatlas.app import cli, code_action, pose_interventions
from mechatlas.app.commands import symmetry
from mechatlas.app.commands.symmetry import SymmetryConfig
from mechatlas.app.report.chapters.symmetry import chapter as symmetry_chapter
from mechatlas.app.report.dossiers import SymmetryLine, TuningLine
from mechatlas.app.report.runs import find_runs
from mechatlas.app.run_folder import FEATURES, SYMMETRY_TENSORS, execute
from mechatlas.app.stimuli import SUPPORT
from mechatlas.base import DiskError, SiteError, WeightsError, no_progress
from mechatlas.dictionaries.autoencoder import Autoencoder, Transcoder
from mechatlas.dictionaries.formats import load, save
from mechatlas.dictionaries.pose_tied import PoseTied
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.files import read_json, write_json
from mechatlas.maths.named_groups import group
from tests.analysis.symmetry.planted import adjusted_rand
from tests.app import posed
from tests.app.worlds import bytes_in, dry_run
from tests.forging import forge
from tests.networks import turning as turning_network

KEYS = {"n_features", "classes", "fdr", "noise_ceiling", "families", "r2", "discoveries_shuffled"}
COLUMNS = {
    "feature",
    "stabiliser",
    "stabiliser_order",
    "stabilizer",
    "stabilizer_order",
    "family",
    "pose",
    "q_value",
    "reliability",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("posed")
    posed.write_store(root / "store")
    save(posed.plain_dictionary(), root / "plain")
    save(posed.group_crosscoder(), root / "crosscoder")
    return root


def classify(dictionary, store, out, **options):
    config = SymmetryConfig(dictionary=dictionary, store=store, out=out, trust=True, **options)
    result = execute(config)
    return result, symmetry.in_words(result)


def run(world, name, out, **options):
    return classify(world / name, world / "store", out, **options)


@pytest.mark.parametrize("name", ["plain", "crosscoder"])
def test_planted_features_are_classified_from_a_store(world, tmp_path, name):
    result, text = run(world, name, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(written) >= KEYS
    table = pq.read_table(tmp_path / "out" / "features.parquet")
    assert set(table.column_names) >= COLUMNS
    blocks, stabilizers, families = posed.features()
    assert written["n_features"] == len(blocks)
    assert [frozenset(each) for each in table["stabilizer_elements"].to_pylist()] == stabilizers
    assert adjusted_rand(table["family"].to_numpy(), families) == 1
    assert all(table["reliable"].to_pylist())
    assert sum(written["classes"].values()) == len(blocks)
    assert written["classes"]["half-turn (line-like)"] == 4
    assert written["families"] == 4  # all but the invariant feature, which is alone
    assert written["discoveries"] == 11
    assert written["discoveries_shuffled"] == 0
    assert written["noise_ceiling"] > 0.9
    assert written["agreement"] == pytest.approx(1, abs=0.02)
    reference, pose = table["reference"].to_numpy(), table["pose"].to_numpy()
    for i in range(len(blocks)):
        again = blocks[reference[i]][posed.D4.table[:, pose[i]]]
        np.testing.assert_allclose(blocks[i], again, atol=1e-5)
    assert "15 features under D4" not in text  # there are 19
    assert f"{len(blocks)} features under D4" in text
    assert load_file(tmp_path / "out" / "symmetry.safetensors")["atoms"].shape == (len(blocks), 36)
    assert result.out == str(tmp_path / "out")


def test_the_baselines_stand_beside_the_dictionary(world, tmp_path):
    result, _ = run(world, "crosscoder", tmp_path / "out")
    r2 = result.r2
    for way in ("dictionary", "linear", "invariant", "shuffled"):
        assert len(r2[way]) == 8
    # The planted code is linear in the untransformed block: both explain all but the noise.
    signal = 1 - 0.25 / (0.25 + np.square(posed.features()[0]).mean() * 19 * 0.15 * 1.85)
    for way in ("dictionary", "linear"):
        assert r2[way][0] == pytest.approx(1, abs=1e-3)
        assert r2[way][3] == pytest.approx(signal, abs=0.03)
    assert abs(r2["shuffled"][3]) < 0.05
    assert r2["invariant"][0] == 1
    assert r2["invariant"][3] < 0.5


def test_nothing_is_found_where_poses_do_not_belong_together(world, tmp_path):
    posed.write_store(tmp_path / "store", mixed=True)
    result, _ = classify(world / "plain", tmp_path / "store", tmp_path / "out")
    assert result.discoveries == 0
    assert result.families == 0
    assert abs(result.r2_mean["dictionary"]) < 0.05


def test_zero_blocks_that_the_code_drives_are_no_lack_of_symmetry(world, tmp_path):
    save(posed.group_crosscoder(zeroed=[(0, 3), (0, 6), (8, 2)]), tmp_path / "shrunk")
    result, text = classify(tmp_path / "shrunk", world / "store", tmp_path / "out")
    found = result.artifacts
    assert (found.features, found.tested, found.blocks, found.shrunk) == (2, 2, 3, 3)
    assert (found.affected, found.withheld) == (2, 1)
    assert "2 features have 3 zero blocks: 0 absent, 3 shrunk" in text
    table = pq.read_table(tmp_path / "out" / FEATURES).to_pydict()
    assert [k for k, name in enumerate(table["block_classes"][0]) if name == "shrunk"] == [3, 6]
    assert set(table["block_classes"][1]) == {"present"}
    # Its stabilizer is {e}, but not shown to be while blocks are missing; the line's is certain.
    assert (table["grade"][0], table["grade"][1], table["grade"][8]) == (
        "not shown", "none", "exact"
    )  # fmt: skip
    tensors = load_file(tmp_path / "out" / SYMMETRY_TENSORS)
    assert tensors["nu_error_low"][0, 3] > 0.2
    assert np.isnan(tensors["nu_error"][0, 4])
    chapter = symmetry_chapter(find_runs(tmp_path), no_progress)
    assert chapter is not None
    assert "3, in 2 features" in chapter.html
    lines = [line for _, line in chapter.statements if isinstance(line, SymmetryLine)]
    for i, value in ((1, 0.12), (8, 1.0)):
        ends = [pytest.approx(value, abs=0.02)] * 3
        assert lines[i].likeness == ("half-turn (line-like)", *ends)
    assert [each[:2] for each in lines[0].zero] == [
        (posed.D4.element_names[g], "shrunk") for g in (3, 6)
    ]
    assert not lines[1].zero
    sound, _ = run(world, "plain", tmp_path / "plain")
    assert "no decoder block for each pose" in sound.artifacts.missing


def test_a_learnt_action_on_codes_is_judged_by_held_out_poses(world, tmp_path, monkeypatch):
    result, text = run(world, "crosscoder", tmp_path / "out", code_action=True)
    found = result.code_action
    assert (found.parts, found.represented) == (5, 5)  # one for each family
    assert (found.rows, found.held_out_rows) == (4320, 480)
    assert found.irreps["1a"] == 5  # a permutation of cosets has the trivial irrep once
    # Families of all poses have the regular action, which leaves the noise.
    assert found.fvu["regular"] == pytest.approx(1 - result.r2_mean["dictionary"], abs=1e-3)
    assert found.fvu["learnt"] == pytest.approx(found.fvu["regular"], abs=1e-3)
    assert found.fvu["unchanged"] > 1
    assert abs(found.gain) < 1e-3
    assert "5 of 5 parts have a representation: 5 1a" in text
    chapter = symmetry_chapter(find_runs(tmp_path), no_progress)
    assert chapter is not None
    assert "5 of 5: 5 1a" in chapter.html
    monkeypatch.setattr(code_action, "MAX_LATENTS", 5)
    refused, text = run(world, "crosscoder", tmp_path / "few", code_action=True)
    assert "19 latents are active; an action is learnt for 5" in refused.code_action.missing
    assert "No action on codes was learnt: 19 latents" in text


def test_classes_stand_beside_those_of_a_control(world, tmp_path):
    control, _ = run(world, "plain", tmp_path / "control")
    assert control.control is None
    result, text = run(world, "crosscoder", tmp_path / "out", control=tmp_path / "control")
    assert (
        "Features with a known class here (19) and in the control (19): no class differs." in text
    )
    rows = {row.name: row for row in result.control.classes}
    assert (rows["any symmetry"].n, rows["any symmetry"].n_control) == (11, 11)
    chapter = symmetry_chapter(find_runs(tmp_path), no_progress)
    assert chapter is not None
    assert "randomly re-initialized weights" in chapter.html
    table = pq.read_table(tmp_path / "control" / "features.parquet")
    without = ["none (curve-like)"] * table.num_rows
    changed = table.set_column(table.column_names.index("class"), "class", [without])
    pq.write_table(changed, tmp_path / "control" / "features.parquet")
    forge(tmp_path / "control")
    _, text = run(world, "crosscoder", tmp_path / "out", control=tmp_path / "control")
    assert "any symmetry 57.9% and 0.0% (q " in text


def test_a_run_gives_the_same_files_again(world, tmp_path):
    for name in ("a", "b"):
        run(world, "plain", tmp_path / name)
    for file in (FEATURES, SYMMETRY_TENSORS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    run(world, "plain", tmp_path / "a")  # its own folder may be written again
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("mine")
    with pytest.raises(DiskError, match="not empty"):
        run(world, "plain", tmp_path / "c")


def test_a_dictionary_of_a_branch_is_compared_with_that_branch_of_every_pose(world, tmp_path):
    save(Autoencoder(d_in=20, n_latents=40, seed=1), tmp_path / "branch")
    result, _ = classify(tmp_path / "branch", world / "store", tmp_path / "out", site="layer/part")
    assert result.site == "layer/part"
    assert result.n_features == 40


def refused(world, tmp_path, capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["symmetry", *words, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err


def test_what_does_not_fit_is_refused_in_one_sentence(world, tmp_path, capsys):
    store = str(world / "store")
    manifest = read_json(world / "store" / "manifest.json")
    plain = {k: v for k, v in manifest.items() if k != "group"}
    (tmp_path / "store").mkdir()
    forge(tmp_path / "store", plain)
    message = refused(
        world, tmp_path, capsys, str(world / "plain"), "--store", str(tmp_path / "store")
    )
    assert "Collect a store with a [group]" in message
    short = {**manifest, "shards": [shard for shard in manifest["shards"] if "held" not in shard]}
    forge(tmp_path / "store", short)
    message = refused(
        world, tmp_path, capsys, str(world / "plain"), "--store", str(tmp_path / "store")
    )
    assert "has no held-out rows to measure on; collect with held_out > 0." in message
    message = refused(
        world, tmp_path, capsys, str(world / "plain"), "--store", store, "--control", store
    )
    assert "is no result of `mechatlas symmetry`" in message
    save(Autoencoder(d_in=12, n_latents=40, seed=1), tmp_path / "narrow")
    message = refused(world, tmp_path, capsys, str(tmp_path / "narrow"), "--store", store)
    assert "reads 12 numbers, but one pose of layer" in message
    message = refused(world, tmp_path, capsys, str(world / "plain"), "--store", store, "--fdr", "2")
    assert "fdr must be in (0, 1)" in message
    message = refused(
        world,
        tmp_path,
        capsys,
        str(world / "plain"),
        "--store",
        store,
        "--equality-threshold",
        "0.5",
    )
    assert "--equality-threshold must be above 0.7071 and at most 1" in message
    save(Transcoder(d_in=36, d_out=20, n_latents=40, seed=1), tmp_path / "transcoder")
    message = refused(world, tmp_path, capsys, str(tmp_path / "transcoder"), "--store", store)
    assert "writes 20 numbers, but one pose of layer" in message
    write_json(tmp_path / "narrow" / "manifest.json", {"group": {"name": "C8", "table": [[0]]}})
    save(posed.plain_dictionary(), tmp_path / "narrow")
    message = refused(world, tmp_path, capsys, str(tmp_path / "narrow"), "--store", store)
    assert "was trained for C8, but" in message
    assert "order 8" in message


def test_a_dictionary_or_a_control_of_another_action_or_site_is_refused(world, tmp_path, capsys):
    store = ["--store", str(world / "store")]
    shutil.copytree(world / "crosscoder", tmp_path / "hues")
    group_facts = {"name": "D4", "table": posed.D4.table.tolist(), "action": "hue"}
    write_json(tmp_path / "hues" / "manifest.json", {"group": group_facts})
    message = refused(world, tmp_path, capsys, str(tmp_path / "hues"), *store)
    assert "was trained for D4 (hue), but" in message
    assert "with D4 (order 8, rotate)" in message
    run(world, "plain", tmp_path / "control", interventions=0)
    words = [str(world / "plain"), *store, "--control", str(tmp_path / "control")]
    forge(tmp_path / "control", site="other")
    message = refused(world, tmp_path, capsys, *words)
    assert "is one for other under D4 (rotate), but this is layer under D4 (rotate)" in message
    manifest = read_json(tmp_path / "control" / "manifest.json")
    forge(tmp_path / "control", group={**manifest["group"], "action": "hue"}, site="layer")
    message = refused(world, tmp_path, capsys, *words)
    assert "is one for layer under D4 (hue), but this is layer under D4 (rotate)" in message


def test_turns_that_interpolate_stand_beside_those_that_do_not(world, tmp_path):
    result, text = run(world, "plain", tmp_path / "a")
    assert result.interpolation is None
    shutil.copytree(world / "store", tmp_path / "store")
    manifest = read_json(tmp_path / "store" / "manifest.json")
    manifest["group"] |= {"exact": [True, False] * 4, "matched_blur": False}
    forge(tmp_path / "store", manifest)
    result, text = classify(world / "plain", tmp_path / "store", tmp_path / "out")
    s = load_file(tmp_path / "out" / SYMMETRY_TENSORS)["stabilizer_function"].mean(axis=0)
    interpolation = result.interpolation
    assert interpolation.quarters == pytest.approx(s[[2, 4, 6]].mean(), abs=1e-5)
    assert interpolation.between == pytest.approx(s[[1, 3, 5, 7]].mean(), abs=1e-5)
    assert "the control is `matched_blur`" in text
    chapter = symmetry_chapter(find_runs(tmp_path / "out"), no_progress)
    assert chapter is not None
    assert "collected with <code>matched_blur</code>" in chapter.html


def test_the_command_prints_the_result_as_json(world, tmp_path, capsys):
    cli.main([
        "symmetry", str(world / "plain"), "--store", str(world / "store"),
        "--out", str(tmp_path / "out"), "--json",
    ])  # fmt: skip
    assert json.loads(capsys.readouterr().out)["n_features"] == 19


@pytest.fixture(scope="module")
def turning(tmp_path_factory):
    """Posed activations of a network that sees every pose alike, and what it sees."""
    root = tmp_path_factory.mktemp("turning")
    return root, *posed.turning_world(root)


def test_swapped_poses_pass_in_a_network_that_sees_every_pose_alike(turning, tmp_path):
    root, _, stabilizers = turning
    result, text = run(root, "plain", tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "features.parquet")
    assert [frozenset(each) for each in table["stabilizer_elements"].to_pylist()] == stabilizers
    effects = result.interventions
    assert effects.downstream == "after"  # the next module
    assert effects.pose.share > 0.9
    assert effects.tested == 28  # all but the one that nothing changes
    assert effects.share > 0.9
    assert effects.low < effects.share <= effects.high + 1e-9
    assert effects.null_share < 0.05
    assert effects.recovered_by_all == pytest.approx(1, abs=0.01)
    assert effects.symmetric == 5
    assert effects.symmetric_change < 0.05 < effects.change
    assert effects.elements == posed.D4.element_names[1:]
    assert f"{effects.passed} of 28 features bring after nearer to its answer" in text
    chapter = symmetry_chapter(find_runs(tmp_path), no_progress)
    assert chapter is not None
    assert "interventions0" in chapter.figures
    assert "28 of 28" in chapter.html.replace("\n", " ")
    assert np.isnan(table["intervention_q_value"].to_numpy()).tolist() == [*[False] * 28, True]
    assert np.isfinite(table["intervention_symmetric_change"].to_numpy()).sum() == 5


def test_dossiers_have_the_tuning_of_features_with_known_symmetries(turning, tmp_path):
    root, _, stabilizers = turning
    result, _ = run(root, "plain", tmp_path / "out", interventions=0)
    made = symmetry_chapter(find_runs(tmp_path), no_progress)
    assert made is not None
    lines = {f.latent: line for f, line in made.statements if isinstance(line, TuningLine)}
    assert sorted(lines) == list(range(len(stabilizers)))
    # The same from the network itself: the field of the middle place is 5 pixels wide.
    stimuli = draw_stimuli(11, (5.0, 5.0), 2.5, 16)
    network = turning_network()
    with torch.no_grad():
        seen = network.seen(network.posed(torch.from_numpy(stimuli.images) - 0.5))[:, :, 3, 3]
        codes = load(root / "plain").encode(seen).numpy()[stimuli.image_of]
    for i, stabilizer in enumerate(stabilizers):
        line, best = lines[i], codes[..., i].max(axis=1).argmax()
        assert line.name == stimuli.names[best] == stimuli.names[line.picture]
        curve = codes[best, :, i] / codes[best, :, i].max()
        np.testing.assert_allclose(line.curve, curve[:16], atol=1e-3)
        assert line.response == pytest.approx(codes[best, :, i].max(), rel=1e-3)
        assert line.turn is not None
        assert line.mirror is not None
        assert (line.period == line.turn[0] < 360) == (line.turn[2] > SUPPORT)
        if 1 in stabilizer:
            assert line.turn == (90, 1, 1, 1)
        assert 2 not in stabilizer or line.period in (90, 180)
        assert (line.mirror[1:] == (1, 1, 1)) == any(h >= 4 for h in stabilizer)
        assert line.claimed is None or line.claimed[1:] == (1, 1, 1)
    assert len({line.period for line in lines.values()}) > 1
    assert result.tuning.responding == len(stabilizers)
    sheet = Image.open(io.BytesIO(made.images["stimuli"]))
    assert sheet.size == (sheet.height * len(stimuli.names), sheet.height)


def test_the_group_of_the_paper_goes_all_the_way(tmp_path):
    """D16: sixteen rotations, most of which interpolate, and their mirror images."""
    posed.turning_world(tmp_path, "D16", side=17, per_sample=4)
    result, text = classify(tmp_path / "plain", tmp_path / "store", tmp_path / "out")
    assert (result.group.name, result.group.order) == ("D16", 32)
    assert len(result.r2["dictionary"]) == 32
    assert "features under D16" in text
    assert result.interpolation is not None
    assert result.interventions.tested > 0
    tensors = load_file(tmp_path / "out" / SYMMETRY_TENSORS)
    assert tensors["stabilizer_function"].shape == (29, 32)
    # The network knows the poses of a square: what they leave unchanged, they leave so here.
    similarity = tensors["tuning_similarity"]
    assert similarity.shape == (29, 32)
    np.testing.assert_allclose(similarity[28, 0::4], 1, atol=1e-4)
    np.testing.assert_allclose(similarity[24:, 8], 1, atol=1e-4)
    assert (similarity[:28, 4] < 0.999).all()
    made = symmetry_chapter(find_runs(tmp_path), no_progress)
    assert made is not None
    lines = [line for _, line in made.statements if isinstance(line, TuningLine)]
    assert {len(line.curve) for line in lines} == {16}
    assert {line.n_mirrors for line in lines} == {16}


def test_poses_are_swapped_where_the_network_can_be_run_again_or_it_is_said_why_not(
    world, turning, tmp_path
):
    result, text = run(world, "plain", tmp_path / "out")
    assert "no recipe names its network" in result.interventions.missing
    assert "Poses were not changed inside the network" in text
    root, _, _ = turning
    result, _ = run(root, "plain", tmp_path / "out", interventions=0)
    assert result.interventions.missing == "Not asked for (--interventions 0)."
    result, _ = run(root, "plain", tmp_path / "out", interventions=3, downstream="output")
    assert (result.interventions.tested, result.interventions.downstream) == (3, "output")


def test_a_wrong_place_downstream_is_refused_before_the_store_is_read(
    turning, tmp_path, monkeypatch
):
    root, _, _ = turning
    monkeypatch.setattr(symmetry, "estimate_blocks", lambda *_: pytest.fail("read for nothing"))
    with pytest.raises(SiteError, match="no module 'afterr'"):
        run(root, "plain", tmp_path / "out", downstream="afterr")


def test_a_pose_tied_dictionary_is_told_by_its_atoms(turning, tmp_path):
    root, _, _ = turning
    made = PoseTied(group=posed.D4, d_in=8 * 40, n_latents=8 * 5, sparsity=TopK(k=40))
    with torch.no_grad():
        made._atoms.zero_()
        for kind in range(5):  # channel g of a kind is the atom's pose g
            for g in range(8):
                made.atoms[kind, g, 8 * kind + g] = 1
        made._encoder.copy_(made.atoms[:, 0])
        made._b_dec.zero_()
    save(made, root / "tied")
    result, text = run(root, "tied", tmp_path / "out")
    assert result.reads == "all poses"
    assert "reads all poses; the linear map reads one" in text
    assert result.n_features == 5
    assert result.r2_mean["dictionary"] == pytest.approx(1, abs=1e-4)
    assert result.interventions.tested > 0
    assert result.rows_of_halves[0] + result.rows_of_halves[1] == result.rows
    table = pq.read_table(tmp_path / "out" / "features.parquet")
    # Kinds 0 to 2 have no symmetry. Of the others the codes of poses are equal, so that only sums
    # of blocks are known: they are told as symmetric.
    orders = table["stabilizer_order"].to_pylist()
    assert orders[:3] == [1, 1, 1]
    other = PoseTied(group=group("C8"), d_in=320, n_latents=40, sparsity=TopK(k=8))
    save(other, tmp_path / "other")
    with pytest.raises(WeightsError, match="was collected with"):
        classify(tmp_path / "other", root / "store", tmp_path / "x")


def test_an_interrupted_run_continues_to_the_same_files_without_reading_the_store_again(
    turning, tmp_path, monkeypatch
):
    root, _, _ = turning
    whole, _ = run(root, "plain", tmp_path / "whole")
    run_trials, done = interchange._run_trials, []

    def interrupted(*args):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(run_trials(*args))

    monkeypatch.setattr(pose_interventions, "KEEP_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(interchange, "_run_trials", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(root, "plain", tmp_path / "out")
    assert len(list((tmp_path / "out" / "unfinished").iterdir())) == 2
    monkeypatch.setattr(symmetry, "estimate_blocks", lambda *_, **__: pytest.fail("read again"))
    again = []
    monkeypatch.setattr(interchange, "_run_trials", lambda *args: again.append(run_trials(*args)))
    result, _ = run(root, "plain", tmp_path / "out")
    assert 0 < len(again) == (28 + 5) * interchange.SAMPLES // interchange.BATCH + 1 - len(done)
    assert result.interventions == whole.interventions
    for file in (FEATURES, SYMMETRY_TENSORS):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not (tmp_path / "out" / "unfinished").exists()


def test_a_dry_run_knows_the_size_of_the_blocks(world, tmp_path):
    run(world, "plain", tmp_path / "out")
    words = (world / "plain", "--store", world / "store", "--trust")
    found, size = dry_run("symmetry", *words, out=tmp_path / "new"), bytes_in(tmp_path / "out")
    assert 0.2 * size < found.disk < 5 * size
