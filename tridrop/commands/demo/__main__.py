"""``python -m tridrop.commands.demo``: the demo without the rest of the command line."""

import argparse
import sys

from . import __doc__ as description
from . import add_arguments, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="tridrop demo", description=description)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
