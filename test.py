"""Test as the reference implementation does: ``python test.py --mode cifar`` (or other modes)."""

import sys

from vitrail.cli.reference import test_command

sys.exit(test_command())
