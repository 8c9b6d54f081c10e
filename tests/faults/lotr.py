"""The command ``lotr`` of this checkout."""

import sys

from lotrtensor.cli import main

if __name__ == "__main__":
    sys.argv[0] = "lotr"
    main()
