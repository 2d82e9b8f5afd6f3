"""Tasks that ask what a model remembers, made of random tokens or of text with something hidden in it.

Each gives rows of `length` tokens and their labels, −100 where nothing is asked; as everywhere in Transformers, the label
at position t is to be predicted from the tokens before t. What is made depends on the generator alone.
"""

import torch
from torch import Tensor

IGNORED = -100


def mqar(count: int, length: int, generator: torch.Generator, *, pairs: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall as in Zoology (arXiv 2312.04927): `pairs` keys, each with its value, then every key
    once more somewhere in the rest, early rather than late, where its value is asked; random tokens in between.

    Raises:
        ValueError: the length has no room for the pairs and their queries, or the vocabulary not enough keys.
    """
    places = (length - 2 * pairs) // 2
    if places < pairs or vocabulary // 2 <= pairs:
        raise ValueError(f"{pairs} pairs need a length of {4 * pairs} and a vocabulary above {2 * pairs}")
    half = vocabulary // 2
    keys = _distinct(count, pairs, half - 1, generator) + 1  # 0 is nobody's
    values = _distinct(count, pairs, half, generator) + half
    power = 0.01  # of the power law of the distances
    likely = torch.arange(1, places + 1, dtype=torch.float64) ** (power - 1)
    gaps = torch.multinomial(likely.expand(count, -1), pairs, generator=generator)
    tokens = torch.randint(1, vocabulary, (count, length), generator=generator)
    labels = torch.full_like(tokens, IGNORED)
    tokens[:, : 2 * pairs] = torch.stack([keys, values], 2).flatten(1)
    tokens.scatter_(1, 2 * pairs + 2 * gaps, keys)
    labels.scatter_(1, 2 * pairs + 2 * gaps + 1, values)
    return tokens, labels


def induction(count: int, length: int, generator: torch.Generator, *, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Induction heads as in Mamba (arXiv 2312.00752): a special token comes once, and again at the end, where the token
    that had followed it is asked."""
    special = vocabulary - 1
    tokens = torch.randint(special, (count, length), generator=generator)
    place = torch.randint(length - 4, (count, 1), generator=generator)
    answer = tokens.gather(1, place + 1)
    tokens.scatter_(1, place, special)
    tokens[:, -2] = special
    labels = torch.full_like(tokens, IGNORED)
    labels[:, -1:] = answer
    return tokens, labels


def selective_copy(
    count: int, length: int, generator: torch.Generator, *, vocabulary: int, copied: int
) -> tuple[Tensor, Tensor]:
    """Selective copying as in Mamba (arXiv 2312.00752): `copied` tokens are scattered in noise; at the end they are asked in
    their order."""
    noise, marker = vocabulary - 2, vocabulary - 1
    tokens = torch.full((count, length), noise)
    room = length - copied - 1
    places = _distinct(count, copied, room, generator).sort(1).values
    data = torch.randint(vocabulary - 2, (count, copied), generator=generator)
    tokens.scatter_(1, places, data)
    tokens[:, room:] = marker
    labels = torch.full_like(tokens, IGNORED)
    labels[:, room + 1 :] = data
    return tokens, labels


QUESTION, DIGITS = b"\nThe secret number%s is ", 4
NAMES = b"Ada Ben Cleo Dora Emil Finn Gwen Hugo Ines Jack Kira Leon Mira Noah Olga Paul".split()  # no initial twice


def needle(
    count: int, length: int, generator: torch.Generator, *, text: Tensor, distractors: int = 0
) -> tuple[Tensor, Tensor]:
    """A sentence with a number of four digits, somewhere in `length` bytes of text; at the end the number is asked. With
    `distractors`, the number is a person's, and as many sentences in the text tell those of others.

    Raises:
        ValueError: there are not enough names, or the length has no room for the sentences.
    """
    if not 0 <= distractors < len(NAMES):
        raise ValueError(f"distractors={distractors} must be from 0 to {len(NAMES) - 1}, for whom there are names")
    rows, labels = [], []
    for _ in range(count):
        numbers = [b"%04d" % int(torch.randint(10**DIGITS, (), generator=generator)) for _ in range(1 + distractors)]
        names = [b""]
        if distractors:
            chosen = torch.randperm(len(NAMES), generator=generator)[: 1 + distractors]
            names = [b" of " + NAMES[i] for i in chosen.tolist()]
        hidden = [QUESTION % name + number + b".\n" for name, number in zip(names, numbers, strict=True)]
        end = QUESTION % names[0] + numbers[0]
        room = length - sum(map(len, hidden)) - len(end)
        if room < 1:
            raise ValueError(f"a needle and {distractors} distractors need more than the {length} bytes of the row")
        start = int(torch.randint(len(text) - room, (), generator=generator))
        depths = torch.randint(room, (1 + distractors,), generator=generator).tolist()
        hay, pieces, done = text[start : start + room].long(), [], 0
        for depth, sentence in sorted(zip(depths, hidden, strict=True)):
            pieces += [hay[done:depth], torch.tensor(list(sentence))]
            done = depth
        rows.append(torch.cat([*pieces, hay[done:], torch.tensor(list(end))]))
        labels.append(torch.full((length,), IGNORED))
        labels[-1][-DIGITS:] = rows[-1][-DIGITS:]
    return torch.stack(rows), torch.stack(labels)


def text_blocks(count: int, length: int, generator: torch.Generator, *, text: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of a text of bytes, from anywhere; every byte is asked."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    tokens = text[starts + torch.arange(length)].long()
    return tokens, tokens.clone()


def _distinct(count: int, picked: int, among: int, generator: torch.Generator) -> Tensor:
    """[count,picked] numbers below `among`, no two in a row alike."""
    return torch.rand(count, among, generator=generator).argsort(1)[:, :picked]
