"""Everything besides config and data that affects how a training's numbers are rounded."""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path

import jax

THREADS = ("NPROC", "OMP_NUM_THREADS")  # variables that limit the threads of XLA and of BLAS
HARMLESS = re.compile(
    "JAX_(PLATFORM|COMPILATION_CACHE|PERSISTENT_CACHE|LOG|TRACEBACK|DEBUG_LOG|COORDINATOR|THREEFRY|DEFAULT_PRNG|DEFAULT_MATMUL)"
)
PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that affect the numbers."""
    return {"Python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}


@cache
def code_version(package: Path = PACKAGE) -> str:
    """The package's version; in a git checkout also the commit, and whether the package's files differ from it."""
    version = f"vae_jax {importlib.metadata.version('vae_jax')}"
    if not (package.parent / ".git").exists():  # a repository further up is another project's
        return version
    command = ["git", "--no-optional-locks", "-C", str(package.parent), "status", "--porcelain=v2", "--branch", "--"]
    try:
        status = subprocess.run([*command, package.name], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):  # no git, or not this user's repository
        return version
    lines = status.stdout.splitlines()
    commit = next((line.split()[2][:12] for line in lines if line.startswith("# branch.oid ")), "unknown")
    changed = "" if all(line.startswith("#") for line in lines) else f", with changes in {package.name}/"
    return f"{version}, commit {commit}{changed}"


def environment(devices: int) -> dict[str, str]:
    """Versions, processor, cores, `devices` and settings: each affects how sums are rounded."""
    device = jax.local_devices()[0]
    settings = (name for name in os.environ if name.startswith("JAX_") and not HARMLESS.match(name))
    partitionable = "partitionable" if jax.config.jax_threefry_partitionable else "not partitionable"
    return versions() | {
        "devices": f"{devices} {device.device_kind} ({device.platform})",
        "processor": processor(),
        "CPU cores": " ".join(
            [str(cores()), *(f"{name}={os.environ[name]}" for name in THREADS if name in os.environ)]
        ),
        "random numbers": f"{jax.config.jax_default_prng_impl}, {partitionable}",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "JAX settings": " ".join(f"{name}={os.environ[name]}" for name in sorted(settings)),
        "matmul precision": str(jax.config.jax_default_matmul_precision or "default"),
    }


def check_jax() -> None:
    """Raise ValueError, in one line, for JAX settings under which nothing here works."""
    for name in ("jax_enable_x64", "jax_disable_jit"):
        if getattr(jax.config, name):
            raise ValueError(f"{name.upper()} is set, but vae_jax does not work with it: unset it")
    try:
        jax.local_devices()
    except RuntimeError as error:
        raise ValueError(f"JAX finds no device ({' '.join(str(error).split())[:120]}): check JAX_PLATFORMS") from error


def processor() -> str:
    """The name of the CPU."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def differences(then: dict[str, str], now: dict[str, str]) -> str:
    """The facts that differ, as "NAME was OLD, is NEW", separated by commas."""
    return ", ".join(
        f"{name} was {then.get(name) or 'unset'}, is {now.get(name) or 'unset'}"
        for name in then | now
        if then.get(name) != now.get(name)
    )
