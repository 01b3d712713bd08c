"""What `convert` writes into the config of a `transformers` model, so that `mumoe_fast.huggingface` can repeat it.

It stands where transformers keeps a record of modules that are swapped before the weights are loaded:
``config.quantization_config = {"quant_method": "mumoe_fast.huggingface", "conversions": [...]}``, with one entry of
arguments to `convert` per conversion. transformers itself is never imported: a model of its is there only where it is.
"""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

from torch import nn

from mumoe_fast._conversion import Conversion
from mumoe_fast._structure import OURS

METHOD = "mumoe_fast.huggingface"  # what transformers names where it is not registered: the module to import


def record(model: nn.Module, conversion: Conversion) -> None:
    """Note a conversion in the model's config, after those that came before; other models are no business of this.

    The config becomes the model's own: models that were made from the same one are not converted.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel) or not conversion.replaced:
        return
    before = dict(getattr(model.config, "quantization_config", None) or {})
    if before.get("quant_method", METHOD) != METHOD:
        warnings.warn(
            f"convert: model.config says that the model is quantised ({before['quant_method']}) and cannot hold the "
            "conversion too: from_pretrained will not repeat it",
            stacklevel=3,
        )
        return
    entry = _entry(conversion)
    entries = [old for old in before.get("conversions", ()) if _applies(old, model, entry)]
    own = _own_config(model)
    own.quantization_config = {"quant_method": METHOD, "conversions": [*entries, entry]}


def _applies(old: dict[str, Any], model: nn.Module, entry: dict[str, Any]) -> bool:
    """Whether an older entry is about this model, and not about one whose config this one was made from."""
    if set(old["layers"]) & set(entry["layers"]):  # nothing is converted twice
        return False
    modules = dict(model.named_modules())
    return "factory" in old or all(isinstance(modules.get(name), OURS) for name in old["layers"])


def _entry(conversion: Conversion) -> dict[str, Any]:
    """Arguments of `convert`, or a note that there are none that a config could hold."""
    if conversion.recipe is None:
        return {"layers": [layer.name for layer in conversion.replaced], "factory": True}
    return conversion.to_dict()


def _own_config(model: nn.Module) -> Any:
    """A copy of the config, and of those inside it, in every module of the model that holds one of them."""
    copies: dict[int, Any] = {}
    own = copy.deepcopy(model.config, copies)
    for module in model.modules():
        held = getattr(module, "config", None)
        if held is not None and id(held) in copies:
            module.config = copies[id(held)]
    return own
