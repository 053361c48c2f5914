"""Which format reads a folder."""

import pytest

from mezzotint.errors import ModelError
from mezzotint.formats.decoded import packed_weights
from mezzotint.registry import FORMATS

CONFIGS = {
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "gptq": {"quant_method": "gptq", "checkpoint_format": "gptq"},
    "gptq-v2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "mezzotint": {"quant_method": "mezzotint", "format_version": 2, "schemes": [], "modules": {}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_one_format_knows_a_folder(name: str):
    found = {form: FORMATS[form]().packed(CONFIGS[name], {}, {}.__getitem__) for form in FORMATS}
    assert {form for form, weights in found.items() if weights is not None} == {name}


@pytest.mark.parametrize(
    "config",
    [{"quant_method": "awq"}, {"quant_method": "compressed-tensors", "format": "float-quantized"}, {}],
    ids=str,
)
def test_packing_that_no_format_knows_is_refused(config: dict[str, str]):
    with pytest.raises(ModelError, match=r"none of the formats .*mezzotint.*\[already-quantized\]"):
        packed_weights(config, {}, {}.__getitem__)
