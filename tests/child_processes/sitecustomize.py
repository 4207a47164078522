"""What every Python process that a test starts does first: it makes warnings that our own code causes errors.

The filters of pytest end with its process. tests/conftest.py puts this folder into PYTHONPATH, so that command lines,
their ranks and the workers of Ray follow the same rule for our packages; warnings of others are theirs.
"""

import warnings

warnings.filterwarnings("error", module=r"(megatron_deepstack|orchestration)(\.|$)")
# Python reports unclosed files where an error cannot end a process; pytest shows those of its own process.
warnings.filterwarnings("ignore", category=ResourceWarning)
