"""What a conversion is made of and what it reports: the layers that replace, and the tables of what was replaced."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mumoe_fast import rank as counts
from mumoe_fast._structure import Dense, linear_features
from mumoe_fast.layers import MuMoE, MuMoEMLP, MxD

if TYPE_CHECKING:
    from rich.console import Group

Rank = int | Sequence[int] | None


class MuMoEMLPWithDropout(MuMoEMLP):
    """A `MuMoEMLP` that keeps the dropout of the block it replaced, with the same state_dict as one without.

    Args:
        *args: as for `MuMoEMLP`.
        dropout: applied to the output.
        **kwargs: as for `MuMoEMLP`.
    """

    def __init__(self, *args: Any, dropout: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dropout = dropout

    def forward(self, x: Tensor, gate_input: Tensor | None = None) -> Tensor:
        """x (..., I) to (..., O); the gate reads `gate_input` (..., I) where it is given, else x."""
        y: Tensor = self.dropout(super().forward(x, gate_input))
        return y


@dataclass(frozen=True)
class Recipe:
    """The arguments of every μMoE layer of a conversion; `rank` may be given per name."""

    num_experts: tuple[int, ...]
    factorization: str
    rank: Rank | Mapping[str, Rank]
    norm: str
    alpha: float
    impl: str

    def layer(self, name: str, dense: Dense, budget: int, device: torch.device | str) -> MuMoE | MuMoEMLP:
        """The layer in place of a dense one of `budget` parameters."""
        keywords: dict[str, Any] = {
            "factorization": self.factorization,
            "rank": self._rank(name, dense, budget),
            "bias": dense.bias,
            "norm": self.norm,
            "alpha": self.alpha,
            "impl": self.impl,
            "device": device,
            "dtype": dense.dtype,
        }
        if dense.activation is None:
            in_features, out_features = dense.features
            return MuMoE(in_features, out_features, self.num_experts, **keywords)
        keywords |= {"num_experts": self.num_experts, "activation": dense.activation}
        if dense.dropout is None:
            return MuMoEMLP(*dense.features, **keywords)
        return MuMoEMLPWithDropout(*dense.features, dropout=dense.dropout, **keywords)

    def _rank(self, name: str, dense: Dense, budget: int) -> Rank:
        rank = self.rank
        if isinstance(rank, Mapping):
            if name not in rank:
                raise ValueError(f"rank: expected one for every layer, got none for {name!r}")
            rank = rank[name]
        if rank is not None or self.factorization == "full":
            return rank
        return counts.match_rank(dense.features, self.num_experts, self.factorization, bias=dense.bias, budget=budget)


@dataclass(frozen=True)
class Replacement:
    """One layer, before and after. FLOPs are multiply-adds per row of its input, None where they are not known."""

    name: str
    before: str
    after: str
    rank: tuple[int, ...]
    parameters_before: int
    parameters_after: int
    flops_before: int | None
    flops_after: int | None


@dataclass(frozen=True)
class LeftAlone:
    """A layer that was asked for and not replaced, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Conversion:
    """What `convert` replaced, or with `dry_run` would replace, and what it left alone.

    `parameters_before` and `parameters_after` are the whole model's, tied ones counted once. `recipe` is None where a
    factory made the replacements. `str()` and rich's `print` show a table.
    """

    replaced: tuple[Replacement, ...]
    left_alone: tuple[LeftAlone, ...]
    parameters_before: int
    parameters_after: int
    recipe: Recipe | None
    dry_run: bool

    @property
    def flops_before(self) -> int | None:
        """Multiply-adds of all replaced layers together, one row of input each; None where one is not known."""
        return sum_known(layer.flops_before for layer in self.replaced)

    @property
    def flops_after(self) -> int | None:
        """Multiply-adds of all their replacements together, one row of input each; None where one is not known."""
        return sum_known(layer.flops_after for layer in self.replaced)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold and `convert(model, **dict)` takes, to convert a model of the same shape in the same way.

        The layers are listed by name and their ranks as matched, so that a state_dict saved after this conversion
        loads after the repeated one.

        Raises:
            ValueError: a factory made the replacements, which JSON cannot hold.
        """
        if self.recipe is None:
            raise ValueError("to_dict: a factory cannot be written as JSON; convert again with the same arguments")
        recipe, levels = self.recipe, self.recipe.num_experts
        ranks = {layer.name: layer.rank[0] if len(layer.rank) == 1 else list(layer.rank) for layer in self.replaced}
        if recipe.factorization == "full":
            rank: Any = None
        else:
            rank = next(iter(ranks.values())) if len(set(map(str, ranks.values()))) == 1 else ranks
        return {
            "layers": [layer.name for layer in self.replaced],
            "num_experts": levels[0] if len(levels) == 1 else list(levels),
            "factorization": recipe.factorization,
            "rank": rank,
            "norm": recipe.norm,
            "alpha": recipe.alpha,
            "impl": recipe.impl,
        }

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        many = f"{len(self.replaced)} layer{'' if len(self.replaced) == 1 else 's'}"
        title = f"{many} {'would be replaced' if self.dry_run else 'replaced'}"
        table = Table(title=title, title_justify="left", show_footer=True)
        parameters = [sum(layer.parameters_before for layer in self.replaced)]
        parameters.append(sum(layer.parameters_after for layer in self.replaced))
        table.add_column("layer", "total")
        table.add_column("before")
        table.add_column("after")
        table.add_column("parameters", "{:,} → {:,}".format(*parameters), justify="right")
        table.add_column("FLOPs per row", _arrow(self.flops_before, self.flops_after), justify="right")
        for layer in self.replaced:
            table.add_row(
                layer.name,
                layer.before,
                layer.after,
                _arrow(layer.parameters_before, layer.parameters_after),
                _arrow(layer.flops_before, layer.flops_after),
            )
        lines = [f"parameters of the model: {_arrow(self.parameters_before, self.parameters_after)}"]
        lines += [f"left alone: {layer.name or '(the model itself)'}: {layer.reason}" for layer in self.left_alone]
        return Group(table if self.replaced else title, *map(Text, lines))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=160, no_color=True, highlight=False, markup=False)
        console.print(self, soft_wrap=True)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()


def count_parameters(module: nn.Module) -> int:
    """Every parameter once, as Hugging Face counts."""
    return sum(parameter.numel() for parameter in module.parameters())


def moe_shape(layer: MuMoE | MuMoEMLP) -> counts.MoEShape:
    """The counted shape of a layer."""
    if isinstance(layer, MuMoE):
        experts, features = layer.experts, [layer.in_features, layer.out_features]
    else:
        experts, features = layer.in_experts, [layer.in_features, layer.hidden_features, layer.out_features]
    return counts.MoEShape(tuple(features), experts.num_experts, layer.factorization, experts.rank, experts.bias_in_use)


def count_flops(module: nn.Module) -> int | None:
    """Multiply-adds per row of input, by the rule of `mumoe_fast.rank`; None where a part is of unknown kind."""
    linear = linear_features(module)
    if linear is not None:
        return counts.dense_flops(linear)
    if isinstance(module, MuMoE | MuMoEMLP):
        return moe_shape(module).flops
    if isinstance(module, MxD):
        features = (module.in_features, module.hidden_features, module.out_features)
        return counts.mxd_flops(features, module.gate.num_experts[0], module.gate.k)
    if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
        return None
    return sum_known(count_flops(child) for child in module.children())


def sum_known(values: Iterable[int | None]) -> int | None:
    """The sum, or None where a value is not known."""
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def describe(module: nn.Module, dense: Dense | None = None) -> str:
    """Class, sizes and options in one line."""
    kind = type(module).__name__
    if isinstance(module, MuMoE | MuMoEMLP):
        shape = moe_shape(module)
        sizes = [f"N={_numbers(shape.num_experts)}"] + [f"R={_numbers(shape.rank)}"] * bool(shape.rank)
        return f"{kind} {shape.factorization} {' '.join(sizes)}"
    if dense is None:
        return kind
    return f"{kind} {'→'.join(map(str, dense.features))}" + (f", {dense.activation}" if dense.activation else "")


def _numbers(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(values) == 1 else str(values)


def _arrow(before: int | None, after: int | None) -> str:
    return " → ".join("unknown" if value is None else f"{value:,}" for value in (before, after))
