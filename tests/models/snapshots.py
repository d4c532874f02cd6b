"""What users see and store of every model, as text: its printed tree, its state-dict keys, its config.

`python -m tests.models.snapshots` writes the files of `tests/models/snapshots/`; a change of one is reviewed like code.
"""

import json
from pathlib import Path

import torch

from .tiny import REGISTRY

FOLDER = Path(__file__).with_name("snapshots")


def snapshot(model_type: str) -> str:
    """The text of one model type: default config but for two layers."""
    causal_lm = REGISTRY[model_type]
    config = causal_lm.config_class(num_hidden_layers=2)
    with torch.device("meta"):
        model = causal_lm(config)
    keys = "\n".join(f"{name} {list(x.shape)} {str(x.dtype)[6:]}" for name, x in model.state_dict().items())
    fields = causal_lm.config_class().to_diff_dict()
    del fields["transformers_version"]
    return f"{model}\n\n{keys}\n\n{json.dumps(fields, indent=2, sort_keys=True)}\n"


def write() -> None:
    """Write every snapshot, and remove those of types that are gone."""
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.txt"):
        if path.stem not in REGISTRY:
            path.unlink()
    for model_type in REGISTRY:
        (FOLDER / f"{model_type}.txt").write_text(snapshot(model_type))


if __name__ == "__main__":
    write()
