"""A command, where LITTLE_MEMORY more bytes than at its start may be had, on the rank LITTLE_MEMORY_RANK."""

import os
import resource
import sys
from pathlib import Path

if __name__ == "__main__":
    import dist_kd.lifetime  # noqa: F401 - what is imported by now is not counted
    from dist_kd.commands.main import main

    if os.environ.get("RANK", "0") == os.environ["LITTLE_MEMORY_RANK"]:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(os.environ["LITTLE_MEMORY"])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.exit(main())
