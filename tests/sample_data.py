"""Where the real data of the tests are: CIFAR-10 and ImageNet photos as TFRecords."""

import os
from pathlib import Path

FOLDER = Path(os.environ.get("CONADV_TEST_DATA", "data")).absolute()
