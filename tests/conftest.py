"""What must be set before any test imports transformers: nothing is downloaded, and no fork is warned about."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from hypothesis import settings


# The first call of a torch operator is slow, so deadlines would fail at random; the same examples on every run.
settings.register_profile("rmt_hf", deadline=None, derandomize=True)
settings.load_profile("rmt_hf")
