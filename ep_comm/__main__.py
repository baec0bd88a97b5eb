"""`python -m ep_comm` is the `ep-comm` command."""

import sys

from ep_comm.cli import main

if __name__ == "__main__":
    sys.exit(main())
