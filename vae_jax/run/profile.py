"""`run.profile`: a trace for TensorBoard or Perfetto."""

from collections.abc import Callable
from pathlib import Path

import jax

from vae_jax.steps import TrainState

PROFILED = range(1, 4)  # calls since the start; the first one compiles


class Profile:
    """Write a trace of a few calls of the compiled program to the folder `path`; None writes none."""

    def __init__(self, path: Path | None, note: Callable[[str], None]):
        self._path, self._note = path, note
        self._calls, self._tracing = 0, False

    def __enter__(self):
        return self

    def before_call(self) -> None:
        if self._path and self._calls == PROFILED.start:
            jax.profiler.start_trace(self._path)
            self._tracing = True
        self._calls += 1

    def after_call(self, state: TrainState) -> None:
        if self._tracing and self._calls == PROFILED.stop:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self):
        jax.profiler.stop_trace()
        self._tracing = False

    def __exit__(self, error, *_):
        if self._tracing:  # the training ended or failed before the last call to trace
            self._stop()
        elif self._path and error is None and self._calls <= PROFILED.start:
            self._note("too few calls for a profile: lower run.steps_per_call")
