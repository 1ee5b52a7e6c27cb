"`python -m ltnb …` is the same as `ltnb …`"
import sys

from ltnb.cli import main

sys.exit(main())
