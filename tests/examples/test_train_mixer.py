"""The Mixer example: the paper's model, and a run that learns, repeats itself and goes on."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn
from typer import Typer
from typer.testing import CliRunner

from mumoe_fast.examples import train_mixer
from mumoe_fast.examples._checkpoints import Checkpoints
from mumoe_fast.examples._classification import Augmentation, Classification
from mumoe_fast.examples._images import gratings
from mumoe_fast.examples._mixer import Kind, Mixer, MixerConfig, MLPs, Patches, StochasticDepth, build
from mumoe_fast.examples._training import TrainConfig, Trainer, count_parameters
from mumoe_fast.examples.train_mixer import SIZES

SHAPE = MixerConfig(image=16, patch=4, width=32, blocks=2, token_hidden=32, channel_hidden=64, channels=1, classes=8)
TRAINING = TrainConfig(steps=60, batch=32, learning_rate=1e-2, weight_decay=1e-4, precision="float32")
DATA = gratings(16)


def trainer(
    kind: Kind = "cp", shape: MixerConfig = SHAPE, augmentation: Augmentation | None = None
) -> Trainer[Classification]:
    model = build(shape, MLPs(kind, experts=(6,)), TRAINING.seed)
    return Trainer(Classification(model, DATA, blocks=model.blocks, augmentation=augmentation), TRAINING)


@pytest.mark.parametrize(
    ("kind", "token_rank", "channel_rank", "mlps", "model"),
    [("dense", None, None, "17.6M", "18.5M"), ("cp", 147, 384, "17.7M", "18.6M"), ("tr", 37, 97, "17.4M", "18.3M")],
)
def test_s16_has_the_papers_parameters(
    kind: Kind, token_rank: int | None, channel_rank: int | None, mlps: str, model: str
) -> None:
    """Tables 3 and 4, ImageNet1k's 1,000 classes."""
    with torch.device("meta"):
        mixer = build(
            SIZES["S/16"].shape,
            replace(SIZES["S/16"].mlps, kind=kind, token_rank=token_rank, channel_rank=channel_rank),
            0,
        )
    inside = sum(count_parameters(block.token_mlp) + count_parameters(block.channel_mlp) for block in mixer.blocks)
    assert f"{inside / 1e6:.1f}M" == mlps
    assert f"{count_parameters(mixer) / 1e6:.1f}M" == model


def test_matched_ranks_keep_the_parameters_of_s16() -> None:
    preset = SIZES["S/16"]
    with torch.device("meta"):
        dense, mumoe = (
            count_parameters(build(preset.shape, replace(preset.mlps, kind=kind), 0)) for kind in ("dense", "cp")
        )
    assert mumoe == pytest.approx(dense, rel=0.01)


def test_s16_is_trained_as_in_table_7() -> None:
    training = SIZES["S/16"].training
    assert (training.learning_rate, training.batch, training.weight_decay, training.seed) == (1e-3, 4096, 1e-4, 0)
    assert training.steps * training.batch == pytest.approx(300 * 1_281_167, rel=1e-4)
    assert training.warmup * training.steps == pytest.approx(10_000, abs=1)
    assert (training.precision, SIZES["S/16"].augmentation.mixup) == ("bfloat16", 0.5)
    assert SIZES["S/16"].mlps.experts == (64,)


@pytest.mark.parametrize("kind", ["dense", "cp", "tr"])
def test_accuracy_rises_on_images_that_were_not_trained_on(kind: Kind) -> None:
    run = trainer(kind)
    losses = [record.loss for record in run]
    assert sum(losses[-5:]) < sum(losses[:5]) - 2.5  # 0.5 nats each
    assert run.evaluate(complete=True)["accuracy"] > 0.6  # chance is 1 in 8


def test_two_runs_are_the_same_and_another_order_is_not() -> None:
    shape = replace(SHAPE, stochastic_depth=0.5)
    augmentation = Augmentation(shift=2, mixup=0.5)
    first, second = ([record.loss for record in islice(trainer("cp", shape, augmentation), 4)] for _ in range(2))
    assert first == second
    assert first != [record.loss for record in islice(trainer("cp", shape), 4)]


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    shape, augmentation = replace(SHAPE, stochastic_depth=0.5), Augmentation(shift=2, mixup=0.5)
    whole = trainer("cp", shape, augmentation)
    expected = [record.loss for record in islice(whole, 6)]
    stopped, goes_on = (trainer("cp", shape, augmentation) for _ in range(2))
    before = [record.loss for record in islice(stopped, 3)]
    Checkpoints(tmp_path, {}).save(stopped)
    assert Checkpoints(tmp_path, {}).resume(goes_on)
    assert before + [record.loss for record in islice(goes_on, 3)] == expected
    for mine, theirs in zip(goes_on.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_one_seed_starts_dense_and_mumoe_from_the_same_weights_outside_the_mlps() -> None:
    dense, mumoe = (dict(build(SHAPE, MLPs(kind, (6,)), 0).named_parameters()) for kind in ("dense", "cp"))
    shared = [name for name in dense if "_mlp." not in name]
    assert len(shared) == 2 + 2 * 4 + 2 + 2
    for name in shared:
        assert torch.equal(dense[name], mumoe[name]), name


def test_the_gates_have_the_papers_batch_norm_and_every_level_of_a_hierarchy() -> None:
    model = build(SHAPE, MLPs("cp", experts=(6, 2)), 0)
    gates = [gate for block in model.blocks for gate in (block.token_mlp.gate, block.channel_mlp.gate)]
    assert {gate.norm for gate in gates} == {"batch"}
    assert {gate.num_experts for gate in gates} == {(6, 2)}


def test_patches_are_cut_as_a_strided_convolution_cuts_them() -> None:
    config = replace(SHAPE, channels=3)
    patches, images = Patches(config), torch.randn(2, 3, 16, 16)
    convolution = nn.Conv2d(3, 32, 4, stride=4)
    convolution.load_state_dict({"weight": patches.linear.weight.view(32, 3, 4, 4), "bias": patches.linear.bias})
    torch.testing.assert_close(patches(images), convolution(images).flatten(2).transpose(1, 2))


def test_token_mlps_mix_tokens_and_channel_mlps_do_not() -> None:
    block = build(SHAPE, MLPs("cp", (6,)), 0).eval().blocks[0]
    x = torch.randn(1, 16, 32)
    changed = x.clone()
    changed[0, 3] += 1
    moved = (block(changed) - block(x)).abs().amax(-1)[0]
    assert (moved > 0).all()
    with torch.no_grad():
        for parameter in block.token_mlp.out_experts.parameters():
            parameter.zero_()
    moved = (block(changed) - block(x)).abs().amax(-1)[0]
    assert (moved > 0).nonzero().flatten().tolist() == [3]


def test_stochastic_depth_leaves_branches_out_per_image_and_only_in_training() -> None:
    skip, x = StochasticDepth(0.25), torch.ones(4000, 2, 3)
    y = skip(x)
    torch.testing.assert_close(y.unique(), torch.tensor([0, 1 / 0.75]))
    assert torch.equal(y.amax((1, 2)), y.amin((1, 2)))
    assert y.mean() == pytest.approx(1, abs=0.05)
    assert torch.equal(skip.eval()(x), x)
    depths = [block.skip.p for block in Mixer(replace(SHAPE, blocks=3, stochastic_depth=0.2)).blocks]
    assert depths == pytest.approx([0, 0.1, 0.2])


def test_an_image_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="image: expected a multiple of the patch size 4, got 15"):
        replace(SHAPE, image=15)


def run(*arguments: str) -> tuple[int, str]:
    app = Typer()
    app.command()(train_mixer.main)
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*arguments], catch_exceptions=False)
    return result.exit_code, result.output


SMALL = ("--data", "gratings", "--device", "cpu", "--batch", "4", "--steps", "2", "--experts", "4")


def test_the_command_goes_on_in_its_folder_and_refuses_another_run(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "run"))
    code, printed = run(*SMALL, *out)
    assert code == 0
    assert "samples 1×28×28 of 8 classes, 20,000 to learn from and 1,000 held out" in printed
    assert "after 2 of 2 steps" in printed
    code, printed = run(*SMALL, *out)
    assert (code, "going on after step 2" in printed) == (0, True)
    for option, field in ((("--shift", "1"), "augmentation.shift"), (("--mlp", "dense"), "mlps.kind")):
        code, printed = run(*SMALL, *out, *option)
        assert (code, f"{field}: expected" in printed) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), "data: expected gratings, mnist, a folder or a file, got 'nowhere'"),
        (("--experts", "0"), "num_experts: expected at least 1, got 0"),
        (("--token-rank", "0"), "rank"),
        (("--batch", "5", "--accumulate", "2"), "batch: expected a multiple of 2"),
        (("--impl", "cuda"), "impl: expected one of"),
        (("--tensor-parallel", "2"), "tensor_parallel: expected a divisor of the 1 processes"),
    ],
)
def test_bad_options_are_named(arguments: tuple[str, ...], message: str) -> None:
    code, printed = run("--data", "gratings", "--device", "cpu", *arguments)
    assert (code, message in printed) == (2, True), printed


def test_the_command_explains_itself() -> None:
    code, printed = run("--help")
    assert code == 0
    for word in ("--token-rank", "--out", "--tensor-parallel", "one sub-folder per class"):
        assert word in printed
