"""Make a virtual environment in the folder named, or say in one sentence what is missing. Runs on any Python.

An environment that works is left as it is, whichever Python made it: a second one on top would mix the two.
"""

import os
import subprocess
import sys

PROBE = "import pip, sys; sys.exit(sys.version_info < (3, 11))"


def works(folder):
    python = os.path.join(folder, "bin", "python")
    return os.path.exists(python) and subprocess.call([python, "-c", PROBE], stderr=subprocess.DEVNULL) == 0


def main(folder):
    if works(folder):
        return 0
    if sys.version_info < (3, 11):
        found = "%s is %d.%d" % (sys.executable, sys.version_info[0], sys.version_info[1])
        return "Python 3.11 or newer is needed, but %s. Say which one to use: make PYTHON=/path/to/python3" % found
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return (
            "%s lacks the modules venv and ensurepip. On Debian or Ubuntu: sudo apt install python3-venv"
            % sys.executable
        )
    return subprocess.call([sys.executable, "-m", "venv", "--clear", folder])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
