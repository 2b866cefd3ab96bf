"""The pass: statistics against float64, scores against the model's own loss, windows, and going on where it stopped."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from audited import CONFIG, TEXTS, VOCABULARY, Oracle, given, knows, llama, memorized_in_sinks, tokens_of
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_outputs import CausalLMOutput

from memsinks.auditing import scores
from memsinks.auditing.scores import FIELDS, DocumentScore, ScoreTable, score, token_statistics
from memsinks.data.identity import document_id
from memsinks.errors import ArchitectureError, CheckpointError, DataError
from memsinks.sinks.opening import sinks_open

IDS = [document_id(text) for text in TEXTS]


@pytest.fixture(scope="module")
def tokens() -> list[np.ndarray]:
    return tokens_of(TEXTS)


def same(ours: DocumentScore, theirs: DocumentScore, atol: float = 2e-5) -> None:
    """The same scores but for rounding; a rank may move by one where two tokens are as probable."""
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    for name in ("logprob", "mean", "std"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=atol)
    assert np.abs(ours.rank.astype(int) - theirs.rank).max() <= 1
    assert ((ours.rank == 0) == (theirs.rank == 0)).all()


def identical(ours: ScoreTable, theirs: ScoreTable) -> bool:
    return len(ours) == len(theirs) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) and a.first == b.first
        for a, b in zip(ours, theirs, strict=True) for name in FIELDS
    )  # fmt: skip


# Statistics of one token


def plain(logits: np.ndarray, target: int) -> tuple[float, int, float, float]:
    """Log-probability, rank, mean and std of log p by their definitions, in float64."""
    logits = logits.astype(np.float64)
    logp = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    p, finite = np.exp(logp), np.isfinite(logp)
    mean = (p[finite] * logp[finite]).sum()
    rank = int((logits > logits[target]).sum()) or int((logits[:target] == logits[target]).sum())
    return logp[target], rank, mean, math.sqrt((p[finite] * (logp[finite] - mean) ** 2).sum())


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_statistics_are_those_of_float64(monkeypatch, scale, dtype) -> None:
    monkeypatch.setattr(scores, "SLICE", 50 * 3)  # slices of 3 tokens
    logits = (torch.randn(4, 5, 50) * scale).to(dtype)
    targets = torch.randint(0, 50, (4, 5))
    found = token_statistics(logits, targets)
    assert [x.dtype for x in found] == [torch.float32, torch.int32, torch.float32, torch.float32]
    for row in range(4):
        for place in range(5):
            logprob, rank, mean, std = plain(logits[row, place].float().numpy(), int(targets[row, place]))
            assert float(found[0][row, place]) == pytest.approx(logprob, rel=1e-5, abs=1e-5)
            assert int(found[1][row, place]) == rank
            assert float(found[2][row, place]) == pytest.approx(mean, rel=1e-4, abs=1e-5)
            assert float(found[3][row, place]) == pytest.approx(std, rel=1e-3, abs=1e-4)


def test_statistics_of_a_model_that_knows_nothing_and_of_one_that_is_certain() -> None:
    even, certain = torch.full((1, 3, 8), 2.5), torch.zeros(1, 3, 8)
    certain[..., 6] = 200.0
    targets = torch.tensor([[0, 6, 7]])
    logprob, rank, mean, std = token_statistics(even, targets)
    assert logprob[0].tolist() == pytest.approx([-math.log(8)] * 3)
    assert rank[0].tolist() == [0, 6, 7]  # of equals, greedy decoding takes the one with the lowest id
    assert mean[0].tolist() == pytest.approx([-math.log(8)] * 3)
    assert std[0].tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    logprob, rank, mean, std = token_statistics(certain, targets)
    assert logprob[0].tolist() == pytest.approx([-200.0, 0.0, -200.0])
    assert rank[0].tolist() == [1, 0, 1]
    assert mean[0].tolist() == std[0].tolist() == pytest.approx([0.0] * 3, abs=1e-6)


def test_rank_of_equals_is_what_greedy_decoding_takes() -> None:
    logits = torch.randint(0, 3, (200, 1, 9)).float()
    targets = torch.randint(0, 9, (200, 1))
    _, rank, _, _ = token_statistics(logits, targets)
    assert ((rank == 0) == (logits.argmax(-1) == targets)).all()
    assert rank[:, 0].tolist() == [plain(logits[i, 0].numpy(), int(targets[i]))[1] for i in range(200)]


def test_tokens_that_a_model_excludes_do_not_count() -> None:
    logits = torch.randn(2, 3, 20)
    some = logits.clone()
    logits = torch.cat([logits, torch.full((2, 3, 5), -math.inf)], -1)
    targets = torch.randint(0, 20, (2, 3))
    for ours, theirs in zip(token_statistics(logits, targets), token_statistics(some, targets), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert token_statistics(logits, targets + 5 - targets + 18)[0].isinf().all()


def test_the_scores_of_a_part_of_a_document() -> None:
    one = given([0, 1, 2, 3], first=1)
    assert one.rank[one.between(1, 2)].tolist() == [0, 1]
    assert one.rank[one.between(3)].tolist() == [2, 3]
    assert [one.between(*x) for x in ((0, 2), (4, 2), (5,), (1, 0), (3, -1))] == [None] * 5
    started = given([0, 1, 2, 3], first=0)
    assert started.rank[started.between(0, 2)].tolist() == [0, 1]
    assert started.rank[started.between(2)].tolist() == [2, 3]
    assert started.between(3, 2) is None
    assert given([0, 0], [-1.0, -2.5]).loss == pytest.approx(1.75)


# A whole pass


@pytest.mark.parametrize("open_ids", [None, IDS])
def test_scores_equal_the_models_own_loss(tmp_path, tokens, open_ids) -> None:
    model = memorized_in_sinks()
    table = score(model, tokens, tmp_path, open_ids=open_ids)
    assert len(table) == len(tokens)
    for index, (document, one) in enumerate(zip(tokens, table, strict=True)):
        batch = torch.from_numpy(document)[None]
        with torch.no_grad():
            if open_ids is None:
                out = model(input_ids=batch, labels=batch)
            else:
                with sinks_open(model, open_ids[index]):
                    out = model(input_ids=batch, labels=batch)
        assert one.loss == pytest.approx(out.loss.item(), rel=1e-4, abs=1e-5)
        assert one.tokens.tolist() == document[1:].tolist()
        assert one.first == 1
        assert (one.rank == 0).tolist() == (out.logits[0, :-1].argmax(-1) == batch[0, 1:]).tolist()
        same(table[index], one, atol=0)


def test_open_sinks_change_the_scores(tmp_path, tokens) -> None:
    closed, opened = (
        [one.loss for one in score(memorized_in_sinks(), tokens[:2], tmp_path / str(ids is None), open_ids=ids)]
        for ids in (None, IDS[:2])
    )
    assert all(b < a - 1 for a, b in zip(closed, opened, strict=True))


@pytest.mark.parametrize("batch_tokens", [1, 60, 100, 10_000, None])
@pytest.mark.parametrize("chunk", [2, 256])
def test_scores_do_not_depend_on_batches_and_chunks(monkeypatch, tmp_path, tokens, batch_tokens, chunk) -> None:
    documents = [*tokens, tokens[0][:2], tokens[2][:7]]
    ids = [*IDS, 5, 6]
    alone = [
        score(memorized_in_sinks(), [document], tmp_path / str(index), open_ids=[ids[index]])[0]
        for index, document in enumerate(documents)
    ]
    monkeypatch.setattr(scores, "CHUNK", chunk)
    found = score(memorized_in_sinks(), documents, tmp_path / "all", open_ids=ids, batch_tokens=batch_tokens)
    for index, (ours, theirs) in enumerate(zip(found, alone, strict=True)):
        same(ours, theirs)
        same(found[index], theirs)
    assert len(list((tmp_path / "all").glob("*.safetensors"))) == math.ceil(len(documents) / chunk)


class Watcher(nn.Module):
    """Says in its losses how many tokens it had read, and remembers the rows it was given.

    After c tokens since the start of its row, the token one above the last (after 99: token 10) has a logit of c / 4, all
    others 0.
    """

    def __init__(self, limit: int, vocabulary: int = 100, fail_at: int = 0) -> None:
        super().__init__()
        self.config = LlamaConfig(**(CONFIG | {"vocab_size": vocabulary, "max_position_embeddings": limit}))
        self.device, self.rows, self.forwards, self.fail_at = torch.device("cpu"), [], 0, fail_at

    def forward(self, input_ids, use_cache=False) -> CausalLMOutput:
        self.forwards += 1
        if self.forwards == self.fail_at:
            raise RuntimeError("the power went out")
        self.rows += input_ids.tolist()
        count = torch.arange(1, input_ids.shape[1] + 1).float().expand(input_ids.shape)
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        following = torch.where(input_ids == 99, 10, input_ids + 1).clamp(max=self.config.vocab_size - 1)
        return CausalLMOutput(logits=logits.scatter(2, following[..., None], (count / 4)[..., None]))

    def read_before(self, one: DocumentScore) -> list[int]:
        """How many tokens stood before each predicted one, from its loss."""
        others = self.config.vocab_size - 1
        table = [c / 4 - math.log(math.exp(c / 4) + others) for c in range(1, self.config.max_position_embeddings + 1)]
        return [1 + int(np.abs(np.array(table) - x).argmin()) for x in one.logprob]


@pytest.mark.parametrize("limit", [2, 3, 8, 11])
@pytest.mark.parametrize("start", [None, np.array([99])])
def test_every_token_of_a_long_document_is_predicted_once_from_half_a_context(tmp_path, limit, start) -> None:
    limit += start is not None
    first = 0 if start is not None else 1
    lengths = [*range(first + 1, 3 * limit + 3), 61]
    model = Watcher(limit)
    documents = [np.arange(10, 10 + length) for length in lengths]
    table = score(model, documents, tmp_path, start=start, batch_tokens=40)
    assert all(len(row) <= limit for row in model.rows)
    for document, one in zip(documents, table, strict=True):
        assert one.first == first
        assert one.tokens.tolist() == document[first:].tolist()
        assert not one.rank.any()  # the prediction belongs to the token after the last one read
        before = model.read_before(one)
        for place, (index, read) in enumerate(zip(range(first, len(document)), before, strict=True)):
            own = read - (1 - first)  # tokens of the document
            if index < limit - (1 - first):
                assert own == index
            else:
                assert (limit - (1 - first)) / 2 <= own < limit, (len(document), place)
    assert (start is not None) == ({row[0] for row in model.rows} == {99})


def test_a_document_that_fits_is_read_in_one_piece(tmp_path) -> None:
    model = Watcher(8)
    score(model, [np.arange(8), np.arange(9)], tmp_path, batch_tokens=1)
    assert model.rows == [[*range(8)], [*range(8)], [*range(1, 9)]]


def test_a_start_token_stands_before_the_text_and_is_not_scored(tmp_path, tokens) -> None:
    model, document = llama(), tokens[0]
    one = score(model, [document], tmp_path, start=np.array([3]))[0]
    with torch.no_grad():
        logp = model(torch.from_numpy(np.concatenate([[3], document]))[None]).logits[0, :-1].log_softmax(-1)
    expected = logp[torch.arange(len(document)), torch.from_numpy(document)]
    np.testing.assert_allclose(one.logprob, expected, rtol=1e-4, atol=1e-5)
    assert one.first == 0
    assert one.tokens.tolist() == document.tolist()


def test_forwards_hold_no_more_tokens_than_asked(tmp_path, tokens, monkeypatch) -> None:
    class Counting(Oracle):
        sizes: tuple[int, ...] = ()

        def forward(self, input_ids, use_cache=False) -> CausalLMOutput:
            self.sizes += (input_ids.numel(),)
            return super().forward(input_ids, use_cache)

    model = Counting([])
    score(model, tokens * 3, tmp_path / "a", batch_tokens=110)
    assert max(model.sizes) <= 110
    assert len(model.sizes) < 12
    alone = Counting([])
    score(alone, tokens, tmp_path / "b", batch_tokens=1)
    assert sorted(alone.sizes) == sorted(len(document) for document in tokens)
    monkeypatch.setattr(scores, "LOGITS", 110 * VOCABULARY)
    default = Counting([])
    score(default, tokens * 3, tmp_path / "c")
    assert default.sizes == model.sizes


@pytest.mark.parametrize("known", [True, False])
def test_losses_at_both_ends(tmp_path, tokens, known) -> None:
    for one in score(Oracle(tokens if known else []), tokens, tmp_path):
        # 20 nats less the logarithm of a number next to 1 leaves about 1e-6 in float32.
        assert one.loss == pytest.approx(knows() + (0 if known else 20), rel=1e-3, abs=2e-6)
        assert (one.rank == 0).all() == known
        assert one.rank.any() != known
    even = score(Oracle([], sure=0.0), tokens, tmp_path / "even")
    assert [one.loss for one in even] == pytest.approx([math.log(VOCABULARY)] * 4)
    assert not any((one.rank == 0).any() for one in even if 0 not in one.tokens)


# On disk


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(scores, "CHUNK", 3)


DOCUMENTS = [np.arange(start, start + 6) for start in range(10)]


def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path, small_chunks) -> None:
    whole = score(Watcher(8), DOCUMENTS, tmp_path / "whole", key={"model": 1})
    broken = Watcher(8, fail_at=8)
    with pytest.raises(RuntimeError, match="power"):
        score(broken, DOCUMENTS, tmp_path / "part", key={"model": 1}, batch_tokens=1)
    assert len(list((tmp_path / "part").glob("*.safetensors"))) == 2
    assert not list((tmp_path / "part").glob("*.part"))
    again = Watcher(8)
    table = score(again, DOCUMENTS, tmp_path / "part", key={"model": 1}, batch_tokens=1)
    assert again.forwards == 4
    assert identical(table, whole)
    idle = Watcher(8)
    assert identical(score(idle, DOCUMENTS, tmp_path / "part", key={"model": 1}), whole)
    assert idle.forwards == 0


@pytest.mark.parametrize(
    "change",
    [{"key": {"model": 2}}, {"key": None}, {"documents": [*DOCUMENTS[:9], np.arange(1, 8)]}, {"documents": DOCUMENTS[:9]},
     {"documents": DOCUMENTS[::-1]}, {"start": np.array([7])}],
)  # fmt: skip
def test_a_table_of_anything_else_is_made_anew(tmp_path, small_chunks, change) -> None:
    score(Watcher(8), DOCUMENTS, tmp_path / "t", key={"model": 1})
    arguments = {"key": {"model": 1}, "start": None} | change
    documents = arguments.pop("documents", DOCUMENTS)
    model = Watcher(8)
    table = score(model, documents, tmp_path / "t", batch_tokens=1, **arguments)
    assert model.forwards == len(documents) + (arguments["start"] is not None and sum(len(x) > 7 for x in documents))
    assert identical(table, score(Watcher(8), documents, tmp_path / "fresh", start=arguments["start"]))
    assert len(list((tmp_path / "t").glob("*.safetensors"))) == math.ceil(len(documents) / 3)


def test_a_table_with_other_sinks_open_is_made_anew(tmp_path, tokens) -> None:
    a, b = (score(memorized_in_sinks(), tokens[:2], tmp_path, open_ids=ids)[0].loss for ids in (IDS[:2], [7, 8]))
    assert a != b


def test_a_damaged_file_is_said_and_can_be_deleted(tmp_path, small_chunks) -> None:
    table = score(Watcher(8), DOCUMENTS, tmp_path)
    good = list(table)
    path = tmp_path / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    for read in (lambda: list(table), lambda: table[4]):
        with pytest.raises(CheckpointError, match=r"cannot read scores from .*000001.safetensors: .*delete it"):
            read()
    same(table[2], good[2], atol=0)
    path.unlink()
    model = Watcher(8)
    again = score(model, DOCUMENTS, tmp_path, batch_tokens=1)
    assert model.forwards == 3
    for ours, theirs in zip(again, good, strict=True):
        same(ours, theirs, atol=0)


def test_a_full_disk_is_said(tmp_path, monkeypatch) -> None:
    def full(values, path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(scores, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device; the same command goes on from here"):
        score(Watcher(8), DOCUMENTS, tmp_path / "t")
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["key.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        score(Watcher(8), DOCUMENTS, tmp_path / "file" / "t")


def test_the_table_holds_no_scores_itself(tmp_path, small_chunks) -> None:
    table = score(Watcher(8), DOCUMENTS, tmp_path)
    assert not [x for x in vars(table).values() if isinstance(x, np.ndarray | list | tuple | dict)]
    documents = iter(table)
    next(documents)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert [len(next(documents).rank) for _ in range(2)] == [5, 5]  # the rest of the chunk in memory
    with pytest.raises(CheckpointError):
        next(documents)


# What cannot be scored


@pytest.mark.parametrize(
    ("wrong", "start", "part"),
    [(np.arange(1), None, "document 1 has 1 tokens; scoring needs at least 2"),
     (np.arange(0), None, "document 1 has 0 tokens"),
     (np.arange(0), np.array([5]), "document 1 has 0 tokens; scoring needs at least 1")],
)  # fmt: skip
def test_a_document_too_short_to_score_is_named(tmp_path, wrong, start, part) -> None:
    with pytest.raises(DataError) as caught:
        score(Watcher(8), [np.arange(5), wrong], tmp_path / "t", start=start)
    assert part in str(caught.value)
    assert not (tmp_path / "t").exists()
    assert len(score(Watcher(8), [np.arange(1)], tmp_path / "t", start=np.array([5]))[0].rank) == 1


def test_a_context_too_short_to_score_anything(tmp_path) -> None:
    with pytest.raises(DataError, match="a context of 2 tokens is too short"):
        score(Watcher(2), DOCUMENTS, tmp_path, start=np.array([5]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_losses_that_are_no_numbers_name_the_document(tmp_path, small_chunks, value) -> None:
    class Broken(Watcher):
        def forward(self, input_ids, use_cache=False) -> CausalLMOutput:
            out = super().forward(input_ids, use_cache)
            out.logits[input_ids == 10] = value  # the last token of document 5, after which nothing is predicted
            return out

    with pytest.raises(DataError, match="NaN or infinite losses on document 6; it cannot be audited"):
        score(Broken(8), DOCUMENTS, tmp_path)


def test_open_ids_need_sinks(tmp_path, tokens) -> None:
    with pytest.raises(ArchitectureError, match="has no sinks"):
        score(llama(), tokens, tmp_path, open_ids=IDS)


def test_the_mode_is_restored_also_after_an_error(tmp_path, tokens) -> None:
    model = llama(attention_dropout=0.5)
    for training in (True, False):
        model.train(training)
        first = score(model, tokens, tmp_path / f"{training}")
        assert model.training == training
        assert identical(first, score(model, tokens, tmp_path / f"{training} again"))
    broken = Watcher(8, fail_at=1).train()
    with pytest.raises(RuntimeError):
        score(broken, DOCUMENTS, tmp_path / "broken")
    assert broken.training
