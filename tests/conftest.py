"""What must be set before any test imports torch or transformers.

Nothing is downloaded, no fork is warned about, and torch has one thread: models here are tiny, and two threads beside
anything else that runs wait for each other far longer than they compute.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings


# The first call of a torch operator is slow, so deadlines would fail at random; the same examples on every run.
settings.register_profile("rmt_hf", deadline=None, derandomize=True)
settings.load_profile("rmt_hf")
