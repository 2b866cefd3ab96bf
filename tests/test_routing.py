"""Routing opens the promised number of blocks, evenly, without special ids, the same everywhere and for ever."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memsinks.batch import check_ids
from memsinks.errors import ConfigError, DataError
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.plan import plan
from memsinks.sinks.routing import splitmix64
from memsinks.sinks.table import EMPTY_TABLE, AssignmentTable, open_blocks, open_mask

GOLDEN = json.loads((Path(__file__).parent / "golden" / "routing.json").read_text(encoding="ascii"))
MASK = 2**64 - 1
BLOCKS = SinkConfig(neurons=128, active=4, block_size=1)
EXACT = SinkConfig(neurons=96, active=12, routing="exact")
BERNOULLI = SinkConfig(neurons=100, active=30, routing="bernoulli")
ROUTINGS = {"blocks": BLOCKS, "exact": EXACT, "bernoulli": BERNOULLI}
SPECIAL = [0, 1, 2, 3, 2**31, 2**32, 2**62, 2**63 - 1]


def ids_of(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def random_ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


def sets(
    ids: torch.Tensor, config: SinkConfig, layer: int = 0, table: AssignmentTable = EMPTY_TABLE
) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in open_mask(ids, config, layer, table)]


def python_splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def python_route(identity: int, config: SinkConfig, layer: int) -> list[int]:
    """Format version 1 once more, in plain Python integers."""
    base = python_splitmix64(python_splitmix64(config.seed) ^ (layer + 1 if config.per_layer else 0))
    if config.routing == "bernoulli":
        threshold = round(config.active / config.neurons * 2**53)
        draws = [python_splitmix64(identity ^ python_splitmix64(base ^ (n + 1))) for n in range(config.hashed_blocks)]
        return [n for n, draw in enumerate(draws) if draw >> 11 < threshold]
    chosen = []
    for bank in range(config.open_blocks):
        start, end = (b * config.hashed_blocks // config.open_blocks for b in (bank, bank + 1))
        draw = python_splitmix64(identity ^ python_splitmix64(base ^ (bank + 1)))
        chosen.append(start + (draw >> 1) % (end - start))
    if config.hashed_blocks % config.open_blocks:
        turn = python_splitmix64(identity ^ python_splitmix64(base ^ (config.open_blocks + 1))) >> 1
        chosen = [(block + turn % config.hashed_blocks) % config.hashed_blocks for block in chosen]
    return sorted(chosen)


def overlap(first: torch.Tensor, second: torch.Tensor, config: SinkConfig, layers: tuple[int, int] = (0, 0)) -> float:
    """Mean number of shared blocks, in standard errors above what chance gives."""
    shared = (open_mask(first, config, layers[0]) & open_mask(second, config, layers[1])).sum(1).double()
    if config.routing == "bernoulli":
        chances = [(config.active / config.neurons) ** 2] * config.blocks
    else:
        chances = [config.open_blocks / config.hashed_blocks] * config.open_blocks
    spread = math.sqrt(sum(p * (1 - p) for p in chances) / len(shared))
    return (float(shared.mean()) - sum(chances)) / spread


# The hash


def test_splitmix64_known_vector():
    assert int(splitmix64(ids_of(0))) & MASK == 0xE220A8397B1DCDAF


def test_splitmix64_published_sequence():
    """The first outputs of the generator seeded with 1234567, see Rosetta Code, "Pseudo-random numbers/Splitmix64"."""
    states = [(1234567 + n * 0x9E3779B97F4A7C15) & MASK for n in range(5)]
    signed = ids_of(*(x - 2**64 if x >= 2**63 else x for x in states))
    assert [x & MASK for x in splitmix64(signed).tolist()] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=50))
def test_splitmix64_equals_python_integers(values):
    assert [x & MASK for x in splitmix64(ids_of(*values)).tolist()] == [python_splitmix64(x & MASK) for x in values]


# What opens


@pytest.mark.parametrize(
    "config", [BLOCKS, EXACT, SinkConfig(neurons=13, active=5, routing="exact", reserved_blocks=2)]
)
def test_blocks_and_exact_open_exactly_the_active_number(config):
    mask = open_mask(torch.cat([random_ids(2000), torch.arange(2000)]), config, 3)
    assert mask.sum(1).unique().tolist() == [config.open_blocks]


@pytest.mark.parametrize("blocks", [6, 7, 13])
def test_load_is_even_where_the_blocks_do_not_divide_into_banks(blocks):
    config = SinkConfig(neurons=blocks, active=4, block_size=1)
    load = open_mask(random_ids(20000), config, 0).double().mean(0) / (4 / blocks)
    assert 0.95 < float(load.min()) < float(load.max()) < 1.05


def test_bernoulli_density_is_binomial():
    mask = open_mask(torch.arange(4000), BERNOULLI, 0)
    counts, p = mask.sum(1).double(), 0.3
    deviation = math.sqrt(p * (1 - p) / mask.numel())
    assert abs(float(mask.double().mean()) - p) < 5 * deviation
    assert 0.9 < float(counts.var()) / (100 * p * (1 - p)) < 1.1
    per_neuron = (mask.double().mean(0) - p).abs().max()
    assert float(per_neuron) < 5 * math.sqrt(p * (1 - p) / 4000)


@pytest.mark.parametrize(
    "ids", [torch.arange(20000), torch.arange(20000) << 40, random_ids(20000)], ids=["run", "high", "random"]
)
@pytest.mark.parametrize("config", [BLOCKS, EXACT], ids=["blocks", "exact"])
def test_load_is_near_uniform(config, ids):
    load = open_mask(ids, config, 1).sum(0).double()
    expected = len(ids) * config.open_blocks / config.blocks
    assert float(load.max()) < 1.2 * expected
    freedom = config.blocks - config.open_blocks
    chi2 = float(((load - expected) ** 2 / expected).sum())
    assert abs(chi2 - freedom) < 6 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("config", ROUTINGS.values(), ids=ROUTINGS)
def test_overlap_of_two_documents_is_chance(config):
    ids = random_ids(20000)
    assert abs(overlap(ids[::2], ids[1::2], config)) < 5
    consecutive = torch.arange(1, 10000)
    assert abs(overlap(consecutive, consecutive + 1, config)) < 5


RELATED = {
    "2k": lambda k: 2 * k,
    "4k": lambda k: 4 * k,
    "3k": lambda k: 3 * k,
    "k xor 1": lambda k: k ^ 1,
    "k + 2**32": lambda k: k + 2**32,
    "k + 2**62": lambda k: k + 2**62,
    "2**63 - 1 - k": lambda k: 2**63 - 1 - k,
}


@pytest.mark.parametrize("relation", RELATED)
@pytest.mark.parametrize("config", ROUTINGS.values(), ids=ROUTINGS)
def test_related_ids_overlap_no_more_than_chance(config, relation):
    ids = torch.arange(1, 8000)
    assert abs(overlap(ids, RELATED[relation](ids), config)) < 5


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("config", ROUTINGS.values(), ids=ROUTINGS)
def test_no_id_is_special(config, special):
    own = ids_of(special)
    count = len(sets(own, config)[0])
    if config.routing == "bernoulli":
        assert abs(count - 30) < 5 * math.sqrt(100 * 0.3 * 0.7)
    else:
        assert count == config.open_blocks
    others = random_ids(4000, seed=1)
    shared = (open_mask(own, config, 0) & open_mask(others, config, 0)).sum(1).double()
    p = config.open_blocks / config.blocks
    assert abs(float(shared.mean()) - count * p) < 5 * math.sqrt(count * p * (1 - p) / len(others))


def test_special_ids_differ_from_each_other():
    assert len({tuple(x) for x in sets(ids_of(*SPECIAL), EXACT)}) == len(SPECIAL)


@pytest.mark.parametrize("config", ROUTINGS.values(), ids=ROUTINGS)
def test_layers_are_independent(config):
    ids = random_ids(10000)
    assert abs(overlap(ids, ids, config, layers=(0, 1))) < 5
    assert abs(overlap(ids, ids, config, layers=(4, 11))) < 5


def test_sharing_a_block_in_one_layer_says_nothing_about_the_next():
    first, second = random_ids(40000).view(2, -1)
    share = [(open_mask(first, BLOCKS, layer) & open_mask(second, BLOCKS, layer)).any(1) for layer in (0, 1)]
    rate, p = float(share[1][share[0]].double().mean()), 1 - (1 - 1 / 32) ** 4
    assert abs(rate - p) < 5 * math.sqrt(p * (1 - p) / int(share[0].sum()))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_one_set_serves_all_layers_if_told_so(routing):
    config = SinkConfig(neurons=96, active=12, block_size=1, routing=routing, per_layer=False)
    ids = random_ids(50)
    assert sets(ids, config, 0) == sets(ids, config, 7)
    made = plan(ids, (0, 3, 7), config, path="masked")
    assert made.layers[0] is made.layers[1] is made.layers[2]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_seed_changes_the_sets(routing):
    make = lambda seed: SinkConfig(neurons=96, active=12, block_size=1, routing=routing, seed=seed)  # noqa: E731
    ids = random_ids(20)
    assert sets(ids, make(5)) == sets(ids, make(5))
    for seed in (1, 2**62, 2**63 - 1):
        assert all(a != b for a, b in zip(sets(ids, make(0)), sets(ids, make(seed)), strict=True))


@pytest.mark.parametrize("routing", ["blocks", "exact"])
def test_reserved_blocks_are_never_hashed_to_and_all_others_are(routing):
    config = SinkConfig(neurons=48, active=12, block_size=1, routing=routing, reserved_blocks=20)
    assert open_mask(random_ids(3000), config, 0).any(0).tolist() == [True] * 28 + [False] * 20


@pytest.mark.parametrize("config", ROUTINGS.values(), ids=ROUTINGS)
def test_minus_one_opens_nothing(config):
    mask = open_mask(ids_of(-1, 5, -1), config, 0)
    assert mask.any(1).tolist() == [False, True, False]


def test_places_that_open_nothing_are_marked_by_the_number_of_blocks():
    assert open_blocks(ids_of(-1), BLOCKS, 0).tolist() == [[128] * 4]


# The assignment table


def test_assigned_ids_open_exactly_their_blocks_and_others_the_hashed_ones():
    config = SinkConfig(neurons=128, active=4, block_size=1, reserved_blocks=64)
    lists = {7: [70, 3], 0: [127], 2**63 - 1: [64, 65, 66, 67, 68, 69], 9: []}
    table = AssignmentTable.from_dict(lists, config)
    for layer in (0, 5):
        assert sets(ids_of(*lists), config, layer, table) == [sorted(x) for x in lists.values()]
        others = random_ids(200)
        assert sets(others, config, layer, table) == sets(others, config, layer)
    assert sets(ids_of(8, -1, 6), config, 0, table) == [*sets(ids_of(8), config), [], *sets(ids_of(6), config)]


def test_table_of_ids_without_blocks():
    table = AssignmentTable.from_dict({3: [], 4: []}, BLOCKS)
    assert sets(ids_of(3, 5), BLOCKS, 0, table) == [[], *sets(ids_of(5), BLOCKS)]


def test_table_layout_is_sorted_and_ragged():
    table = AssignmentTable.from_dict({9: [5, 1, 5], 2: [], 4: [7]}, BLOCKS)
    assert (table.ids.tolist(), table.offsets.tolist(), table.blocks.tolist()) == ([2, 4, 9], [0, 0, 1, 3], [7, 1, 5])
    assert {x.dtype for x in (table.ids, table.offsets, table.blocks)} == {torch.int64}
    assert len(table) == 3
    assert len(EMPTY_TABLE) == 0


def test_table_opens_in_the_plan_too():
    config = SinkConfig(neurons=32, active=2, block_size=1, reserved_blocks=16)
    table = AssignmentTable.from_dict({7: [20, 21, 22]}, config)
    made = plan(ids_of(7, 8, 7), (0,), config, table, path="grouped").layers[0]
    assert pairs_as_mask(made, 3, 32)[[0, 2]].nonzero()[:, 1].tolist() == [20, 21, 22] * 2


def test_invalid_tables_are_refused_with_every_problem():
    with pytest.raises(ConfigError) as caught:
        AssignmentTable.from_dict({-1: [0], 5: [3, 128], 6: [-2], 8: [1], 2**63: [2]}, BLOCKS)
    message = str(caught.value)
    for part in (
        "got -1",
        "id 5 is assigned blocks [3, 128]",
        "blocks 0 to 127",
        "id 6 is assigned blocks [-2]",
        f"got {2**63}",
    ):
        assert part in message
    assert "id 8" not in message


def test_table_under_bernoulli_routing_is_refused():
    with pytest.raises(ConfigError, match='need routing "blocks" or "neurons"'):
        AssignmentTable.from_dict({7: [1]}, BERNOULLI)
    table = AssignmentTable.from_dict({7: [1]}, BLOCKS)
    with pytest.raises(ConfigError, match='needs routing "blocks" or "neurons"'):
        open_mask(ids_of(7), BERNOULLI, 0, table)


# The plan


def pairs_as_mask(made, tokens: int, blocks: int) -> torch.Tensor:
    """The (token, block) pairs of a plan as bool [tokens, blocks]; a pair that comes twice fails."""
    mask = torch.zeros(tokens, blocks, dtype=torch.bool)
    start = 0
    for block, end in enumerate(made.ends.tolist()):
        for token in made.token[start:end].tolist():
            assert not mask[token, block], f"pair ({token}, {block}) comes twice"
            mask[token, block] = True
        start = end
    return mask


def runs_as_mask(made, tokens: int, blocks: int) -> torch.Tensor:
    """The runs of a plan as bool [tokens, blocks]; a block that comes twice, or after a place without one, fails."""
    mask = torch.zeros(tokens, blocks, dtype=torch.bool)
    done = 0
    for (start, end), opened in zip(made.spans.tolist(), made.blocks.tolist(), strict=True):
        assert done <= start <= end
        done = end
        count = sum(block < blocks for block in opened)
        assert len(set(opened[:count])) == count and all(block == blocks for block in opened[count:])
        if start < end:
            mask[start:end, opened[:count]] = True
    return mask


PLAN_IDS = st.integers(1, 3).flatmap(
    lambda union: st.lists(
        st.lists(st.integers(-1, 6) | st.just(2**63 - 1), min_size=union, max_size=union), min_size=1, max_size=30
    )
)


@settings(max_examples=60, deadline=None)
@given(PLAN_IDS, st.booleans(), st.booleans())
def test_every_plan_equals_the_mask(values, with_table, per_layer):
    config = SinkConfig(neurons=24, active=6, block_size=2, per_layer=per_layer, reserved_blocks=2)
    table = AssignmentTable.from_dict({2: [11], 3: [], 4: [0, 1, 2, 10, 11]}, config) if with_table else EMPTY_TABLE
    ids = torch.tensor(values)
    plans = (plan(ids, (0, 4), config, table, path=path).layers for path in ("grouped", "masked", "tiled"))
    for layer, made, masked, runs in zip((0, 4), *plans, strict=True):
        union = torch.stack([open_mask(column, config, layer, table) for column in ids.t().contiguous()]).any(0)
        assert torch.equal(masked.mask, union)
        assert torch.equal(pairs_as_mask(made, len(ids), config.blocks), union)
        assert torch.equal(runs_as_mask(runs, len(ids), config.blocks), union)
        assert runs.tokens == int((ids != -1).any(1).sum())
        assert made.open_token.tolist() == union.any(1).nonzero()[:, 0].tolist()
        assert made.ends.dtype == torch.int32
        assert int(made.ends[-1]) == len(made.token)
        for token, places in zip(made.open_token.tolist(), made.place.tolist(), strict=True):
            own = [place for place in places if place < len(made.token)]
            assert made.token[own].tolist() == [token] * int(union[token].sum())


def test_union_holds_each_shared_block_once():
    config = SinkConfig(neurons=8, active=4, block_size=1)
    ids = ids_of(3, 3, 4, -1).view(1, 4)
    made = plan(ids, (0,), config, path="grouped").layers[0]
    assert pairs_as_mask(made, 1, 8).sum() == len(set(sets(ids_of(3), config)[0]) | set(sets(ids_of(4), config)[0]))


def test_weight_scale_is_passed_on():
    scale = torch.rand(3, dtype=torch.float64)
    assert plan(ids_of(1, 2, 3), (0,), BLOCKS, path="grouped", weight_scale=scale).weight_scale is scale


# Compiled


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("config", [BLOCKS, EXACT], ids=["blocks", "exact"])
def test_blocks_equal_compiled(config):
    ids = torch.cat([random_ids(100), ids_of(-1, *SPECIAL)])
    assert torch.equal(compiled(lambda x: open_blocks(x, config, 2))(ids), open_blocks(ids, config, 2))


@pytest.mark.parametrize("config", ROUTINGS.values(), ids=ROUTINGS)
def test_mask_equals_compiled(config):
    ids = torch.cat([random_ids(100), ids_of(-1, *SPECIAL)])
    assert torch.equal(compiled(lambda x: open_mask(x, config, 2))(ids), open_mask(ids, config, 2))


def test_table_equals_compiled():
    table = AssignmentTable.from_dict({3: [1, 2, 3, 4, 5], 4: [], 9: [127]}, BLOCKS)
    ids = ids_of(3, 4, 5, 9, -1, 2**63 - 1)
    assert torch.equal(compiled(lambda x: open_mask(x, BLOCKS, 2, table))(ids), open_mask(ids, BLOCKS, 2, table))


def test_compiled_plan_opens_the_same_pairs():
    config = SinkConfig(neurons=24, active=6, block_size=2)
    ids = ids_of(3, 3, -1, 5, 5, 3, 5, -1).view(4, 2)
    made, eager = (f(lambda x: plan(x, (1,), config, path="grouped"))(ids).layers[0] for f in (compiled, lambda x: x))
    assert torch.equal(pairs_as_mask(made, 4, 12), pairs_as_mask(eager, 4, 12))
    assert torch.equal(made.ends, eager.ends)
    runs = compiled(lambda x: plan(x, (1,), config, path="tiled"))(ids).layers[0]
    assert torch.equal(runs_as_mask(runs, 4, 12), pairs_as_mask(eager, 4, 12))


# For ever


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=[case["name"] for case in GOLDEN["cases"]])
def test_format_version_1_never_changes(case):
    config = SinkConfig.from_dict({"format_version": GOLDEN["format_version"], **case["settings"]})
    got = sets(ids_of(*case["ids"]), config, case["layer"])
    assert got == case["blocks"] == [python_route(identity, config, case["layer"]) for identity in case["ids"]]


# Ids


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2], "must be an int64 tensor, got list"),
        (torch.tensor([1.0]), "must be int64, got torch.float32"),
        (torch.tensor([1], dtype=torch.int32), "must be int64, got torch.int32"),
        (torch.tensor([3, -2]), "must be non-negative, or exactly -1 for no sinks; the least value is -2"),
    ],
)
def test_bad_ids_are_refused(ids, message):
    with pytest.raises(DataError, match=f"document_ids {message}"):
        check_ids(ids)


def test_least_value_of_exposures():
    check_ids(ids_of(1, 2), "exposures", 1)
    with pytest.raises(DataError, match="exposures must be at least 1; the least value is 0"):
        check_ids(ids_of(0), "exposures", 1)
    check_ids(torch.empty(0, dtype=torch.int64))
