"""What goes wrong in a new user's first hour, done on purpose, in processes of their own.

Each time: the exit code, one line on stderr, and in that line what to do next; what was there before is there after.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import resource
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from calling import ROOT, Called, assert_refused
from conftest import DECODER, TINY

from sdae.store import Store
from sdae.yamls import merge
from slurm import doctor

LATEX = ("pdflatex", "tectonic", "xelatex", "lualatex", "latexmk")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The folder in which a user stands, with a run's config."""
    values = merge(TINY, {"stage": "pretrain", "model": DECODER, "optim": {"epochs": 1, "warmup_epochs": 0}})
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def environment(**changes: str | None) -> dict[str, str]:
    values = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}
    return {key: value for key, value in values.items() if value is not None}


def start(here: Path, *words: object, **changes: str | None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cli.main", *map(str, words)], cwd=here, env=environment(**changes), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], seconds: float = 600) -> Called:
    out, err = process.communicate(timeout=seconds)
    return Called(process.returncode, out, err)


def cli(here: Path, *words: object, **changes: str | None) -> Called:
    return ended(start(here, *words, **changes))


def below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# 1. In the wrong folder


def test_in_the_wrong_folder(here: Path) -> None:
    before = below(here)
    assert_refused(cli(here, "run", "two.yaml"), f"two.yaml: no such file in {here}")
    shown = cli(here, "results", "show", "pretrain-0123")
    assert_refused(
        shown, f"runs: no run named 'pretrain-0123': there is no such folder in {here}; --store DIR names another"
    )
    listed = cli(here, "results", "list")
    assert (listed.code, listed.err) == (0, f"runs: there is no such folder in {here}; --store DIR names another\n")
    for word in ("check", "prune"):
        absent = cli(here, "results", word)
        assert_refused(absent, f"runs: there is no such folder in {here}; --store DIR names another")
    assert below(here) == before
    (here / "out" / "runs" / "pretrain-0123456789abcdef").mkdir(parents=True)
    above = cli(here, "results", "list", "--store", "out")
    assert (above.code, above.err) == (0, "out: no runs in it; --store out/runs has some\n")
    (here / "out" / "later").mkdir()
    (here / "out" / "later" / "FORMAT").write_text("99\n")
    above = cli(here, "results", "list", "--store", "out")
    assert (above.code, above.err) == (0, "out: no runs in it; --store out/runs has some\n"), (
        "nobody asked for out/later"
    )


# 2. Without pictures


@pytest.mark.parametrize("words", [("reproduce", "table5"), ("sweep", "submit", "table5")])
def test_without_pictures(words: tuple[str, ...], here: Path) -> None:
    refused = cli(here, *words, "--scale", "small", SDAE_DATA=None)
    assert_refused(refused, "${SDAE_DATA} is not set: export it, or say where the pictures are with --data")
    missing = cli(here, *words, "--scale", "small", SDAE_DATA=str(here / "nothing"))
    assert_refused(missing, f"data.path: {here / 'nothing'}", "no such folder (expected ", "train/CLASS/")
    assert not (here / "runs").exists()


# 3. Without a GPU


def test_a_gpu_is_asked_for_where_there_is_none(here: Path) -> None:
    called = cli(here, "run", "one.yaml", "-s", "efficiency.device=cuda", CUDA_VISIBLE_DEVICES="")
    assert_refused(called, "efficiency.device: cuda", "no usable GPU (allowed here: auto, cpu)")


# 4. With what is too old, or broken


def stub(folder: Path, version: str, body: str) -> str:
    """A PYTHONPATH on which torch is this."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(body)
    (folder / f"torch-{version}.dist-info").mkdir()
    (folder / f"torch-{version}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    return f"{folder}{os.pathsep}{ROOT}"


def test_an_old_torch(here: Path) -> None:
    path = stub(here / "stub", "2.1.0", "__version__ = '2.1.0'\n")
    assert_refused(cli(here, "run", "one.yaml", PYTHONPATH=path), "torch 2.1.0 (2.11 or newer): `make setup`", "doctor")
    worker = cli(here, "reproduce", "table5", PYTHONPATH=path)
    assert (worker.code, worker.out) == (2, "")
    assert worker.err.splitlines()[-1].startswith("error: a worker could not start: ")
    assert worker.err.endswith("(`sdae-cli doctor` checks this machine)\n")
    doctor = cli(here, "doctor", PYTHONPATH=path)
    assert doctor.code == 1
    assert any(
        line.startswith("FAILED  torch ") and "2.1.0 (2.11 or newer)" in line for line in doctor.out.splitlines()
    )


def test_a_torch_that_cannot_be_loaded(here: Path) -> None:
    path = stub(here / "stub", "2.14.1", "raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    assert_refused(cli(here, "run", "one.yaml", PYTHONPATH=path), "libcudart.so.12", "`sdae-cli doctor` checks")


def test_an_old_python(here: Path) -> None:
    program = (
        "import sys; sys.version_info = (3, 9, 1); import runpy; runpy.run_module('cli.main', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), cwd=here, capture_output=True, text=True)
    assert_refused(
        Called(done.returncode, done.stdout, done.stderr), "Python 3.9 is too old (3.11 or newer): `make setup`"
    )


# 5. On a disk that is full, or may only be read


def limited() -> None:
    """No file may grow beyond 4 KiB, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.slow
def test_a_full_disk(here: Path) -> None:
    for words in (("run", "one.yaml"), ("reproduce", "table5")):
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *words], cwd=here, env=environment(PYTHONDONTWRITEBYTECODE="1"),
            capture_output=True, text=True, preexec_fn=limited, timeout=600,
        )  # fmt: skip
        called = Called(done.returncode, done.stdout, done.stderr)
        assert_refused(called, "runs: the store cannot be written: ", "(make room, then the same command goes on)")
    assert cli(here, "run", "one.yaml").code == 0


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that may only be read; where this user may not mount one, a folder that he may not write to."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    if not mounted and os.getuid() == 0:
        pytest.skip("root may write everywhere, and not mount here")
    folder.chmod(0o500) if not mounted else None
    yield folder
    subprocess.run(["umount", str(folder)], check=True) if mounted else folder.chmod(0o700)


@pytest.mark.slow
def test_a_store_that_may_only_be_read(here: Path, read_only: Path) -> None:
    for words in (("run", "one.yaml"), ("reproduce", "table5"), ("sweep", "submit", "table5")):
        called = cli(here, *words, "--store", read_only / "runs")
        assert_refused(called, "the store cannot be made: ", "(name a folder that you may write to)")
    report = cli(here, "paper", "report", "--scale", "smoke", "--out", read_only / "paper")
    assert_refused(report, "cannot be written: ", "(name a folder that you may write to)")
    assert cli(here, "results", "check", "--store", read_only).code == 0


# 6. Ctrl-C


def typed(process: subprocess.Popen[bytes], terminal: int, until: Callable[[str], bool], seconds: float = 300) -> str:
    """What a process writes on its terminal, until that holds."""
    text, end = "", time.monotonic() + seconds
    while not until(text) and time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                text += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # its other end is closed
                break
        elif process.poll() is not None:
            break
    return text


def in_front() -> None:
    """Gives a process its terminal, and Ctrl-C, which those that a shell has put into the background ignore."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(
    here: Path, words: tuple[object, ...], ready: Callable[[int], bool], presses: int = 1
) -> tuple[int, str]:
    """Exit code and words of a command that got Ctrl-C on its terminal, once it was ready, told by its process id; and
    another where it did not mind."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *map(str, words)], cwd=here, env=environment(TERM="dumb"),
        stdin=child, stdout=child, stderr=child, start_new_session=True,
        preexec_fn=in_front,
    )  # fmt: skip
    os.close(child)
    text = typed(process, parent, lambda _: ready(process.pid))
    for left in range(presses, 0, -1):
        if process.poll() is None:
            os.write(parent, b"\x03")
            text += typed(process, parent, lambda _: process.poll() is not None, 10 if left > 1 else 300)
    text += typed(process, parent, lambda _: False, 1)
    code = process.wait(600)
    os.close(parent)
    return code, text


def pictures(root: Path, number: int) -> Path:
    from PIL import Image

    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                Image.effect_noise((256, 256), 80).convert("RGB").save(root / split / name / f"{i}.png")
    return root


def test_ctrl_c_in_reproduce(here: Path) -> None:
    store = Store(here / "runs")
    running = lambda _: any(store.run(i).state() == "running" for i in store.ids())  # noqa: E731
    code, text = interrupted(here, ("reproduce", "table5"), running)
    assert code == 130, text
    assert "the runs have saved their state, and the same command goes on" in text
    assert "Traceback" not in text
    # A second worker may have met it before its run had more than a log
    assert {store.run(i).state() for i in store.ids()} <= {"new", "started", "done"}


def cli_in(pid: int) -> bool:
    """Whether a process has come to our code, which imports libyaml among the first."""
    return "_yaml" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("seconds", [0.0, 0.7])
@pytest.mark.parametrize("words", [("sweep", "plan", "--scale", "mini", "--seeds", ",".join(map(str, range(250)))),
                                   ("paper", "report", "--scale", "mini")], ids=lambda words: words[0])  # fmt: skip
def test_ctrl_c_in_what_computes_nothing(words: tuple[str, ...], seconds: float, here: Path) -> None:
    # It is lost where it comes in a callback of Python's own or in an import of compiled code: one presses again
    for _ in range(5):
        began = time.monotonic()
        ready = lambda pid, began=began: time.monotonic() > began + seconds and cli_in(pid)  # noqa: E731
        code, text = interrupted(here, words, ready, presses=5)
        if seconds and "^C" not in text:  # a fast machine was done before
            return
        if code != 0 and "Exception ignored in" not in text:
            break
    # Python ends itself by the signal where it met it in an `exec`, as dataclasses have it: a shell calls that 130, too
    assert code in (130, -signal.SIGINT), text
    assert "stopped; the same command goes on" in text
    assert "Traceback" not in text
    assert not (here / "runs").exists()


def test_ctrl_c_that_compiled_code_wraps_in_its_own_error(here: Path) -> None:
    # As pydantic does, where it meets it while it builds a schema
    script = """
import os, signal
import cli.main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
def command(**_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt as error:
        raise ValueError("SchemaError") from error
cli.main.app = command
cli.main.main()
"""
    called = subprocess.run([sys.executable, "-c", script], cwd=here, env=environment(), capture_output=True, text=True)
    assert (called.returncode, called.stderr) == (130, "error: stopped; the same command goes on\n")


@pytest.mark.slow
def test_ctrl_c_in_data_prepare(here: Path) -> None:
    folder, out = pictures(here / "pictures", 60), here / "packed"
    words = ("data", "prepare", folder, "--out", out, "--form", "shards", "--side", "64", "--workers", "2")
    code, text = interrupted(here, words, lambda _: out.exists() and any(out.rglob("*")))
    assert code in (0, 130), text  # it may have been done
    assert "Traceback" not in text or "Exception ignored in" in text  # it hit a callback of Python's own
    assert code == 0 or "stopped; the same command goes on" in text
    assert cli(here, *words).code == 0
    assert cli(here, "data", "verify", out).code == 0


@pytest.mark.parametrize(
    "words",
    [("results", "prune", "--dry-run"), ("paper", "table", "table1"), ("paper", "report"), ("paper", "claims")],
    ids=" ".join,
)
def test_no_seeds_are_not_all_seeds(words: tuple[str, ...], here: Path) -> None:  # as of an unset variable of a shell
    (here / "runs").mkdir()
    assert_refused(cli(here, *words, "--seeds", ""), "--seeds '': expected whole numbers with commas between them")


# 7. Two terminals on one store


@pytest.mark.slow
def test_two_terminals_on_one_store(here: Path) -> None:
    words = ("run", "one.yaml", "-s", "optim.epochs=100000")
    first, store = start(here, *words), Store(here / "runs")
    try:
        while not any(store.run(i).metrics() for i in store.ids()):
            assert first.poll() is None, ended(first)
            time.sleep(0.05)
        (identity,) = store.ids()
        second = cli(here, *words)
        assert_refused(
            second, f"{identity}: another process is running it (", f"process {first.pid})", "sweep logs", "-f"
        )
        pruned = cli(here, "results", "prune", "--yes")
        assert "nothing to remove" in pruned.out
        assert store.run(identity).state() == "running"
    finally:
        first.send_signal(signal.SIGINT)
        stopped = ended(first)
    assert stopped.code == 75
    assert "its state is saved, run it again to go on" in stopped.err


@pytest.mark.parametrize(("found", "ok"), [("2.11rc1", True), ("3", True), ("2.10.1", False), ("unknown", False)])
def test_doctor_reads_any_version(found: str, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: found)
    assert {row["check"]: row["ok"] for row in doctor.packages()}["torch"] is ok


# 8. Without Slurm


def test_without_slurm(here: Path) -> None:
    profile = ROOT / "examples/profiles/cpu.yaml"
    words = ("sweep", "submit", "table5", "--on", "slurm")
    assert_refused(cli(here, *words), "--profile: missing (a YAML file such as those in examples/profiles)")
    for more in ((), ("--dry-run",)):
        called = cli(here, *words, "--profile", profile, *more, PATH=str(here))
        if more and called.code == 0:  # a text can be shown without Slurm
            continue
        assert_refused(called, "Slurm", "sbatch")
    doctor = cli(here, "doctor", "--profile", profile, PATH=str(here))
    assert doctor.code == 1
    assert any("slurm" in line.lower() and line.startswith("FAILED") for line in doctor.out.splitlines())
    assert not (here / "runs").exists() or not Store(here / "runs").ids()


# 9. Typing errors


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("run", "one.yaml", "-s", "optim.lr=1"), ("optim.lr: unknown key (allowed: ", "base_lr")),
        (("run", "one.yaml", "-s", "optim.epochs"), ("optim.epochs", "key=value")),
        (("reproduce", "tabel5"), ("artifact 'tabel5' is unknown (allowed: table1", "a YAML file of your own")),
        (("reproduce", "table5", "--scale", "tiny"), ("scale 'tiny' is unknown (allowed: ", "smoke")),
        (("sweep", "plan", "--seeds", "0-2"), ("--seeds '0-2': expected whole numbers", "e.g. 0,1,2")),
        (("repoduce",), ("No such command", "repoduce")),
        (("reproduce", "--sclae", "smoke"), ("No such option", "--scale")),
        (("data", "prepare", "."), ("--out",)),
        (("paper", "explain", "table5.fold.top1"), ("cell 'table5.fold.top1' is unknown (e.g. table5.folds.top1",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_typing_errors(words: tuple[str, ...], parts: tuple[str, ...], here: Path) -> None:
    before = below(here)
    assert_refused(cli(here, *words), *parts)
    assert below(here) == before


# 10. Without LaTeX


def test_without_latex(here: Path) -> None:
    """The report is made; that there is no PDF is said, and what would make one."""
    tools = here / "tools"
    tools.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                if name not in LATEX and not (tools / name).exists():
                    (tools / name).symlink_to(Path(folder) / name)
    called = cli(here, "paper", "report", "--scale", "smoke", PATH=str(tools))
    assert called.code == 0, called
    assert (here / "paper/report.html").exists()
    assert not (here / "paper/report.pdf").exists()
    assert "pdflatex" in called.err
    assert "texlive" in called.err


def test_what_is_said_fits_on_a_line(here: Path) -> None:
    """Whatever a new user may type first: no traceback, never more than one line of error."""
    cases: list[tuple[Any, ...]] = [
        (),
        ("run",),
        ("sweep",),
        ("sweep", "logs"),
        ("predict", "x", "y"),
        ("paper", "table", "9"),
    ]
    for words in cases:
        called = cli(here, *words)
        assert called.code == 2, (words, called)
        assert "Traceback" not in called.err
        assert called.err.count("error: ") <= 1
