"""What every process of a step would do first, done once in the server that they are forked from: see infra.worker.

Nothing here may start a thread: a forked process has only the one that forked it.
"""

import torch._dynamo  # noqa: F401 - the first optimiser of a process loads it, in a second

from tasks.crypto import pedersen

# The rows are never written again, so all children share their 42 MiB.
pedersen.commitments()
