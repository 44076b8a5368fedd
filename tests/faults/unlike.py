"""The trainer, with words that rank 1 alone is given in place of others, and folders that it imports from first.

UNLIKE is a JSON object: {"words": {word: other word}, "path": [folder]}.
"""

import json
import os
import sys

if __name__ == "__main__":
    own = json.loads(os.environ["UNLIKE"]) if os.environ["RANK"] == "1" else {}
    sys.path[:0] = own.get("path", [])
    from dist_kd.train import main

    sys.exit(main([own.get("words", {}).get(word, word) for word in sys.argv[1:]]))
