"""`python -m runtime_service.engine_main`: the engine process, which keeps the bytecode of what it imports.

So nothing of it is imported at the head.
"""

import sys

from shared.process import keep_bytecode

if __name__ == "__main__":
    keep_bytecode("torch")
    from runtime_service.engine_process import main

    sys.exit(main(sys.argv[1:]))
