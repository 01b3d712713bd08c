"""transformers' own Trainer, save_pretrained, from_pretrained and generate on converted models."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import mumoe_fast.huggingface as hub  # noqa: E402
from mumoe_fast import MuMoE, MuMoEMLP, MxD, convert  # noqa: E402

VOCABULARY = 50
PROMPT = torch.arange(14).view(2, 7)


def gpt2(kind: str = "GPT2LMHeadModel", **options: Any) -> Any:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0, **options)
    return getattr(transformers, kind)(config)


def converted(kind: str = "GPT2LMHeadModel", **options: Any) -> Any:
    """A model whose μMoE layers, buffers included, are not as they are initialised."""
    model = gpt2(kind)
    convert(model, **({"num_experts": 4} | options))
    fill(model)
    return model.eval()


def fill(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.1, 0.6)


def loaded(folder: Path, auto: str = "GPT2LMHeadModel", **options: Any) -> Any:
    """The model of a folder, which must have exactly the weights that the model has."""
    model, found = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(found.values()), found
    return model


def same(model: nn.Module, other: nn.Module) -> None:
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=False)


def conversions(model: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = model.config.quantization_config["conversions"]
    return found


# Saving and loading


@pytest.mark.parametrize("auto", ["GPT2LMHeadModel", "AutoModelForCausalLM"])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts": (4, 2), "norm": "batch", "alpha": 1.25},
        {"factorization": "tr", "rank": (2, 3, 4)},
        {"factorization": "full", "num_experts": 2},
    ],
)
def test_a_saved_model_comes_back_converted(tmp_path: Path, auto: str, settings: dict[str, Any]) -> None:
    model = converted(**settings)
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path, auto)
    assert type(again) is transformers.GPT2LMHeadModel
    assert [type(block.mlp) for block in again.transformer.h] == [type(block.mlp) for block in model.transformer.h]
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())
    same(again, model)
    torch.testing.assert_close(again(PROMPT).logits, model(PROMPT).logits, rtol=0, atol=0)
    assert conversions(again) == conversions(model)
    assert again.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}


def test_sharded_files_other_dtypes_and_device_maps(tmp_path: Path) -> None:
    model = converted(norm="batch")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    same(loaded(tmp_path, device_map="cpu"), model)
    for dtype in (torch.bfloat16, "bfloat16"):
        again = loaded(tmp_path, dtype=dtype, low_cpu_mem_usage=True)
        assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.bfloat16}
        assert_equal(again.state_dict(), {name: t.to(torch.bfloat16) for name, t in model.state_dict().items()})


def test_conversions_add_up_also_after_loading(tmp_path: Path) -> None:
    model = gpt2(tie_word_embeddings=False)
    convert(model, layers=["transformer.h.0.mlp"], num_experts=4)
    model.save_pretrained(tmp_path / "first")
    model = loaded(tmp_path / "first")
    convert(model, num_experts=3, factorization="tt")
    convert(model, layers="head", num_experts=2)
    fill(model)
    model.save_pretrained(tmp_path / "second")
    again = loaded(tmp_path / "second")
    assert [entry["layers"] for entry in conversions(again)] == [
        ["transformer.h.0.mlp"],
        ["transformer.h.1.mlp"],
        ["lm_head"],
    ]
    assert isinstance(again.lm_head, MuMoE)
    assert [block.mlp.factorization for block in again.transformer.h] == ["cp", "tt"]
    same(again, model)


def test_a_model_made_from_the_same_config_is_not_said_to_be_converted(tmp_path: Path) -> None:
    model = gpt2()
    dense = transformers.GPT2LMHeadModel(model.config)
    convert(model, num_experts=4)
    dense.save_pretrained(tmp_path)
    assert not hasattr(dense.config, "quantization_config")
    assert isinstance(loaded(tmp_path).transformer.h[0].mlp, transformers.models.gpt2.modeling_gpt2.GPT2MLP)
    held = {id(module.config) for module in model.modules() if hasattr(module, "config")}
    assert held == {id(model.config)}


def test_a_config_of_a_converted_model_makes_another_whose_own_conversion_counts(tmp_path: Path) -> None:
    model = transformers.GPT2LMHeadModel(converted().config)
    convert(model, layers=["transformer.h.1.mlp"], num_experts=2)
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert [entry["num_experts"] for entry in conversions(again)] == [2]
    same(again, model)


def test_a_dry_run_and_nothing_to_replace_are_not_noted() -> None:
    model = gpt2()
    config = model.config
    convert(model, num_experts=4, dry_run=True)
    with pytest.warns(UserWarning, match="nothing in the model"):
        convert(model, layers="head", num_experts=4)
    assert model.config is config
    assert not hasattr(config, "quantization_config")


@pytest.mark.parametrize(
    ("saved", "wanted", "names"),
    [
        ("GPT2LMHeadModel", "GPT2Model", ["h.0.mlp", "h.1.mlp"]),
        ("GPT2Model", "GPT2LMHeadModel", ["transformer.h.0.mlp", "transformer.h.1.mlp"]),
        ("GPT2LMHeadModel", "GPT2ForSequenceClassification", ["transformer.h.0.mlp", "transformer.h.1.mlp"]),
    ],
)
def test_the_body_is_converted_under_another_head(tmp_path: Path, saved: str, wanted: str, names: list[str]) -> None:
    model = converted(saved, rank={name: 3 + place for place, name in enumerate(mlp_names(saved))})
    model.save_pretrained(tmp_path)
    again = getattr(transformers, wanted).from_pretrained(tmp_path)
    assert [name for name, part in again.named_modules() if isinstance(part, MuMoEMLP)] == names
    same(again.base_model, model.base_model)
    again.save_pretrained(tmp_path / "again")
    same(loaded(tmp_path / "again", wanted), again)


def mlp_names(kind: str) -> list[str]:
    return [name for name, _ in gpt2(kind).named_modules() if name.endswith("mlp")]


def test_a_head_that_another_model_has_not_is_passed_over(tmp_path: Path) -> None:
    model = gpt2(tie_word_embeddings=False)
    convert(model, num_experts=4)
    convert(model, layers="head", num_experts=2)
    model.save_pretrained(tmp_path)
    again = transformers.GPT2Model.from_pretrained(tmp_path)
    assert [entry["layers"] for entry in conversions(again)] == [["h.0.mlp", "h.1.mlp"]]
    same(again, model.transformer)


def test_layers_of_no_such_name_are_an_error(tmp_path: Path) -> None:
    converted().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["conversions"][0]["layers"] = ["decoder.0.mlp"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"conversions: expected layers of a GPT2LMHeadModel, got decoder\.0\.mlp"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path)


def test_a_factory_cannot_be_repeated_and_loading_says_so(tmp_path: Path) -> None:
    def factory(name: str, module: nn.Module) -> nn.Module:
        return MxD(16, 64, num_experts=8, k=2)

    model = gpt2()
    convert(model, factory=factory)
    fill(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp, transformer\.h\.1\.mlp came from a factory"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    config = transformers.GPT2Config.from_pretrained(tmp_path)
    del config.quantization_config
    again = transformers.GPT2LMHeadModel(config)
    convert(again, factory=factory)
    again.load_state_dict(transformers.modeling_utils.load_state_dict(tmp_path / "model.safetensors"), strict=False)
    same(again, model)


def test_a_conversion_can_be_kept_and_repeated_by_hand(tmp_path: Path) -> None:
    model = gpt2()
    model.config.conversion = convert(model, num_experts=4).to_dict()
    fill(model)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    config = transformers.GPT2Config.from_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel(config)
    convert(again, **config.conversion)
    again.load_state_dict(torch.load(tmp_path / "model.pt"))
    same(again, model)
    assert len(conversions(again)) == 1


def test_weights_that_are_missing_are_initialised(tmp_path: Path) -> None:
    converted(norm="batch", factorization="tr", rank=3).config.save_pretrained(tmp_path)
    gpt2().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").rename(tmp_path / "model.safetensors")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    for block in model.transformer.h:
        core = block.mlp.in_experts.in_core
        assert core.abs().max() <= 16**-0.5
        assert core.std() > 0.5 * (3 * 16) ** -0.5
        assert not block.mlp.gate.weights[0].any()
        assert not block.mlp.gate.norms[0].running_mean.any()
        assert (block.mlp.gate.norms[0].running_var == 1).all()
    same_embedding = transformers.modeling_utils.load_state_dict(tmp_path / "model.safetensors")
    assert torch.equal(model.transformer.wte.weight, same_embedding["transformer.wte.weight"])


def test_without_our_module_transformers_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    converted().save_pretrained(tmp_path)
    monkeypatch.delitem(transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING, hub.METHOD)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    _, found = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert "Unknown quantization type, got mumoe_fast.huggingface" in caplog.text
    assert found["unexpected_keys"]


def test_a_dense_model_is_not_converted_by_an_argument(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    settings = hub.ConversionConfig([{"layers": ["transformer.h.0.mlp"], "num_experts": 4}])
    with pytest.raises(ValueError, match=r"quantization_config: expected none; convert the loaded model"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=settings)


def test_a_quantised_model_keeps_its_own_note() -> None:
    model = gpt2()
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.warns(UserWarning, match=r"says that the model is quantised \(fp8\)"):
        convert(model, num_experts=4)
    assert isinstance(model.transformer.h[0].mlp, MuMoEMLP)
    assert model.config.quantization_config == {"quant_method": "fp8"}


# What is done with a model


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        tokens = (torch.arange(12) * (1 + place % 3) + place) % VOCABULARY
        return {"input_ids": tokens, "labels": tokens}


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    settings = {
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = transformers.TrainingArguments(str(folder), **(settings | options))
    return transformers.Trainer(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences())


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_checkpointing": True}], ids=["float32", "bfloat16"])
def test_the_trainer_trains_resumes_and_saves_what_comes_back(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    first = gpt2()
    convert(first, num_experts=4, norm="batch")
    start = {name: value.clone() for name, value in first.state_dict().items()}
    whole = trainer(first, tmp_path / "whole", **options)
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    for name, value in first.state_dict().items():
        assert not torch.equal(value, start[name]), name

    resumed = trainer(loaded(tmp_path / "whole" / "checkpoint-3"), tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    same(resumed.model, first)

    resumed.save_model(str(tmp_path / "saved"))
    same(loaded(tmp_path / "saved", "AutoModelForCausalLM"), first)


def test_the_trainer_takes_a_loaded_model_and_the_best_checkpoint(tmp_path: Path) -> None:
    converted().save_pretrained(tmp_path / "saved")
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    best = trainer(loaded(tmp_path / "saved"), tmp_path, **options)
    best.train()
    same(best.model, loaded(Path(best.state.best_model_checkpoint)))


def test_gradients_are_the_same_with_checkpointing() -> None:
    model = converted().train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0

    def gradients() -> dict[str, Tensor]:
        torch.manual_seed(1)
        logits = model(PROMPT).logits
        found = torch.autograd.grad(logits, list(model.parameters()), torch.randn(logits.shape))
        return dict(zip((name for name, _ in model.named_parameters()), found, strict=True))

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert_equal(gradients(), plain)


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampling"])
def test_generation_with_a_cache_is_generation_without(tmp_path: Path, sample: bool) -> None:
    model = converted()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    nn.init.normal_(model.transformer.wpe.weight, std=4.0)  # or greedily the same token again and again
    model.save_pretrained(tmp_path)
    outputs = []
    for each, cache in ((model, False), (model, True), (loaded(tmp_path), True)):
        torch.manual_seed(0)
        options = {"do_sample": sample, "use_cache": cache, "max_new_tokens": 12, "min_new_tokens": 12}
        outputs.append(each.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **options))
    assert outputs[0].shape == (2, 19)
    assert len(outputs[0][:, 7:].unique()) > 2
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[0])


def test_embeddings_are_tied_and_resized(tmp_path: Path) -> None:
    model = converted()
    model.resize_token_embeddings(VOCABULARY + 9)
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight
    assert again(PROMPT).logits.shape == (2, 7, VOCABULARY + 9)
    same(again, model)


def test_a_loaded_model_is_not_taken_for_a_quantised_one(tmp_path: Path) -> None:
    converted().save_pretrained(tmp_path)
    model = loaded(tmp_path)
    assert model.half().dtype == torch.float16  # which a quantised one refuses, as the Trainer refuses to compile it
    assert model.float().dtype == torch.float32
    assert not model.is_quantized
