"""The former name of `_device`, kept for one release. Both names are one module object, also for patches."""

import sys

from . import _device

sys.modules[__name__] = _device
