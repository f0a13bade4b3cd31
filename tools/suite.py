"""A pytest plugin over nbval and pytest-xdist: the suite cannot be green by accident.

- A kernel that dies before it answers is started again, twice: its ports are chosen before it takes
  them, and another program may be faster.
- A cell that is interrupted, that exceeds the machine's time limit or whose kernel dies fails, and
  the rest of its notebook is not run. (nbval marks that rest as expected failures; and a loop that
  takes an interrupt for "stop" lets its cell pass half-done.)
- A test that is skipped fails the run unless its reason begins with "not here: "; so does every
  expected failure, come true or not.
- Every notebook has a folder of its own for runs and data, so none sees what another or you left.
- A notebook that somebody has run and saved is compared with its committed outputs.
- With `-n`, each file goes to one worker, whatever --dist says, and the slowest files start first.
"""

import json
import math
import os
import subprocess
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from queue import Empty

import nbformat
import pytest
from nbval import plugin as nbval
from nbval.kernel import RunningKernel, start_new_kernel

from notebooks import STARTS, canonicalise, fixed_environment, time_limit

ASKED_FOR, NOT_RUN = "not here: ", "not run: "
NBVAL_DEFAULT = 2000.0  # seconds for a cell, where the command line names none
GRACE = 20  # seconds from an interrupt to the kernel's end
MEASURED = pytest.StashKey[bool]()


class DeadKernel(Exception):
    """The notebook's kernel is gone."""


class Kernel(RunningKernel):
    """nbval's kernel; its death is noticed within a second, not at the time limit."""

    def __init__(self, kernel_name, cwd=None, startup_timeout=60):
        options = {"kernel_name": kernel_name, "cwd": cwd, "startup_timeout": startup_timeout}
        for left in reversed(range(STARTS)):
            with tempfile.TemporaryFile() as words:
                try:
                    self.km, self.kc = start_new_kernel(stderr=words, **options)
                    break
                except RuntimeError as error:
                    if not left:
                        words.seek(0)
                        last = words.read()[-2000:].decode(errors="replace")
                        raise RuntimeError(f"{error}. Its last words:\n{last}") from None
        self._ensure_iopub_up()

    def get_message(self, stream, timeout=None):
        end = time.monotonic() + (math.inf if timeout is None else timeout)
        while True:
            left = end - time.monotonic()
            try:
                return super().get_message(stream, timeout=max(0.0, min(1.0, left)))
            except Empty:
                if not self.is_alive():
                    raise DeadKernel from None
                if left <= 0:
                    raise


class Cell(nbval.IPyNbCell):
    """A code cell; its notebook goes no further where it does not come to its end."""

    def setup(self):
        """Without nbval's, which expects cells to fail after a time limit."""

    def runtest(self):
        if self.parent.left:
            pytest.skip(NOT_RUN + self.parent.left)
        if self.options["skip"]:
            pytest.skip(ASKED_FOR + "the cell is tagged nbval-skip")
        fault = None
        try:
            super().runtest()
        except DeadKernel:
            self.leave("the kernel died")
        except nbval.NbCellError as error:
            fault = error
        outputs = self.test_outputs or []
        if self.parent.timed_out:
            limit = self.config.option.nbval_cell_timeout
            self.leave(f"exceeded the time limit of {limit:.0f} s", fault)
        if any(output.get("ename") == "KeyboardInterrupt" for output in outputs):
            self.leave("was interrupted", fault)
        if fault is not None:
            if "exception" in str(fault):
                self.parent.left = f"cell {self.cell_num} failed"
            raise fault

    def leave(self, reason, fault=None):
        """Fail, and let the notebook end here."""
        self.parent.left = f"cell {self.cell_num}: {reason}"
        if self.parent.kernel.is_alive():
            self.parent.kernel.stop()
        self.raise_cell_error(reason, getattr(fault, "inner_traceback", None))


class Notebook(nbval.IPyNbFile):
    """A notebook, in a kernel and a folder of its own."""

    left = ""  # why its other cells are not run
    deadline = math.inf  # after an interrupt
    saved_by_hand = False

    def collect(self):
        cells = []
        for found in super().collect():
            parts = {key: getattr(found, key) for key in ("name", "cell_num", "cell", "options")}
            cells.append(Cell.from_parent(self, **parts))
        stored = self.path.read_text(encoding="utf-8")
        recorded = nbformat.writes(canonicalise(nbformat.reads(stored, 4)))
        self.saved_by_hand = json.loads(stored) != json.loads(recorded)
        if self.saved_by_hand:
            references = committed_cells(self.path)
            for item in cells:
                use_reference(item, references)
        return cells

    def setup(self):
        if self.saved_by_hand:
            words = "was saved since it was recorded: compared with git's HEAD where that has it"
            warnings.warn(f"{self.path.name} {words}", stacklevel=1)
        option = self.config.option
        if self.config.stash.get(MEASURED, False):
            option.nbval_cell_timeout = time_limit()
            option.nbval_kernel_startup_timeout = max(60.0, option.nbval_cell_timeout / 5)
        before = os.environ.get("NOISOUT_RUNS")
        if before:
            os.environ["NOISOUT_RUNS"] = str(Path(before) / self.path.stem)
        try:
            super().setup()
        finally:
            if before:
                os.environ["NOISOUT_RUNS"] = before

    def get_kernel_message(self, timeout=None, stream="iopub"):
        if self.timed_out:  # a loop that goes on all the same must not keep us here
            self.deadline = min(self.deadline, time.monotonic() + GRACE)
            if time.monotonic() > self.deadline:
                raise Empty
        return super().get_kernel_message(timeout=timeout, stream=stream)


def committed_cells(path):
    """The code cells of the notebook as git has it; none without git."""
    command = ["git", "show", f"HEAD:./{path.name}"]
    try:
        found = subprocess.run(command, cwd=path.parent, capture_output=True, check=True)
        cells = nbformat.reads(found.stdout.decode(), 4).cells
    except (OSError, subprocess.CalledProcessError):
        return []
    return [cell for cell in cells if cell.cell_type == "code"]


def use_reference(item, references):
    """Compare the cell with the committed one of the same source; with nothing if there is none."""
    found = next((cell for cell in references if cell.source == item.cell.source), None)
    if found is None:
        item.cell.outputs, item.cell.execution_count = [], None
    else:
        references.remove(found)
        item.cell.outputs, item.cell.execution_count = found.outputs, found.execution_count


class Watch:
    """Sees every report, in the process that gives the exit code."""

    def __init__(self, config):
        self.config, self.unasked, self.failed, self.seconds = config, [], set(), {}
        self.asked = 0

    def pytest_runtest_logreport(self, report):
        file = report.nodeid.split("::")[0]
        self.seconds[file] = self.seconds.get(file, 0.0) + report.duration
        if report.failed:
            self.failed.add(file)
        if hasattr(report, "wasxfail"):
            self.unasked.append(f"{report.nodeid}: expected failure ({report.wasxfail})")
        else:
            self.note_skip(report)

    def pytest_collectreport(self, report):
        self.note_skip(report)

    def note_skip(self, report):
        if not report.skipped:
            return
        *_, reason = report.longrepr
        reason = str(reason).removeprefix("Skipped: ")
        left = reason.startswith(NOT_RUN) and report.nodeid.split("::")[0] in self.failed
        if reason.startswith(ASKED_FOR):
            self.asked += 1
        elif not left:
            self.unasked.append(f"{report.nodeid}: skipped ({reason})")

    def pytest_sessionfinish(self, session, exitstatus):
        nothing_ran = exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED
        if self.unasked and (exitstatus == 0 or nothing_ran):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        elif self.asked and nothing_ran:  # a file that has nothing to do on this machine
            session.exitstatus = pytest.ExitCode.OK
        cache = getattr(self.config, "cache", None)
        if cache is not None and not self.config.option.collectonly:
            cache.set("noisout/seconds", cache.get("noisout/seconds", {}) | self.seconds)

    def pytest_terminal_summary(self, terminalreporter):
        if self.unasked:
            terminalreporter.section("skipped without being asked to: the run has failed")
            for line in self.unasked:
                terminalreporter.write_line(line)
            terminalreporter.write_line(f'A skip that is meant has a reason "{ASKED_FOR}..."')


def pytest_configure(config):
    nbval.RunningKernel = Kernel
    stack = ExitStack()
    stack.enter_context(fixed_environment())
    config.add_cleanup(stack.close)
    config.stash[MEASURED] = config.option.nbval_cell_timeout == NBVAL_DEFAULT
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Watch(config), "watch")


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(parent):
    """`Notebook` in the place of nbval's own collector."""
    collectors = yield
    return [
        Notebook.from_parent(parent, path=found.path)
        if isinstance(found, nbval.IPyNbFile)
        else found
        for found in collectors
    ]


def pytest_collection_modifyitems(config, items):
    """The slowest files first, as the last run timed them; notebooks before they are timed."""
    cache = getattr(config, "cache", None)
    seconds = {} if cache is None else cache.get("noisout/seconds", {})

    def rank(item):
        unknown = 1000.0 if item.path.suffix == ".ipynb" else 0.0
        return -seconds.get(item.nodeid.split("::")[0], unknown)

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A notebook's cells share a kernel, so a file is never split over workers."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # keep the order of pytest_collection_modifyitems
    return LoadFileScheduling(config, log)
