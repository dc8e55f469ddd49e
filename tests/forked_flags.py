"""Reads a list of flags a line (JSON), parses each in a fresh fork of the program, answers [exit code, stderr]; for tests/test_fuzz.py."""

import json
import os
import sys
import tempfile
import traceback

from vae_jax import main
from vae_jax.run import session


def do_nothing(*arguments):
    """Instead of a training or another mode: the config could be stored."""
    assert session  # imported once for all forks
    json.dumps(arguments)


main.train = main.use = do_nothing
for line in sys.stdin:
    with tempfile.TemporaryFile() as told:
        if not (child := os.fork()):
            os.dup2(told.fileno(), 2)
            sys.argv = ["vae_jax.main", *json.loads(line)]
            try:
                main.main(main.parse_flags(sys.argv))
                code = 0
            except SystemExit as stopped:
                code = stopped.code
            except Exception:  # noqa: BLE001
                traceback.print_exc()
                code = 99
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told.seek(0)
        print(json.dumps([code, told.read().decode(errors="replace")]), flush=True)
