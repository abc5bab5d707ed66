"""`python -m rmt_hf` is `rmt`."""

from .cli import main


main()
