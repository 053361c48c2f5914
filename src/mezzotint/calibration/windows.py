"""Windows of tokens: what calibration and evaluation read.

One rule for BOS: where the model wants it (`begin_token`), each window starts with it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched_or_chunked  # placeholder
