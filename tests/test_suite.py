"""The suite itself, on tiny notebooks: it is green only where everything was run to its end."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress

import nbformat
import psutil
import pytest
from jupyter_client.connect import LocalPortCache
from suite import Kernel

from notebooks import METADATA, ROOT, canonicalise, execute

SWALLOWS_ONE_INTERRUPT = """import time
try:
    for _ in range(600):
        time.sleep(0.1)
except KeyboardInterrupt:
    pass"""
SWALLOWS_ALL = """import time
from IPython.display import clear_output
while True:
    try:
        time.sleep(0.1)
        clear_output()
    except KeyboardInterrupt:
        pass"""
INTERRUPTED = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(9)"
RUNS = "import os\nfrom pathlib import Path\nruns = Path(os.environ['NOISOUT_RUNS'])\n"


def code(source, *outputs, tags=(), count=1):
    """A code cell that says it has been run."""
    printed = [nbformat.v4.new_output("stream", text=text) for text in outputs]
    metadata = {"tags": list(tags)} if tags else {}
    return nbformat.v4.new_code_cell(
        source, outputs=printed, execution_count=count, metadata=metadata
    )


def write(path, *cells):
    nb = canonicalise(nbformat.v4.new_notebook(cells=list(cells), metadata=METADATA))
    path.write_text(nbformat.writes(nb) + "\n", encoding="utf-8")


def suite(folder, *options):
    """The exit code and the report of the suite, run over a folder."""
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    command = (
        "-m pytest -p suite --nbval --nbval-current-env --nbval-cell-timeout=100 -rA --color=no"
    )
    command = [sys.executable, *command.split(), *options, "."]
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    found = subprocess.run(
        command,
        cwd=folder,
        env=environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])},
        capture_output=True,
        text=True,
    )
    return found.returncode, found.stdout + found.stderr


def outcomes(report, name):
    """The outcome of each cell of a notebook, in order."""
    found = re.findall(rf"^([A-Z]+) {name}.ipynb::Cell (\d+)", report, re.MULTILINE)
    return [outcome for outcome, _ in sorted(found, key=lambda pair: int(pair[1]))]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """One run over a notebook of each fault, with a time limit of three seconds."""
    folder = tmp_path_factory.mktemp("faulty")
    last = code("print('never')", "never\n")
    write(folder / "one.ipynb", code("1;"), code(SWALLOWS_ONE_INTERRUPT), last)
    write(folder / "all.ipynb", code(SWALLOWS_ALL), last)
    write(folder / "death.ipynb", code("import os\nos._exit(3)"), last)
    write(folder / "error.ipynb", code("1 / 0"), code("print('late')", "late\n"))
    write(folder / "interrupt.ipynb", code(INTERRUPTED, tags=["raises-exception"]), last)
    write(folder / "differs.ipynb", code("print(1)", "2\n"), code("print(3)", "3\n"))
    return suite(folder, "--nbval-cell-timeout=3")


@pytest.mark.parametrize(
    "name, reason",
    [
        ("one", "exceeded the time limit of 3 s"),
        ("all", "exceeded the time limit of 3 s"),
        ("death", "the kernel died"),
        ("error", "ZeroDivisionError"),
        ("interrupt", "was interrupted"),
    ],
)
def test_a_cell_that_does_not_reach_its_end_fails_and_the_rest_is_not_run(faulty, name, reason):
    code, report = faulty
    found = outcomes(report, name)
    assert code == 1 and "XFAIL" not in report and "XPASS" not in report
    assert found[-1:] == ["FAILED"] and "PASSED" not in found[1:], report
    assert reason in report


def test_an_output_that_differs_fails_alone(faulty):
    assert sorted(outcomes(faulty[1], "differs")) == ["FAILED", "PASSED"]


@pytest.mark.parametrize(
    "test, expected",
    [
        ("def test(): pass", 0),
        ("def test(): pytest.skip('not here: no such machine')", 0),
        ("pytest.skip('not here: no git', allow_module_level=True)", 0),
        ("def test(): pytest.skip('some day')", 1),
        ("def test(): pytest.skip('not run: cell 1 failed')", 1),
        ("pytest.importorskip('no_such_module')\ndef test(): pass", 1),
        ("@pytest.mark.xfail\ndef test(): assert False", 1),
        ("@pytest.mark.xfail\ndef test(): pass", 1),
    ],
)
def test_only_a_skip_that_was_asked_for_leaves_the_suite_green(tmp_path, capsys, test, expected):
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    source = f"import pytest\n{test}\ndef test_fine(): pass\n"
    (tmp_path / f"test_{tmp_path.name}.py").write_text(source, encoding="utf-8")
    assert pytest.main(["-p", "suite", "--color=no", str(tmp_path)]) == expected
    assert ("the run has failed" in capsys.readouterr().out) == bool(expected)


def test_notebooks_run_in_parallel_each_in_one_kernel_and_in_one_folder(tmp_path):
    alone = RUNS + "runs.mkdir(parents=True)\nx = 1"  # fails where another notebook was before
    for name in "abcd":
        cells = [code("x"), code("x"), code("x += 1\nprint(x)", "2\n")]
        for cell in cells[:2]:
            cell.outputs = [
                nbformat.v4.new_output(
                    "execute_result", data={"text/plain": "1"}, execution_count=1
                )
            ]
        write(tmp_path / f"{name}.ipynb", code(alone), *cells)
    exit_code, report = suite(tmp_path, "-n", "2", "--dist", "worksteal")
    assert exit_code == 0 and "16 passed" in report, report


def test_a_test_sees_no_setting_or_file_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("NOISOUT_PROFILE", "flowers64")
    monkeypatch.setenv("NOISOUT_RUNS", str(tmp_path / "mine"))
    source = (
        RUNS + "print(os.environ['NOISOUT_PROFILE'], runs.exists(), runs.parent.name == 'mine')"
    )
    write(tmp_path / "it.ipynb", code(source, "quick False False\n"))
    exit_code, report = suite(tmp_path)
    assert exit_code == 0, report


@pytest.mark.skipif(not shutil.which("git"), reason="not here: git is not installed")
def test_a_notebook_that_a_reader_has_saved_is_compared_with_the_committed_one(tmp_path):
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]
    path = tmp_path / "it.ipynb"
    write(path, code("print(1)", "1\n"), code("print(2)", "2\n"))
    for arguments in (["init", "-q"], ["add", "it.ipynb"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    nb = nbformat.read(path, 4)
    nb.cells[0].outputs[0].text = "1 in 0.3 s\n"  # what another machine shows
    nb.cells[1].source = "print(3)  # changed: there is nothing to compare it with"
    nb.cells.append(code("print('an answer')", count=7))  # the reader's own
    nb.metadata["language_info"]["version"] = "3.11.7"  # as JupyterLab saves
    nbformat.write(nb, path)
    exit_code, report = suite(tmp_path)
    assert exit_code == 0 and "saved since it was recorded" in report, report

    write(path, code("print(1)", "2\n"))  # as a recording writes it: its own outputs count
    assert suite(tmp_path)[0] == 1


# --- tools/notebooks.py, on a script of its own ---

TRAINS = """# %%
import os
import time
from pathlib import Path
from noisout_nb.progress import progress
print("training")
step, runs = 0, Path(os.environ["NOISOUT_RUNS"])
try:
    for step in progress(range(1, 301), description="training"):
        time.sleep(0.1)
except KeyboardInterrupt:
    (runs / "saved").write_text(str(step))

# %%
assert step == 300, "stopped early"
"""


def start(folder, verb, source, **environment):
    """tools/notebooks.py with `source` as the only script."""
    scripts = folder / "pages" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "tiny.py").write_text(source, encoding="utf-8")
    driver = (
        "import notebooks as n, pathlib, sys; n.ROOT = pathlib.Path(sys.argv.pop(1)); "
        "n.NOTEBOOKS = n.ROOT / 'pages'; n.SCRIPTS = n.NOTEBOOKS / 'scripts'; "
        "n.time_limit = lambda: 4.0; n.main()"
    )
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])}
    return subprocess.Popen(
        [sys.executable, "-c", driver, str(folder), verb, "tiny"],
        env=os.environ | paths | {"NOISOUT_RECORD": ""} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


class Ports(ExitStack):
    """In place of jupyter_client's choice of ports: the first `kernels` find theirs taken."""

    def __init__(self, monkeypatch, kernels):
        super().__init__()
        self.left = 5 * kernels
        monkeypatch.setattr(LocalPortCache, "find_available_port", lambda _, ip: self.choose(ip))

    def choose(self, ip):
        self.left -= 1
        server = self.enter_context(socket.create_server((ip, 0)))
        port = server.getsockname()[1]
        if self.left < 0:
            server.close()
        return port


def start_under_nbval():
    kernel = Kernel(":nbval-parent-env")
    kernel.stop()


def start_under_nbclient():
    execute(nbformat.v4.new_notebook(cells=[code("1 + 1")], metadata=METADATA), "tiny", 100)


@pytest.mark.parametrize("begin", [start_under_nbval, start_under_nbclient])
def test_a_kernel_whose_ports_were_taken_is_started_again(monkeypatch, begin):
    with Ports(monkeypatch, kernels=2) as ports:
        begin()
    assert ports.left == -5


def test_a_kernel_that_never_starts_says_why(monkeypatch):
    reason = pytest.raises(RuntimeError, match="died before (.*\n)+.*Address already in use")
    with Ports(monkeypatch, kernels=3) as ports, reason:
        start_under_nbval()
    assert ports.left == 0


@pytest.mark.skipif(os.name == "nt", reason="not here: Windows has no SIGINT for one process")
def test_ctrl_c_of_a_run_says_where_it_stopped_and_how_to_go_on(tmp_path):
    run = start(tmp_path, "run", TRAINS, NOISOUT_RUNS=str(tmp_path), NOISOUT_PROFILE="quick")
    report = ""
    while "training" not in report:
        report += run.stdout.readline()
    time.sleep(2)
    run.send_signal(signal.SIGINT)
    report += run.communicate(timeout=60)[0]
    saved = int((tmp_path / "saved").read_text())
    stopped = re.search(r"stopped at step (\d+); run again to go on", report)
    assert stopped and abs(int(stopped[1]) - saved) <= 5, report
    assert run.returncode == 1 and "Traceback" not in report


def kernels_of(pid):
    found = []
    for child in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):  # a short one
            found += [child] if "ipykernel_launcher" in child.cmdline() else []
    return found


@pytest.mark.skipif(os.name == "nt", reason="not here: Windows has no SIGINT for one process")
def test_ctrl_c_while_the_kernel_starts_leaves_no_traceback_and_no_kernel(tmp_path):
    run = start(tmp_path, "run", TRAINS, NOISOUT_RUNS=str(tmp_path))
    while not (kernels := kernels_of(run.pid)):
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    report = run.communicate(timeout=60)[0]
    assert run.returncode == 1 and "stopped; run again" in report
    assert "Traceback" not in report, report
    assert not psutil.wait_procs(kernels, timeout=20)[1]


def test_a_run_ends_with_its_images_and_what_to_open_next(tmp_path):
    source = TRAINS.replace("301", "3").replace("300", "2")
    source += 'from PIL import Image\nimage = Image.new("L", (2, 2))\nimage'
    source += '\n\n# %%\nprint("later")\nimage.save(runs / "quick" / "it.png")\n'
    run = start(tmp_path, "run", source, NOISOUT_RUNS=str(tmp_path), NOISOUT_PROFILE="quick")
    report = run.communicate(timeout=100)[0]
    assert run.returncode == 0, report
    assert "it.png" in report and "tiny.ipynb" in report and "Next: `make lab`" in report
    first = tmp_path / "quick" / "tiny" / "01.png"  # shown at once, not at the end
    assert first.read_bytes().startswith(b"\x89PNG")
    assert report.index("01.png") < report.index("later")


def test_a_run_that_cannot_write_names_the_way_out(tmp_path):
    (tmp_path / "file").write_text("")
    run = start(tmp_path, "run", TRAINS, NOISOUT_RUNS=str(tmp_path / "file" / "runs"))
    report = run.communicate(timeout=100)[0]
    assert run.returncode == 1 and "set NOISOUT_RUNS to a folder" in report
    assert "Traceback" not in report


@pytest.mark.parametrize(
    "source, reason",
    [
        ("# %%\n1 / 0\n", "code cell 1 failed"),
        ("# %%\nimport time\ntime.sleep(99)\n", "longer than this machine's limit"),
        (f'# %% tags=["raises-exception"]\n{INTERRUPTED}\n', "code cell 1 was interrupted"),
        ("# %%\nimport os\nos._exit(1)\n", "failed"),
    ],
)
def test_a_recording_that_did_not_reach_its_end_is_not_stored(tmp_path, source, reason):
    recording = start(tmp_path, "record", source)
    report = recording.communicate(timeout=100)[0]
    assert recording.returncode == 1 and reason in report, report
    assert not (tmp_path / "pages" / "tiny.ipynb").exists()


def test_a_recording_is_stored(tmp_path):
    recording = start(tmp_path, "record", "# %%\nprint(1 + 1)\n")
    report = recording.communicate(timeout=100)[0]
    assert recording.returncode == 0, report
    stored = nbformat.read(tmp_path / "pages" / "tiny.ipynb", 4)
    assert stored.cells[0].outputs[0].text == "2\n"
