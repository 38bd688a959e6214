"""`import cuda_functional`, where this folder is on sys.path: what install_as_sru registers takes this module's place."""

import sys

del sys.modules["cuda_functional"]

from cusru.torch import install_as_sru  # noqa: E402

install_as_sru()
