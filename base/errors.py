"""Mistakes that the user can mend, and how a script ends on them."""

import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend: one plain sentence that names the file, line or option, and what would do instead.

    Our own mistakes are assertions and keep their traceback.
    """


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main` and exit: 0 done, 2 after a `UserError` (its sentence on stderr), 130 or 143 if stopped."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
    except UserError as error:
        sys.exit(_say(f"error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_say("stopped: what is finished is kept, and the same command continues from it", 130))
    except RuntimeError as error:
        # torch.OutOfMemoryError, named by its class so that `--help` need not import torch
        if type(error).__name__ != "OutOfMemoryError":
            raise
        sys.exit(_say("error: out of GPU memory; lower --slots (generate, evaluate) or --micro-batch-tokens (train)",
                      2))
    except BrokenPipeError:
        sys.exit(0)  # `... | head` closed our stdout: nothing is wrong


def _terminate(signum: int, frame: object) -> None:
    sys.exit(_say("stopped: what is finished is kept, and the same command continues from it", 143))


def _say(sentence: str, code: int) -> int:
    """Print one line on stderr, without the line breaks of a library's message in it; returns `code`."""
    print(" ".join(sentence.split()), file=sys.stderr)
    return code
