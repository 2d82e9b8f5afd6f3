import re

import pytest
import torch
from lib.study import recall

IGNORED = recall.IGNORED


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_mqar_asks_each_key_once_for_the_value_that_followed_it():
    tokens, labels = recall.mqar(50, 64, generator(), pairs=8, vocabulary=100)
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        values = dict(zip(row[:16:2], row[1:16:2], strict=True))
        asked = [t for t, label in enumerate(wanted) if label != IGNORED]
        assert len(values) == 8 and max(values) < 50 <= min(values.values()) and 0 not in row
        assert sorted(row[t - 1] for t in asked) == sorted(values) and min(asked) > 16
        assert [wanted[t] for t in asked] == [values[row[t - 1]] for t in asked]


def test_mqar_asks_early_rather_than_late():
    _, labels = recall.mqar(400, 256, generator(), pairs=4, vocabulary=100)
    places = (labels != IGNORED).nonzero()[:, 1].float()
    assert places.median() < 100


@pytest.mark.parametrize(("length", "vocabulary"), [(31, 100), (64, 16)])
def test_mqar_without_room_is_refused(length, vocabulary):
    with pytest.raises(ValueError, match="8 pairs need a length of 32 and a vocabulary above 16"):
        recall.mqar(1, length, generator(), pairs=8, vocabulary=vocabulary)


def test_induction_asks_what_followed_the_special_token():
    tokens, labels = recall.induction(50, 32, generator(), vocabulary=16)
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        first, second = (t for t, token in enumerate(row[:-1]) if token == 15)
        assert second == 30 and wanted == [IGNORED] * 31 + [row[first + 1]]


def test_selective_copy_asks_the_scattered_tokens_in_their_order():
    tokens, labels = recall.selective_copy(50, 32, generator(), vocabulary=10, copied=4)
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert row[27:] == [9] * 5 and row[:27].count(8) == 23
        assert wanted == [IGNORED] * 28 + [token for token in row[:27] if token < 8]


def test_needle_asks_the_number_that_the_text_holds():
    text = torch.tensor(list(b"some text " * 100), dtype=torch.uint8)
    tokens, labels = recall.needle(20, 128, generator(), text=text)
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        whole = bytes(row)
        number = whole[-4:]
        assert whole.count(b"The secret number is " + number) == 2 and bytes(wanted[-4:]) == number
        assert wanted[:-4] == [IGNORED] * 124
        assert whole.replace(b"\nThe secret number is %s.\n" % number, b"")[:60] in b"some text " * 100


def test_a_needle_among_others_asks_for_one_persons_number():
    text = torch.tensor(list(b"some text " * 100), dtype=torch.uint8)
    tokens, labels = recall.needle(40, 256, generator(), text=text, distractors=3)
    asked_for = []
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        whole = bytes(row)
        told = re.findall(rb"\nThe secret number of (\w+) is (\d{4})\.\n", whole)
        name, number = re.search(rb"\nThe secret number of (\w+) is (\d{4})$", whole).groups()
        assert len(dict(told)) == 4 and dict(told)[name] == number == bytes(wanted[-4:])
        assert wanted[:-4] == [IGNORED] * 252
        hay = re.sub(rb"\nThe secret number of \w+ is \d{4}(\.\n|$)", b"", whole)
        assert hay in b"some text " * 100
        asked_for.append([person for person, _ in told].index(name))
    assert set(asked_for) == {0, 1, 2, 3}  # it may be the first, the last or one between


@pytest.mark.parametrize(
    ("length", "distractors", "message"),
    [(200, 16, "distractors=16 must be from 0 to 15"), (160, 3, "3 distractors need more than the 160 bytes")],
)
def test_needles_without_room_are_refused(length, distractors, message):
    with pytest.raises(ValueError, match=message):
        recall.needle(9, length, generator(), text=torch.zeros(500, dtype=torch.uint8), distractors=distractors)


def test_text_blocks_are_of_the_text():
    text = torch.arange(200, dtype=torch.uint8)
    tokens, labels = recall.text_blocks(30, 20, generator(), text=text)
    assert torch.equal(tokens, labels) and (tokens.diff() == 1).all() and tokens[:, 0].unique().numel() > 10


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("mqar", {"pairs": 2, "vocabulary": 32}),
        ("induction", {"vocabulary": 16}),
        ("selective_copy", {"vocabulary": 16, "copied": 3}),
    ],
)
def test_the_generator_alone_decides(task, options):
    make = getattr(recall, task)
    rows = [make(5, 16, generator(seed), **options)[0] for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
