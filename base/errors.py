"""Mistakes that the user can mend, and how a script ends on them."""

import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend: one plain sentence that names the file, line or option, and what would do instead.

    Our own mistakes are assertions and keep their traceback.
    """


@contextmanager
def about(what: str) -> Iterator[None]:
    """Say of a UserError inside what it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a script as Ctrl-C does."""


def run_script(main: Callable[[], None], kept: str = "finished files", memory: str = "another machine") -> None:
    """Run a script's `main` and exit: 0 done, 2 after a `UserError` (its sentence on stderr), 130 or 143 if stopped.

    `kept` is what a run that is stopped has saved, `memory` what would do where memory has run out.
    """
    signal.signal(signal.SIGTERM, _terminate)
    stopped = f"stopped: {kept} are kept; to go on from there: {shlex.join(sys.orig_argv)}"
    memory = f"error: out of memory; {memory} would do"
    try:
        main()
    except UserError as error:
        sys.exit(_say(f"error: {error}", 2))
    except KeyboardInterrupt as error:
        sys.exit(_say(stopped, 143 if isinstance(error, Terminated) else 130))
    except BrokenPipeError:
        # `... | head` closed our stdout: the shell's code for it, and nowhere for the last flush to fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_say(stopped, 141))
    except MemoryError:
        sys.exit(_say(memory, 2))
    except OSError as error:
        # a full disk, a folder without permission, a name that is too long
        if error.errno == errno.ENOMEM:
            sys.exit(_say(memory, 2))
        sys.exit(_say(f"error: {error.filename or 'a file'} can't be used: {error.strerror or error}", 2))
    except Exception as error:
        # torch's and safetensors' errors, told by their names so that `--help` need not import either
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            sys.exit(_say(memory, 2))
        if type(error).__name__ == "SafetensorError":
            sys.exit(_say(f"error: a safetensors file can't be used: {error}", 2))
        raise


def _terminate(signum: int, frame: object) -> None:
    raise Terminated


def _say(sentence: str, code: int) -> int:
    """Print one line on stderr, without the line breaks of a library's message in it; returns `code`."""
    print(printable(" ".join(sentence.split())), file=sys.stderr)
    return code


def printable(text: str) -> str:
    """Without what a terminal or a browser would obey: escapes, overrides of direction, odd line ends."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
