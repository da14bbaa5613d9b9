"""`python -m ral`, and `accelerate launch -m ral` on several processes."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
