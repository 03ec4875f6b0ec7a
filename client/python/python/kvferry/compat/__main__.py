"""`python -m kvferry.compat --path` prints the folder for PYTHONPATH."""

import argparse

from kvferry.compat import path

parser = argparse.ArgumentParser(prog="python -m kvferry.compat", description=__doc__)
parser.add_argument("--path", action="store_true", required=True, help="print the folder for PYTHONPATH")
parser.parse_args()
print(path())
