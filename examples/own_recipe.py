"""A recipe of one's own, from a file and from Python, and what its rules decided.

python examples/own_recipe.py MODEL CALIBRATION.txt OUT
"""

import sys
from pathlib import Path

import mezzotint

model, calibration, out = sys.argv[1:]
options = {"calibration": calibration, "samples": 32, "seqlen": 128}

from_file = Path(__file__).with_name("own_recipe.yaml")
report = mezzotint.quantize(model, str(from_file), out=out, **options)
for linear in report["plan"]["linears"]:
    print(f"{linear['name']:40} {linear['grid']['bits']} bits, because of {linear['because']}")
taken = sum(found.get("refinement") == "accepted" for found in report["decisions"].values())
print(f"refinement was kept in {taken} of {len(report['linears'])} matrices")

# The same from Python: settings have the same names, and a name that does not exist is an error with a suggestion.
recipe = mezzotint.Recipe(
    name="own",
    target={"kind": "qep", "alpha": 0.5},
    grid={"kind": "uniform", "bits": 3, "group_size": None, "symmetric": True, "range": "weighted"},
    rounding={"kind": "gptq"},
    rules=[{"match": "*.mlp.down_proj", "set": {"grid.bits": 4}}],
)
planned = mezzotint.plan(model, recipe, **options)
print(f"from Python: {planned.bits_per_weight:.3f} bits a weight")
