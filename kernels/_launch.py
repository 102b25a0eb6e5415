"""The former name of `_device`, kept for one release. It is the same object: what is patched here is patched there."""

import sys

from . import _device

sys.modules[__name__] = _device
