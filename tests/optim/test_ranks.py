"""A step that two ranks take together is the step that one process takes alone."""

from __future__ import annotations

import math

import pytest
import torch

from apollo_grpc.region import Region
from apollo_trainer.optim import Apollo
from apollo_trainer.optim.factored import Factored
from apollo_trainer.optim.preview import Preview
from apollo_trainer.parallel.parts import part_of
from tests.parallel.two_ranks import DEVICES, on_one, on_two_ranks

TOKENS = 12


def cut(root, dimension, *sides):
    """Regions of two ranks: the given runs of one dimension each."""
    whole = Region.whole_of(root)
    return [
        Region(root, (*whole.runs[:dimension], side, *whole.runs[dimension + 1 :]))
        for side in sides
    ]


def alike(root):
    return [Region(root, Region.whole_of(root).runs, replica) for replica in (0, 1)]


# Matrices that are cut along either side, unevenly, in two boxes, along their experts; and others.
REGIONS = {
    "rows of a tall one": cut((24, 10), 0, ((0, 15),), ((15, 9),)),
    "columns of a tall one": cut((24, 11), 1, ((0, 5),), ((5, 6),)),
    "rows of a wide one": cut((9, 20), 0, ((0, 4),), ((4, 5),)),
    "columns of a wide one": cut((8, 24), 1, ((0, 8),), ((8, 16),)),
    "rows of a square": cut((12, 12), 0, ((0, 6),), ((6, 6),)),
    "columns of a square": cut((12, 12), 1, ((0, 3), (6, 3)), ((3, 3), (9, 3))),
    "rows in another order": cut((16, 8), 0, ((8, 4), (0, 4)), ((12, 4), (4, 4))),
    "two boxes of experts": cut((3, 16, 10), 1, ((0, 4), (8, 4)), ((4, 4), (12, 4))),
    "inner side of experts": cut((3, 10, 16), 2, ((0, 7),), ((7, 9),)),
    "experts": cut((3, 10, 16), 0, ((0, 1),), ((1, 2),)),
    "a bias": cut((21,), 0, ((0, 8),), ((8, 13),)),
    "a small matrix": cut((3, 30), 1, ((0, 11),), ((11, 19),)),
    "alike": alike((20, 10)),
    "a norm": alike((17,)),
}


def values(name, root, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * seed + sorted(REGIONS).index(name))
    return torch.randn(root, generator=generator).mul_(0.3).to(dtype)


def factors(name, root, seed):
    """Both factors of a gradient; those of experts have TOKENS tokens an expert, the last none."""
    count = math.prod(root[:-2])
    sides = (
        torch.randn(count * TOKENS, n, generator=torch.Generator().manual_seed(seed + n))
        for n in root[-2:]
    )
    ends = torch.arange(1, count + 1, dtype=torch.int32) * TOKENS
    return Factored(*sides, ends if len(root) == 3 else None)


def gradient(name, region, step, kind, device="cpu"):
    """The part of a gradient, which is that of one seed on all ranks and devices."""
    if kind == "factors" and len(region.root) > 1 and min(region.root[-2:]) >= 8:
        whole = factors(name, region.root, step)
        if region.shape[:-2] != region.root[:-2]:
            return part_of(whole.dense(), region).to(device)
        rows, columns = (torch.tensor(region.indices(k)) for k in (-2, -1))
        sides = (whole.left[:, rows].to(device), whole.right[:, columns].to(device))
        return Factored(*sides, None if whole.ends is None else whole.ends.to(device))
    whole = values(name, region.root, step)
    if kind == "an expert without tokens" and len(region.root) == 3:
        whole[-1] = 0
    if kind == "one that is not finite" and step == 3:
        whole.view(-1)[-1] = math.inf
    return part_of(whole, region).to(device)


def steps(ranks, options, dtype, kind, whole, device):
    """Weights and state after some steps, and what was measured of each."""
    regions = {
        n: Region.whole_of(r[0].root) if whole else r[ranks.rank] for n, r in REGIONS.items()
    }
    weights = {n: part_of(values(n, r.root, 99, dtype), r).to(device) for n, r in regions.items()}
    optimizer = Apollo(
        list(weights.items()),
        lr=1e-2,
        rank=8,
        proj_refresh=2,
        seed=5,
        regions=regions,
        ranks=ranks,
        **options,
    )
    optimizer.measure = True
    measured = list[float]()
    for step in range(1, 5):
        given = {w: gradient(n, regions[n], step, kind, device) for n, w in weights.items()}
        norm = optimizer.prepare(given)
        if step == 2:
            preview = Preview(optimizer, given)
            measured += [preview.update_norm(), preview.weight_norm(), float(preview.changed())]
        optimizer.step(gradients=given)
        measured += [
            float(norm),
            float(optimizer.last_update_norm),
            float(optimizer.last_changed_fraction),
        ]
    tensors, meta = optimizer.named_state()
    again = Apollo(list(weights.items()), rank=8, regions=regions, ranks=ranks, **options)
    again.load_named_state(tensors, meta)
    same = again.named_state()[0]
    assert all(torch.equal(same[key], tensor) for key, tensor in tensors.items())
    assert all(
        torch.equal(a, b)
        for w in weights.values()
        for a, b in zip(again.state[w].values(), optimizer.state[w].values(), strict=True)
    )
    return weights, tensors, measured, meta["parameters"]


CASES = {
    "dense": ({}, torch.float32, "dense"),
    "mini": ({"variant": "mini"}, torch.float32, "dense"),
    "factors": ({}, torch.float32, "factors"),
    "an expert without tokens": ({}, torch.float32, "an expert without tokens"),
    "one that is not finite": ({}, torch.float32, "one that is not finite"),
}


def everything(ranks, whole, device):
    torch.set_num_threads(1)
    found = {case: steps(ranks, *how, whole, device) for case, how in CASES.items()}
    found["draws"] = drawn(ranks, whole, device)
    return found


def drawn(ranks, whole, device):
    """bfloat16 weights after a step whose exact result is the same on any number of ranks."""
    regions = {
        n: Region.whole_of(r[0].root) if whole else r[ranks.rank] for n, r in REGIONS.items()
    }
    full = {n: values(n, r.root, 99, torch.bfloat16) for n, r in regions.items()}
    weights = {n: part_of(full[n], r).to(device) for n, r in regions.items()}
    optimizer = Apollo(
        list(weights.items()), lr=1e-1, rank=8, weight_decay=0.02, regions=regions, ranks=ranks
    )
    for _ in range(3):
        # Decay alone: no sum is made, so that what is rounded has the same bits.
        optimizer.step(gradients={w: torch.zeros(w.shape, device=device) for w in weights.values()})
    return weights


@pytest.fixture(scope="module", params=DEVICES)
def found(request):
    device = request.param
    return on_two_ranks(everything, False, device), on_one(everything, True, device)


@pytest.mark.parametrize("case", CASES)
def test_weights_and_moments_are_those_of_one_process(found, case):
    together, alone = found
    for rank, (weights, tensors, _, described) in enumerate(found_of(together, case)):
        assert described == alone[case][3]
        for name, regions in REGIONS.items():
            region = regions[rank]
            close(weights[name], part_of(alone[case][0][name], region), name)
        assert tensors.keys() == alone[case][1].keys()
        for key, tensor in tensors.items():
            close(tensor, alone[case][1][key], key)


@pytest.mark.parametrize("case", CASES)
def test_what_is_measured_is_of_all_ranks(found, case):
    together, alone = found
    first, second = (each[2] for each in found_of(together, case))
    assert first == pytest.approx(second, nan_ok=True, rel=1e-12)
    assert first == pytest.approx(alone[case][2], nan_ok=True, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_all_ranks_have_stays_the_same_bit_for_bit(found, case):
    first, second = found_of(found[0], case)
    for name in ("alike", "a norm"):
        assert torch.equal(first[0][name], second[0][name])
        for part in ("m", "v", "step"):
            assert torch.equal(first[1][f"{part}.{name}"], second[1][f"{part}.{name}"])


def test_the_state_of_two_ranks_is_loaded_by_one_bit_for_bit(found):
    (_, tensors, _, _), options = found[0][0]["dense"], {"rank": 8, "impl": "reference"}
    weights = [(n, values(n, r[0].root, 99)) for n, r in REGIONS.items()]
    optimizer = Apollo(weights, **options)
    optimizer.load_named_state(tensors, optimizer.named_state()[1])
    for key, tensor in optimizer.named_state()[0].items():
        assert torch.equal(tensor, tensors[key]), key


def test_a_part_of_the_state_of_one_is_loaded_by_a_rank_bit_for_bit(found):
    tensors = found[1]["dense"][1]
    for rank in (0, 1):
        regions = {name: each[rank] for name, each in REGIONS.items()}
        weights = {n: torch.zeros(r.shape) for n, r in regions.items()}
        optimizer = Apollo(list(weights.items()), rank=8, regions=regions)
        optimizer.load_named_state(tensors, optimizer.named_state()[1])
        for slot in optimizer._slots:
            for part, own in optimizer.state[slot.param].items():
                whole = tensors[f"{part}.{slot.name}"]
                assert torch.equal(own, part_of(whole, slot.region_of(part))), (slot.name, part)


def test_the_draws_have_the_same_bits(found):
    together, alone = found
    moved = 0
    for rank in (0, 1):
        for name, regions in REGIONS.items():
            own = together[rank]["draws"][name]
            assert torch.equal(own, part_of(alone["draws"][name], regions[rank])), name
            moved += int(
                (own != part_of(values(name, regions[0].root, 99, own.dtype), regions[rank])).sum()
            )
    assert moved > 100


def test_a_step_that_is_not_finite_is_skipped_on_both(found):
    together, _ = found
    for rank in (0, 1):
        tensors = together[rank]["one that is not finite"][1]
        assert int(tensors["step.rows of a tall one"]) == 3
        assert int(tensors["step.a bias"]) == 3


def test_a_matrix_that_is_cut_along_both_sides_is_refused_by_name():
    corner = Region((8, 8), (((0, 4),), ((0, 4),)))
    with pytest.raises(ValueError, match="w: ranks divide it along more than one"):
        Apollo([("w", torch.zeros(4, 4))], rank=4, regions={"w": corner})


def test_a_tensor_of_another_shape_than_its_region_is_refused_by_name():
    with pytest.raises(ValueError, match="w: its region is"):
        Apollo([("w", torch.zeros(8, 8))], rank=4, regions={"w": cut((8, 8), 0, ((0, 4),))[0]})


def test_apollo_torch_is_not_reproduced_in_parts():
    with pytest.raises(ValueError, match="apollo-torch"):
        Apollo([("w", torch.zeros(4, 8))], rank=4, compat="apollo-torch", eps=1e-6,
               regions={"w": cut((8, 8), 0, ((0, 4),))[0]})  # fmt: skip


def found_of(together, case):
    return [each[case] for each in together]


def close(found, expected, name):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=lambda m: f"{name}: {m}")
