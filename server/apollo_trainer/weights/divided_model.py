"""A transformers model of whose parameters each rank has a part.

Which layer is divided how, transformers says itself (`tp_plan`), and is taken as data: no parameter
becomes anything else than a plain local one. What comes into divided layers is the same on all
ranks, and its gradient is summed; what comes out of them is summed, and its gradient is the same.
Each placement is compared with what was found of vLLM's, and what is not known is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apollo_grpc.region import Region, Runs
from apollo_trainer.parallel.collectives import spread, summed
from apollo_trainer.parallel.ranks import Ranks
from apollo_trainer.parallel.vocabulary import Vocabulary
from apollo_trainer.weights.manifest import refusal

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_COLUMNS, _ROWS, _EXPERTS = "colwise", "rowwise", "moe_tp_experts"
_SEEN_IN_PART = "replicated_with_grad_allreduce"
_OF_EXPERTS = {"packed_colwise", _ROWS}


def divide_model(model: Any, regions: Mapping[str, Region], ranks: Ranks) -> None:
    """Has the model compute what it computes whole, on all ranks together.

    Its logits are those of this rank's tokens where the head is divided (`vocabulary_of`).

    Raises FailedPrecondition that names the layer that cannot be divided as vLLM divides it.
    """
    if not all(region.complete for region in regions.values()):
        _Division(model, regions, ranks).place()


class _Division:
    def __init__(self, model: Any, regions: Mapping[str, Region], ranks: Ranks):
        self._model, self._ranks = model, ranks
        named = model.named_parameters(remove_duplicate=False)
        owners = {id(parameter): regions.get(name) for name, parameter in model.named_parameters()}
        self._regions: dict[str, Region] = {
            name: owners[id(parameter)] or Region.whole_of(parameter.shape)
            for name, parameter in named
        }
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        names = {id(module): name for name, module in model.named_modules()}
        self._ends = {names[id(module)]: module for module in ends}
        self._placed = set[str]()

    def place(self) -> None:
        self._place_vocabulary()
        for name, module in self._model.named_modules():
            children = {f"{name}.{child}": each for child, each in module.named_children()}
            styles = {child: self._style(child) for child in children}
            if any(styles.values()):
                self._place_block(name, children, {n: s for n, s in styles.items() if s})
        for name, region in self._regions.items():
            if not region.complete and name not in self._placed:
                raise _cannot(name, "transformers has no plan for it")

    # --- vocabulary -------------------------------------------------------------------------

    def _place_vocabulary(self) -> None:
        for (name, module), divide in zip(
            self._ends.items(), (self._embed, self._head), strict=True
        ):
            region = self._regions[f"{name}.weight"]
            if region.complete:
                continue
            if (
                not region.is_whole(1)
                or len(region.runs[0]) != 1
                or len(list(module.parameters())) > 1
            ):
                raise _cannot(f"{name}.weight", "its rows are not one run of the vocabulary's")
            divide(module, Vocabulary(region, self._ranks))
            self._placed.add(f"{name}.weight")

    def _embed(self, module: Any, vocabulary: Vocabulary) -> None:
        padding = getattr(module, "padding_idx", None)
        if padding is not None:
            place, mine = vocabulary.own(torch.tensor(padding))
            module.padding_idx = int(place) if mine else None
        module.forward = partial(_look_up, module.forward, vocabulary)

    def _head(self, module: Any, vocabulary: Vocabulary) -> None:
        self._model.divided_vocabulary = vocabulary
        module.register_forward_pre_hook(self._spread_first)

    # --- blocks -----------------------------------------------------------------------------

    def _style(self, name: str) -> str | None:
        """What the plan says of a module or parameter, but for both ends of the vocabulary."""
        style: str | None = (self._model.tp_plan or {}).get(_NUMBER.sub("*", name))
        return None if name in self._ends else style

    def _place_block(self, name: str, children: dict[str, Any], styles: dict[str, str]) -> None:
        """Layers that belong together: those whose outputs only the block's last ones read."""
        known = {_COLUMNS, _ROWS, _SEEN_IN_PART, _EXPERTS}
        for child, style in styles.items():
            if style not in known:
                raise _cannot(child, f"its style {style!r} is not known")
        weights = {
            n: self._regions[f"{n}.weight"] for n, s in styles.items() if s in (_COLUMNS, _ROWS)
        }
        if any(not region.complete for region in weights.values()):
            self._place_layers(name, children, styles, weights)
        for child in (n for n, style in styles.items() if style == _EXPERTS):
            self._place_experts(child, children[child])

    def _place_layers(
        self,
        name: str,
        children: dict[str, Any],
        styles: dict[str, str],
        weights: dict[str, Region],
    ) -> None:
        last = [n for n, style in styles.items() if style == _ROWS]
        if len(last) != 1:
            raise _cannot(name, "not one of its layers gathers what the others make")
        shares = weights[last[0]]
        if any(region.complete for region in weights.values()):
            self._fewer_groups(name, shares)
        for child, style in styles.items():
            if style == _ROWS:
                self._sum_output(child, children[child], shares)
            elif style == _SEEN_IN_PART:
                self._sum_gradients(children[child])
            elif weights[child].complete:
                # Every rank has all of it, and reads a part of what it gives.
                children[child].register_forward_hook(self._spread_output)
            else:
                self._divide_outputs(child, children[child], weights[child], shares)

    def _divide_outputs(self, name: str, module: Any, region: Region, shares: Region) -> None:
        bias = self._regions.get(f"{name}.bias")
        ours = _share(_joined(region.runs[0]), region.root[0])
        alike = region.is_whole(1) and ours == _share(shares.runs[1], shares.root[1])
        if not alike or (bias is not None and bias.runs[0] != region.runs[0]):
            raise _cannot(f"{name}.weight", "ranks have other rows of it than of what reads them")
        module.register_forward_pre_hook(self._spread_first)
        self._placed |= {f"{name}.weight", f"{name}.bias"}

    def _sum_output(self, name: str, module: Any, region: Region) -> None:
        bias = self._regions.get(f"{name}.bias")
        linear = isinstance(module, nn.Linear)
        if not linear or not region.is_whole(0) or len(region.runs[1]) != 1:
            raise _cannot(f"{name}.weight", "its columns are not one run")
        if bias is not None and not bias.complete:
            raise _cannot(f"{name}.bias", "ranks have parts of it")
        module.forward = partial(_multiply, module, self._ranks)
        self._placed.add(f"{name}.weight")

    def _sum_gradients(self, module: Any) -> None:
        for parameter in module.parameters():
            parameter.register_hook(self._sum)

    def _fewer_groups(self, name: str, shares: Region) -> None:
        """Of query heads for each head of keys, where every rank has all of those."""
        module = self._model.get_submodule(name)
        whole = getattr(module, "num_key_value_groups", None)
        heads, rest = divmod((whole or 0) * shares.shape[1], shares.root[1])
        if not whole or rest:
            raise _cannot(name, "how many of its heads share one cannot be told")
        module.num_key_value_groups = heads

    def _place_experts(self, name: str, module: Any) -> None:
        own = {f"{name}.{n}": self._regions[f"{name}.{n}"] for n, _ in module.named_parameters()}
        if all(region.complete for region in own.values()):
            return
        last = [region for n, region in own.items() if self._style(n) == _ROWS]
        if len(last) != 1 or any(self._style(n) not in _OF_EXPERTS for n in own):
            raise _cannot(
                name, "its parameters have no plan of one packed and one gathering matrix"
            )
        for n, region in own.items():
            packed = self._style(n) == "packed_colwise"
            shares, size = last[0].runs[2], last[0].root[2]
            wanted = _packed(shares, size) if packed else shares
            cut, others = (1, (0, 2)) if packed else (2, (0, 1))
            if region.runs[cut] != wanted or not all(region.is_whole(k) for k in others):
                raise _cannot(n, "ranks have other parts of it than each expert's share")
        module.register_forward_pre_hook(self._spread_floats)
        module.register_forward_hook(self._sum_result)
        self._placed |= own.keys()

    # --- hooks ------------------------------------------------------------------------------

    def _spread_first(self, module: Any, args: Any) -> Any:
        return (spread(args[0], self._ranks), *args[1:])

    def _spread_floats(self, module: Any, args: Any) -> Any:
        floats = (isinstance(x, Tensor) and x.is_floating_point() for x in args)
        return tuple(spread(x, self._ranks) if y else x for x, y in zip(args, floats, strict=True))

    def _spread_output(self, module: Any, args: Any, output: Tensor) -> Tensor:
        return spread(output, self._ranks)

    def _sum_result(self, module: Any, args: Any, output: Tensor) -> Tensor:
        return summed(output, self._ranks)

    def _sum(self, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        self._ranks.sum(total)
        return total


def _multiply(module: Any, ranks: Ranks, x: Tensor) -> Tensor:
    """A linear layer of whose inputs each rank has some; the bias is added once."""
    total = summed(F.linear(x, module.weight), ranks)
    return total if module.bias is None else total + module.bias


def _look_up(forward: Callable[[Tensor], Tensor], vocabulary: Vocabulary, ids: Tensor) -> Tensor:
    places, mine = vocabulary.own(ids)
    return summed(forward(places).masked_fill(~mine[..., None], 0.0), vocabulary.ranks)


def _share(runs: Runs, size: int) -> list[tuple[Fraction, Fraction]]:
    """Where each run begins, and how long it is, as parts of all indices."""
    return [(Fraction(start, size), Fraction(count, size)) for start, count in runs]


def _joined(runs: Runs) -> Runs:
    """The same indices in ascending order."""
    size = max(start + count for start, count in runs)
    return Region((size,), (tuple(sorted(runs)),)).runs[0]


def _packed(shares: Runs, size: int) -> Runs:
    """The same share of two matrices, one after the other."""
    return (*shares, *((size + start, count) for start, count in shares))


def _cannot(name: str, why: str) -> Exception:
    return refusal(
        "TENSOR_PARALLEL_UNSUPPORTED",
        f"{name} cannot be trained on several ranks as vLLM divides it: {why}. Serve the model "
        "with --tensor-parallel-size 1.",
    )
