import sys

from ecul.cli import main

sys.exit(main())
