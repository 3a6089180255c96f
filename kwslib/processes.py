"""Several processes and one disk: one run per study, a file made once, no helper that outlives its run.

All locks are the operating system's. It lets go of them when a process ends, however it ends, so a lock
file that a killed run left behind holds nothing.
"""

import functools
import json
import multiprocessing
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import ModuleType

from filelock import FileLock, Timeout

from kwslib import paths

PATIENCE_S = 5.0  # what a killed run's kernel and helpers may take to notice
IDLE_S = 300


class Busy(RuntimeError):
    """Another process is at work there; the message says which and what to do."""


@contextmanager
def only_one(folder: Path, what: str, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold ``folder`` for one kind of work by this process; a second process is told who holds it.

    Raises:
        Busy: another process holds it, and still does after ``patience_s``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / f".{what}.lock"), folder / f".{what}.json"
    try:
        lock.acquire(timeout=patience_s)
    except Timeout:
        raise Busy(f"{folder} is in use by {_who(holder)}: wait until it is done, or stop it") from None
    try:
        since = datetime.now().isoformat(sep=" ", timespec="seconds")
        paths.write_json(holder, {"process": os.getpid(), "machine": platform.node(), "since": since, "work": what})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _who(holder: Path) -> str:
    try:
        row = json.loads(holder.read_bytes())
        return f"process {row['process']} on {row['machine']} ({row['work']}, since {row['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or is just ending
        return "another process"


@contextmanager
def made_once(path: Path, complete: str = "") -> Iterator[bool]:
    """Whether this process has to make the file or folder ``path``; a second one that wants it waits and finds it done.

    Args:
        complete: name of the file in a folder without which it counts as not made, and is removed.
    """
    if (path / complete).exists():
        yield False
        return
    with FileLock(path.with_name(path.name + ".lock")):
        remove_left_behind(path.parent, f"{path.name.removesuffix('.npy')}*")  # and what belongs to an array
        if complete and not (path / complete).exists():
            shutil.rmtree(path, ignore_errors=True)
        yield not path.exists()


def remove_left_behind(folder: Path, name: str = "*", older_than_s: float = 0) -> None:
    """Remove temporary files and folders of killed processes.

    Only for who holds the lock under which they are made; where others may write, too, only those that are old.
    """
    for left in folder.glob(f"{name}.tmp"):
        with suppress(FileNotFoundError):  # somebody was quicker
            if time.time() - left.stat().st_mtime >= older_than_s:
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


@functools.cache
def end_with(parent: int) -> None:
    """Let this process end soon after the one that started it, however that ended; nothing for that one itself.

    A worker that survives its run would write into a study that the next run believes to be its own.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    if os.getpid() != parent:
        threading.Thread(target=watch, name="end with parent", daemon=True).start()


def helped(function: Callable) -> Callable:
    """``joblib.delayed``, for calls whose helpers end soon after this process, however that ends."""
    from joblib import delayed

    return functools.partial(delayed(_helping), os.getpid(), str(paths.home()), function)


def in_helpers(function: Callable, calls: Iterable[tuple], in_order: bool = False) -> Iterator:
    """What a function says of each call's arguments; never in this process, which may not compute pinned."""
    from joblib import Parallel, cpu_count

    work = (helped(function)(*arguments) for arguments in calls)
    return Parallel(max(2, cpu_count()), return_as="generator" if in_order else "generator_unordered")(work)


def _helping(parent: int, home: str, function: Callable, *arguments):
    os.environ["KWS_HOME"] = home  # a helper may have been started for another home
    end_with(parent)
    return function(*arguments)


@functools.cache
def _pool(n: int):
    from joblib.externals.loky.process_executor import ProcessPoolExecutor  # it notices a worker that was killed

    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return ProcessPoolExecutor(n, timeout=IDLE_S, env=dict.fromkeys(threads, "1"))


@contextmanager
def workers(n: int) -> Iterator[Callable[..., Future]]:
    """What starts a call in one of so many processes of one thread; they end with this one, or when it fails here."""
    try:
        yield lambda *call: _pool(n).submit(_helping, os.getpid(), str(paths.home()), *call)
    except BaseException:
        _pool(n).shutdown(kill_workers=True)
        _pool.cache_clear()
        raise


def was_killed(future: Future) -> bool:
    """Whether a call ended because its process did, or another one of ``workers``; the next calls get new ones."""
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    if killed := isinstance(future.exception(), TerminatedWorkerError):
        _pool.cache_clear()
    return killed


@contextmanager
def fresh_processes() -> Iterator[ProcessPoolExecutor]:
    """Workers that each do one task and end, so that a library with a memory of its own is always as if just started.

    They need this room, not the program that asked: importing that again, with torch and all, would take longer.
    """
    program = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), spawn, max_tasks_per_child=1) as pool:
            yield pool
    finally:
        sys.modules["__main__"] = program


def in_fresh_process(function, *arguments):
    """Call a function in a process that has done nothing yet."""
    return in_fresh_processes(function, [arguments])[0]


def in_fresh_processes(function, calls: list[tuple]) -> list:
    """Results of several such calls, each in a process of its own."""
    with fresh_processes() as pool:
        return [done.result() for done in [pool.submit(function, *arguments) for arguments in calls]]


def _papermill(parent: str, source: str, executed: str, parameters: str) -> None:
    """What the process of one notebook does: every cell, whatever becomes of those before it."""
    from papermill import PapermillExecutionError, execute_notebook

    end_with(int(parent))
    how = {"kernel_name": "python3", "progress_bar": False, "log_output": True, "allow_errors": True}
    how["extra_arguments"] = ["--IPKernelApp.log_level=ERROR"]  # else each warns that it talks to papermill unencrypted
    try:
        execute_notebook(source, executed, json.loads(parameters), **how)
    except PapermillExecutionError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":  # here, where it starts at once: this room knows no torch
    _papermill(*sys.argv[1:])
