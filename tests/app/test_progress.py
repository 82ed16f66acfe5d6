from mechatlas.app import progress


def test_progress_speaks_where_there_is_no_terminal(capsys, monkeypatch):
    clock = iter([0.0, 3.0, 11.0, 12.0, 25.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.bar("drawing") as update:
        for done in (10, 40, 50, 90):
            update(done, 200)
    assert capsys.readouterr().err == (
        "drawing: 20%, about 43 seconds left\ndrawing: 45%, about 30 seconds left\n"
    )


def test_short_work_says_nothing(capsys):
    with progress.bar("drawing") as update:
        update(1, 2)
    assert capsys.readouterr().err == ""
