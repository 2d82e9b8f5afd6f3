"""Loss, perplexity and bits per byte of documents, from what a language model says of each: an `evaluate` metric.

metric = evaluate.load("scripts/lib/bits_per_byte")    # a local folder: nothing is fetched
metric.compute(nll=[1730.5, 96.2], tokens=[812, 40], bytes=[2950, 131])
"""

import math

import datasets  # `evaluate` reads these imports line by line: one module on each
import evaluate

DESCRIPTION = """\
loss          mean negative log likelihood of a token, in nats
perplexity    exp(loss)
bits_per_byte what a compressor that uses the model would spend on a byte of the text; comparable across tokenizers
"""
INPUTS = """\
nll     negative log likelihood of each document: the sum over its tokens, in nats
tokens  number of tokens in each document
bytes   number of bytes of each document in UTF-8
"""


class BitsPerByte(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "nll": datasets.Value("float64"),
                    "tokens": datasets.Value("int64"),
                    "bytes": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, nll: list[float], tokens: list[int], bytes: list[int]) -> dict[str, float]:
        total = math.fsum(nll)
        loss = total / sum(tokens)
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,  # exp(710) is beyond a float
            "bits_per_byte": total / math.log(2) / sum(bytes),
        }
