"""Command lines as processes: in a fresh Python, as a user starts them, or in a fork of one that has imported
everything.

Imports take more than half the time of a small training, and nearly all the time of a command line that is refused;
`Forks` pays for them once. The forking process starts no JAX backend, because a backend's threads do not survive a
fork. A fork gives the exit code, the output and the reaction to signals of a fresh process. It hides two faults, which
tests with fresh processes must find: a missing import, and a complaint while Python tears itself down. Its figures are
empty files unless the test asks for them, since drawing would take half the time of a small training.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 180  # seconds after which a process that should have ended counts as hung
# Tests compile for longer than they compute, so XLA generates code quickly for them, and as for a user where they ask
# for USUAL. With XLA_FLAGS=--xla_backend_optimization_level=3 pytest runs all of them as for a user. Its workers
# inherit what conftest.py makes of XLA_FLAGS, so the flags from outside have a variable of their own.
USUAL = os.environ.setdefault("XLA_FLAGS_FROM_OUTSIDE", os.environ.get("XLA_FLAGS", ""))
QUICK = f"--xla_backend_optimization_level=0 {USUAL}"
DRAWN = "VAE_JAX_TESTS_DRAWN"
INSIDE_FUNCTIONS = (  # what the package imports there
    "jax.experimental.multihost_utils",
    "PIL.Image",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "ml_collections.config_flags",
    "sklearn.datasets",
    "sklearn.model_selection",
    "tensorflow_datasets",
)


class Process:
    """A running command line, with its output in files; `start` is `subprocess.Popen` or resembles it."""

    def __init__(self, start, arguments, cwd, env):
        self._stdout, self._stderr = stdout, stderr = [*map(tempfile.TemporaryFile, ["w+b"] * 2)]
        self._process = start(arguments, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
        self.pid = self._process.pid
        self.poll, self.send_signal = self._process.poll, self._process.send_signal

    @property
    def stdout(self) -> str:
        """The output so far."""
        return self._read(self._stdout)

    @property
    def stderr(self) -> str:
        return self._read(self._stderr)

    def _read(self, file):
        size = os.fstat(file.fileno()).st_size
        return os.pread(file.fileno(), size, 0).decode(errors="replace")  # the process shares the position

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end."""
        self._process.kill()
        self._process.wait()

    def wait(self, timeout=PATIENCE) -> int:
        """The exit code. Kills the process and raises TimeoutExpired after `timeout` seconds."""
        try:
            return self._process.wait(timeout)
        finally:
            self.kill()

    def ends(self, code=0) -> str:
        """Wait for the end and assert its exit code; returns stderr."""
        assert self.wait() == code, self.stderr
        return self.stderr

    def refuses(self, code=1) -> str:
        """Like `ends`, and asserts that stderr is one line."""
        stderr = self.ends(code)
        assert stderr.startswith("vae_jax: ") and stderr.count("\n") == 1, stderr
        return stderr

    def wait_for(self, condition) -> None:
        """Return when `condition()` holds. Fails if the process ends first, or takes longer than PATIENCE."""
        until = time.monotonic() + PATIENCE
        while not condition():
            assert self.poll() is None, self.stderr
            assert time.monotonic() < until, self.stderr
            time.sleep(0.001)

    def __del__(self):
        if hasattr(self, "_process"):
            self.kill()
        self._stdout.close()
        self._stderr.close()


def environment(**variables) -> dict[str, str]:
    """The environment of a process: that of pytest, and these variables."""
    return os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK} | variables


def fresh(*arguments, cwd=ROOT, **variables) -> Process:
    """Start `python ARGUMENTS` as a user does; `variables` are added to its environment."""
    env = environment(**variables)
    return Process(subprocess.Popen, [sys.executable, *arguments], cwd, env)


class Forks:
    """`forks(*arguments)` starts the command line that `fresh(*arguments)` starts, without its imports, and compiles it
    quickly.
    """

    def __init__(self):
        self._socket, theirs = socket.socketpair()
        env = environment(OPENBLAS_NUM_THREADS="1")  # a process with threads must not fork
        command = [sys.executable, __file__, str(theirs.fileno())]
        with theirs:
            self._server = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )

    def __call__(self, *arguments, cwd=ROOT, drawn=False, **variables) -> Process:
        assert not any(name.startswith("JAX_") for name in variables), "JAX has read its variables"
        return Process(self._start, arguments, cwd, {"XLA_FLAGS": QUICK, DRAWN: str(drawn)} | variables)

    def _start(self, arguments, *, cwd, env, stdin, stdout, stderr):
        reader, writer = os.pipe()
        with tempfile.TemporaryFile("w+") as request, open(writer, "wb") as report:
            json.dump({"arguments": arguments, "cwd": str(cwd), "env": env}, request)
            request.flush()
            files = [file.fileno() for file in (request, stdout, stderr, report)]
            socket.send_fds(self._socket, [b"!"], files)
            return _Fork(open(reader, "rb", buffering=0))

    def close(self) -> None:
        self._socket.close()
        self._server.wait()


class _Fork:
    """What `subprocess.Popen` offers, for a process that is not a child of this one."""

    def __init__(self, report):
        self._report, self._code = report, None
        self.pid = int(report.readline())

    def wait(self, timeout=None):
        if self._code is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self._code = os.waitstatus_to_exitcode(int(self._report.readline()))
            self._report.close()
        return self._code

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self._code

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def load_digits_once() -> None:
    """Let every later use of the bundled digits take the same arrays, which nothing may change."""
    datasets = importlib.import_module("vae_jax.data.named").DATASETS
    splits = datasets["digits"]("digits", "")
    for split in splits:
        for array in split:
            array.flags.writeable = False
    datasets["digits"] = lambda name, manual_dir: splits


def share_compiled_programs() -> None:
    """Let JAX take compiled programs from the folder `VAE_JAX_TESTS_COMPILED`, and put its own there.

    Tests compile thousands of small programs, most of them the same in several processes. JAX writes a program's file
    in place, where another process may read half of it, and a killed one leaves half of it.
    """
    import jax
    from jax._src.lru_cache import LRUCache

    from vae_jax.run.devices import enable_compilation_cache

    def put(cache, key, value):
        path = cache.path / f"{key}-cache"
        part = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        part.write_bytes(value)
        part.replace(path)

    LRUCache.put = put
    jax.config.update("jax_compilation_cache_dir", os.environ["VAE_JAX_TESTS_COMPILED"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    enable_compilation_cache()  # in the format of the command line


def import_everything() -> None:
    """Import the package and what it uses, but not `vae_jax.main`, which a command line runs as `__main__`."""
    for path in sorted((ROOT / "vae_jax").rglob("*.py")):
        *parents, name = path.relative_to(ROOT).with_suffix("").parts
        if name not in ("main", "__main__"):
            importlib.import_module(".".join([*parents, name]).removesuffix(".__init__"))
    for module in INSIDE_FUNCTIONS:
        importlib.import_module(module)
    load_digits_once()
    from jax._src import xla_bridge

    assert not xla_bridge.backends_are_initialized(), "an import started a JAX backend"
    assert len(os.listdir("/proc/self/task")) == 1, "an import started a thread"
    gc.collect()
    gc.freeze()  # forks share these objects' memory


def serve(requests: socket.socket) -> list[str]:
    """Fork for each request, until the other side closes; returns, in the forks only, the command line's arguments."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends pytest, and pytest ends this process
    children = 0
    while True:
        _, files, _, _ = socket.recv_fds(requests, 1, 4)
        while children and os.waitpid(-1, os.WNOHANG)[0]:
            children -= 1
        if not files:
            os._exit(0)
        if not os.fork():
            break
        children += 1
        for file in files:
            os.close(file)
    requests.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    request, stdout, stderr, report = files
    if pid := os.fork():  # this process only waits, to report the exit code
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.write(report, f"{pid}\n".encode())
        os.write(report, f"{os.waitpid(pid, 0)[1]}\n".encode())
        os._exit(0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    with open(request) as file:
        file.seek(0)
        asked = json.load(file)
    for file in (stdout, stderr, report):
        os.close(file)
    os.chdir(asked["cwd"])
    os.environ |= asked["env"]
    if os.environ[DRAWN] == "False":
        importlib.import_module("vae_jax.run.directory").RunDirectory.save_figures = touch_figures
        importlib.import_module("vae_jax.run.job").Job.make_route = lambda job: lambda variables: []
    return asked["arguments"]


def touch_figures(directory, figures, epoch) -> None:
    """What `RunDirectory.save_figures` does, without a line drawn."""
    for name in figures:
        (directory.path / "figures" / f"{name}.png").touch()


def execute(arguments: list[str]) -> None:
    """Do what `python ARGUMENTS` does."""
    first, *sys.argv[1:] = arguments
    if first == "-m":
        sys.path[0] = os.getcwd()
        runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[0], sys.argv[0] = "", first
        exec(compile(sys.argv.pop(1), "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv[0] = os.path.dirname(first), first
        runpy.run_path(first, run_name="__main__")


def leave(code: int) -> None:
    """Exit as Python does, but do not tear down what was imported, which takes 0.1 s."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    server = socket.socket(fileno=int(sys.argv[1]))
    import_everything()
    share_compiled_programs()
    try:
        execute(serve(server))
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        leave(end.code or 0)
    leave(0)
