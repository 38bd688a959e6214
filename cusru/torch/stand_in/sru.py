"""`import sru`, where this folder is on sys.path: what install_as_sru registers takes this module's place."""

import sys

del sys.modules["sru"]

from cusru.torch import install_as_sru  # noqa: E402

install_as_sru()
