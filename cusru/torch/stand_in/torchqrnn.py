"""`import torchqrnn`, where this folder is on sys.path: what install_as_torchqrnn registers takes this module's place."""

import sys

del sys.modules["torchqrnn"]

from cusru.torch import install_as_torchqrnn  # noqa: E402

install_as_torchqrnn()
