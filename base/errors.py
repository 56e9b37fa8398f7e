"""Mistakes that the user can mend, and how a script ends on them."""

import os
import signal
import sys
from collections.abc import Callable

STOPPED = "stopped: what is finished is kept, and the same command continues from it"
MEMORY = "error: out of memory; lower --slots or --kv-memory (sampling) or --micro-batch-tokens (training)"


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
        sys.exit(_say(STOPPED, 130))
    except BrokenPipeError:
        # `... | head` closed our stdout: the shell's code for it, and nowhere for the last flush to fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_say(STOPPED, 141))
    except MemoryError:
        sys.exit(_say(MEMORY, 2))
    except OSError as error:
        # a full disk, a folder without permission, a name that is too long
        sys.exit(_say(f"error: {error.filename or 'a file'} can't be used: {error.strerror or error}", 2))
    except Exception as error:
        # torch's and safetensors' errors, told by their names so that `--help` need not import either
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            sys.exit(_say(MEMORY, 2))
        if type(error).__name__ == "SafetensorError":
            sys.exit(_say(f"error: a safetensors file can't be used: {error}", 2))
        raise


def _terminate(signum: int, frame: object) -> None:
    sys.exit(_say(STOPPED, 143))


def _say(sentence: str, code: int) -> int:
    """Print one line on stderr, without the line breaks of a library's message in it; returns `code`."""
    print(printable(" ".join(sentence.split())), file=sys.stderr)
    return code


def printable(text: str) -> str:
    """Without what a terminal or a browser would obey: escapes, overrides of direction, odd line ends."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
