"""`python -m convexlearn` is the command `convexlearn`."""

import sys

from convexlearn.cli import main

if __name__ == "__main__":
    sys.exit(main())
