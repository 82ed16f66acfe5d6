"""Engines: results of all pieces, lost workers, errors, and names."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mechatlas.app.engines import Here, LostPieceError, Processes, as_engine
from mechatlas.base import RecipeError


def square(piece, shared):
    return piece * piece + shared


def die_once(piece, shared):
    """Kill the worker the first time that piece 2 is run."""
    mark = Path(shared) / str(piece)
    if piece == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return piece


def die(piece, shared):
    del shared
    if piece == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return piece


def refuse(piece, shared):
    del shared
    if piece == 3:
        raise RecipeError("piece three is wrong")
    return piece


@pytest.mark.parametrize("engine", [Here(), Processes(2)])
def test_every_piece_has_its_result(engine):
    found = dict(engine.map(square, range(7), shared=10))
    assert found == {i: i * i + 10 for i in range(7)}
    assert dict(engine.map(square, [], shared=0)) == {}


def test_the_piece_of_a_lost_worker_runs_again(tmp_path):
    found = dict(Processes(2).map(die_once, range(5), shared=str(tmp_path)))
    assert found == {i: i for i in range(5)}
    assert (tmp_path / "2").exists()  # it did die


def test_a_piece_that_ends_three_workers_ends_the_work_and_is_named():
    found = []
    with pytest.raises(LostPieceError, match=r"Piece 1 \(1\) ended its process 3 times"):
        found.extend(Processes(1).map(die, range(3)))
    assert found == [(0, 0)]  # what was finished before


def test_an_error_of_the_work_is_raised_here():
    with pytest.raises(RecipeError, match="piece three is wrong"):
        list(Processes(1).map(refuse, range(9)))


def test_a_process_that_is_ended_from_outside_still_says_how_to_go_on():
    code = (
        "import os; from mechatlas.app.engines import _last_words\n"
        "with _last_words(): pass\n"
        "with _last_words(): os._exit(3)"
    )
    ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 3
    assert ended.stderr.count("the same command goes on from there") == 1


def test_names():
    assert as_engine("here") == Here()
    assert as_engine("processes:3") == Processes(3)
    for wrong in ("processes", "processes:0", "processes:x", "dask", "threads:2", ""):
        with pytest.raises(RecipeError, match="engines are here"):
            as_engine(wrong)


def test_ray_runs_pieces_on_a_cluster():
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'mechatlas[ray]'")
    found = dict(as_engine("ray").map(square, range(7), shared=10))
    assert found == {i: i * i + 10 for i in range(7)}
