"""Train as the reference implementation does: ``python train.py --batch_size 128 --epochs 200``."""

import sys

from vitrail.cli.reference import train_command

sys.exit(train_command())
