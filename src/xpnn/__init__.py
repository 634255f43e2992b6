"""xpnn: neural-network kernels, forward and backward, written once, run composed or fused.

>>> import numpy as np, xpnn
>>> xpnn.softmax(np.array([[0.0, 0.0]]))
array([[0.5, 0.5]])
"""

from xpnn import init, kernels, testing
from xpnn.backends.choice import set_backend, use_backend
from xpnn.backends.kernel import Kernel, kernel
from xpnn.backends.kinds import Column, Full, Index, Matrix, Row, Scalar
from xpnn.backends.recording import SubsetError
from xpnn.backends.task import BackendError
from xpnn.diagnosis import diagnose
from xpnn.kernels import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "BackendError", "Column", "Full", "Index", "Kernel", "Matrix", "Row", "Scalar", "SubsetError", "diagnose", "init", "kernel",
    "set_backend", "testing", "use_backend", *kernels.__all__,
]  # fmt: skip
