"""The session on a GPU (`benchmarks.gpu_session`): no part can take the time of the others, or end them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_session
from benchmarks.gpu_session import Part, parts


def test_session__goes_on_after_a_crash_and_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def python(code: str) -> tuple[str, ...]:
        return ("timeit", "-n", "1", "-r", "1", code)

    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    session = [
        Part("crash", 0, 30, python("1 / 0")),
        Part("hang", 0, 1, python(f"print('begun', flush=True); {child}")),
        Part("good", 0, 30, python("print('here')")),
        Part("long", 600, 900, python("1")),
    ]
    monkeypatch.setattr(gpu_session, "parts", lambda _out: session)
    monkeypatch.setattr(sys, "argv", ["gpu_session", "--minutes", "2", "--out", str(tmp_path)])
    start = time.monotonic()
    gpu_session.main()

    assert time.monotonic() - start < 30  # the hanging part would sleep for a minute, and so would its child
    rows = [json.loads(line) for line in (tmp_path / "session.jsonl").read_text().splitlines()]
    verdicts = {row["part"]: row["verdict"] for row in rows}
    assert verdicts["crash"].startswith("failed")
    assert verdicts["hang"] == "ended after 1 s"
    assert verdicts["good"] == "done"
    assert verdicts["long"].startswith("left out")
    assert "begun" in (tmp_path / "hang.txt").read_text()
    assert "ZeroDivisionError" in (tmp_path / "crash.txt").read_text()
    printed, summary = capsys.readouterr().out, (tmp_path / "summary.txt").read_text()
    assert printed.endswith(summary)
    assert "== good: done (" in summary
    assert "\nhere\n" in summary
    assert (
        summary.index("== crash: failed") < summary.index("== hang: ended after 1 s") < summary.index("== long: left")
    )

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--continue"])
    gpu_session.main()
    again = [json.loads(line)["part"] for line in (tmp_path / "session.jsonl").read_text().splitlines()][len(rows) :]
    assert again == ["crash", "hang", "long"]


def test_session__is_no_time_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_session", "--minutes", "0.1", "--out", str(tmp_path)])
    gpu_session.main()
    rows = [json.loads(line) for line in (tmp_path / "session.jsonl").read_text().splitlines()]
    assert [row["part"] for row in rows] == [part.name for part in parts(tmp_path)]
    assert {row["verdict"] for row in rows} <= {f"left out: {left} s are left" for left in (4, 5, 6)}


def test_session__ends_its_part_when_it_is_ended(tmp_path: Path) -> None:
    code = f"import time, pathlib; pathlib.Path({str(tmp_path / 'begun')!r}).touch(); time.sleep(600)"
    program = (
        "import sys; from pathlib import Path; from benchmarks import gpu_session as g;"
        f"g.parts = lambda _: [g.Part('sleep', 0, 600, ('timeit', '-n', '1', '-r', '1', {code!r}))];"
        f"sys.argv = ['x', '--out', {str(tmp_path)!r}]; g.main()"
    )
    session = subprocess.Popen([sys.executable, "-c", program])
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    (child,) = Path(f"/proc/{session.pid}/task/{session.pid}/children").read_text().split()
    session.send_signal(signal.SIGTERM)
    assert session.wait(30) == 143
    assert not Path(f"/proc/{child}").exists()


def test_parts__have_names_of_their_own_and_rows_that_exist(tmp_path: Path) -> None:
    from benchmarks import codebook_peer, pretrain_step

    session = parts(tmp_path)
    assert len({part.name for part in session}) == len(session)
    rows = {
        "benchmarks.pretrain_step": set(pretrain_step.ROWS),
        "benchmarks.codebook_peer": set(codebook_peer.ROWS),
    }
    for part in session:
        for words in (part.words, part.toy):
            if words and words[0] in rows:
                assert set(words[words.index("--rows") + 1 :]) <= rows[words[0]], part.name


def test_micro__multiplies_in_fp8() -> None:
    from benchmarks.micro import fp8_product, to_fp8

    torch.manual_seed(0)
    a, b = 30 * torch.randn(32, 64).bfloat16(), torch.randn(48, 64).bfloat16() / 50
    product, exact = fp8_product(*to_fp8(a), *to_fp8(b)).double(), a.double() @ b.double().t()

    assert product.shape == (32, 48)
    assert (product - exact).norm() / exact.norm() < 0.05  # e4m3 has 3 bits after the point


def test_micro__names_what_a_cpu_leaves_out() -> None:
    from benchmarks.micro import products, uploads

    cpu = torch.device("cpu")
    left_out = {
        row.name: row.unit for part in (products(cpu, 512), uploads(cpu, 8)) for row in part if row.call is None
    }
    assert left_out == {
        "products in FP8": "a GPU with FP8 (compute capability 8.9)",
        "uploads on a stream of their own": "a GPU",
    }
