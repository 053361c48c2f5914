"""Calibration: text and data sets to windows of tokens, or windows sampled from the model itself."""

from mezzotint.calibration.sampled import sample_windows
from mezzotint.calibration.text import read_documents, read_text
from mezzotint.calibration.tokenizer import begin_token, check_vocabulary, load_tokenizer, separator_token
from mezzotint.calibration.windows import (
    TOKENS_PER_COLUMN,
    TOKENS_TO_REGRESS,
    Windows,
    auto_samples,
    consecutive_windows,
    document_windows,
    packed_windows,
)

__all__ = [
    "TOKENS_PER_COLUMN",
    "TOKENS_TO_REGRESS",
    "Windows",
    "auto_samples",
    "begin_token",
    "check_vocabulary",
    "consecutive_windows",
    "document_windows",
    "load_tokenizer",
    "packed_windows",
    "read_documents",
    "read_text",
    "sample_windows",
    "separator_token",
]
