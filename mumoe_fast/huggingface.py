"""Saved `transformers` models come back converted: import this module before `from_pretrained`.

`mumoe_fast.convert` notes in a model's config what it has done; `save_pretrained` and the Trainer write that with the
weights. With this module imported, `from_pretrained` of the model's own class or of an Auto class converts again,
before it loads the weights, and gives a model like any other: to train, compile, cast, convert further and save.

The note is a quantisation config, and what is registered here is a quantiser, although nothing is quantised: it is the
one place where transformers lets a library swap modules between the making of a model and the loading of its weights,
on the meta device, with sharded files, dtypes and device maps all taken care of. Weighed against it were

* remote code (`auto_map`), which copies Python files beside the weights, asks for `trust_remote_code=True` and is
  passed over by `GPT2LMHeadModel.from_pretrained`;
* config and model classes of our own for `AutoModel`, one pair for every architecture, which take the model out of the
  class that its user chose;
* `transformers.monkey_patching`, which swaps whole classes for every model in the process, whatever its config says.

Once the weights are there the model is no longer called quantised: the Trainer, torch.compile, `half()` and `float()`
would refuse it. Where this module is not imported, transformers logs "Unknown quantization type, got
mumoe_fast.huggingface" and reports the weights as unexpected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mumoe_fast._pretrained import METHOD
from mumoe_fast._structure import OURS
from mumoe_fast.convert import convert


class ConversionConfig(QuantizationConfigMixin):
    """What `convert` noted: the arguments of each conversion, in their order.

    Args:
        conversions: arguments of `mumoe_fast.convert`, one mapping per conversion.
        quant_method: the name under which transformers finds this class.
    """

    def __init__(self, conversions: Sequence[Mapping[str, Any]], quant_method: str = METHOD) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.conversions = [dict(conversion) for conversion in conversions]


class ConversionLoader(HfQuantizer):
    """Converts a model between its making and the loading of its weights.

    Raises:
        ValueError: a layer came from a factory, which a config cannot hold; none of the converted layers is in the
            model; `quantization_config` was passed to `from_pretrained` for a model that was not saved with one.
    """

    quantization_config: ConversionConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to convert what was not saved converted."""
        if not self.pre_quantized:
            raise ValueError("quantization_config: expected none; convert the loaded model: mumoe_fast.convert(model)")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        del model.config.quantization_config  # noted anew, by the names that the layers have in this model
        for conversion in self.quantization_config.conversions:
            if arguments := _arguments(model, conversion):
                convert(model, **arguments)
        noted = getattr(model.config, "quantization_config", None)
        if noted is None:
            names = [name for conversion in self.quantization_config.conversions for name in conversion["layers"]]
            raise ValueError(f"conversions: expected layers of a {type(model).__name__}, got {', '.join(names)}")
        self.quantization_config = ConversionConfig(**noted)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        _initialise_missing(model)
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        model.config.quantization_config = self.quantization_config.to_dict()
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """Yes: the converted model has a state_dict like any other."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes."""
        return True


def _arguments(model: nn.Module, conversion: Mapping[str, Any]) -> dict[str, Any]:
    """A conversion's arguments with the names that its layers have in this model; empty where it has none of them.

    The same layers are ``transformer.h.0.mlp`` of a language model and ``h.0.mlp`` of the bare one, and a classifier
    has no ``lm_head``: what a model does not have is passed over, as transformers passes over its weights.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = {name for name, _ in model.named_modules()}
    names = {}
    for saved in conversion["layers"]:
        candidates = (saved, saved.removeprefix(prefix), prefix + saved)
        if found := next((name for name in candidates if name in modules), None):
            names[saved] = found
    if not names:
        return {}
    if "factory" in conversion:
        raise ValueError(
            f"conversions: {', '.join(names)} came from a factory, which a config cannot hold: make the model from its "
            "config without its quantization_config, convert it with the factory, and load the state_dict"
        )
    rank = conversion.get("rank")
    if isinstance(rank, Mapping):
        rank = {name: rank[saved] for saved, name in names.items()}
    return {**conversion, "layers": list(names.values()), "rank": rank}


def _initialise_missing(model: nn.Module) -> None:
    """Give layers whose weights were not in the files their initial values: transformers leaves them as they fell.

    It marks what it loads; where nothing is marked, another loader was at work and knows what it left out.
    """

    def loaded(module: nn.Module) -> list[bool]:
        return [getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()]

    if not any(loaded(model)):
        return
    for layer in model.modules():
        if isinstance(layer, OURS) and not all(loaded(layer)):
            for part in layer.modules():
                if callable(reset := getattr(part, "reset_parameters", None)):
                    reset()


register_quantization_config(METHOD)(ConversionConfig)
register_quantizer(METHOD)(ConversionLoader)
