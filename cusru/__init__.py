"""cusru: the recurrences of SRU, of the QRNN and of linear RNNs as CUDA kernels, for arrays of any framework."""

from cusru.api import (
    Gradients,
    LinearRecurrenceGradients,
    Output,
    QRNNGradients,
    linear_recurrence_backward,
    linear_recurrence_forward,
    qrnn_backward,
    qrnn_forward,
    sru_backward,
    sru_forward,
    workspace_size,
)

__all__ = [
    "Gradients",
    "LinearRecurrenceGradients",
    "Output",
    "QRNNGradients",
    "linear_recurrence_backward",
    "linear_recurrence_forward",
    "qrnn_backward",
    "qrnn_forward",
    "sru_backward",
    "sru_forward",
    "workspace_size",
]
__version__ = "0.9.0"
