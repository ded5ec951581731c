"""Progress bars of long passes."""

from srit.runtime.progress_bar import progress_bar


def test_a_log_gets_a_line_a_minute(capfd, monkeypatch):
    now = [0.0]
    bar = progress_bar(total=600, unit="step")
    monkeypatch.setattr(bar, "_time", lambda: now[0])
    bar.last_print_t = bar.start_t = 0.0
    for _ in range(600):
        now[0] += 1
        bar.update()
    bar.set_postfix_str("loss=0.5", refresh=False)
    bar.close()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 12 and all("\r" not in line for line in lines)  # at the start, and at the end
    assert "600/600" in lines[-1] and "loss=0.5" in lines[-1]


def test_another_rank_is_silent(capfd, monkeypatch):
    monkeypatch.setattr("srit.runtime.distributed.rank", lambda: 1)
    for _ in progress_bar(range(3)):
        pass
    assert capfd.readouterr().err == ""
