"`python -m ltnb …` is the same as `ltnb …`"
import os
import sys


def leave_working_folder():
    "`python -m` puts the working folder before the standard library: a random.py there is no module of ours"
    try: here = os.getcwd()
    except OSError: here = ""
    if not sys.flags.safe_path and sys.path and sys.path[0] in ("", here): del sys.path[0]
    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if own not in sys.path: sys.path.append(own) # for processes that are started from this one


if __name__ == "__main__":
    leave_working_folder()
    from ltnb.cli import main

    sys.exit(main())
