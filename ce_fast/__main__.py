"""python -m ce_fast: the command ce-fast."""

import sys

from ce_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
