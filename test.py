"""Test as the reference system does: ``python test.py --mode cifar|cifar-single|custom``."""

import sys

from vitrine.cli.reference import test_command

sys.exit(test_command())
