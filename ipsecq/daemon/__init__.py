"""Supervisor and workers."""

import os

# numpy's OpenBLAS starts a thread for each processor when it is loaded.  Nobody here multiplies matrices, and threads
# keep the capabilities that their process gives up later.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
