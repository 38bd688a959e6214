"""cusru: the Simple Recurrent Unit's recurrence as CUDA kernels, for arrays of any framework."""

from cusru.api import Gradients, Output, sru_backward, sru_forward, workspace_size

__all__ = ["Gradients", "Output", "sru_backward", "sru_forward", "workspace_size"]
__version__ = "0.1.0"
