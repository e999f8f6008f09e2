"""One thread a process: the ranks of a test share two cores, and sums must not depend on timing."""

import logging
import os
import warnings

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|transformer-engine|absl).*")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
