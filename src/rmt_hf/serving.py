"""`transformers serve` for RMT models: `python -m rmt_hf.serving FOLDER`, with the same options.

`transformers serve` alone knows only classes of transformers; importing this package gives it ours.
"""

import sys

from transformers.cli.transformers import main as transformers_main


def main() -> None:
    """Command line."""
    sys.argv.insert(1, "serve")
    transformers_main()


if __name__ == "__main__":
    main()
