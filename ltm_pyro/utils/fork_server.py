"""The first module that multiprocessing's fork server imports: the server ends with its parent while it still imports.

By itself it would notice only when all imports are done, which takes seconds for torch.
"""

import sys

from ltm_pyro.utils.processes import end_with_parent

if any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    end_with_parent()
